"""One RL step through the neural tangent kernel (NTK): how a step on some states moves the logits of others.

A policy-gradient step of size eta on states x_i with tokens y_i and advantages A_i changes the logits at a state x by

    df(x) = eta sum_i A_i K(x, x_i) (e_{y_i} - pi_i) + O(eta^2),    K = R + G                                 (E7)
    R(x, x') = <phi(x), phi(x')> I_V          the representation component: what moving W does
    G(x, x') = W J(x) J(x')^T W^T             the gradient component: what moving the body does, J = d phi / d theta

`empirical_ntk` computes R and G exactly, `gradient_by_definition` does it in four lines that are slow. `influence` is
what they do to the sampled tokens: who teaches whom (E10). For an update other than a plain gradient step, Adam's for
one, no kernel is needed: `logit_change` splits any update into the same two parts (E8), and `entropy_change` and
`confidence_change` turn a change of logits into one of confidence (E9).
Source: Tomihari, arXiv 2601.04670, re-derived. Left out on purpose: kernels in expectation or at infinite width,
low-rank approximations, devices.

Shapes: N, M states, V vocabulary, d features, U = min(V, d) differentiated outputs. For one layer of the body: n states
at one position, T tokens up to it, I inputs, O outputs. A state is a (row, position) of tokens that a mask selects.
"""

import copy
import warnings
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call, grad, jacrev, jvp, vjp, vmap

from model import GPT, check_counts, check_tokens, confidence, entropy, residuals, token_logp


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
    """Raise ValueError unless `mask` selects states of `tokens` and the logits are W phi, W no part of the body."""
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
    for name, parameter in model.body.named_parameters():
        if parameter.untyped_storage().data_ptr() == W.untyped_storage().data_ptr():
            raise ValueError(f"the classifier is tied to body.{name}, so K is not R + G: untie them")


def _body_function(model):
    """The body as a function, ({name: parameter}, tokens (B, T)) -> features (B, T, d), and its parameters."""
    body = copy.deepcopy(model.body)  # functional_call does not give a module that is registered twice its own back
    theta = {name: parameter.detach() for name, parameter in body.named_parameters()}
    return lambda theta, tokens: functional_call(body, theta, (tokens,)), theta


# ------------------------------------------------------------------------------------------------------- the definition


def gradient_by_definition(model: GPT, tokens: Tensor, mask: Tensor, tokens2: Tensor, mask2: Tensor) -> Tensor:
    """G as it is defined (E7), (N, V, M, V): two Jacobians of the logits in every parameter of the body, contracted.

    With P parameters that is (N + M) V P numbers to hold and N V M V P products to add.
    """
    W = model.classifier.weight.detach()

    def jacobian(tokens, mask):  # {name: (N, V, *the parameter's shape)}
        features, theta = _body_function(model)
        return jacrev(lambda theta: features(theta, tokens)[mask] @ W.T)(theta)

    J, J2 = jacobian(tokens, mask), jacobian(tokens2, mask2)
    return sum(torch.einsum("nvp,mwp->nvmw", J[name].flatten(2), J2[name].flatten(2)) for name in J)


# --------------------------------------------------------------------------------------------------------- the fast way
#
# At a first reading skip to the next such line: nothing here changes what the kernel is.
#
# A linear layer y_t = A x_t + b is used at every position t, so the gradient of output u in A is a sum of outer
# products, sum_t g_t x_t^T, with g_t = d output_u / d y_t by backpropagation. Two of them have the inner product
#
#     sum_{t,s} (g_t . g'_s) (x_t . x'_s),
#
# which takes the inputs x and the backpropagated g of each state and never the gradient itself. The bias is one more
# input that is always 1. An embedding is a linear layer on one-hot inputs; token and position embedding are summed, so
# they share one g and are one layer. A LayerNorm's gain and bias are no matrix: their gradient (2d numbers) is written
# out, as the g of a layer with one position and one input that is 1. Every layer so becomes a pair
#
#     inputs (n, T, I) and backprops (n, U, T, O).
#
# A body with anything else in it would get a wrong kernel. So the result is checked on random directions (`_holds`).


def _record(body, rows):
    """The features at the end of `rows` (n, T), with a graph, and (module, input, output) of each layer."""
    calls = []

    def hook(module, arguments, output):
        if module is body.token_embedding:  # the graph starts here: frozen or not, no parameter is differentiated
            output = output.detach().requires_grad_()
        if output.shape[:-1] == rows.shape:  # one vector per token
            calls.append((module, arguments[0].detach(), output))
        return output

    layers = [m for m in body.modules() if type(m) is nn.Linear or type(m) is nn.LayerNorm and m.bias is not None]
    handles = [module.register_forward_hook(hook) for module in (body.token_embedding, *layers)]
    try:
        return body(rows)[:, -1], calls
    finally:
        for handle in handles:
            handle.remove()


