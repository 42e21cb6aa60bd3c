"""The microscope for any model whose logits are W phi: what moved them, W or the body, for an update of any size.

ntk.logit_change needs the toy's own GPT and an update small enough for first order. Here any features will do.
"""

import torch
from torch import Tensor

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


@torch.no_grad()
def check_linear(model, run) -> None:
    """ValueError unless the logits of a language model of transformers are W phi and nothing more, whatever their size.

    `run()` passes some tokens through `model` and returns the last hidden states, phi, and the logits. One pass tells,
    looked at where it meets W: is it phi that enters, does W phi leave, and is nothing done afterwards? To see that,
    numbers of all sizes are put in the place of W phi: a soft cap changes only the large ones, which training brings.
    """
    head, met = model.get_output_embeddings(), []

    def meet(head, inputs, output):
        wide = torch.promote_types(output.dtype, torch.float32)
        x, W, y = (each.detach().to(wide) for each in (inputs[0], head.weight, output))
        eps = max(torch.finfo(each.dtype).eps for each in (inputs[0], head.weight, output))
        # Rounding, with 576 features: up to 1.2 eps of |x| |W|^T in float32, .2 in bfloat16, .4 under autocast.
        linear = ((y - x @ W.T).abs() <= 10 * eps * (x.abs() @ W.abs().T)).all().item()
        instead = torch.linspace(-1e4, 1e4, output.numel(), device=output.device).view_as(output).to(output.dtype)
        met.append((inputs[0], linear, instead))
        return instead

    hook = head.register_forward_hook(meet)
    try:
        phi, logits = run()
    finally:
        hook.remove()
    entered, linear, instead = met[-1] if met else (phi, False, logits)
    if getattr(head, "bias", None) is not None:
        fault = "the classifier has a bias"
    elif not linear:
        fault = "the classifier does not multiply by W alone"
    elif entered.shape != phi.shape or not torch.equal(entered.to(phi.dtype), phi):
        fault = f"what enters the classifier is not the last hidden state, of shape {tuple(phi.shape)}"
    elif not torch.equal(instead.to(logits.dtype), logits):
        fault = "what leaves the classifier is changed, as by a scale or a soft cap"
    else:
        return
    raise ValueError(f"the logits of {type(model).__name__} are not W phi: {fault}")
