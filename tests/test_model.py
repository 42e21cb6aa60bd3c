"""The policy: what its features may depend on, and that sampling draws from the distribution that is differentiated."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, precondition, rule
from strategies import policies, seeds
from tiny import ROUNDING, generator, tiny_gpt

from minicfrl import sequence_logp
from model import GPT, GPTConfig, sample


@st.composite
def rows_of(draw, policy, rows=(1, 3), length=(1, 8)):
    """Tokens (B, T) of a policy, each drawn, so that they shrink to zeros."""
    B, T = draw(st.integers(*rows)), draw(st.integers(*length))
    return torch.tensor(draw(st.lists(st.integers(0, policy.V - 1), min_size=B * T, max_size=B * T))).view(B, T)


@st.composite
def policies_and_tokens(draw, T=8, **shape):
    policy = draw(policies(T=T))
    return policy.model, draw(rows_of(policy, **shape))


@given(drawn=policies_and_tokens(), data=st.data())
def test_no_state_sees_a_later_token(drawn, data):
    """Masked scores are -inf, so the weights of later positions are exactly 0 and earlier logits stay bit for bit."""
    model, tokens = drawn
    position = data.draw(st.integers(0, tokens.size(1) - 1))
    changed = tokens.clone()
    changed[:, position] = (changed[:, position] + 1) % model.config.vocab_size
    before, after = model(tokens), model(changed)
    assert torch.equal(before[:, :position], after[:, :position])
    assert not torch.equal(before[:, position], after[:, position])


class Cache(RuleBasedStateMachine):
    """Chunks of any lengths, appended to a cache, have the features and logits of one forward pass over all of them.

    A state machine is worth its lines where what a call does depends on the calls before it. The cache is such a state.
    The sampler reads it in one order alone, a prompt and then token after token, so that an example of sampling never
    sees two tokens continue a cache, nor rows copied in the middle. Here hypothesis chooses the calls. The model
    of what is right is a plain tensor of all tokens, read anew each time. A failure shrinks to the fewest calls.
    """

    @initialize(policy=policies(), data=st.data())
    def start(self, policy, data):
        self.policy, self.cache = policy, [[] for _ in policy.model.body.blocks]
        self.tokens = torch.zeros(data.draw(st.integers(1, 3)), 0, dtype=torch.long)  # (B, 0)

    def room(self):
        return self.policy.T - self.tokens.size(1)

    def draw_chunk(self, data, *length):
        B = len(self.tokens)
        return data.draw(rows_of(self.policy, (B, B), length))

    @precondition(lambda self: self.room())
    @rule(data=st.data())
    def append(self, data):
        """Two orders of adding the same numbers: rounding."""
        model, chunk = self.policy.model, self.draw_chunk(data, 1, min(self.room(), 4))
        self.tokens = torch.cat((self.tokens, chunk), dim=1)
        phi, whole = model.body(chunk, self.cache), model.features(self.tokens)[:, -chunk.size(1) :]
        torch.testing.assert_close(phi, whole, rtol=0, atol=100 * ROUNDING)
        logits = model(self.tokens)[:, -chunk.size(1) :]
        torch.testing.assert_close(model.classifier(phi), logits, rtol=0, atol=100 * ROUNDING)

    @precondition(lambda self: 0 < self.tokens.size(1) and len(self.tokens) < 6)
    @rule()
    def copy_every_row(self):
        """As `sample` does with a prompt's rows, whose samples then differ."""
        self.tokens = self.tokens.repeat_interleave(2, dim=0)
        for block in self.cache:
            block[:] = (each.repeat_interleave(2, dim=0) for each in block)

    @rule(data=st.data())
    def overflow(self, data):
        """A chunk that is one token too long is refused, and leaves the cache as it was."""
        chunk = self.draw_chunk(data, self.room() + 1, self.room() + 1)
        with pytest.raises(ValueError, match=f"{self.policy.T + 1} tokens are more than block_size={self.policy.T}"):
            self.policy.model.body(chunk, self.cache)


TestCache = Cache.TestCase
TestCache.settings = settings(stateful_step_count=8)


@given(drawn=policies_and_tokens(T=6, length=(1, 5)), samples=st.integers(1, 3), seed=seeds)
def test_the_sampler_logits_are_the_full_forward_logits(drawn, samples, seed):
    """With the key-value cache a state's keys and values are those of the full forward, up to rounding."""
    model, prompts = drawn
    T0 = prompts.size(1)
    tokens, _, logits = sample(model, prompts, 6 - T0, 0, generator(seed), samples)
    assert torch.equal(tokens[:, :T0], prompts.repeat_interleave(samples, dim=0))
    torch.testing.assert_close(logits, model(tokens)[:, T0 - 1 : -1], rtol=ROUNDING, atol=100 * ROUNDING)


@given(drawn=policies_and_tokens(rows=(1, 4), length=(1, 4)), budget=st.integers(1, 4), seed=seeds, data=st.data())
def test_a_response_is_all_up_to_its_first_end_token_or_to_the_end_of_its_budget(drawn, budget, seed, data):
    """The mask is rebuilt from the tokens alone. A batch is as long as its longest response."""
    model, prompts = drawn
    end, T0 = data.draw(st.integers(0, model.config.vocab_size - 1)), prompts.size(1)
    tokens, mask, logits = sample(model, prompts, budget, end, generator(seed), samples=2)
    lengths = []
    for row, marks in zip(tokens[:, T0:].tolist(), mask.tolist(), strict=True):
        lengths.append(row.index(end) + 1 if end in row else budget)
        assert marks == [False] * T0 + [t < lengths[-1] for t in range(len(row))]
        assert all(token == end for token in row[lengths[-1] :])
    assert tokens.size(1) - T0 == logits.size(1) == max(lengths)


