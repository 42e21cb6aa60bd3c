"""The kernel is exact: checked against one autograd.grad per logit, which shares no code with ntk.py."""

import copy

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny import generator, seeds, states, tiny_gpt
from torch import nn

from fast_ntk import as_linear, inner_products
from minicfrl import token_logp
from model import GPT, GPTConfig
from ntk import empirical_ntk, gradient_by_definition, influence, logit_change

EXACT = 1e-12  # relative to the largest entry: sums of some hundred products in float64

shapes = st.fixed_dictionaries(
    {
        "vocab_size": st.sampled_from([2, 5, 8, 12]),  # fewer than the features, as many, more; 2 repeats tokens
        "n_embd": st.sampled_from([4, 8, 16]),
        "n_head": st.sampled_from([1, 2]),
        "n_layer": st.integers(1, 3),
    }
)


def gradients_of_logits(model, tokens, mask, parameters):
    """(N, V, number of parameters): one autograd.grad for every logit of every state, a parameter after the other."""
    logits = model(tokens)[mask]  # (N, V)
    rows = [torch.autograd.grad(logit, parameters, retain_graph=True) for logit in logits.flatten()]
    return torch.stack([torch.cat([part.flatten() for part in row]) for row in rows]).view(*logits.shape, -1)


def oracle(model, tokens, mask, tokens2=None, mask2=None, parameters=None):
    """(N, V, M, V): the inner products of those gradients, in the body's parameters unless others are given."""
    parameters = list(model.body.parameters() if parameters is None else parameters)
    J = gradients_of_logits(model, tokens, mask, parameters)
    J2 = J if tokens2 is None else gradients_of_logits(model, tokens2, mask2, parameters)
    return torch.einsum("nvp,mwp->nvmw", J, J2)


def assert_equal(actual, expected, tolerance=EXACT):
    torch.testing.assert_close(actual, expected, rtol=0, atol=tolerance * expected.abs().max().item())


# ------------------------------------------------------------------------------------------------------------ exactness


@given(seed=seeds, shape=shapes, rows=st.integers(1, 3), length=st.integers(1, 6))
def test_the_kernel_holds_the_inner_products_of_all_logits_gradients(seed, shape, rows, length):
    """K = R + G: W and the body share no parameter, so their parts of each inner product add up."""
    model = tiny_gpt(seed, block_size=6, **shape)
    tokens, mask = states(model, rows, length, seed)
    kernel = empirical_ntk(model, tokens, mask)
    assert_equal(kernel.gradient, oracle(model, tokens, mask))
    features = model.features(tokens)[mask].detach()
    assert_equal(kernel.representation, features @ features.T)
    assert_equal(kernel.full(), oracle(model, tokens, mask, parameters=model.parameters()))


@settings(max_examples=10)  # its oracle is slow
@given(seed=seeds, shape=shapes, length=st.integers(1, 6), block=st.integers(1, 4))
def test_the_kernel_between_two_sets_of_states_is_exact(seed, shape, length, block):
    """Different rows, lengths and numbers of states on the two sides, whatever the block."""
    model = tiny_gpt(seed, block_size=6, **shape)
    left, right = states(model, 2, 6, seed), states(model, 3, length, seed + 1)
    kernel = empirical_ntk(model, *left, *right, block=block)
    assert_equal(kernel.full(), oracle(model, *left, *right, parameters=model.parameters()))


@pytest.mark.parametrize("block", [1, 2, 5, 100])
def test_blocks_bound_the_memory_and_change_nothing(block):
    model = tiny_gpt(0)
    tokens, mask = states(model, 4, 6, 0)
    assert_equal(empirical_ntk(model, tokens, mask, block=block).gradient, oracle(model, tokens, mask))


