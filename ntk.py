"""One RL step through the neural tangent kernel (NTK): how a step on some states moves the logits of others.

A policy-gradient step of size eta on states x_i with tokens y_i and advantages A_i changes the logits at a state x by

    df(x) = eta sum_i A_i K(x, x_i) (e_{y_i} - pi_i) + O(eta^2),    K = R + G                                 (E7)
    R(x, x') = <phi(x), phi(x')> I_V          the representation component: what moving W does
    G(x, x') = W J(x) J(x')^T W^T             the gradient component: what moving the body does, J = d phi / d theta

`empirical_ntk` computes R and G exactly, `gradient_by_definition` does it in four lines that are slow. For an update
other than a plain gradient step, Adam's for one, no kernel is needed: `logit_change` splits any update into the same
two parts (E8), and `entropy_change` and `confidence_change` turn a change of logits into one of confidence (E9).
`influence` is what the kernel does to the sampled tokens: who teaches whom (E10). How the exact kernel becomes fast is
the last part of this file, and nothing else needs it.
Source: Tomihari, arXiv 2601.04670, re-derived. Left out on purpose: kernels in expectation or at infinite width,
low-rank approximations, devices.

Shapes: N, M states, V vocabulary, d features. A state is a (row, position) of tokens that a mask selects.
"""

import warnings
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call, jacrev, jvp

from model import GPT, check_counts, check_tokens, confidence, entropy, residuals


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
    """Raise ValueError unless `mask` selects states of `tokens` and the logits are W phi, W no part of the body, and
    phi the same at every call."""
    check_tokens(model, tokens)
    if mask.shape != tokens.shape or mask.dtype != torch.bool:
        raise ValueError(f"mask {tuple(mask.shape)} {mask.dtype} does not fit tokens {tuple(tokens.shape)}")
    if not mask.any():
        raise ValueError("mask selects no state")
    if tokens.is_inference() or torch.is_inference_mode_enabled():
        raise ValueError("nothing can be differentiated in torch.inference_mode: use torch.no_grad")
    if type(model.classifier) is not nn.Linear or model.classifier.bias is not None:
        raise ValueError(f"the classifier must be nn.Linear with bias=False, else K is not R + G: {model.classifier}")
    W = model.classifier.weight
    if W.dtype not in (torch.float32, torch.float64):
        raise ValueError(f"the kernel needs a model in float32 or float64, not {W.dtype}")
    if torch.is_autocast_enabled(W.device.type):
        raise ValueError("torch.autocast rounds what is computed here to half precision: leave it first")
    for name, parameter in model.body.named_parameters():
        if parameter.untyped_storage().data_ptr() == W.untyped_storage().data_ptr():
            raise ValueError(f"the classifier is tied to body.{name}, so K is not R + G: untie them")
    with torch.no_grad():  # one row is enough to see a random layer, and cheap
        if not torch.allclose(model.features(tokens[:1]), model.features(tokens[:1]), equal_nan=True):
            raise ValueError("two passes of the body differ, for dropout or other noise: call model.eval() first")


def _body_function(body):
    """The body as a function, ({name: parameter}, tokens (B, T)) -> features (B, T, d), and its parameters."""
    names = {parameter: name for name, parameter in body.named_parameters()}
    places = {  # a parameter may have several; left to itself, functional_call breaks a module that is registered twice
        place: names[parameter]
        for path, module in body.named_modules()
        for place, parameter in module.named_parameters(path, recurse=False, remove_duplicate=False)
    }

    def features(theta, tokens):
        here = {place: theta[name] for place, name in places.items()}
        return functional_call(body, here, (tokens,), tie_weights=False)

    return features, {name: parameter.detach() for name, parameter in body.named_parameters()}


def gradient_by_definition(model: GPT, tokens: Tensor, mask: Tensor, tokens2: Tensor, mask2: Tensor) -> Tensor:
    """G as it is defined (E7), (N, V, M, V): two Jacobians of the logits in every parameter of the body, contracted.

    With P parameters that is (N + M) V P numbers to hold and N V M V P products to add.
    """
    (features, theta), W = _body_function(model.body), model.classifier.weight.detach()

    def jacobian(tokens, mask):  # {name: (N, V, *the parameter's shape)}
        return jacrev(lambda theta: features(theta, tokens)[mask] @ W.T)(theta)

    J, J2 = jacobian(tokens, mask), jacobian(tokens2, mask2)
    return sum(torch.einsum("nvp,mwp->nvmw", J[name].flatten(2), J2[name].flatten(2)) for name in J)


