"""The kernel is exact: checked against one autograd.grad per logit, which shares no code with ntk.py."""

import copy
from unittest.mock import patch

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from profiles import dear
from strategies import policies_and_states
from tiny import generator, states, tiny_gpt
from torch import nn

import fast_ntk
from model import GPT, GPTConfig
from ntk import empirical_ntk, influence, logit_change

EXACT = 1e-12  # relative to the largest entry: sums of some hundred products in float64


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

sizes = st.integers(1, 6)


@given(drawn=policies_and_states() | policies_and_states(sides=2), block=sizes, tile=sizes)
def test_the_kernel_holds_the_inner_products_of_all_logits_gradients_whatever_the_block_and_the_tile(
    drawn, block, tile
):
    """K = R + G: W and the body share no parameter, so their parts of each inner product add up. Blocks and tiles only
    say how many states are multiplied at once. Two sets of states differ in rows, lengths and numbers."""
    policy, *sides = drawn
    model = policy.model
    with patch.object(fast_ntk, "TILE", tile):
        kernel = empirical_ntk(model, *sides, block=block)
    phi = [model.features(tokens)[mask].detach() for tokens, mask in (sides[:2], sides[-2:])]
    assert_equal(kernel.representation, phi[0] @ phi[1].T)
    assert_equal(kernel.gradient, oracle(model, *sides))
    assert_equal(kernel.full(), oracle(model, *sides, parameters=model.parameters()))


@pytest.mark.parametrize("vocab_size", [17, 80])
def test_float32_is_exact_to_1e_5(vocab_size):
    """The default model's sizes in the precision of training, against the oracle of the same weights in float64."""
    model = GPT(GPTConfig(vocab_size, 8), generator(0))
    tokens, mask = states(model, 1, 4, 0)
    single = empirical_ntk(copy.deepcopy(model).float(), tokens, mask)
    assert single.gradient.dtype == single.full().dtype == torch.float32
    assert_equal(single.gradient.double(), oracle(model, tokens, mask), 1e-5)


# ------------------------------------------------------------------------------------------------------------ structure


@given(drawn=policies_and_states())
def test_the_kernel_is_symmetric_and_positive_semidefinite(drawn):
    """It is J J^T, the kernel of a state with itself too: g^T G(x, x) g >= 0, so no A > 0 lowers its own token."""
    policy, *probe = drawn
    kernel = empirical_ntk(policy.model, *probe)
    for part in (kernel.gradient, kernel.full()):
        assert_equal(part, part.permute(2, 3, 0, 1))
        matrix = part.reshape(part.size(0) * part.size(1), -1)
        eigenvalues = torch.linalg.eigvalsh((matrix + matrix.T) / 2)
        assert eigenvalues[0] > -1e-9 * eigenvalues[-1]


@dear
@given(drawn=policies_and_states(), scale=st.floats(0.1, 10) | st.just(0.0))
def test_scaling_the_classifier_scales_the_gradient_component_quadratically_and_the_other_not_at_all(drawn, scale):
    """G = W M W^T with M from the body alone; R has no W in it. A classifier of zeros has no gradient component."""
    policy, *probe = drawn
    before = empirical_ntk(policy.model, *probe)
    with torch.no_grad():
        policy.model.classifier.weight *= scale
    after = empirical_ntk(policy.model, *probe)
    assert_equal(after.gradient, scale**2 * before.gradient)
    assert torch.equal(after.representation, before.representation)


@dear
@given(drawn=policies_and_states(), data=st.data())
def test_tokens_after_the_state_do_not_matter(drawn, data):
    """Padding, for one: a state is a prefix."""
    policy, tokens, mask = drawn
    seen = mask.flip(1).cumsum(dim=1).flip(1) > 0  # a state is here or later in the row
    other = data.draw(st.integers(0, policy.V - 1))
    again = empirical_ntk(policy.model, torch.where(seen, tokens, other), mask)
    assert torch.equal(again.gradient, empirical_ntk(policy.model, tokens, mask).gradient)