@pytest.mark.parametrize("vocab_size, n_embd", [(3, 4), (3, 64)])
def test_many_states_at_long_and_at_short_contexts_are_exact(vocab_size, n_embd):
    """At two positions each, so that a block holds rows of different lengths."""
    model = tiny_gpt(0, vocab_size, block_size=12, n_layer=1, n_embd=n_embd)
    tokens = torch.randint(vocab_size, (20, 12), generator=generator(0))
    mask = torch.zeros(20, 12, dtype=torch.bool)
    mask[:, [4, 11]] = True
    assert_equal(empirical_ntk(model, tokens, mask).gradient, oracle(model, tokens, mask))


@pytest.mark.parametrize("vocab_size", [17, 80])
def test_float32_is_exact_to_1e_5(vocab_size):
    """The default model's sizes in the precision of training, against the oracle of the same weights in float64."""
    model = GPT(GPTConfig(vocab_size, 8), generator(0))
    tokens, mask = states(model, 1, 4, 0)
    single = empirical_ntk(copy.deepcopy(model).float(), tokens, mask)
    assert single.gradient.dtype == single.full().dtype == torch.float32
    assert_equal(single.gradient.double(), oracle(model, tokens, mask), 1e-5)


@given(seed=seeds, shape=shapes)
def test_the_fast_way_is_the_definition(seed, shape):
    model = tiny_gpt(seed, **shape)
    left, right = states(model, 2, 4, seed), states(model, 1, 6, seed + 1)
    assert_equal(empirical_ntk(model, *left, *right).gradient, gradient_by_definition(model, *left, *right))


@given(
    seed=seeds, lengths=st.tuples(st.integers(1, 5), st.integers(1, 5)), bias=st.booleans(), states=st.integers(1, 3)
)
def test_one_layer_s_inputs_and_backpropagated_gradients_have_the_inner_products_of_its_gradients(
    seed, lengths, bias, states
):
    """The identity of fast_ntk.py, <grad u, grad u'> = sum_{t,s} (g_t . g'_s)(x_t . x'_s), against autograd's gradients
    of two outputs u, each a function of all the layer's outputs that is not linear, in weight and bias."""
    torch.manual_seed(seed)
    layer, pairs, gradients = nn.Linear(3, 2, bias), [], []
    for T in lengths:
        x = torch.randn(states, T, 3)
        y = layer(x)
        outputs = torch.stack((y.sin().sum(dim=(1, 2)), y.flatten(1).cumsum(dim=1).cos().sum(dim=1)), dim=1)  # (N, 2)
        g = [torch.autograd.grad(outputs[:, u].sum(), y, retain_graph=True)[0] for u in range(2)]
        pairs.append([as_linear(layer, x, torch.stack(g, dim=1))])
        each = [torch.autograd.grad(u, list(layer.parameters()), retain_graph=True) for u in outputs.flatten()]
        gradients.append(torch.stack([torch.cat([part.flatten() for part in parts]) for parts in each]))
    expected = (gradients[0] @ gradients[1].T).view(states, 2, states, 2)
    torch.testing.assert_close(inner_products(*pairs), expected, rtol=1e-12, atol=1e-12)


# ------------------------------------------------------------------------------------------------------------ structure


@given(seed=seeds, shape=shapes)
def test_the_kernel_is_symmetric_and_positive_semidefinite(seed, shape):
    """It is J J^T, the kernel of a state with itself too: g^T G(x, x) g >= 0, so no A > 0 lowers its own token."""
    model = tiny_gpt(seed, **shape)
    kernel = empirical_ntk(model, *states(model, 2, 5, seed))
    for part in (kernel.gradient, kernel.full()):
        assert_equal(part, part.permute(2, 3, 0, 1))
        matrix = part.reshape(part.size(0) * part.size(1), -1)
        eigenvalues = torch.linalg.eigvalsh((matrix + matrix.T) / 2)
        assert eigenvalues[0] > -1e-9 * eigenvalues[-1]


@given(seed=seeds, scale=st.floats(0.1, 10), shape=shapes)
def test_scaling_the_classifier_scales_the_gradient_component_quadratically_and_the_other_not_at_all(
    seed, scale, shape
):
    """G = W M W^T with M from the body alone; R has no W in it."""
    model = tiny_gpt(seed, **shape)
    tokens, mask = states(model, 2, 4, seed)
    before = empirical_ntk(model, tokens, mask)
    with torch.no_grad():
        model.classifier.weight *= scale
    after = empirical_ntk(model, tokens, mask)
    assert_equal(after.gradient, scale**2 * before.gradient)
    assert torch.equal(after.representation, before.representation)


