"""An appendix to ntk.py: how the gradient component G becomes fast. Nothing here changes what G is.

An entry of G is the inner product of two gradients, each as long as the body has parameters. We need not write these
gradients out, because one identity gives the inner product without them. A linear layer computes y_t = weight x_t at
every token t. Let u be any number that is computed from these y_t, and let g_t = du/dy_t, which backpropagation gives.
The gradient of u in the weight is sum_t g_t x_t^T, so the gradients of two such numbers have the inner product

    <grad u, grad u'> = sum_{t,s} (g_t . g'_s) (x_t . x'_s)

It takes only what goes into the layer, x, and what backpropagation brings back to it, g. On one layer:

>>> layer, x, x2 = nn.Linear(3, 2, bias=False), torch.randn(4, 3), torch.randn(5, 3)  # 4 tokens and 5 other tokens
>>> y, y2 = layer(x), layer(x2)
>>> u, u2 = y.sin().sum(), y2.cos().sum()
>>> (gradient, g), (gradient2, g2) = grad(u, (layer.weight, y)), grad(u2, (layer.weight, y2))
>>> torch.allclose((gradient * gradient2).sum(), ((g @ g2.T) * (x @ x2.T)).sum(), atol=1e-4)
True

A body is many layers, and its gradient is theirs one after the other, so their inner products add up:

1. `inputs_and_backprops` runs the body, and records the inputs x and the backpropagated g of every layer.
2. `as_linear` brings biases, embeddings and norms into the same form, a pair (x, g).
3. `inner_products` adds up the identity over all layers.
4. `gradient_products` does this for all states, some at a time. Then it checks the result against autograd in one
   direction, drawn at random with a fixed seed. The check is needed because a body may have parameters that none of
   this knows of, or may use a layer in an unusual way. Such a body is refused with the exception `UnknownBody`.

Letters: B rows of tokens; T tokens of a row; N, M numbers of states, where a state is a prefix of a row; d features; U
outputs u of a state; I inputs and O outputs of a layer. Of two sets of states, M, x2, g2, ... belong to the second.
"""

import torch
from torch import Tensor, nn
from torch.autograd import grad
from torch.func import functional_call, jvp


class UnknownBody(ValueError):
    """The body is not all linear layers, embeddings and norms. The message names what else there is."""


def gradient_products(body, size, states, states2=None):
    """The inner products (N, U, M, U) of all outputs' gradients for the body's parameters: between the N states
    `states` and the M states `states2`, or among `states` alone.

    A set of states is a triple: tokens (B, T), a mask (B, T) that selects N of their positions, and constants C
    (N, U, d). The outputs u of a state with features phi are the U numbers C phi. With C = W they are the logits. With
    the single row C = (e_y - pi)^T W, the gradient of u is that of log pi(y).

    We take the states in blocks of `size`. Cost: U backward passes per state and pair of blocks, and for every layer
    N M T (T I + U (T + U) O) multiplications, of which we do half when there is only one set of states. Memory besides
    the result: T (I + U O) numbers for every layer of every state in two blocks. The check at the end needs more: two
    gradients in all parameters, and one pass over all the rows at once.
    """
    (N, U), M = states[2].shape[:2], len((states2 or states)[2])
    blocks, blocks2 = ([slice(first, first + size) for first in range(0, count, size)] for count in (N, M))
    products = states[2].new_empty(N, U, M, U)
    for i, block in enumerate(blocks):
        layers = inputs_and_backprops(body, states, block)
        for block2 in blocks2 if states2 else blocks[: i + 1]:
            layers2 = layers if block2 is block else inputs_and_backprops(body, states2 or states, block2)
            products[block, :, block2] = inner_products(layers, layers2) if layers and layers2 else 0.0
    if not states2:  # Above we computed the products with n >= m. The others follow, because <a, b> = <b, a>.
        for m in range(M):
            products[m, :, m + 1 :] = products[m + 1 :, :, m].permute(2, 0, 1)
    if not agrees_with_autograd(body, products, states, states2 or states):
        raise UnknownBody(f"the body is not all linear layers, embeddings and norms, each used once ({suspects(body)})")
    return products