@torch.enable_grad()
def _layers(model, rows):
    """The states at the end of `rows` (n, T) -> [(inputs (n, T, I), backprops (n, U, T, O))], one pair per layer."""
    features, calls = _record(model.body, rows)  # (n, d)
    W = model.classifier.weight.detach()
    outputs = features @ W.T if len(W) <= W.size(1) else features  # (n, U): the fewer of logits and features
    ys = [y for _, _, y in calls]
    backprops = [y.new_empty(len(rows), outputs.size(1), *y.shape[1:]) for y in ys]
    for u in range(outputs.size(1)):  # one row, one state: the sum over rows keeps them apart
        gradients = torch.autograd.grad(outputs[:, u].sum(), ys, retain_graph=True, materialize_grads=True)
        for g, gradient in zip(backprops, gradients, strict=True):
            g[:, u] = gradient
    layers = []
    for (module, x, _), g in zip(calls, backprops, strict=True):
        if isinstance(module, nn.Embedding):
            position = torch.arange(rows.size(1)).expand_as(rows)
            one_hots = F.one_hot(rows, model.config.vocab_size), F.one_hot(position, model.config.block_size)
            x = torch.cat(one_hots, dim=2).to(g.dtype)
        elif isinstance(module, nn.LayerNorm):
            normalised = F.layer_norm(x, module.normalized_shape, eps=module.eps)[:, None]
            g = torch.cat(((g * normalised).sum(2, keepdim=True), g.sum(2, keepdim=True)), dim=3)  # (n, U, 1, 2d)
            x = g.new_ones(len(rows), 1, 1)
        elif module.bias is not None:
            x = F.pad(x, (0, 1), value=1.0)
        used = g.any(dim=(0, 1, 3))  # (T,): past its attention, the last block has but one position left
        layers.append((x, g) if used.all() else (x[:, used], g[:, :, used]))
    return layers


def _explicit(x, g):
    """The same layer with its gradient written out: one position, one input that is 1, and I*O outputs."""
    return x.new_ones(len(x), 1, 1), torch.einsum("nti,nuto->nuio", x, g).flatten(2)[:, :, None]


TILE = 16  # states contracted at once: few enough that what lies between two matrix products stays in the cache


def _products(layers, layers2, symmetric):
    """The kernel (n, U, m, U) between two groups of states; if symmetric, of its halves only the one with n >= m."""
    (_, g), (_, h) = layers[0], layers2[0]
    U = g.size(1)
    kernel = g.new_zeros(len(g), U, len(h), U)
    for (x, g), (y, h) in zip(layers, layers2, strict=True):
        if x.size(1) * (y.size(1) + U) > 2 * U * x.size(2):  # many positions, few inputs: cheaper, even to build
            (x, g), (y, h) = _explicit(x, g), _explicit(y, h)
        g, h = g.flatten(2), h.permute(0, 2, 3, 1).flatten(2)  # (n, U, T*O), (m, S, O*U): no more copies from here on
        for m in range(len(y)):  # one state on the right, a tile of them on the left
            for first in range(m if symmetric else 0, len(x), TILE):
                tile = slice(first, first + TILE)
                weighted = x[tile] @ y[m].T @ h[m]  # (tile, T, O*U): sum_s (x_t . x'_s) g'_s
                kernel[tile, :, m] += g[tile] @ weighted.view(len(weighted), g.size(2), U)
    return kernel


def _groups(tokens, mask, block):
    """The states by position, `block` of them at a time: [[(indices (n,), rows (n, T) at whose end they are)]]."""
    row, position = mask.nonzero(as_tuple=True)
    chunks = position.argsort(stable=True).split(block)
    groups = [[chunk[position[chunk] == p] for p in position[chunk].unique()] for chunk in chunks]
    return [[(index, tokens[row[index], : position[index[0]] + 1]) for index in group] for group in groups]


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
    the model is left as it was. float32 or float64, as the model is.

    Cost: U backward passes per state; then, for a layer with O outputs, N M U T (T + U) O multiplications, half of them
    for a kernel with itself. Explicit gradients take N M U^2 I O: they are used where that is less than half, at long
    T, and for LayerNorm. Memory, besides the result: the backprops of 2 `block` states, U T O numbers for each layer of
    each, where a Jacobian takes U I O.

    Raises ValueError for bad tokens or masks and for a classifier that is tied, biased or no nn.Linear. If the body is
    not all linear layers, LayerNorms and embeddings (a layer of another kind, a weight used twice, a hook that changes
    an output), G comes from its definition, with a warning.
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
    (N, M), U = representation.shape, min(W.shape)
    gradient = W.new_zeros(N, U, M, U)
    chunks = _groups(tokens, mask, block)
    chunks2 = chunks if symmetric else _groups(tokens2, mask2, block)
    for c, chunk in enumerate(chunks):
        left = [(index, _layers(model, rows)) for index, rows in chunk]
        for chunk2 in chunks[: c + 1] if symmetric else chunks2:
            right = left if chunk2 is chunk else [(index, _layers(model, rows)) for index, rows in chunk2]
            for i, (index, layers) in enumerate(left):
                for index2, layers2 in left[: i + 1] if right is left else right:
                    products = _products(layers, layers2, symmetric=layers is layers2)  # (n, U, m, U)
                    gradient[index[:, None], :, index2] = products.transpose(1, 2)
    if symmetric:  # the pairs above have the later state, in the groups' order, on the left
        rank = torch.cat([index for chunk in chunks for index, _ in chunk]).argsort()
        done = rank[:, None] >= rank  # (N, N)
        gradient = torch.where(done[:, None, :, None], gradient, gradient.permute(2, 3, 0, 1))
    if U < len(W):
        gradient = torch.einsum("va,namb,wb->nvmw", W, gradient, W)
    if not _holds(model, gradient, (tokens, mask), None if symmetric else (tokens2, mask2)):
        message = "the body is not all linear layers, LayerNorms and embeddings: G comes from its definition, slowly"
        warnings.warn(message, stacklevel=2)
        gradient = gradient_by_definition(model, tokens, mask, tokens2, mask2)
    return NTK(representation, gradient)