def empirical_ntk(
    model: GPT,
    tokens: Tensor,
    mask: Tensor,
    tokens2: Tensor | None = None,
    mask2: Tensor | None = None,
    block: int = 64,
) -> NTK:
    """The exact NTK (E7) between the N states that `mask` selects of `tokens`, both (B, T), and M others or themselves.

    States come in row-major order, several of one row if wanted. A frozen body has the same kernel as a free one, and
    the model is left as it was. float32 or float64, as the model is. `block` states are looked at together: fewer need
    less memory.

    Raises ValueError for bad tokens or masks, for a classifier that is tied, biased or no nn.Linear, and for a body
    that is random, as with dropout. If the body is not all linear layers, embeddings and norms, G comes from its
    definition, with a warning.
    """
    check_counts(block=block)
    if (tokens2 is None) != (mask2 is None):
        raise ValueError("tokens2 and mask2 go together: one of them is missing")
    symmetric = tokens2 is None
    if symmetric:
        tokens2, mask2 = tokens, mask
    for some_tokens, some_mask in ((tokens, mask), (tokens2, mask2)):
        _check_states(model, some_tokens, some_mask)
    with torch.no_grad():
        representation = model.features(tokens)[mask] @ model.features(tokens2)[mask2].T  # (N, M)  (E7)
    W = model.classifier.weight.detach()
    V, d = W.shape
    C = W if V <= d else torch.eye(d, dtype=W.dtype)  # (U, d): G = W J J'^T W^T, by way of J J'^T if that is smaller
    states = tokens, mask, C.expand(len(representation), -1, -1)
    states2 = None if symmetric else (tokens2, mask2, C.expand(representation.size(1), -1, -1))
    try:
        gradient = _gradient_products(model.body, states, states2, block)  # (N, U, M, U)
    except UnknownLayer as unknown:
        warnings.warn(f"{unknown}: G comes from its definition, slowly", stacklevel=2)
        gradient = gradient_by_definition(model, tokens, mask, tokens2, mask2)
    else:
        if V > d:
            gradient = torch.einsum("va,namb,wb->nvmw", W, gradient, W)
    return NTK(representation, gradient)


# ------------------------------------------------------------------------------------------------- what an update does