@torch.enable_grad()
def inputs_and_backprops(body, states, block):
    """For every layer a pair: inputs x (N, T, I), and backpropagated g (N, U, T, O). N are the states of one block.

    Every state gets a row of its own, up to the length of the longest. A state does not depend on tokens that come
    after it, so its g is 0 there.
    """
    tokens, mask, C = states
    row, position = (index[block] for index in mask.nonzero(as_tuple=True))  # (N,) each
    rows, calls = tokens[row, : position.max() + 1], []  # (N, T)
    N, T = rows.shape

    def record(module, arguments, y):
        """A hook: torch calls it after each layer, and goes on with the y that it returns."""
        if len(arguments) == 1 and isinstance(y, Tensor):
            x = arguments[0].detach()
            if isinstance(module, nn.Embedding) and x.shape in ((T,), (1, T)):
                # Positions are embedded once for all rows. We repeat them, because every row needs a g of its own.
                x, y = x.expand(N, T), y.detach().expand(N, T, -1)
            if y.shape[:2] == (N, T):
                calls.append((module, x, y.requires_grad_()))  # even a frozen layer's y must be in the graph
        return y

    known = [module for module in body.modules() if [*module.parameters(recurse=False)] and is_known(module)]
    handles = [module.register_forward_hook(record) for module in known]
    try:
        phi = body(rows)[torch.arange(N), position]  # (N, d)
    finally:
        for handle in handles:
            handle.remove()
    # One batched backward pass serves all U outputs u = C phi. Differentiating the sum over the N states keeps them
    # apart, because a state depends on its own row alone.
    ys, du_dphi = [y for *_, y in calls], C[block].transpose(0, 1)  # (U, N, d)
    gs = grad(phi, ys, du_dphi, is_grads_batched=True, materialize_grads=True) if ys else []  # (U, N, T, ..., O) each
    return [as_linear(module, x, g.transpose(0, 1)) for (module, x, _), g in zip(calls, gs, strict=True)]


def is_known(module):
    """Whether a module's own parameters are a weight matrix and perhaps a bias (a linear layer, an embedding), or
    vectors (a norm), or none. GPT-2, GPT-NeoX, Llama and Qwen2 are made of such modules. (Their rotary positions, for
    example, have no parameters.)"""
    dims = {name: parameter.ndim for name, parameter in module.named_parameters(recurse=False)}
    return set(dims.values()) <= {1} or dims in ({"weight": 2}, {"weight": 2, "bias": 1})


def as_linear(module, x, g):
    """A module that took x (N, T, ...) and got g (N, U, T, ..., O) back, as a linear layer x (N, T, I), g (N, U, T, O).

    Norm: its gradient is as short as its vectors, so we write it out, as the sum over t of g_t times a slope. It
    becomes the g of a layer that has one token, whose only input is 1.
    Embedding: its inputs are one-hot vectors. We keep the tokens, (N, T, 1), that they stand for.
    Linear layer: its bias is the weight of one more input, which is always 1. A layer that is used for each of several
    heads has one more dimension after T; the heads count as more tokens.
    """
    names = [name for name, _ in module.named_parameters(recurse=False)]
    if all(module.get_parameter(name).ndim == 1 for name in names):
        by_name = [(g * slope(module, name, x)[:, None]).flatten(2, -2).sum(2, keepdim=True) for name in names]
        return x.new_ones(len(x), 1, 1), torch.cat(by_name, dim=3)  # (N, 1, 1), (N, U, 1, O)
    g = g.flatten(2, -2)
    x = x.reshape(len(x), g.size(2), -1)
    if "bias" in names:
        x = nn.functional.pad(x, (0, 1), value=1.0)
    # We leave out the first tokens if all their g are 0. After the last attention an output depends on the state's own
    # token alone, so these are all tokens before the first state's own.
    start = next((t for t in range(g.size(2)) if g[:, :, t].any()), g.size(2) - 1)
    return x[:, start:], g[:, :, start:].contiguous()  # because inner_products reads it many times


