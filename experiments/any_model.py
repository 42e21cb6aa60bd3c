"""The microscope for any model whose logits are W phi: what moved them, W or the body, for an update of any size.

ntk.logit_change needs the toy's own GPT and an update small enough for first order. Here any features will do.
"""

import torch
from torch import Tensor
from torch.func import jvp
from torch.nn.attention import SDPBackend, sdpa_kernel

from model import confidence, entropy


def exact_split(phi0: Tensor, W0: Tensor, phi1: Tensor, W1: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The change of f = W phi from policy 0 to policy 1 in three parts, exactly: through W, through the body, and both.

        f_1 - f_0 = dW phi_0 + W_0 dphi + dW dphi

    The first two are those of (E8) up to the second order of phi in theta. Features (N, d), classifiers (V, d): three
    times (N, V), in float32 at least, for bfloat16 is widened before it is subtracted. Our derivation. ValueError for
    shapes that disagree.
    """
    if phi0.ndim != 2 or phi0.shape != phi1.shape or W0.shape != W1.shape or W0.shape[1:] != phi0.shape[1:]:
        shapes = ", ".join(str(tuple(x.shape)) for x in (phi0, W0, phi1, W1))
        raise ValueError(f"features must be (N, d) and classifiers (V, d), before and after alike, not {shapes}")
    phi0, W0, phi1, W1 = (x.to(torch.promote_types(x.dtype, torch.float32)) for x in (phi0, W0, phi1, W1))
    dphi, dW = phi1 - phi0, W1 - W0
    return phi0 @ dW.T, dphi @ W0.T, dphi @ dW.T


def split_effect(logits: Tensor, through_W: Tensor, through_body: Tensor, cross: Tensor) -> dict[str, float]:
    """What a change of the logits (N, V) does to entropy (nats) and confidence (top-1), as means over the N states.

    NAME_change as measured; NAME_by_W and NAME_by_body, what that part alone would do, exactly; NAME_residual, the
    rest, which is due to both together.
    """
    row, moved = {}, {"change": through_W + through_body + cross, "by_W": through_W, "by_body": through_body}
    for name, measure in (("entropy", entropy), ("confidence", confidence)):
        effect = {part: (measure(logits + df) - measure(logits)).mean().item() for part, df in moved.items()}
        row |= {f"{name}_{part}": value for part, value in effect.items()}
        row[f"{name}_residual"] = effect["change"] - effect["by_W"] - effect["by_body"]
    return row


def feature_change(features, before: dict[str, Tensor], after: dict[str, Tensor]) -> tuple[Tensor, float]:
    """How features move when the body goes from parameters `before` to `after`: (N, d), and its relative error.

    `features` maps parameters to phi (N, d). Of two ways the one that errs less for an update of this share of the
    weights' norm: the difference of two passes, whose rounding is about eps / 2 over the share; or the forward-mode
    derivative at `after`, which leaves out what is beyond first order, about 10 times the share (both measured on four
    architectures, see results.md). Fused attention has no such derivative on CPU, so the plain one is chosen for it.
    """
    update = {name: after[name] - before[name] for name in before}
    moved, there = (torch.stack([x.float().norm() for x in each.values()]).norm() for each in (update, before))
    share, eps = (moved / there).item(), max(torch.finfo(x.dtype).eps for x in before.values())
    if not share or eps / 2 / share < 10 * share:
        return features(after) - features(before), eps / 2 / share if share else 0.0
    with sdpa_kernel(SDPBackend.MATH):
        return jvp(features, (after,), (update,))[1], 10 * share + 4 * eps