def _holds(model, gradient, states, states2):
    """Whether u^T G u' = <J^T u, J'^T u'> for random u, u' over all states and logits: two plain backward passes."""

    def directions(states, seed):
        tokens, mask = states
        features, theta = _body_function(model)
        phi, backward = vjp(lambda theta: features(theta, tokens)[mask], theta)
        W = model.classifier.weight.detach()
        u = torch.randn(len(phi), len(W), dtype=W.dtype, generator=torch.Generator().manual_seed(seed))
        return u, torch.cat([part.flatten() for part in backward(u @ W)[0].values()])

    u, v = directions(states, 0)
    u2, v2 = (u, v) if states2 is None else directions(states2, 1)
    error = torch.einsum("nv,nvmw,mw->", u, gradient, u2) - v @ v2
    rounding = torch.finfo(gradient.dtype).eps * v.norm() * v2.norm()
    return error.abs() <= 1000 * rounding  # tests see up to 100 of it; a layer that is left out is far more


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
    features, theta = _body_function(model)
    dtheta = {name: changes.get(f"body.{name}", torch.zeros_like(parameter)) for name, parameter in theta.items()}
    phi, dphi = jvp(lambda theta: features(theta, tokens)[mask], (theta,), (dtheta,))  # (N, d) each
    W = parameters["classifier.weight"]
    return phi @ changes.get("classifier.weight", torch.zeros_like(W)).T, dphi @ W.T  # (E8)


def influence(model: GPT, tokens: Tensor, mask: Tensor, advantages: Tensor, chunk: int = 64) -> tuple[Tensor, Tensor]:
    """Who teaches whom: R's and G's part, (N, N) each, of what sampled token i does to log pi of sampled token j,

        A_i g_j^T K(x_j, x_i) g_i,    g = e_y - pi,                                                 (E10)

    to first order and per unit of the step size. `mask` (B, T) selects the states that chose the tokens, the ones after
    them; `advantages` (B,) are the rows'. Summed over i this is the change of log pi_j in one gradient step on
    sum_i A_i log pi_i, up to second order (E7). Our derivation.

    R's part is A_i <phi_i, phi_j> <g_i, g_j>; G's is A_i times the inner product of the two tokens' gradients of log pi
    in the body. So no V x V block is needed. Cost, with P parameters: N backward passes of one row, N^2 P
    multiplications, N P numbers to hold. ValueError as `empirical_ntk`, and for a state that no token follows.
    """
    check_counts(chunk=chunk)
    _check_states(model, tokens, mask)
    if mask[:, -1].any():
        raise ValueError("mask selects the last position, which no token follows")
    if advantages.shape != mask.shape[:1]:
        raise ValueError(f"advantages {tuple(advantages.shape)} do not fit tokens {tuple(tokens.shape)}")
    (features, theta), W = _body_function(model), model.classifier.weight.detach()
    row, t = mask.nonzero(as_tuple=True)  # (N,) each
    here = F.one_hot(t, tokens.size(1))[:, :-1]  # (N, T-1)

    def logp(theta, tokens, here):
        phi = features(theta, tokens[None])[0, :-1]  # (T-1, d)
        return (token_logp(phi @ W.T, tokens[1:]) * here).sum()

    gradients = vmap(grad(logp), (None, 0, 0), chunk_size=chunk)(theta, tokens[row], here)
    gradients = torch.cat([part.flatten(1) for part in gradients.values()], dim=1)  # (N, P)
    phi = model.features(tokens)[mask].detach()  # (N, d)
    g = residuals(phi @ W.T, tokens[row, t + 1])  # (N, V)
    A = advantages[row, None]  # (N, 1)
    return A * (phi @ phi.T) * (g @ g.T), A * (gradients @ gradients.T)  # (E10)


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