@given(seed=seeds)
def test_adding_one_vector_to_every_row_of_the_classifier_changes_neither_policy_nor_what_the_body_learns(seed):
    """W + 1 v^T adds the same number to all logits of a state, and 1^T (e_y - pi) = 0 hides it from backpropagation."""
    model = tiny_gpt(seed)
    tokens, mask = states(model, 2, 4, seed)

    def policy_and_gradient():
        logits = model(tokens)[mask]
        loss = token_logp(logits, logits.argmin(dim=1)).sum()
        return logits.softmax(dim=1), *torch.autograd.grad(loss, list(model.body.parameters()))

    before = policy_and_gradient()
    with torch.no_grad():
        model.classifier.weight += torch.randn(model.config.n_embd, generator=generator(seed))
    for old, new in zip(before, policy_and_gradient(), strict=True):
        torch.testing.assert_close(new, old, rtol=1e-9, atol=1e-9)


@given(seed=seeds)
def test_tokens_after_the_state_do_not_matter(seed):
    """Padding, for one: a state is a prefix."""
    model = tiny_gpt(seed)
    tokens, mask = states(model, 2, 6, seed)
    mask[:, 4:] = False
    mask[0, 0] = True
    padded = tokens.clone()
    padded[:, 4:] = 0
    assert torch.equal(empirical_ntk(model, tokens, mask).gradient, empirical_ntk(model, padded, mask).gradient)


def test_the_model_is_left_as_it_was_and_frozen_parameters_count():
    """Weights, gradients, flags, hooks and mode; also under no_grad, where a training loop might ask."""
    model = tiny_gpt(0)
    tokens, mask = states(model, 2, 4, 0)
    expected = oracle(model, tokens, mask)
    model.body.requires_grad_(False)
    model.eval()
    model.classifier.weight.grad = torch.ones_like(model.classifier.weight)
    before = copy.deepcopy(model)
    with torch.no_grad():
        kernel = empirical_ntk(model, tokens, mask)
        logit_change(model, tokens, mask, {})
    assert_equal(kernel.gradient, expected)
    assert not any(p.requires_grad for p in model.body.parameters()) and not model.training
    for (name, p), (_, old) in zip(model.named_parameters(), before.named_parameters(), strict=True):
        assert torch.equal(p, old) and (p.grad is None) == (name != "classifier.weight")
    assert torch.equal(model.classifier.weight.grad, torch.ones_like(model.classifier.weight))
    assert not any(module._forward_hooks for module in model.modules())
    assert not kernel.gradient.requires_grad and not kernel.representation.requires_grad


# -------------------------------------------------------------------------------------------------- what is unsupported


def with_one_more(tokens, mask):
    """The same rows and one more token, which `influence` asks for."""
    return nn.functional.pad(tokens, (0, 1)), nn.functional.pad(mask, (0, 1))


class Scale(nn.Module):
    """A gain of another name."""

    def __init__(self, d):
        super().__init__()
        self.gain = nn.Parameter(torch.full((d,), 1.5))

    def forward(self, x):
        return x * self.gain


class ScaleBy(Scale):
    """And a second argument, without which it cannot be called."""

    def forward(self, x, scale):
        return scale * super().forward(x)


class Twice(nn.Module):
    """A linear layer that is used twice."""

    def __init__(self, d):
        super().__init__()
        self.linear = nn.Linear(d, d)

    def forward(self, x):
        return self.linear(self.linear(x))


class Doubled(nn.Linear):
    """A linear layer by name, but not by what it does."""

    def forward(self, x):
        return super().forward(x) * 2


class PerHead(nn.Module):
    """A layer for each half of the features: its outputs are no vector per token."""

    def __init__(self, layer):
        super().__init__()
        self.layer = layer

    def forward(self, x):
        return self.layer(x.unflatten(2, (2, 4))).flatten(2)


