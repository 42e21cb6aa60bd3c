"""What the properties draw: policies, batches, states, advantages, rewards, logits. Read it before the tests.

Three rules. What a claim is about is drawn as data (shapes, lengths, tokens, advantages), so that hypothesis can shrink
it; a seed draws weights alone, because a smaller weight is no simpler. What is invalid is never made, so nothing is
thrown away: lengths come first, and masks from them; a lead comes first, and the likeliest token from it. And a Batch
or a Policy prints as the call that makes it again. (A tensor prints four digits, so that a small lead looks like a tie;
the line with @reproduce_failure is exact.) Let `policy_gradient_loss` (E3) divide each part of a batch by its own count
of tokens, and hypothesis finds two responses of one token, one of them with an advantage, and a cut between them. It
prints, here shortened:

    Failing test case: test_the_gradient_does_not_depend_on_the_micro_batch_split(
        batch=Batch(policy=Policy(V=2, T=4, layers=1, heads=1, d=4, tied=False, seed=0),
         prompt=1,
         responses=((0,), (0,)),
         advantages=(0.0, 1.0)),
        data=data(...),
    )
    Draw 1: {1}
"""

import functools
from dataclasses import dataclass

import torch
from hypothesis import strategies as st
from tiny import seeds, tiny_gpt

numbers = st.floats(-4, 4, width=32, allow_subnormal=False)
one_advantage = st.sampled_from((0.0, 1.0, -1.0)) | numbers
steps = st.floats(1e-3, 10)  # positive weights c of a push: step size times advantage times inner product


def vectors(size, elements=numbers):
    """(size,) of such numbers."""
    return st.lists(elements, min_size=size, max_size=size).map(torch.tensor)


# ------------------------------------------------------------------------------------------------------------- policies


@dataclass(frozen=True)
class Policy:
    """A tiny GPT: its sizes, and the seed of its weights, which are large enough that no distribution is near uniform.
    Tied, its classifier is its token embedding."""

    V: int
    T: int = 8
    layers: int = 1
    heads: int = 1
    d: int = 4
    tied: bool = False
    seed: int = 0

    @functools.cached_property
    def model(self):
        model = tiny_gpt(self.seed, self.V, self.T, self.layers, self.heads, self.d)
        if self.tied:
            model.classifier.weight = model.body.token_embedding.weight
        return model


@st.composite
def policies(draw, T=8, V=None):
    """Of T positions, one or two blocks and heads, 4 or 8 features, 2 to 6 tokens: fewer than the features and more."""
    V = V or draw(st.integers(2, 6))
    layers, heads, d = draw(st.integers(1, 2)), draw(st.integers(1, 2)), draw(st.sampled_from((4, 8)))
    return Policy(V, T, layers, heads, d, seed=draw(seeds))


@st.composite
def policies_and_states(draw, sides=1, rows=3, longest=5, most=4):
    """A policy, and for each side the tokens (B, T) of some rows and a mask of 1 to `most` of their positions,
    often several in a row. Sides differ in rows, lengths and numbers of states."""
    policy, drawn = draw(policies(T=longest)), []
    for _ in range(sides):
        B, T = draw(st.integers(1, rows)), draw(st.integers(1, longest))
        tokens = torch.tensor(draw(st.lists(st.integers(0, policy.V - 1), min_size=B * T, max_size=B * T)))
        mask = torch.zeros(B * T, dtype=torch.bool)
        mask[sorted(draw(st.sets(st.integers(0, B * T - 1), min_size=1, max_size=most)))] = True
        drawn += [tokens.view(B, T), mask.view(B, T)]
    return policy, *drawn


# -------------------------------------------------------------------------------------------------------------- batches


