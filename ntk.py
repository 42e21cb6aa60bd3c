"""One RL step through the neural tangent kernel (NTK): how a step on some states moves the logits of others.

A policy-gradient step of size eta on states x_i with tokens y_i and advantages A_i changes the logits at a state x by

    df(x) = eta sum_i A_i K(x, x_i) (e_{y_i} - pi_i) + O(eta^2),    K = R + G                                 (E7)
    R(x, x') = <phi(x), phi(x')> I_V          the representation component: what moving W does
    G(x, x') = W J(x) J(x')^T W^T             the gradient component: what moving the body does, J = d phi / d theta

Read the paper's two names as "through W" (R) and "through the body" (G). Below we use both pairs of names.

The kernel: `empirical_ntk` is fast, and the appendix fast_ntk.py says how; `gradient_by_definition` is G as it is
written here, in a few lines, and slow. Of any update, Adam's too, `logit_change` (to first order) and `exact_split`
(exactly) say what its change of W does to the logits, and what its change of the body does, without a kernel (E8).
`entropy_change`, `confidence_change` (to first order) and `split_effect` (exactly) say what that does to entropy and
confidence (E9). `influence` says who teaches whom (E10).

Source: Tomihari, arXiv 2601.04670, re-derived. Left out on purpose: kernels in expectation or at infinite width,
low-rank approximations, devices.

Letters: B rows of tokens, T tokens of a row, V vocabulary, d features. A state is a position in a row that a mask
selects, together with the tokens up to it; N and M are numbers of states. Of each state, U outputs are differentiated.
R and G are the two parts of the kernel, W is the classifier.
"""

import warnings
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.func import jacrev, jvp

from fast_ntk import UnknownBody, body_function, gradient_products
from model import check, check_counts, check_policy, confidence, entropy, residuals


@dataclass(frozen=True)
class NTK:
    """The kernel between N states and M states, as its two components  (E7)."""

    representation: Tensor  # (N, M): <phi, phi'>, the coefficient of I_V
    gradient: Tensor  # (N, V, M, V)

    def full(self) -> Tensor:
        """K = R + G, (N, V, M, V); .reshape(N*V, M*V) makes it the kernel matrix."""
        identity = torch.eye(self.gradient.size(1), dtype=self.gradient.dtype)
        return torch.einsum("nm,vw->nvmw", self.representation, identity) + self.gradient  # (E7)


def _check_states(model, tokens, mask):
    """The policy, unwrapped. ValueError unless its kernel can be computed and `mask` selects states of `tokens`."""
    inference = tokens.is_inference() or torch.is_inference_mode_enabled()
    check(not inference, "nothing can be differentiated in torch.inference_mode: use torch.no_grad")
    model = check_policy(model, tokens)
    fits = mask.shape == tokens.shape and mask.dtype == torch.bool
    check(fits, f"mask {tuple(mask.shape)} {mask.dtype} does not fit tokens {tuple(tokens.shape)}")
    check(mask.any(), "mask selects no state")
    W = model.classifier.weight
    exact = W.dtype in (torch.float32, torch.float64) and not torch.is_autocast_enabled(W.device.type)
    check(exact, f"the kernel needs float32 or float64 without torch.autocast, and the model is in {W.dtype}")
    return model


def gradient_by_definition(model: nn.Module, tokens: Tensor, mask: Tensor, tokens2: Tensor, mask2: Tensor) -> Tensor:
    """G as it is defined (E7), (N, V, M, V): two Jacobians of the logits in every parameter of the body, contracted.

    It holds (N + M) V numbers for every parameter of the body, and adds N V M V products for each.
    """
    (features, theta), W = body_function(model.body), model.classifier.weight.detach()

    def jacobian(tokens, mask):  # {name: (N, V, *the parameter's shape)}
        return jacrev(lambda theta: features(theta, tokens)[mask] @ W.T)(theta)

    J, J2 = jacobian(tokens, mask), jacobian(tokens2, mask2)
    return sum(torch.einsum("nvp,mwp->nvmw", J[name].flatten(2), J2[name].flatten(2)) for name in J)