class AllAtOnce(nn.Linear):
    """A linear layer that sees the tokens of all rows as one."""

    def __init__(self):
        super().__init__(8, 8)
        self.inner = nn.Linear(8, 8)

    def forward(self, x):
        return self.inner(x.flatten(0, 1)).view_as(x) + super().forward(x)


class Mixing(nn.Module):
    """A gain that acts on its neighbour."""

    def __init__(self, d):
        super().__init__()
        self.gain = nn.Parameter(torch.linspace(0.5, 1.5, d))

    def forward(self, x):
        return x * self.gain * self.gain.roll(1)


class Conv1D(nn.Module):
    """A linear layer as GPT-2 has it in transformers: weight (in, out)."""

    def __init__(self, inputs, outputs):
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.randn(inputs, outputs) / 4), nn.Parameter(torch.randn(outputs))

    def forward(self, x):
        return x @ self.weight + self.bias


class OnePlus(nn.Module):
    """An RMS norm as Gemma has it: 1 + w is the gain."""

    def __init__(self, d):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(d))

    def forward(self, x):
        return x * x.square().mean(dim=-1, keepdim=True).rsqrt() * (1 + self.weight)


class Table(nn.Module):
    """Positions as a parameter of their own, of another name."""

    def __init__(self, num_embeddings, d):
        super().__init__()
        self.num_embeddings, self.table = num_embeddings, nn.Parameter(torch.randn(num_embeddings, d))

    def forward(self, positions):
        return self.table[positions]


class Positions(nn.Embedding):
    """An embedding of positions whose output has one row for all: (1, T, d)."""

    def forward(self, positions):
        return super().forward(positions[None])


def with_an_unknown_layer(body):
    body.blocks[0].mlp[1] = Mixing(32)


def with_a_layer_called_twice(body):
    body.blocks[0].mlp = Twice(8)


def with_a_layer_in_two_places(body):
    body.blocks[1].mlp = body.blocks[0].mlp


def with_a_shared_weight(body):
    body.blocks[1].attention.proj.weight = body.blocks[0].attention.proj.weight


def with_a_subclass(body):
    body.blocks[0].attention.proj = Doubled(8, 8)


def with_a_layer_of_all_tokens_at_once(body):
    body.blocks[0].attention.proj = AllAtOnce()


def with_a_layer_that_returns_two_things(body):
    body.blocks[0].mlp[1] = First(TwoParts(32), 2.0)


def with_a_layer_of_one_argument_that_returns_two_things(body):
    body.blocks[0].mlp[1] = First(TwoParts(32))


def with_a_layer_of_two_arguments(body):
    body.blocks[0].mlp[1] = Times(ScaleBy(32), 2.0)


def with_a_table_that_is_no_embedding(body):
    body.position_embedding = Table(6, 8)


def with_a_hook_that_ablates(body):
    body.blocks[0].mlp[2].register_forward_hook(lambda module, arguments, output: 0.5 * output)


def with_an_embedding_that_ignores_a_token(body):
    body.token_embedding.padding_idx = 0


@pytest.mark.parametrize(
    "change",
    [
        with_an_unknown_layer,
        with_a_layer_called_twice,
        with_a_layer_in_two_places,
        with_a_shared_weight,
        with_a_subclass,
        with_a_layer_of_all_tokens_at_once,
        with_a_layer_that_returns_two_things,
        with_a_layer_of_one_argument_that_returns_two_things,
        with_a_layer_of_two_arguments,
        with_a_table_that_is_no_embedding,
        with_a_hook_that_ablates,
        with_an_embedding_that_ignores_a_token,
    ],
)
def test_what_the_fast_way_does_not_know_is_left_to_the_definition_with_a_warning(change):
    """And the model keeps its own parameters, also those of a module that is registered twice."""
    torch.manual_seed(0)  # new layers draw from the global generator
    model = tiny_gpt(0)
    change(model.body)
    tokens, mask = states(model, 2, 4, 0)
    assert (tokens == 0).any()
    before = [id(parameter) for parameter in model.parameters()]
    for right in ((), states(model, 3, 5, 1)):
        with pytest.warns(UserWarning, match="^the body is not all linear layers"):
            kernel = empirical_ntk(model, tokens, mask, *right)
        assert_equal(kernel.gradient, oracle(model, tokens, mask, *right))
    with pytest.raises(ValueError, match="^the body is not all linear layers"):
        influence(model, *with_one_more(tokens, mask), torch.ones(2))
    logit_change(model, tokens, mask, {})
    assert [id(parameter) for parameter in model.parameters()] == before