def test_the_model_is_left_as_it_was_and_frozen_parameters_count():
    """Weights, gradients, flags, hooks and mode; also under no_grad, where a training loop might ask."""
    model = tiny_gpt(0).eval()
    tokens, mask = states(model, 2, 4, 0)
    expected = oracle(model, tokens, mask)
    model.body.requires_grad_(False)
    model.classifier.weight.grad = torch.ones_like(model.classifier.weight)
    before = copy.deepcopy(model)
    with torch.no_grad():
        kernel = empirical_ntk(model, tokens, mask)
        logit_change(model, tokens, mask, {})
    assert_equal(kernel.gradient, expected)
    assert not kernel.gradient.requires_grad and not kernel.representation.requires_grad
    for (name, p), old in zip(model.named_parameters(), before.parameters(), strict=True):
        assert torch.equal(p, old) and p.requires_grad == old.requires_grad
        assert torch.equal(p.grad, torch.ones_like(p)) if name == "classifier.weight" else p.grad is None
    assert not any(module._forward_hooks or module.training for module in model.modules())


# --------------------------------------------------------------------------------------------------------- other bodies


class Own(nn.Module):
    """A module of one's own: parameters and modules by name, and a function of it and of the input."""

    def __init__(self, function, **parts):
        super().__init__()
        self.function = function
        for name, part in parts.items():
            setattr(self, name, nn.Parameter(part) if isinstance(part, torch.Tensor) else part)

    def forward(self, *inputs):
        return self.function(self, *inputs)


def gain(d):
    return torch.linspace(0.5, 1.5, d)


def two_things(d):
    """A module with a vector of its own that returns a tuple, as some attentions do."""
    return Own(lambda m, x, scale=1.0: (scale * x * m.sink, None), sink=gain(d))


def times(factor):
    """A linear layer by its parameters, but not by what it does."""
    function = lambda m, x: factor * nn.functional.linear(x, m.weight, m.bias)  # noqa: E731
    return Own(function, weight=torch.randn(8, 8) / 4, bias=torch.randn(8))


def all_at_once():
    """A linear layer, and in it one that sees the tokens of all rows as one."""
    function = lambda m, x: m.inner(x.flatten(0, 1)).view_as(x) + nn.functional.linear(x, m.weight)  # noqa: E731
    return Own(function, weight=torch.randn(8, 8) / 4, inner=nn.Linear(8, 8))


def per_head(layer):
    """A layer for each half of the features: its outputs are no vector per token."""
    return Own(lambda m, x: m.layer(x.unflatten(2, (2, 4))).flatten(2), layer=layer)


class Positions(nn.Embedding):
    """An embedding of positions whose output has one row for all: (1, T, d)."""

    def forward(self, positions):
        return super().forward(positions[None])


def put(path, make):
    return lambda body: body.set_submodule(path, make())


def share(path, name):
    """In the second block what the first has there."""

    def change(body):
        first, second = (block.get_submodule(path) for block in body.blocks)
        setattr(second, name, getattr(first, name))

    return change


GELU, MLP, PROJECTION = "blocks.0.mlp.1", "blocks.0.mlp", "blocks.0.attention.proj"  # of 32, 8 and 8 features
UNKNOWN = {
    "a gain that acts on its neighbour": put(
        GELU, lambda: Own(lambda m, x: x * m.gain * m.gain.roll(1), gain=gain(32))
    ),
    "a layer called twice": put(MLP, lambda: Own(lambda m, x: m.linear(m.linear(x)), linear=nn.Linear(8, 8))),
    "a layer in two places": share("", "mlp"),
    "a shared weight": share("attention.proj", "weight"),
    "a layer that does a hundredth more than it seems to": put(PROJECTION, lambda: times(1.01)),
    "a layer of all tokens at once": put(PROJECTION, all_at_once),
    "a layer of two arguments": put(
        GELU, lambda: Own(lambda m, x: m.own(x, 2.0), own=Own(lambda m, x, scale: scale * x * m.gain, gain=gain(32)))
    ),
    "one of one argument that returns two things": put(GELU, lambda: Own(lambda m, x: m.own(x)[0], own=two_things(32))),
    "a table that is no embedding": put(
        "position_embedding", lambda: Own(lambda m, at: m.table[at], table=torch.randn(6, 8), num_embeddings=6)
    ),
    "a parametrized weight": lambda body: nn.utils.parametrize.register_parametrization(
        body.blocks[0].attention.proj, "weight", nn.Tanh()
    ),
    "a hook that ablates": lambda body: body.blocks[0].mlp[2].register_forward_hook(lambda module, x, y: 0.5 * y),
    "an embedding that ignores a token": lambda body: setattr(body.token_embedding, "padding_idx", 0),
}


def with_one_more(tokens, mask):
    """The same rows and one more token, which `influence` asks for."""
    return nn.functional.pad(tokens, (0, 1)), nn.functional.pad(mask, (0, 1))