def empirical_ntk(model: nn.Module, tokens: Tensor, mask: Tensor, tokens2=None, mask2=None, block: int = 64) -> NTK:
    """The exact NTK (E7) between the N states that `mask` selects of `tokens`, both (B, T), and M others or themselves.

    The states come in row-major order, and one row may have several. The dtype is the model's, float32 or float64. A
    frozen body has the same kernel as a free one, and the model is left as it was. The states are processed in blocks
    of `block`: a smaller block needs less memory.

    Raises ValueError for bad tokens or masks, for a classifier that is tied, biased or no nn.Linear, and for a body
    that is random, because of dropout for example. If the body is not all linear layers, embeddings and norms, G is
    computed by its definition, with a warning.
    """
    check_counts(block=block)
    check((tokens2 is None) == (mask2 is None), "tokens2 and mask2 go together: one of them is missing")
    sides = [(tokens, mask)] if tokens2 is None else [(tokens, mask), (tokens2, mask2)]
    for side in sides:
        model = _check_states(model, *side)
    phi = [model.features(tokens)[mask].detach() for tokens, mask in sides]  # (N, d) and, of two sides, (M, d)
    W = model.classifier.weight.detach()
    # We differentiate U numbers C phi per state: the logits, or the features themselves if those are fewer.
    C = W if len(W) <= W.size(1) else torch.eye(W.size(1), dtype=W.dtype)  # (U, d)
    states = [(*side, C.expand(len(features), *C.shape)) for side, features in zip(sides, phi, strict=True)]
    try:
        gradient = gradient_products(model.body, block, *states)  # (N, U, M, U)
        if C is not W:
            gradient = torch.einsum("va,namb,wb->nvmw", W, gradient, W)  # (N, V, M, V)
    except UnknownBody as reason:
        warnings.warn(f"{reason}: G comes from its definition, slowly", stacklevel=2)
        gradient = gradient_by_definition(model, *sides[0], *sides[-1])
    return NTK(phi[0] @ phi[-1].T, gradient)  # (E7)


# ------------------------------------------------------------------------------------------------- what an update does