class Raw(nn.Module):
    """A body of one raw matrix, without any layer."""

    blocks = ()

    def __init__(self, V, d):
        super().__init__()
        self.table = nn.Parameter(torch.randn(V, d))

    def forward(self, tokens):
        return self.table[tokens].cumsum(dim=1)


class PositionsFirst(Raw):
    """Its layer sees (T, B, d): in a block with as many states as positions that looks like (N, T, d)."""

    def __init__(self, V, d):
        super().__init__(V, d)
        self.layer = nn.Linear(d, d)

    def forward(self, tokens):
        return self.layer(super().forward(tokens).transpose(0, 1)).transpose(0, 1)


@pytest.mark.parametrize("kind", [Raw, PositionsFirst])
@pytest.mark.parametrize("block", [1, 3, 4, 64])
def test_a_body_whose_layers_are_not_seen_falls_back_to_the_definition(kind, block):
    model = tiny_gpt(0)
    model.body = kind(5, 8)
    model.features = model.body
    tokens, mask = states(model, 3, 4, 0)
    with pytest.warns(UserWarning, match="^the body is not all linear layers"):
        kernel = empirical_ntk(model, tokens, mask, block=block)
    assert_equal(kernel.gradient, oracle(model, tokens, mask))
    with pytest.raises(ValueError, match="^the body is not all linear layers"):
        influence(model, *with_one_more(tokens, mask), torch.ones(3), block=block)


def test_the_layer_that_is_not_known_is_named():
    model = tiny_gpt(0)
    with_a_table_that_is_no_embedding(model.body)
    with pytest.raises(ValueError, match="each used once .Table position_embedding.$"):
        influence(model.double(), *with_one_more(*states(model, 2, 4, 0)), torch.ones(2))


class TwoParts(nn.Module):
    """A module with a vector of its own that returns a tuple, as some attentions do."""

    def __init__(self, d):
        super().__init__()
        self.sink = nn.Parameter(torch.randn(d))

    def forward(self, x, scale=1.0):
        return scale * x * self.sink, None


class Times(nn.Module):
    """Calls another module with more arguments than its input."""

    def __init__(self, inner, *arguments):
        super().__init__()
        self.inner, self.arguments = inner, arguments

    def forward(self, x):
        return self.inner(x, *self.arguments)


class First(Times):
    """And returns the first of the things that it returns."""

    def forward(self, x):
        return super().forward(x)[0]


def with_rms_norms(body):
    body.blocks[0].attention_norm, body.norm = nn.RMSNorm(8), OnePlus(8)
    nn.init.normal_(body.blocks[0].attention_norm.weight)


def with_a_norm_without_bias(body):
    body.norm = nn.LayerNorm(8, bias=False)
    nn.init.normal_(body.norm.weight)


def with_layers_per_head(body):
    body.blocks[1].attention_norm, body.blocks[1].attention.proj = PerHead(nn.LayerNorm(4)), PerHead(nn.Linear(4, 4))


def with_a_gain(body):
    body.blocks[0].mlp[1] = Scale(32)


def with_a_linear_layer_of_gpt_2(body):
    body.blocks[0].mlp[0] = Conv1D(8, 32)


def with_positions_of_one_row(body):
    body.position_embedding = Positions(6, 8)


def without_biases(body):
    body.blocks[0].mlp[0] = nn.Linear(8, 32, bias=False)