@given(drawn=policies_and_tokens(rows=(1, 4), length=(1, 4)))
def test_without_a_generator_the_most_likely_token_is_taken(drawn):
    model, prompts = drawn
    tokens, mask, logits = sample(model, prompts, 4, 0)
    chosen = mask[:, prompts.size(1) :]
    assert torch.equal(tokens[:, prompts.size(1) :][chosen], logits.argmax(dim=-1)[chosen])


def test_sampling_frequencies_match_the_policy():
    """20,000 draws of one token: each frequency lies within 5 standard errors of its probability."""
    model = tiny_gpt(1)
    tokens, _, logits = sample(model, torch.zeros(20_000, 1, dtype=torch.long), 1, 0, generator(0))
    probabilities = logits[0, -1].softmax(dim=-1)
    frequencies = tokens[:, 1].bincount(minlength=5) / len(tokens)
    assert ((frequencies - probabilities).abs() < 5 * (probabilities * (1 - probabilities) / len(tokens)).sqrt()).all()


@given(drawn=policies_and_tokens(rows=(1, 1)))
def test_the_forward_pass_is_gpt_2_s(drawn):
    """Written out again for one row, head by head and position by position: GPT-2, with the exact GELU. A
    LayerNorm of small variance magnifies rounding: 1e-8."""
    model, (row,) = drawn
    w = dict(model.named_parameters())
    d = model.config.n_embd // model.config.n_head

    def norm(x, name):
        variance = ((x - x.mean()) ** 2).mean()
        return (x - x.mean()) / (variance + 1e-5).sqrt() * w[f"{name}.weight"] + w[f"{name}.bias"]

    def linear(x, name):
        return w[f"{name}.weight"] @ x + w[f"{name}.bias"]

    def gelu(x):
        return x * 0.5 * (1 + torch.erf(x / 2**0.5))

    xs = [w["body.token_embedding.weight"][t] + w["body.position_embedding.weight"][i] for i, t in enumerate(row)]
    for block in (f"body.blocks.{i}" for i in range(model.config.n_layer)):
        qkv = [linear(norm(x, f"{block}.attention_norm"), f"{block}.attention.qkv").chunk(3) for x in xs]
        for t in range(len(xs)):
            heads = []
            for h in (slice(d * i, d * i + d) for i in range(model.config.n_head)):
                scores = torch.stack([qkv[t][0][h] @ qkv[s][1][h] / d**0.5 for s in range(t + 1)])
                heads.append(sum(p * qkv[s][2][h] for s, p in enumerate(scores.softmax(dim=0))))
            xs[t] = xs[t] + linear(torch.cat(heads), f"{block}.attention.proj")
        for t, x in enumerate(xs):
            hidden = gelu(linear(norm(x, f"{block}.mlp_norm"), f"{block}.mlp.0"))
            xs[t] = x + linear(hidden, f"{block}.mlp.2")
    logits = torch.stack([w["classifier.weight"] @ norm(x, "body.norm") for x in xs])
    torch.testing.assert_close(model(row[None])[0], logits, rtol=0, atol=1e4 * ROUNDING)


@given(policy=policies())
def test_the_body_holds_every_parameter_but_the_classifier(policy):
    """(E1): W is untied and has no bias."""
    assert set(policy.model.parameters()) - set(policy.model.body.parameters()) == {policy.model.classifier.weight}


@given(seed=seeds, n_layer=st.integers(1, 3))
def test_the_start_is_drawn_from_its_generator_alone_at_gpt_2_s_scales(seed, n_layer):
    """Matrices have standard deviation 0.1; of those that write into the residual stream there are 2 n_layer, and they
    share that variance. A standard deviation of n numbers is known to 1/sqrt(2n): six of those, because hypothesis
    draws many. Biases are 0, and gains 1."""
    config = GPTConfig(32, 32, n_layer, 2, 32)
    first, second, other = (GPT(config, generator(s)) for s in (seed, seed, seed + 1))
    for (name, p), q, r in zip(first.named_parameters(), second.parameters(), other.parameters(), strict=True):
        assert torch.equal(p, q)
        if p.ndim == 1:
            assert (p == (0.0 if name.endswith("bias") else 1.0)).all()
        else:
            scale = 0.1 / math.sqrt(2 * n_layer if name.endswith(("proj.weight", "mlp.2.weight")) else 1)
            assert not torch.equal(p, r) and abs(p.std() / scale - 1) < 6 / math.sqrt(2 * p.numel()), name


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


ONE = torch.tensor([[0]])


@pytest.mark.parametrize(
    "call, message",
    [
        (lambda model: model(torch.zeros(1, 7, dtype=torch.long)), "7 tokens are more than block_size=6"),
        (lambda model: sequence_logp(model, ONE + 5), "token 5 is outside the vocabulary of 5"),
        (lambda model: sample(model, ONE - 1, 1, 0), "token -1 is outside the vocabulary of 5"),
        (lambda model: sample(model, ONE, 1, 5), "end token 5 is outside the vocabulary"),
        (lambda model: sample(model, ONE, 0, 0), "max_new_tokens must be .*not 0"),
        (lambda model: sample(model, ONE[:, :0], 1, 0), "prompt_tokens must be .*not 0"),
        (lambda model: sequence_logp(model, ONE[0]), r"tokens must be \(B, T\) int64, not \(1,\) torch.int64"),
    ],
)
def test_tokens_beyond_block_or_vocabulary_are_refused(call, message):
    with pytest.raises(ValueError, match=message):
        call(tiny_gpt(0))