def slope(module, name, x):
    """How fast each entry of a norm's output grows with the same entry of its vector `name`, which is a gain or a bias.

    If an entry of the vector also acts on other entries of the output, the check at the end fails.
    """
    vector = module.get_parameter(name).detach()
    return jvp(lambda v: functional_call(module, {name: v}, (x,)), (vector,), (torch.ones_like(vector),))[1].detach()


TILE = 16  # states that are multiplied at once: with 64, finding memory for `weighted` took a quarter of the time


def inner_products(layers, layers2):
    """The identity, summed over the layers: (N, U, M, U) between the N states of one block and the M of another. If
    both are the same block, we compute only what has n >= m."""
    (N, U), M = layers[0][1].shape[:2], len(layers2[0][1])
    products = layers[0][1].new_zeros(N, U, M, U)
    for (x, g), (x2, g2) in zip(layers, layers2, strict=False):  # if they do not match, the check at the end fails
        for m in range(M):
            g2_m = g2[m].permute(1, 2, 0).flatten(1)  # (T2, O*U): state m of the second block
            for first in range(m if layers is layers2 else 0, N, TILE):
                tile = slice(first, first + TILE)  # n states of the first block
                # x_t . x'_s, (n, T, T2). Two one-hot vectors have the product 1 if their tokens are equal, and else 0.
                xx = x[tile] @ x2[m].T if x.is_floating_point() else (x[tile] == x2[m].T).to(g.dtype)
                weighted = (xx @ g2_m).view(len(xx), -1, U)  # (n, T*O, U): sum_s (x_t . x'_s) g'_s
                products[tile, :, m] += g[tile].flatten(2) @ weighted  # (n, U, U): sum_t g_t . that
    return products


def body_function(body):
    """The body as a function, ({name: parameter}, tokens (B, T)) -> features (B, T, d), and its parameters."""
    names = {parameter: name for name, parameter in body.named_parameters()}
    # All places of each parameter, because functional_call by itself breaks a module that is registered twice.
    places = {at: names[p] for path, m in body.named_modules() for at, p in m.named_parameters(path, False, False)}
    theta = {name: parameter.detach() for parameter, name in names.items()}

    def features(theta, tokens):
        return functional_call(body, {at: theta[name] for at, name in places.items()}, (tokens,), tie_weights=False)

    return features, theta


def agrees_with_autograd(body, products, states, states2):
    """Whether the products are right in one random direction. We draw a number a for every output u and an a2 for every
    u2. By linearity

        sum a products a2 = <grad sum a u, grad sum a2 u2>,

    and the right side takes only two ordinary backward passes, in all parameters of the body, whatever layers it has. A
    layer that is missing or wrong in `products` changes the left side.
    """
    features, theta = body_function(body)

    def direction(seed, tokens, mask, C):
        a = torch.randn(C.shape[:2], dtype=C.dtype, generator=torch.Generator().manual_seed(seed))  # (N, U)
        gradient = torch.func.grad(lambda p: torch.einsum("nu,nud,nd->", a, C, features(p, tokens)[mask]))(theta)
        return a.flatten().double(), torch.cat([part.flatten() for part in gradient.values()]).double()

    # In double precision, because in float32 rounding in these sums of up to 10^8 products would hide an error.
    (a, gradient), (a2, gradient2) = direction(0, *states), direction(1, *states2)
    error = a @ products.view(len(a), len(a2)).double() @ a2 - gradient @ gradient2
    # In the tests rounding gives up to 100 times eps, and a layer that is left out far more than 1000.
    return error.abs() <= 1000 * torch.finfo(products.dtype).eps * gradient.norm() * gradient2.norm()


def suspects(body):
    """The names of the modules that may be why the check failed. An embedding may scale its output, if it is a subclass
    of nn.Embedding, or have a token that is not trained."""
    embeddings = [m for m in body.modules() if isinstance(m, nn.Embedding)]
    odd = {m for m in embeddings if type(m) is not nn.Embedding or m.padding_idx is not None}
    named = [f"{type(m).__name__} {name}" for name, m in body.named_modules() if m in odd or not is_known(m)]
    return ", ".join(named) or "one is shared, hooked or not what it seems"