def with_a_norm_without_parameters(body):
    body.blocks[1].mlp_norm = nn.LayerNorm(8, elementwise_affine=False)


def with_a_branch_that_is_zero(body):
    nn.init.zeros_(body.blocks[0].attention.proj.weight)
    nn.init.zeros_(body.blocks[1].mlp[2].weight)


def with_a_frozen_embedding(body):
    body.token_embedding.requires_grad_(False)


@pytest.mark.parametrize(
    "change",
    [
        with_rms_norms,
        with_a_norm_without_bias,
        with_layers_per_head,
        with_a_gain,
        with_a_linear_layer_of_gpt_2,
        with_positions_of_one_row,
        without_biases,
        with_a_norm_without_parameters,
        with_a_branch_that_is_zero,
        with_a_frozen_embedding,
    ],
)
def test_what_the_fast_way_does_know_needs_no_warning(change):
    torch.manual_seed(0)
    model = tiny_gpt(0)
    change(model.body)
    tokens, mask = states(model, 2, 4, 0)
    kernel = empirical_ntk(model.double(), tokens, mask)  # a warning would fail the test
    model.requires_grad_()
    assert_equal(kernel.gradient, oracle(model, tokens, mask))


def test_a_classifier_of_zeros_has_no_gradient_component():
    model = tiny_gpt(0)
    nn.init.zeros_(model.classifier.weight)
    kernel = empirical_ntk(model, *states(model, 2, 4, 0))
    assert torch.equal(kernel.gradient, torch.zeros_like(kernel.gradient)) and kernel.representation.any()


def tied(model):
    model.classifier.weight = model.body.token_embedding.weight


def tied_to_a_part_of_it(model):
    model.body.token_embedding = nn.Embedding(6, 8)
    model.classifier.weight = nn.Parameter(model.body.token_embedding.weight.data[1:])


def biased(model):
    model.classifier = nn.Linear(8, 5)


def of_two_layers(model):
    model.classifier = nn.Sequential(nn.Linear(8, 5, bias=False), nn.Tanh())


def in_half_precision(model):
    model.half()


@pytest.mark.parametrize(
    "change, message",
    [
        (tied, "the classifier is tied to body.token_embedding.weight"),
        (tied_to_a_part_of_it, "the classifier is tied to body.token_embedding.weight"),
        (biased, "the classifier must be nn.Linear with bias=False.*bias=True"),
        (of_two_layers, "the classifier must be nn.Linear with bias=False.*Tanh"),
        (in_half_precision, "float32 or float64 without torch.autocast, and the model is in torch.float16"),
    ],
)
def test_a_classifier_with_which_the_kernel_is_not_r_plus_g_is_refused(change, message):
    """A tied W is part of the body too, a bias adds 1 to <phi, phi'>; half precision has no digits to split."""
    model = tiny_gpt(0)
    change(model)
    for call in (empirical_ntk, lambda *arguments: logit_change(*arguments, {})):
        with pytest.raises(ValueError, match=f"(?s){message}"):
            call(model, *states(model, 2, 4, 0))


TOKENS, MASK = torch.zeros(2, 4, dtype=torch.long), torch.ones(2, 4, dtype=torch.bool)


@pytest.mark.parametrize(
    "tokens, mask, message",
    [
        (TOKENS, ~MASK, "mask selects no state"),
        (TOKENS, MASK[:, :3], r"mask \(2, 3\) torch.bool does not fit tokens \(2, 4\)"),
        (TOKENS, MASK.long(), "mask .* torch.int64 does not fit"),
        (TOKENS + 5, MASK, "token 5 is outside the vocabulary of 5"),
        (TOKENS - 1, MASK, "token -1 is outside the vocabulary of 5"),
        (TOKENS[0], MASK[0], r"tokens must be \(B, T\) int64, not \(4,\)"),
        (TOKENS.repeat(1, 2), MASK.repeat(1, 2), "8 tokens are more than block_size=6"),
    ],
)
def test_bad_states_are_refused_in_one_sentence(tokens, mask, message):
    model = tiny_gpt(0)
    for call in (
        lambda: empirical_ntk(model, tokens, mask),
        lambda: empirical_ntk(model, TOKENS, MASK, tokens, mask),
        lambda: logit_change(model, tokens, mask, {}),
    ):
        with pytest.raises(ValueError, match=message):
            call()


