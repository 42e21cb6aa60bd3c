"""One RL step through the neural tangent kernel (NTK): how a step on some states moves the logits of others.

A policy-gradient step of size eta on states x_i with tokens y_i and advantages A_i changes the logits at a state x by

    df(x) = eta sum_i A_i K(x, x_i) (e_{y_i} - pi_i) + O(eta^2),    K = R + G                                 (E7)
    R(x, x') = <phi(x), phi(x')> I_V          the representation component: what moving W does
    G(x, x') = W J(x) J(x')^T W^T             the gradient component: what moving the body does, J = d phi / d theta

`empirical_ntk` computes R and G exactly, `gradient_by_definition` does it in four lines that are slow. For an update
other than a plain gradient step, Adam's for one, no kernel is needed: `logit_change` splits any update into the same
two parts (E8), and `entropy_change` and `confidence_change` turn a change of logits into one of confidence (E9).
`exact_split` does without first order, and is what a run looks at. `influence` is what the kernel does to the sampled
tokens: who teaches whom (E10). How the exact kernel becomes fast is the last part of this file: a reader may stop where
it begins.
Source: Tomihari, arXiv 2601.04670, re-derived. Left out on purpose: kernels in expectation or at infinite width,
low-rank approximations, devices.

Shapes: N, M states, V vocabulary, d features. A state is a (row, position) of tokens that a mask selects.
"""

import warnings
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call, jacrev, jvp, vjp

from model import GPT, check, check_counts, check_tokens, confidence, entropy, residuals


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
    fits = mask.shape == tokens.shape and mask.dtype == torch.bool
    check(fits, f"mask {tuple(mask.shape)} {mask.dtype} does not fit tokens {tuple(tokens.shape)}")
    check(mask.any(), "mask selects no state")
    inference = tokens.is_inference() or torch.is_inference_mode_enabled()
    check(not inference, "nothing can be differentiated in torch.inference_mode: use torch.no_grad")
    plain = type(model.classifier) is nn.Linear and model.classifier.bias is None
    check(plain, f"the classifier must be nn.Linear with bias=False, else K is not R + G: {model.classifier}")
    W = model.classifier.weight
    exact = W.dtype in (torch.float32, torch.float64) and not torch.is_autocast_enabled(W.device.type)
    check(exact, f"the kernel needs float32 or float64 without torch.autocast, and the model is in {W.dtype}")
    for name, parameter in model.body.named_parameters():
        apart = parameter.untyped_storage().data_ptr() != W.untyped_storage().data_ptr()
        check(apart, f"the classifier is tied to body.{name}, so K is not R + G: untie them")
    # One row tells, and up to rounding: not every device adds in one order.
    same = torch.allclose(*(model.features(tokens[:1]) for _ in range(2)), equal_nan=True)
    check(same, "two passes of the body differ, for dropout or other noise: call model.eval() first")


def _body_function(body):
    """The body as a function, ({name: parameter}, tokens (B, T)) -> features (B, T, d), and its parameters."""
    names = {parameter: name for name, parameter in body.named_parameters()}
    # All places of each: left to itself, functional_call breaks a module that is registered twice.
    places = {at: names[p] for path, m in body.named_modules() for at, p in m.named_parameters(path, False, False)}
    theta = {name: parameter.detach() for parameter, name in names.items()}

    def features(theta, tokens):
        return functional_call(body, {at: theta[name] for at, name in places.items()}, (tokens,), tie_weights=False)

    return features, theta


def gradient_by_definition(model: GPT, tokens: Tensor, mask: Tensor, tokens2: Tensor, mask2: Tensor) -> Tensor:
    """G as it is defined (E7), (N, V, M, V): two Jacobians of the logits in every parameter of the body, contracted.

    With P parameters that is (N + M) V P numbers to hold and N V M V P products to add.
    """
    (features, theta), W = _body_function(model.body), model.classifier.weight.detach()

    def jacobian(tokens, mask):  # {name: (N, V, *the parameter's shape)}
        return jacrev(lambda theta: features(theta, tokens)[mask] @ W.T)(theta)

    J, J2 = jacobian(tokens, mask), jacobian(tokens2, mask2)
    return sum(torch.einsum("nvp,mwp->nvmw", J[name].flatten(2), J2[name].flatten(2)) for name in J)