def logit_change(model: nn.Module, tokens: Tensor, mask: Tensor, update: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
    """The first-order change of the logits under any update of the parameters, as its two parts, (N, V) each:

        df = dW phi + W dphi + O(|update|^2)                                                       (E8)

    The first is the representation part, what the change of W does. The second is the gradient part, what the change of
    the body does. For a plain gradient step they are R's and G's terms of (E7). No kernel is needed, because one
    forward-mode derivative of the features gives phi and dphi. So it works for Adam, clipping or weight decay as well.
    Our derivation.

    `update` maps names of parameters to their changes, new - old. A parameter that it does not name does not change.
    Raises ValueError for an unknown name or a wrong shape, and for whatever `empirical_ntk` refuses.
    """
    model = _check_states(model, tokens, mask)
    parameters = {name: parameter.detach() for name, parameter in model.named_parameters()}
    for name, change in update.items():
        check(name in parameters, f"update names {name!r}, which is no parameter of the model")
        wanted, got = (f"{tuple(x.shape)} {x.dtype}" for x in (parameters[name], change))
        check(got == wanted, f"update of {name} must be {wanted}, not {got}")
    changes = {name: update.get(name, torch.zeros_like(old)).detach() for name, old in parameters.items()}
    features, theta = body_function(model.body)
    dtheta = {name: changes[f"body.{name}"] for name in theta}
    phi, dphi = jvp(lambda theta: features(theta, tokens)[mask], (theta,), (dtheta,))  # (N, d) each
    return phi @ changes["classifier.weight"].T, dphi @ parameters["classifier.weight"].T  # (E8)


def _check_change(logits, dlogits):
    right = logits.ndim == 2 and logits.shape == dlogits.shape
    check(right, f"logits and dlogits must both be (N, V), not {(*logits.shape,)} and {(*dlogits.shape,)}")


def entropy_change(logits: Tensor, dlogits: Tensor) -> Tensor:
    """First-order change of the entropy, in nats, when finite logits change by dlogits, (N, V) both -> (N,)  (E9).

    dH = -sum_a pi_a (log pi_a + H) df_a = -Cov_{a~pi}(log pi_a, df_a): the entropy falls when the likely tokens' logits
    rise. Our derivation; it is also in Cui et al., arXiv 2505.22617. Raises ValueError for shapes that disagree.

    >>> logits = torch.tensor([[1.0, 0.0]])
    >>> bool(entropy_change(logits, logits) < 0), entropy_change(logits, torch.ones(1, 2)).abs().item() < 1e-6
    (True, True)
    """
    _check_change(logits, dlogits)
    logp = logits.log_softmax(dim=1)  # (N, V)
    pi = logp.exp()
    return -(pi * (logp - (pi * logp).sum(dim=1, keepdim=True)) * dlogits).sum(dim=1)  # (E9)


def confidence_change(logits: Tensor, dlogits: Tensor) -> Tensor:
    """First-order change of the top-1 probability when logits change by dlogits, (N, V) both -> (N,)  (E9).

    d pi_m = pi_m (df_m - E_pi df), where m is the likeliest token before the change. Our derivation. Raises ValueError
    for shapes that disagree.
    """
    _check_change(logits, dlogits)
    pi = logits.softmax(dim=1)  # (N, V)
    top, m = pi.max(dim=1)  # (N,)
    return top * (dlogits[torch.arange(len(m)), m] - (pi * dlogits).sum(dim=1))  # (E9)


def exact_split(phi0: Tensor, W0: Tensor, phi1: Tensor, W1: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The change of f = W phi from policy 0 to policy 1 in three parts, exactly: through W, through the body, and both.

        f_1 - f_0 = dW phi_0 + W_0 dphi + dW dphi                                                  (E8, for any update)

    The features phi are (N, d), the classifiers W are (V, d), and each part is (N, V). The first two parts are those of
    `logit_change`, except that dphi is not a first-order approximation. bfloat16 is converted to float32 before it is
    subtracted, because it has too few digits. Our derivation. Raises ValueError for shapes that disagree.
    """
    shapes = ", ".join(str(tuple(x.shape)) for x in (phi0, W0, phi1, W1))
    right = phi0.ndim == 2 and phi0.shape == phi1.shape and W0.shape == W1.shape and W0.shape[1:] == phi0.shape[1:]
    check(right, f"features must be (N, d) and classifiers (V, d), before and after alike, not {shapes}")
    phi0, W0, phi1, W1 = (x.to(torch.promote_types(x.dtype, torch.float32)) for x in (phi0, W0, phi1, W1))
    dphi, dW = phi1 - phi0, W1 - W0
    return phi0 @ dW.T, dphi @ W0.T, dphi @ dW.T


def split_effect(logits: Tensor, through_W: Tensor, through_body: Tensor, cross: Tensor) -> dict[str, float]:
    """What a change of the logits (N, V) does to entropy (nats) and confidence (top-1), as means over the N states.

    For each of the two, NAME_change is the whole effect. NAME_by_W and NAME_by_body are what that part alone would do,
    exactly. NAME_residual is the rest: what the two parts do only together.
    """
    row, moved = {}, {"change": through_W + through_body + cross, "by_W": through_W, "by_body": through_body}
    for name, measure in (("entropy", entropy), ("confidence", confidence)):
        effect = {part: (measure(logits + df) - measure(logits)).mean().item() for part, df in moved.items()}
        row |= {f"{name}_{part}": value for part, value in effect.items()}
        row[f"{name}_residual"] = effect["change"] - effect["by_W"] - effect["by_body"]
    return row


# ---------------------------------------------------------------------------------------------------- who teaches whom


def influence(model: nn.Module, tokens: Tensor, mask: Tensor, advantages: Tensor, block=256) -> tuple[Tensor, Tensor]:
    """Who teaches whom: what sampled token i does to log pi of sampled token j, as R's and G's part, (N, N) each,

        A_i r_j^T K(x_j, x_i) r_i,    r = e_y - pi,                                                 (E10)

    to first order and per unit of the step size. `mask` (B, T) selects the N states from which the tokens were sampled,
    so a state's token is the next one in its row. `advantages` (B,) has one number per row. The sum over i is what one
    gradient step on sum_i A_i log pi_i adds to log pi_j, to first order (E7). Our derivation.

    R's part is A_i <phi_i, phi_j> <r_i, r_j>. G's part is A_i times the inner product of the gradients of log pi_i and
    log pi_j in the body. So one number per state is differentiated, log pi of its token, and no V x V block of the
    kernel is needed. The states are processed in blocks of `block`: a smaller block needs less memory.

    Raises ValueError as `empirical_ntk` does, for a state that no token follows, and where `empirical_ntk` would use
    the definition.
    """
    check_counts(block=block)
    model = _check_states(model, tokens, mask)
    check(not mask[:, -1].any(), "mask selects the last position, which no token follows")
    check(advantages.shape == mask.shape[:1], f"advantages {(*advantages.shape,)} do not fit tokens {(*tokens.shape,)}")
    row, t = mask.nonzero(as_tuple=True)  # (N,) each
    W = model.classifier.weight.detach()
    phi = model.features(tokens)[mask].detach()  # (N, d)
    r = residuals(phi @ W.T, tokens[row, t + 1])  # (N, V)
    A = advantages[row, None]  # (N, 1)
    C = (r @ W)[:, None]  # (N, 1, d): d log pi = r^T W d phi, so U = 1 output is enough
    products = gradient_products(model.body, block, (tokens, mask, C))  # (N, 1, N, 1)
    return A * (phi @ phi.T) * (r @ r.T), A * products[:, 0, :, 0]  # (E10)