def test_inference_mode_is_refused():
    with torch.inference_mode(), pytest.raises(ValueError, match="use torch.no_grad"):
        empirical_ntk(tiny_gpt(0), TOKENS, MASK)


def every_call(model, tokens, mask):
    """All that differentiates a body, each as a function without arguments."""
    return (
        lambda: empirical_ntk(model, tokens, mask),
        lambda: empirical_ntk(tiny_gpt(0), tokens, mask, tokens, mask) and empirical_ntk(model, tokens, mask),
        lambda: logit_change(model, tokens, mask, {}),
        lambda: influence(model, tokens, mask & (torch.arange(mask.size(1)) < 3), torch.ones(len(tokens))),
    )


def test_autocast_is_refused():
    """It would return a kernel in bfloat16, with 3 digits, and say nothing."""
    for call in every_call(tiny_gpt(0).float(), TOKENS, MASK):
        with torch.autocast("cpu"), pytest.raises(ValueError, match="without torch.autocast, and the model is in"):
            call()


class Noise(nn.Module):
    """Dropout by another name, which no list of layers would know, and in eval() too."""

    def forward(self, x):
        return x + 1e-3 * torch.randn_like(x)


@pytest.mark.parametrize("layer", [nn.Dropout(0.1), Noise()])
def test_a_random_body_is_refused(layer):
    """Else a kernel is that of one draw."""
    model = tiny_gpt(0)
    model.body.blocks[0].mlp.append(layer)
    for call in every_call(model, TOKENS, MASK):
        with pytest.raises(ValueError, match=r"dropout is on: call model.eval\(\)"):
            call()
    model.body.blocks[0].mlp[-1] = nn.Dropout(0.1).eval()
    for call in every_call(model, TOKENS, MASK):
        call()


class Keeping(nn.Module):
    """A layer that remembers its last output, which copy.deepcopy refuses to copy."""

    def forward(self, x):
        self.last = x
        return x


def test_a_body_that_keeps_its_features_and_one_with_a_parametrized_weight_have_a_kernel():
    torch.manual_seed(0)
    model = tiny_gpt(0)
    tokens, mask = states(model, 2, 4, 0)
    model.body.norm = nn.Sequential(model.body.norm, Keeping())
    model(tokens)
    with pytest.raises(RuntimeError, match="deepcopy"):
        copy.deepcopy(model)
    assert_equal(empirical_ntk(model, tokens, mask).gradient, oracle(model, tokens, mask))
    update = {name: torch.randn_like(p) for name, p in model.named_parameters()}
    J = gradients_of_logits(model, tokens, mask, list(model.body.parameters()))
    change = torch.cat([update[f"body.{name}"].flatten() for name, _ in model.body.named_parameters()])
    assert_equal(logit_change(model, tokens, mask, update)[1], J @ change)
    assert torch.equal(model(tokens), model(tokens))  # and it can be used as before
    nn.utils.parametrize.register_parametrization(model.body.blocks[0].attention.proj, "weight", nn.Tanh())
    with pytest.warns(UserWarning, match="ParametrizationList blocks.0.attention.proj.parametrizations.weight"):
        kernel = empirical_ntk(model, tokens, mask)
    assert_equal(kernel.gradient, oracle(model, tokens, mask))


def test_half_a_second_set_and_a_bad_block_are_refused():
    for arguments, message in (((TOKENS, None), "go together"), ((None, MASK), "go together")):
        with pytest.raises(ValueError, match=message):
            empirical_ntk(tiny_gpt(0), TOKENS, MASK, *arguments)
    with pytest.raises(ValueError, match="block must be a whole number of at least 1, not 0"):
        empirical_ntk(tiny_gpt(0), TOKENS, MASK, block=0)
