"""The policy: what its features may depend on, and that sampling draws from the distribution that is differentiated."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tiny import ROUNDING, generator, seeds, tiny_gpt

from minicfrl import sequence_logp, token_logp
from model import GPT, GPTConfig, sample


def tokens_like(model, rows, length, seed):
    return torch.randint(model.config.vocab_size, (rows, length), generator=generator(seed))


@given(seed=seeds, position=st.integers(0, 5), n_layer=st.integers(1, 3), n_head=st.sampled_from([1, 2, 4]))
def test_no_state_sees_a_later_token(seed, position, n_layer, n_head):
    """Masked scores are -inf, so the weights of later positions are exactly 0 and earlier logits stay bit for bit."""
    model = tiny_gpt(seed, n_layer=n_layer, n_head=n_head)
    tokens = tokens_like(model, 2, 6, seed)
    changed = tokens.clone()
    changed[:, position] = (changed[:, position] + 1) % model.config.vocab_size
    before, after = model(tokens), model(changed)
    assert torch.equal(before[:, :position], after[:, :position])
    assert not torch.equal(before[:, position], after[:, position])


@given(seed=seeds, rows=st.integers(1, 4), prompt=st.integers(1, 4), samples=st.integers(1, 3))
def test_the_sampler_logits_are_the_full_forward_logits(seed, rows, prompt, samples):
    """With the key-value cache a state's keys and values are those of the full forward, up to rounding."""
    model = tiny_gpt(seed)
    prompts = tokens_like(model, rows, prompt, seed)
    tokens, _, logits = sample(model, prompts, 6 - prompt, 0, generator(seed), samples)
    assert torch.equal(tokens[:, :prompt], prompts.repeat_interleave(samples, dim=0))
    torch.testing.assert_close(logits, model(tokens)[:, prompt - 1 : -1], rtol=ROUNDING, atol=ROUNDING)


def test_the_sampler_logits_are_the_full_forward_logits_in_float32():
    """The same in the precision that training runs in: 1e-5 is some hundred roundings of numbers of order 1."""
    model = tiny_gpt(0, block_size=16, n_embd=64).float()
    tokens, _, logits = sample(model, tokens_like(model, 64, 6, 0), 10, 0, generator(0))
    torch.testing.assert_close(logits, model(tokens)[:, 5:-1], rtol=1e-5, atol=1e-5)
    logp = token_logp(logits, tokens[:, 6:])
    torch.testing.assert_close(logp, sequence_logp(model, tokens)[:, 5:], rtol=1e-5, atol=1e-5)


@given(seed=seeds, rows=st.integers(1, 6))
def test_the_mask_credits_the_first_end_token_and_nothing_after_it(seed, rows):
    """Rebuilt here from the tokens alone: the response is what comes up to the first end token, which is its last."""
    model = tiny_gpt(seed, vocab_size=3)
    tokens, mask, _ = sample(model, tokens_like(model, rows, 2, seed), 4, 2, generator(seed))
    for row, marks in zip(tokens.tolist(), mask.tolist(), strict=True):
        response = row[2:]
        length = response.index(2) + 1 if 2 in response else len(response)
        assert marks == [False] * 2 + [True] * length + [False] * (len(response) - length)
        assert all(token == 2 for token in response[length:])


@given(seed=seeds)
def test_without_a_generator_the_most_likely_token_is_taken(seed):
    model = tiny_gpt(seed)
    tokens, mask, logits = sample(model, tokens_like(model, 3, 2, seed), 4, 0)
    chosen = mask[:, 2:]
    assert torch.equal(tokens[:, 2:][chosen], logits.argmax(dim=-1)[chosen])


def test_sampling_frequencies_match_the_policy():
    """20,000 draws of one token: each frequency lies within 5 standard errors of its probability."""
    model = tiny_gpt(1)
    tokens, _, logits = sample(model, torch.zeros(20_000, 1, dtype=torch.long), 1, 0, generator(0))
    probabilities = logits[0, -1].softmax(dim=-1)
    frequencies = tokens[:, 1].bincount(minlength=5) / len(tokens)
    assert ((frequencies - probabilities).abs() < 5 * (probabilities / len(tokens)).sqrt()).all()


@given(seed=seeds)
def test_forward_mode_derivatives_agree_with_finite_differences(seed):
    """jvp of the logits along a random direction, against a central difference with step 1e-5."""
    model = tiny_gpt(seed)
    tokens = tokens_like(model, 2, 5, seed)
    parameters = {name: p.detach() for name, p in model.named_parameters()}
    direction = {name: torch.randn(p.shape, generator=generator(seed)) for name, p in parameters.items()}

    def logits(weights):
        return torch.func.functional_call(model, weights, (tokens,))

    _, tangent = torch.func.jvp(logits, (parameters,), (direction,))
    step = 1e-5
    ahead, behind = ({n: p + s * direction[n] for n, p in parameters.items()} for s in (step, -step))
    difference = (logits(ahead) - logits(behind)) / (2 * step)
    # A LayerNorm of small variance is sharply curved, which costs the difference digits.
    torch.testing.assert_close(tangent, difference, rtol=1e-4, atol=1e-4 * tangent.abs().max().item())