@dataclass(frozen=True)
class Batch:
    """Responses as tokens, after prompts of `prompt` tokens; their advantages; a policy that may sample them."""

    policy: Policy
    prompt: int
    responses: tuple
    advantages: tuple

    @property
    def model(self):
        return self.policy.model

    @functools.cached_property
    def tokens(self):
        """(B, T): the prompts' tokens count up, row by row; what follows a response is token 0."""
        tokens = torch.zeros(len(self.responses), self.prompt + max(map(len, self.responses)), dtype=torch.int64)
        for row, response in enumerate(self.responses):
            tokens[row, : self.prompt] = (row + torch.arange(self.prompt)) % self.policy.V
            tokens[row, self.prompt : self.prompt + len(response)] = torch.tensor(response)
        return tokens

    @functools.cached_property
    def mask(self):
        """(B, T): the tokens of the responses."""
        position, lengths = torch.arange(self.tokens.size(1)), torch.tensor([*map(len, self.responses)])
        return (position >= self.prompt) & (position < self.prompt + lengths[:, None])

    @property
    def states(self):
        """(B, T): the states that chose them, one position earlier."""
        return torch.nn.functional.pad(self.mask[:, 1:], (0, 1))

    @property
    def A(self):
        """(B,)"""
        return torch.tensor(self.advantages)

    @property
    def parts(self):
        """All that a loss takes."""
        return self.tokens, self.mask, self.A


@st.composite
def batches(draw, rows=(1, 6), longest=3, advantages=one_advantage):
    """One to six ragged responses of one to three tokens, after prompts of one to three. Often some
    advantages are 0, often all are equal, and sometimes all are 0. Then nothing is learned, and a claim must hold there
    too."""
    prompt = draw(st.integers(1, 3))
    policy = draw(policies(T=prompt + longest))
    response = st.lists(st.integers(0, policy.V - 1), min_size=1, max_size=longest).map(tuple)
    drawn = draw(st.lists(st.tuples(response, advantages), min_size=rows[0], max_size=rows[1]))
    responses, A = zip(*drawn, strict=True)
    return Batch(policy, prompt, responses, A[:1] * len(A) if draw(st.booleans()) else A)


# ------------------------------------------------------------------------------------------------- rewards, and logits


@st.composite
def rewards(draw, groups=(1, 4), samples=(1, 8)):
    """(P, S): groups of equal rewards, of two values, of any eighths, and of other magnitudes side by side. Sums of
    eighths are exact, and so is a scale that is a power of two: what differs then is no rounding."""
    least, most = samples
    eighths = st.integers(-80, 80).map(lambda n: n / 8)
    group = st.one_of(*(st.lists(one, min_size=least, max_size=most) for one in (st.sampled_from((0.0, 1.0)), eighths)))
    group = eighths.map(lambda reward: [reward] * most) | group
    scale = st.sampled_from((1.0, 2.0**-30, 2.0**30))
    drawn = draw(st.lists(st.tuples(group, scale), min_size=groups[0], max_size=groups[1]))
    S = min(len(group) for group, _ in drawn)  # all are cut to the shortest, so that each shrinks by itself
    return torch.stack([torch.tensor(group[:S], dtype=torch.float64) * unit for group, unit in drawn])


@st.composite
def logits(draw, states=1, bound=5.0, V=(2, 6)):
    """(states, V) over one vocabulary, or (V,) of one state: within +-bound, often with ties or at the bound."""
    size = draw(st.integers(*V))
    values = st.sampled_from((0.0, bound, -bound)) | st.floats(-bound, bound, width=32, allow_subnormal=False)
    drawn = torch.stack([draw(vectors(size, values)).double() for _ in range(states)])
    return drawn if states > 1 else drawn[0]


@st.composite
def logits_and_token(draw, states=1, bound=5.0, V=(2, 6)):
    """Such logits, and one of the tokens."""
    drawn = draw(logits(states, bound, V))
    return drawn, draw(st.integers(0, drawn.size(-1) - 1))


@st.composite
def led_logits(draw, bound=5.0, V=(2, 6), least=2.0**-7):
    """(V,) with one likeliest token m, which leads by `least` or more; m; and one of the other tokens."""
    rest, lead = draw(logits(1, bound, (V[0] - 1, V[1] - 1))), draw(st.floats(least, bound, width=32))
    m, other = draw(st.integers(0, len(rest))), draw(st.integers(0, len(rest) - 1))
    return torch.cat((rest[:m], (rest.max() + lead).view(1), rest[m:])), m, other + (other >= m)