def changed(change):
    torch.manual_seed(0)  # new layers draw from the global generator
    model = tiny_gpt(0)
    change(model.body)
    return model


@pytest.mark.parametrize("change", UNKNOWN.values(), ids=UNKNOWN)
def test_what_the_fast_way_does_not_know_is_left_to_the_definition_with_a_warning(change):
    """In both precisions the check notices it. And the model keeps its own parameters, also those of a module that is
    registered twice."""
    model = changed(change)
    tokens, mask = states(model, 2, 4, 0)
    assert (tokens == 0).any()
    before = [id(parameter) for parameter in model.parameters()]
    with pytest.warns(UserWarning, match="^the body is not all linear layers"):
        kernel = empirical_ntk(model, tokens, mask)
    assert_equal(kernel.gradient, oracle(model, tokens, mask))
    logit_change(model, tokens, mask, {})
    assert [id(parameter) for parameter in model.parameters()] == before
    for precise in (model.to(dtype) for dtype in (torch.float64, torch.float32)):
        with pytest.raises(ValueError, match="^the body is not all linear layers"):
            influence(precise, *with_one_more(tokens, mask), torch.ones(2))


def test_the_layer_that_is_not_known_is_named():
    model = changed(UNKNOWN["a table that is no embedding"])
    with pytest.raises(ValueError, match="each used once .Own position_embedding.$"):
        influence(model, *with_one_more(*states(model, 2, 4, 0)), torch.ones(2))


def raw_matrix():
    """A body without any layer."""
    return Own(lambda m, tokens: m.table[tokens].cumsum(dim=1), table=torch.randn(5, 8), blocks=())


def positions_first():
    """Its layer sees (T, B, d): in a block with as many states as positions that looks like (N, T, d)."""
    function = lambda m, tokens: m.layer(m.first(tokens).transpose(0, 1)).transpose(0, 1)  # noqa: E731
    return Own(function, first=raw_matrix(), layer=nn.Linear(8, 8), blocks=())


@pytest.mark.parametrize("make", [raw_matrix, positions_first])
@pytest.mark.parametrize("block", [1, 3, 4, 64])
def test_a_body_whose_layers_are_not_seen_falls_back_to_the_definition(make, block):
    torch.manual_seed(0)
    model = tiny_gpt(0)
    model.body = make()
    (tokens, mask), right = states(model, 3, 4, 0), states(model, 2, 5, 1)
    with pytest.warns(UserWarning, match="^the body is not all linear layers"):
        kernel = empirical_ntk(model, tokens, mask, *right, block=block)
    assert_equal(kernel.gradient, oracle(model, tokens, mask, *right))
    with pytest.raises(ValueError, match="^the body is not all linear layers"):
        influence(model, *with_one_more(tokens, mask), torch.ones(3), block=block)


def rms_norm(m, x):
    """As Gemma has it: 1 + w is the gain."""
    return x * x.square().mean(dim=-1, keepdim=True).rsqrt() * (1 + m.weight)


KNOWN = {
    "an RMS norm": put("blocks.0.attention_norm", lambda: nn.RMSNorm(8)),
    "an RMS norm of Gemma": put("norm", lambda: Own(rms_norm, weight=gain(8))),
    "a norm without bias": put("norm", lambda: nn.LayerNorm(8, bias=False)),
    "a norm without parameters": put("blocks.1.mlp_norm", lambda: nn.LayerNorm(8, elementwise_affine=False)),
    "a norm per head": put("blocks.1.attention_norm", lambda: per_head(nn.LayerNorm(4))),
    "a linear layer per head": put("blocks.1.attention.proj", lambda: per_head(nn.Linear(4, 4))),
    "a gain of another name": put(GELU, lambda: Own(lambda m, x: x * m.scale, scale=gain(32))),
    "a linear layer of GPT-2": put(
        "blocks.0.mlp.0",
        lambda: Own(lambda m, x: x @ m.weight + m.bias, weight=torch.randn(8, 32) / 4, bias=torch.randn(32)),
    ),
    "a layer without bias": put("blocks.0.mlp.0", lambda: nn.Linear(8, 32, bias=False)),
    "positions of one row": put("position_embedding", lambda: Positions(6, 8)),
    "a branch that is zero": lambda body: nn.init.zeros_(body.blocks[0].attention.proj.weight),
    "a last branch that is zero": lambda body: nn.init.zeros_(body.blocks[1].mlp[2].weight),
    "a frozen embedding": lambda body: body.token_embedding.requires_grad_(False),
}