def empirical_ntk(model: GPT, tokens: Tensor, mask: Tensor, tokens2=None, mask2=None, block: int = 64) -> NTK:
    """The exact NTK (E7) between the N states that `mask` selects of `tokens`, both (B, T), and M others or themselves.

    States come in row-major order, several of one row if wanted. A frozen body has the same kernel as a free one, and
    the model is left as it was. float32 or float64, as the model is. `block` states are looked at together: fewer need
    less memory.

    Raises ValueError for bad tokens or masks, for a classifier that is tied, biased or no nn.Linear, and for a body
    that is random, as with dropout. If the body is not all linear layers, embeddings and norms, G comes from its
    definition, with a warning.
    """
    check_counts(block=block)
    check((tokens2 is None) == (mask2 is None), "tokens2 and mask2 go together: one of them is missing")
    sides = [(tokens, mask)] if tokens2 is None else [(tokens, mask), (tokens2, mask2)]
    for side in sides:
        _check_states(model, *side)
    phi = [model.features(tokens)[mask].detach() for tokens, mask in sides]  # (N, d) and, of two sides, (M, d)
    W = model.classifier.weight.detach()
    C = W if len(W) <= W.size(1) else torch.eye(W.size(1), dtype=W.dtype)  # (U, d): the fewer of logits and features
    states = [(*side, C.expand(len(features), *C.shape)) for side, features in zip(sides, phi, strict=True)]
    gradient = _gradient_products(model.body, block, *states)  # (N, U, M, U)
    if gradient is None:
        warnings.warn(f"{_misfit(model.body)}: G comes from its definition, slowly", stacklevel=2)
        gradient = gradient_by_definition(model, *sides[0], *sides[-1])
    elif C is not W:
        gradient = torch.einsum("va,namb,wb->nvmw", W, gradient, W)
    return NTK(phi[0] @ phi[-1].T, gradient)  # (E7)


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
        check(name in parameters, f"update names {name!r}, which is no parameter of the model")
        wanted, got = (f"{tuple(x.shape)} {x.dtype}" for x in (parameters[name], change))
        check(got == wanted, f"update of {name} must be {wanted}, not {got}")
    changes = {name: update.get(name, torch.zeros_like(old)).detach() for name, old in parameters.items()}
    features, theta = _body_function(model.body)
    dtheta = {name: changes[f"body.{name}"] for name in theta}
    phi, dphi = jvp(lambda theta: features(theta, tokens)[mask], (theta,), (dtheta,))  # (N, d) each
    return phi @ changes["classifier.weight"].T, dphi @ parameters["classifier.weight"].T  # (E8)


def agreement(by_W: Tensor, by_body: Tensor) -> Tensor:
    """How far the representation part of (E8) alone points where the whole change does: (N, V) both -> (N,) cosines.

    Less their means over the vocabulary, which no probability sees.
    """
    by_W, both = (part - part.mean(dim=1, keepdim=True) for part in (by_W, by_W + by_body))
    return F.cosine_similarity(by_W, both, dim=1)


def _check_change(logits, dlogits):
    right = logits.ndim == 2 and logits.shape == dlogits.shape
    check(right, f"logits and dlogits must both be (N, V), not {(*logits.shape,)} and {(*dlogits.shape,)}")


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