@given(seed=seeds, n_layer=st.integers(1, 3), n_head=st.sampled_from([1, 2, 4]))
def test_the_forward_pass_is_gpt_2_s(seed, n_layer, n_head):
    """Written out once more for one row, head by head and position by position, from the definition of GPT-2."""
    model = tiny_gpt(seed, n_layer=n_layer, n_head=n_head)
    w = dict(model.named_parameters())
    row = tokens_like(model, 1, 6, seed)[0]
    d = model.config.n_embd // n_head

    def norm(x, name):
        variance = ((x - x.mean()) ** 2).mean()
        return (x - x.mean()) / (variance + 1e-5).sqrt() * w[f"{name}.weight"] + w[f"{name}.bias"]

    def linear(x, name):
        return w[f"{name}.weight"] @ x + w[f"{name}.bias"]

    def gelu(x):
        return x * 0.5 * (1 + torch.erf(x / 2**0.5))

    xs = [w["body.token_embedding.weight"][t] + w["body.position_embedding.weight"][i] for i, t in enumerate(row)]
    for block in (f"body.blocks.{i}" for i in range(n_layer)):
        qkv = [linear(norm(x, f"{block}.attention_norm"), f"{block}.attention.qkv").chunk(3) for x in xs]
        for t in range(len(xs)):
            heads = []
            for h in (slice(d * i, d * i + d) for i in range(n_head)):
                scores = torch.stack([qkv[t][0][h] @ qkv[s][1][h] / d**0.5 for s in range(t + 1)])
                heads.append(sum(p * qkv[s][2][h] for s, p in enumerate(scores.softmax(dim=0))))
            xs[t] = xs[t] + linear(torch.cat(heads), f"{block}.attention.proj")
        for t, x in enumerate(xs):
            hidden = gelu(linear(norm(x, f"{block}.mlp_norm"), f"{block}.mlp.0"))
            xs[t] = x + linear(hidden, f"{block}.mlp.2")
    logits = torch.stack([w["classifier.weight"] @ norm(x, "body.norm") for x in xs])
    torch.testing.assert_close(model(row[None])[0], logits, rtol=0, atol=1e4 * ROUNDING)


def test_classifier_and_body_split_the_parameters():
    """(E1): the body holds every parameter but W; W is untied, has no bias, and is all that maps features to logits."""
    model = tiny_gpt(0)
    body, everything = set(model.body.parameters()), set(model.parameters())
    assert everything - body == {model.classifier.weight}
    tokens = tokens_like(model, 2, 6, 0)
    assert torch.equal(model(tokens), model.features(tokens) @ model.classifier.weight.T)


def test_the_same_generator_gives_the_same_weights():
    first, second, other = (GPT(GPTConfig(5, 6), generator(seed)) for seed in (0, 0, 1))
    assert all(torch.equal(p, q) for p, q in zip(first.parameters(), second.parameters(), strict=True))
    assert not torch.equal(first.classifier.weight, other.classifier.weight)


@pytest.mark.parametrize(
    "sizes, message",
    [
        (dict(vocab_size=0, block_size=4), "vocab_size must be a whole number of at least 1, not 0"),
        (dict(vocab_size=5, block_size=2.5), "block_size must be a whole number of at least 1, not 2.5"),
        (dict(vocab_size=5, block_size=4, n_embd=10), "n_embd=10 is not divisible by n_head=4"),
    ],
)
def test_unusable_sizes_are_refused(sizes, message):
    with pytest.raises(ValueError, match=message):
        GPTConfig(**sizes)


def test_tokens_beyond_block_or_vocabulary_are_refused():
    model = tiny_gpt(0)
    with pytest.raises(ValueError, match="7 tokens are more than block_size=6"):
        model(torch.zeros(1, 7, dtype=torch.long))
    with pytest.raises(ValueError, match="token 5 is outside the vocabulary of 5"):
        sequence_logp(model, torch.tensor([[0, 5]]))
    with pytest.raises(ValueError, match="token -1 is outside the vocabulary of 5"):
        sample(model, torch.tensor([[-1]]), 1, 0)
    with pytest.raises(ValueError, match="end token 5 is outside the vocabulary"):
        sample(model, torch.tensor([[0]]), 1, 5)
    with pytest.raises(ValueError, match="prompt_tokens must be .*not 0"):
        sample(model, torch.zeros(1, 0, dtype=torch.long), 1, 0)
    with pytest.raises(ValueError, match=r"tokens must be \(B, T\) int64, not \(2,\) torch.int64"):
        sequence_logp(model, torch.tensor([0, 1]))


def test_sampling_stops_at_logits_that_are_not_finite():
    model = tiny_gpt(0)
    with torch.no_grad():
        model.classifier.weight[0, 0] = float("nan")
    with pytest.raises(FloatingPointError, match="logits are not finite"):
        sample(model, torch.zeros(1, 1, dtype=torch.long), 1, 0, generator(0))