@pytest.mark.parametrize("change", KNOWN.values(), ids=KNOWN)
def test_what_the_fast_way_does_know_needs_no_warning(change):
    """A warning fails a test. Float32 gives none: the check allows for its rounding."""
    model = changed(change)
    with torch.no_grad():
        for name, parameter in model.body.named_parameters():
            if name.endswith("norm.weight"):
                nn.init.normal_(parameter)
    tokens, mask = states(model, 2, 4, 0)
    single, kernel = (empirical_ntk(copy.deepcopy(model).to(dtype), tokens, mask) for dtype in (torch.float32, None))
    model.requires_grad_()
    assert_equal(kernel.gradient, oracle(model, tokens, mask))
    assert_equal(single.gradient.double(), kernel.gradient, 1e-4)


# ------------------------------------------------------------------------------------------------------ what is refused


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
def test_bad_states_are_refused_by_every_call(tokens, mask, message):
    model = tiny_gpt(0)
    for call in (
        lambda: empirical_ntk(model, tokens, mask),
        lambda: empirical_ntk(model, TOKENS, MASK, tokens, mask),
        lambda: logit_change(model, tokens, mask, {}),
    ):
        with pytest.raises(ValueError, match=message):
            call()


def every_call(model, tokens, mask):
    """All that differentiates a body, each as a function without arguments."""
    return (
        lambda: empirical_ntk(model, tokens, mask),
        lambda: logit_change(model, tokens, mask, {}),
        lambda: influence(model, tokens, mask & (torch.arange(mask.size(1)) < 3), torch.ones(len(tokens))),
    )


def test_where_nothing_can_be_differentiated_exactly_is_refused():
    """Half precision has too few digits to split; autocast would return a kernel in bfloat16 and say nothing."""
    for call in every_call(tiny_gpt(0).half(), TOKENS, MASK):
        with pytest.raises(ValueError, match="float32 or float64 without torch.autocast, .* torch.float16"):
            call()
    for call in every_call(tiny_gpt(0).float(), TOKENS, MASK):
        with torch.autocast("cpu"), pytest.raises(ValueError, match="without torch.autocast, and the model is in"):
            call()
        with torch.inference_mode(), pytest.raises(ValueError, match="use torch.no_grad"):
            call()


@pytest.mark.parametrize("layer", [nn.Dropout(0.1), Own(lambda m, x: x + 1e-3 * torch.randn_like(x))])
def test_a_random_body_is_refused(layer):
    """Else a kernel is that of one draw. Noise is dropout by another name, which no list of layers would know, and in
    eval() too."""
    model = tiny_gpt(0)
    model.body.blocks[0].mlp.append(layer)
    for call in every_call(model, TOKENS, MASK):
        with pytest.raises(ValueError, match=r"dropout is on: call model.eval\(\)"):
            call()
    model.body.blocks[0].mlp[-1] = nn.Dropout(0.1).eval()
    for call in every_call(model, TOKENS, MASK):
        call()


def test_a_body_that_keeps_its_features_has_a_kernel():
    """What it keeps is in a graph, so that copy.deepcopy refuses to copy the body."""
    model = tiny_gpt(0)
    tokens, mask = states(model, 2, 4, 0)
    model.body.norm = nn.Sequential(model.body.norm, Own(lambda m, x: setattr(m, "last", x) or x))
    model(tokens)
    with pytest.raises(RuntimeError, match="deepcopy"):
        copy.deepcopy(model)
    assert_equal(empirical_ntk(model, tokens, mask).gradient, oracle(model, tokens, mask))
    update = {name: torch.randn_like(p) for name, p in model.named_parameters()}
    change = torch.cat([update[f"body.{name}"].flatten() for name, _ in model.body.named_parameters()])
    J = gradients_of_logits(model, tokens, mask, list(model.body.parameters()))
    assert_equal(logit_change(model, tokens, mask, update)[1], J @ change)
    assert torch.equal(model(tokens), model(tokens))  # and it can be used as before


def test_half_a_second_set_and_a_bad_block_are_refused():
    for half in ((TOKENS, None), (None, MASK)):
        with pytest.raises(ValueError, match="go together"):
            empirical_ntk(tiny_gpt(0), TOKENS, MASK, *half)
    with pytest.raises(ValueError, match="block must be a whole number of at least 1, not 0"):
        empirical_ntk(tiny_gpt(0), TOKENS, MASK, block=0)