def exact_split(phi0: Tensor, W0: Tensor, phi1: Tensor, W1: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The change of f = W phi from policy 0 to policy 1 in three parts, exactly: through W, through the body, and both.

        f_1 - f_0 = dW phi_0 + W_0 dphi + dW dphi                                                  (E8, for any update)

    The first two are those of `logit_change` up to the second order of phi in theta. Features (N, d), classifiers
    (V, d): three times (N, V), in float32 at least, for bfloat16 is widened before it is subtracted. Our derivation.
    ValueError for shapes that disagree.
    """
    shapes = ", ".join(str(tuple(x.shape)) for x in (phi0, W0, phi1, W1))
    right = phi0.ndim == 2 and phi0.shape == phi1.shape and W0.shape == W1.shape and W0.shape[1:] == phi0.shape[1:]
    check(right, f"features must be (N, d) and classifiers (V, d), before and after alike, not {shapes}")
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


# ---------------------------------------------------------------------------------------------------- who teaches whom


def influence(model: GPT, tokens: Tensor, mask: Tensor, advantages: Tensor, block: int = 256) -> tuple[Tensor, Tensor]:
    """Who teaches whom: R's and G's part, (N, N) each, of what sampled token i does to log pi of sampled token j,

        A_i g_j^T K(x_j, x_i) g_i,    g = e_y - pi,                                                 (E10)

    to first order and per unit of the step size. `mask` (B, T) selects the states that chose the tokens, the ones after
    them; `advantages` (B,) are the rows'. Summed over i this is the change of log pi_j in one gradient step on
    sum_i A_i log pi_i, up to second order (E7). Our derivation.

    R's part is A_i <phi_i, phi_j> <g_i, g_j>; G's is A_i times the inner product of the two tokens' gradients of log pi
    in the body, so no V x V block is needed; by inputs and backprops (below) no gradient is held either. ValueError as
    `empirical_ntk`, for a state that no token follows, and where `empirical_ntk` would fall back to the definition.
    """
    check_counts(block=block)
    _check_states(model, tokens, mask)
    check(not mask[:, -1].any(), "mask selects the last position, which no token follows")
    check(advantages.shape == mask.shape[:1], f"advantages {(*advantages.shape,)} do not fit tokens {(*tokens.shape,)}")
    row, t = mask.nonzero(as_tuple=True)  # (N,) each
    W = model.classifier.weight.detach()
    phi = model.features(tokens)[mask].detach()  # (N, d)
    g = residuals(phi @ W.T, tokens[row, t + 1])  # (N, V)
    A = advantages[row, None]  # (N, 1)
    C = (g @ W)[:, None]  # (N, 1, d): d log pi = g^T W d phi
    products = _gradient_products(model.body, block, (tokens, mask, C))  # (N, 1, N, 1)
    check(products is not None, _misfit(model.body))
    return A * (phi @ phi.T) * (g @ g.T), A * products[:, 0, :, 0]  # (E10)


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
# equal. The gain and the bias of a norm act on each feature alone: their gradients, sums over t of g_t times a slope,
# are the g of a layer with one position and one input that is 1. So every layer is a pair
#
#     inputs (n, T, I), or tokens (n, T, 1), and backprops (n, U, T, O)
#
# for n states, T positions, I inputs, O outputs. All rows of a block are as long as its longest: the body is causal, so
# g is 0 after a state's own position. A body with anything else in it would get a wrong kernel, so the result is
# checked on random directions (`_holds`).


def _gradient_products(body, block, states, states2=None):
    """C J J'^T C'^T, (N, U, M, U), between states and states2, each (tokens (B, T), mask (B, T), C (N, U, d)), or among
    `states` alone; None if the body holds something with which that would be wrong.

    Cost: for each pair of blocks U backward passes per state; for a layer with O outputs N M U T (T + U) O
    multiplications, half of them among `states` alone. Memory, besides the result: the backprops of two blocks, U T O
    numbers for each layer of each state. No gradient is ever written out, so nothing grows with the parameters.
    """
    chunks, N, U = _chunks(*states, block), *states[2].shape[:2]
    chunks2, M = (_chunks(*states2, block), len(states2[2])) if states2 else (chunks, N)
    kernel = states[2].new_empty(N, U, M, U)
    for c, (index, *chunk) in enumerate(chunks):
        layers = _layers(body, *chunk)
        for index2, *chunk2 in chunks2 if states2 else chunks[: c + 1]:
            products = _products(layers, layers if index2 is index else _layers(body, *chunk2))  # (n, U, m, U)
            kernel[index[:, None], :, index2] = products.transpose(1, 2)
            if not states2:
                kernel[index2[:, None], :, index] = products.permute(2, 0, 3, 1)
    return kernel if _holds(body, kernel, states, states2 or states) else None


def _misfit(body):
    odd = {m for m in body.modules() if isinstance(m, nn.Embedding) and type(m) is not nn.Embedding}  # it may scale
    unknown = [f"{type(m).__name__} {name}" for name, m in body.named_modules() if not _is_known(m) or m in odd]
    reason = ", ".join(unknown) or "one is shared, hooked or not what it seems"
    return f"the body is not all linear layers, embeddings and norms, each used once ({reason})"


def _chunks(tokens, mask, C, block):
    """The states, longest first, `block` at a time: [(index (n,), rows (n, T), position (n,), C (n, U, d))]."""
    row, position = mask.nonzero(as_tuple=True)
    chunks = position.argsort(descending=True, stable=True).split(block)
    return [(index, tokens[row[index], : position[index[0]] + 1], position[index], C[index]) for index in chunks]


def _is_known(module):
    """Whether it has a weight matrix and at most a bias, or vectors alone, or nothing, for parameters of its own."""
    dims = {name: parameter.ndim for name, parameter in module.named_parameters(recurse=False)}
    return set(dims.values()) <= {1} or dims in ({"weight": 2}, {"weight": 2, "bias": 1})


@torch.enable_grad()
def _layers(body, rows, position, C):
    """[(inputs (n, T, I), backprops (n, U, T, O))] of C phi, C (n, U, d), at the ends of rows (n, T) at `position`."""
    (n, T), calls = rows.shape, []

    def hook(module, arguments, output):
        if isinstance(module, nn.Embedding) and output.shape[:-1] in ((T,), (1, T), (n, T)):
            output = output.detach().expand(n, T, -1)  # that of positions may be the same for all rows
        if len(arguments) == 1 and isinstance(output, Tensor) and output.shape[:2] == (n, T):  # others `_holds` misses
            calls.append((module, arguments[0].detach(), output.requires_grad_()))  # a graph, also of frozen layers
        return output

    known = [module for module in body.modules() if [*module.parameters(recurse=False)] and _is_known(module)]
    handles = [module.register_forward_hook(hook) for module in known]
    try:
        phi = body(rows)[torch.arange(n), position]  # (n, d)
    finally:
        for handle in handles:
            handle.remove()
    ys = [y for *_, y in calls]

    def backpropagated(c):  # one row, one state: the gradient of the sum of all <c, phi> keeps them apart
        return torch.autograd.grad(phi, ys, c, retain_graph=True, materialize_grads=True)

    somewhere = torch.randn(phi.shape, dtype=phi.dtype, generator=torch.Generator().manual_seed(0))
    starts = [int(g.flatten(2).any(dim=(0, 2)).int().argmax()) for g in backpropagated(somewhere)]
    backprops = [y.new_empty(n, C.size(1), T - start, *y.shape[2:]) for y, start in zip(ys, starts, strict=True)]
    for u in range(C.size(1)):
        for g, start, gradient in zip(backprops, starts, backpropagated(C[:, u]), strict=True):
            g[:, u] = gradient[:, start:]  # after the last attention, nothing but a state's own position is used
    layers = []
    for (module, x, _), start, g in zip(calls, starts, backprops, strict=True):
        x = x.expand(n, T, *x.shape[2:])[:, start:]
        if all(parameter.ndim == 1 for parameter in module.parameters(recurse=False)):
            each = [g * _slope(module, name, x)[:, None] for name, _ in module.named_parameters(recurse=False)]
            g = torch.cat([gradient.flatten(2, -2).sum(2, keepdim=True) for gradient in each], dim=3)  # (n, U, 1, O)
            x = x.new_ones(n, 1, 1)
        else:
            g = g.flatten(2, -2)
            x = x.reshape(n, g.size(2), -1)
            if getattr(module, "bias", None) is not None:
                x = F.pad(x, (0, 1), value=1.0)
        layers.append((x, g))
    return layers


def _slope(module, name, x):
    """The derivative of each output in its own entry of a parameter vector: that of all outputs in direction 1."""
    vector = module.get_parameter(name).detach()
    _, slope = jvp(lambda v: functional_call(module, {name: v}, (x,)), (vector,), (torch.ones_like(vector),))
    return slope.detach()


def _products(layers, layers2):
    """The products (n, U, m, U) between the states of two chunks, or of one with itself."""
    (n, U), m = layers[0][1].shape[:2], len(layers2[0][1])
    kernel = layers[0][1].new_zeros(n, U, m, U)
    for (x, g), (y, h) in zip(layers, layers2, strict=True):
        # So many states on the left at once that what lies between two products stays in the processor's cache.
        size, g = min(n, max(1, 2**20 // g[0].numel())), g.flatten(2)  # (n, U, T*O)
        between = g.new_empty(size, x.size(1), h.size(3) * U)  # one piece of memory for all
        for j in range(m):
            right = h[j].permute(1, 2, 0).flatten(1)  # (S, O*U)
            for first in range(j if layers is layers2 else 0, n, size):
                tile = slice(first, first + size)
                alike = x[tile] @ y[j].T if x.is_floating_point() else (x[tile] == y[j].T).to(g.dtype)  # (tile, T, S)
                torch.matmul(alike, right, out=between[: len(alike)])  # (tile, T, O*U): sum_s (x_t . x'_s) g'_s
                kernel[tile, :, j] += g[tile] @ between[: len(alike)].view(len(alike), -1, U)
    for j in range(m if layers is layers2 else 0):  # of two halves the one with n >= j is there
        kernel[j, :, j + 1 :] = kernel[j + 1 :, :, j].permute(2, 0, 1)
    return kernel


def _holds(body, kernel, states, states2):
    """Whether u^T kernel u' = <J^T C^T u, J'^T C'^T u'> for random u, u': two plain backward passes over all states."""
    sides = []
    for seed, (tokens, mask, C) in enumerate((states, states2)):
        features, theta = _body_function(body)
        phi, backward = vjp(lambda theta: features(theta, tokens)[mask], theta)  # noqa: B023
        u = torch.randn(C.shape[:2], dtype=C.dtype, generator=torch.Generator().manual_seed(seed))
        gradients = backward(torch.einsum("nu,nud->nd", u, C))[0]
        sides.append((u.flatten(), torch.cat([gradient.flatten() for gradient in gradients.values()])))
    (u, v), (u2, v2) = [(u.double(), v.double()) for u, v in sides]  # a sum of 10^8 products in float32 is no check
    error = u @ kernel.view(len(u), len(u2)).double() @ u2 - v @ v2
    rounding = torch.finfo(kernel.dtype).eps * v.norm() * v2.norm()
    return error.abs() <= 1000 * rounding  # tests see up to 100 of it; a layer that is left out is far more