def logit_change(model: GPT, tokens: Tensor, mask: Tensor, update: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
    """The first-order change of the logits under any update of the parameters, as its two parts, (N, V) each:

        df = dW phi + W dphi + O(|update|^2)                                                       (E8)

    the representation part, what the change of W does, and the gradient part, what the change of the body does. For a
    plain gradient step they are R's and G's terms of (E7), but no kernel is needed: one forward-mode derivative of the
    features gives phi and dphi, so Adam, clipping or weight decay are split as easily. Our derivation.

    `update` maps parameter names to the changes, new - old; what it leaves out does not move. ValueError for an unknown
    name or a wrong shape, and whatever `empirical_ntk` refuses.
    """
    _check_states(model, tokens, mask)
    parameters = {name: parameter.detach() for name, parameter in model.named_parameters()}
    for name, change in update.items():
        if name not in parameters:
            raise ValueError(f"update names {name!r}, which is no parameter of the model")
        if change.shape != parameters[name].shape or change.dtype != parameters[name].dtype:
            raise ValueError(
                f"update of {name} must be {tuple(parameters[name].shape)} {parameters[name].dtype}, "
                f"not {tuple(change.shape)} {change.dtype}"
            )
    changes = {name: change.detach() for name, change in update.items()}
    features, theta = _body_function(model.body)
    dtheta = {name: changes.get(f"body.{name}", torch.zeros_like(parameter)) for name, parameter in theta.items()}
    phi, dphi = jvp(lambda theta: features(theta, tokens)[mask], (theta,), (dtheta,))  # (N, d) each
    W = parameters["classifier.weight"]
    return phi @ changes.get("classifier.weight", torch.zeros_like(W)).T, dphi @ W.T  # (E8)


def agreement(R: Tensor, G: Tensor) -> Tensor:
    """How far the representation part of (E8) alone points where the whole change does: (N, V) both -> (N,) cosines.

    Less their means over the vocabulary, which no probability sees.
    """
    R, both = (part - part.mean(dim=1, keepdim=True) for part in (R, R + G))
    return F.cosine_similarity(R, both, dim=1)


def _check_change(logits, dlogits):
    if logits.ndim != 2 or logits.shape != dlogits.shape:
        raise ValueError(
            f"logits and dlogits must both be (N, V), not {tuple(logits.shape)} and {tuple(dlogits.shape)}"
        )


def entropy_change(logits: Tensor, dlogits: Tensor) -> Tensor:
    """First-order change of the entropy, in nats, when finite logits change by dlogits, (N, V) both -> (N,)  (E9).

    dH = -sum_a pi_a (log pi_a + H) df_a = -Cov_{a~pi}(log pi_a, df_a): raising what is likely lowers it. Our
    derivation; also in Cui et al., arXiv 2505.22617. ValueError for shapes that disagree.

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

    d pi_m = pi_m (df_m - E_pi df), with m the likeliest token before the change. Our derivation. ValueError as above.
    """
    _check_change(logits, dlogits)
    pi = logits.softmax(dim=1)  # (N, V)
    top, m = pi.max(dim=1)  # (N,)
    return top * (dlogits[torch.arange(len(m)), m] - (pi * dlogits).sum(dim=1))  # (E9)


@torch.no_grad()
def microscope(before: GPT, after: GPT, tokens: Tensor, mask: Tensor) -> dict[str, float]:
    """One update, from policy `before` to policy `after`, seen from the states that `mask` selects of `tokens` (B, T).

    For entropy (nats) and confidence (top-1 probability), as means over the states: NAME_change, as measured; NAME_by_W
    and NAME_by_body, what the representation and the gradient component predict to first order (E8, E9); NAME_residual,
    the rest, which is beyond first order. Whatever made the update: SGD, Adam, one stage or the other.

    Also agreement_prompt and agreement_continuation: the mean `agreement` of the two parts over the first selected
    state of each row (the end of the prompt), and over the others.
    """
    _check_states(after, tokens, mask)
    update = {name: p - old for (name, p), old in zip(after.named_parameters(), before.parameters(), strict=True)}
    parts = logit_change(before, tokens, mask, update)  # (N, V) twice
    logits, logits_after = before(tokens)[mask], after(tokens)[mask]  # (N, V)
    row = {}
    for name, measure, predict in (("entropy", entropy, entropy_change), ("confidence", confidence, confidence_change)):
        change = (measure(logits_after) - measure(logits)).mean().item()
        by_W, by_body = (predict(logits, part).mean().item() for part in parts)
        row |= {f"{name}_change": change, f"{name}_by_W": by_W, f"{name}_by_body": by_body}
        row[f"{name}_residual"] = change - by_W - by_body
    cosine = agreement(*parts)  # (N,)
    first = (mask.cumsum(dim=1) == 1)[mask]
    return row | {
        "agreement_prompt": cosine[first].mean().item(),
        "agreement_continuation": cosine[~first].mean().item(),
    }


# ---------------------------------------------------------------------------------------------------- who teaches whom


def influence(model: GPT, tokens: Tensor, mask: Tensor, advantages: Tensor, block: int = 256) -> tuple[Tensor, Tensor]:
    """Who teaches whom: R's and G's part, (N, N) each, of what sampled token i does to log pi of sampled token j,

        A_i g_j^T K(x_j, x_i) g_i,    g = e_y - pi,                                                 (E10)

    to first order and per unit of the step size. `mask` (B, T) selects the states that chose the tokens, the ones after
    them; `advantages` (B,) are the rows'. Summed over i this is the change of log pi_j in one gradient step on
    sum_i A_i log pi_i, up to second order (E7). Our derivation.

    R's part is A_i <phi_i, phi_j> <g_i, g_j>; G's is A_i times the inner product of the two tokens' gradients of log pi
    in the body, so no V x V block is needed. It takes one backward pass per state, and no gradient is ever held for
    more than `block` states and one layer. ValueError as `empirical_ntk`, for a state that no token follows, and where
    `empirical_ntk` would fall back to the definition.
    """
    check_counts(block=block)
    _check_states(model, tokens, mask)
    if mask[:, -1].any():
        raise ValueError("mask selects the last position, which no token follows")
    if advantages.shape != mask.shape[:1]:
        raise ValueError(f"advantages {tuple(advantages.shape)} do not fit tokens {tuple(tokens.shape)}")
    row, t = mask.nonzero(as_tuple=True)  # (N,) each
    W = model.classifier.weight.detach()
    with torch.no_grad():
        phi = model.features(tokens)[mask]  # (N, d)
    g = residuals(phi @ W.T, tokens[row, t + 1])  # (N, V)
    A = advantages[row, None]  # (N, 1)
    C = (g @ W)[:, None]  # (N, 1, d): d log pi = g^T W d phi
    products = _gradient_products(model.body, (tokens, mask, C), None, block)[:, 0, :, 0]  # (N, N)
    return A * (phi @ phi.T) * (g @ g.T), A * products  # (E10)


# --------------------------------------------------------------------------------------------------------- the fast way
#
# Nothing from here on changes what a kernel is. Both the kernel and influence are C J(x) J(x')^T C'^T for some constant
# C of U rows per state: W, or the one row g^T W.
#
# A linear layer y_t = A x_t + b is used at every position t, so the gradient of output u in A is a sum of outer
# products, sum_t g_t x_t^T, with g_t = d output_u / d y_t by backpropagation. Two of them have the inner product
#
#     sum_{t,s} (g_t . g'_s) (x_t . x'_s),
#
# which takes the inputs x and the backpropagated g of each state and never the gradient itself. The bias is one more
# input that is always 1. An embedding is a linear layer on one-hot inputs, so its x_t . x'_s is whether two tokens are
# equal. The gain of a norm acts on each feature alone: its gradient is written out, and is the g of a layer with one
# position and one input that is 1. So every layer becomes a pair
#
#     inputs (n, T, I) and backprops (n, U, T, O),
#
# for n states at a time, with T positions counted backwards from each state's own. A body with anything else in it
# would get a wrong kernel, so the result is checked on random directions (`_holds`).


class UnknownLayer(ValueError):
    """The body has a layer that the fast way gets wrong."""


def _gradient_products(body, states, states2, block):
    """C J J'^T C'^T, (N, U, M, U), between states and states2, each (tokens (B, T), mask (B, T), C (N, U, d)), or among
    `states` if the second is None. UnknownLayer where it is wrong.

    Cost: U backward passes per state; then, for a layer with O outputs, N M U T (T + U) O multiplications, half of them
    among `states` themselves. Gradients written out take N M U^2 I O: they are used where that is less, at long T or
    small U. Memory, besides the result: the backprops of 2 `block` states, U T O numbers for each layer of each, where
    a Jacobian takes U I O.
    """
    symmetric = states2 is None
    chunks = _chunks(*states, block)
    chunks2 = chunks if symmetric else _chunks(*states2, block)
    (N, U), M = states[2].shape[:2], len((states if symmetric else states2)[2])
    kernel = states[2].new_empty(N, U, M, U)
    for c, (index, *chunk) in enumerate(chunks):
        layers = _layers(body, *chunk)
        for index2, *chunk2 in chunks[: c + 1] if symmetric else chunks2:
            layers2 = layers if index2 is index else _layers(body, *chunk2)
            products = _products(layers, layers2)  # (n, U, m, U)
            kernel[index[:, None], :, index2] = products.transpose(1, 2)
            if symmetric:
                kernel[index2[:, None], :, index] = products.permute(2, 0, 3, 1)
    if not _holds(body, kernel, states, states2):
        odd = [f"{name} is {type(m).__name__}" for name, m in body.named_modules() if _parameters(m) and not _is_known(m)]
        reason = ", ".join(odd) or "one is shared, hooked or not what it seems"
        raise UnknownLayer(f"the body is not all linear layers, embeddings and norms, each used once ({reason})")
    return kernel


def _chunks(tokens, mask, C, block):
    """The states, longest first, `block` at a time: [(index (n,), rows (n, T), position (n,), C (n, U, d))]."""
    row, position = mask.nonzero(as_tuple=True)
    chunks = position.argsort(descending=True, stable=True).split(block)
    return [(index, tokens[row[index], : position[index[0]] + 1], position[index], C[index]) for index in chunks]


def _parameters(module):
    """The module's own parameters, {name: parameter}."""
    return dict(module.named_parameters(recurse=False))


def _is_known(module):
    """A weight and at most a bias: a matrix is a linear layer or an embedding, a vector the gain of a norm."""
    return {"weight"} <= _parameters(module).keys() <= {"weight", "bias"} and module.weight.ndim <= 2


@torch.enable_grad()
def _layers(body, rows, position, C):
    """[(inputs (n, T, I), backprops (n, U, T, O))] of <C, phi> at the states (rows (n, T), position (n,))."""
    (n, T), calls = rows.shape, []

    def hook(module, arguments, output):
        if isinstance(module, nn.Embedding):  # positions have no row of their own yet
            output = output.detach().expand(n, T, -1)
        calls.append((module, arguments[0].detach(), output.requires_grad_()))  # the graph starts here, if frozen
        return output

    handles = [module.register_forward_hook(hook) for module in body.modules() if _is_known(module)]
    try:
        phi = body(rows)[torch.arange(n), position]  # (n, d)
    finally:
        for handle in handles:
            handle.remove()
    ys = [y for _, _, y in calls]
    backprops = [y.new_empty(n, C.size(1), *y.shape[1:]) for y in ys]
    for u in range(C.size(1)):  # one row, one state: the gradient of their sum keeps them apart
        gradients = torch.autograd.grad(phi, ys, C[:, u], retain_graph=True, materialize_grads=True)
        for g, gradient in zip(backprops, gradients, strict=True):
            g[:, u] = gradient
    layers = []
    for (module, x, _), g in zip(calls, backprops, strict=True):
        if module.weight.ndim == 1:
            gain, bias = module.weight.detach(), getattr(module, "bias", None)
            output = lambda gain: functional_call(module, {"weight": gain}, (x,))  # noqa: B023, E731
            slope = jvp(output, (gain,), (torch.ones_like(gain),))[1]  # (n, T, d), of each feature in its gain
            parts = [g * slope[:, None]] + [g] * (bias is not None)
            g = torch.cat([part.flatten(2, -2).sum(2, keepdim=True) for part in parts], dim=3)  # (n, U, 1, d or 2d)
            x = g.new_ones(n, 1, 1)
        else:
            if isinstance(module, nn.Embedding):
                x = x.expand(n, T)[:, :, None]
                if layers and layers[-1][0].dtype == x.dtype and torch.equal(layers[-1][1], g):
                    x = torch.cat((layers.pop()[0], x), dim=2)  # summed embeddings share their g: one layer
            elif module.bias is not None:
                x = F.pad(x, (0, 1), value=1.0)
            used = g.any(dim=(0, 1, 3))
            if not used.all():
                x, g = x[:, used], g[:, :, used]
        layers.append((x, g))
    return layers


CACHE = 2**20  # numbers between two matrix products: few enough to stay in the processor's cache


def _products(layers, layers2):
    """The products (n, U, m, U) between the states of two chunks, or of one with itself."""
    (_, g), (_, h) = layers[0], layers2[0]
    (n, U), m = g.shape[:2], len(h)
    kernel = g.new_zeros(n, U, m, U)
    for (x, g), (y, h) in zip(layers, layers2, strict=True):
        (T, I), S, one_hot = x.shape[1:], y.size(1), not x.is_floating_point()
        if not one_hot and 2 * T * (S + U) > I * (U + T / n + S / m):  # one large product, twice as fast
            g, h = (torch.einsum("nti,nuto->nuio", *layer).reshape(len(layer[0]) * U, -1) for layer in ((x, g), (y, h)))
            kernel.view(n * U, m * U).addmm_(g, h.T)
            continue
        g, h = g.flatten(2), h.permute(0, 2, 3, 1).flatten(2)  # (n, U, T*O), (m, S, O*U): no more copies from here on
        size = max(1, CACHE // max(1, T * h.size(2)))  # states on the left at once
        for j in range(m):
            for first in range(j if layers is layers2 else 0, n, size):
                tile = slice(first, first + size)
                alike = (x[tile, :, None] == y[j]).sum(3).to(g.dtype) if one_hot else x[tile] @ y[j].T  # (tile, T, S)
                weighted = alike @ h[j]  # (tile, T, O*U): sum_s (x_t . x'_s) g'_s
                kernel[tile, :, j] += g[tile] @ weighted.view(len(weighted), g.size(2), U)
    if layers is layers2:  # only the half with n >= m has been computed
        for j in range(m):
            kernel[j, :, j + 1 :] = kernel[j + 1 :, :, j].permute(2, 0, 1)
    return kernel


def _holds(body, kernel, states, states2):
    """Whether u^T kernel u' = <J^T C^T u, J'^T C'^T u'> for random u, u': two plain backward passes over all states."""

    @torch.enable_grad()
    def direction(states, seed):
        (tokens, mask, C), (features, theta) = states, _body_function(body)
        theta = {name: parameter.requires_grad_() for name, parameter in theta.items()}
        u = torch.randn(C.shape[:2], dtype=C.dtype, generator=torch.Generator().manual_seed(seed))
        weights = torch.einsum("nu,nud->nd", u, C)
        parts = torch.autograd.grad(features(theta, tokens)[mask], theta.values(), weights, materialize_grads=True)
        return u.flatten(), torch.cat([part.flatten() for part in parts])

    u, v = direction(states, 0)
    u2, v2 = (u, v) if states2 is None else direction(states2, 1)
    error = u @ kernel.view(len(u), len(u2)) @ u2 - v @ v2
    rounding = torch.finfo(kernel.dtype).eps * v.norm() * v2.norm()
    return error.abs() <= 1000 * rounding  # tests see up to 100 of it; a layer that is left out is far more
