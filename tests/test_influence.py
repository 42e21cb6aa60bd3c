"""Who teaches whom (E10): against the kernel itself, against a real step, and what is refused."""

import copy
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tiny import generator, random_batch, seeds, tiny_gpt
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from minicfrl import policy_gradient_loss, sequence_logp
from model import residuals
from ntk import empirical_ntk, influence


def batch_of_states(seed, **sizes):
    """A policy, tokens, the states that chose the response tokens, and the rows' advantages."""
    model, tokens, mask, advantages = random_batch(seed, **sizes)
    return model, tokens, mask, torch.cat((mask[:, 1:], torch.zeros_like(mask[:, :1])), dim=1), advantages


@given(seed=seeds, block=st.integers(1, 9))
def test_influence_is_the_kernel_between_residuals(seed, block):
    """Entry by entry A_i r_j^T K(x_j, x_i) r_i, with K from empirical_ntk, which never forms a token's gradient. Both
    are exact: 1e-10 leaves room for sums over some thousand parameters."""
    model, tokens, _, states, advantages = batch_of_states(seed)
    kernel = empirical_ntk(model, tokens, states)
    row, t = states.nonzero(as_tuple=True)
    r = residuals(model(tokens)[states].detach(), tokens[row, t + 1])
    R, G = influence(model, tokens, states, advantages, block)
    expected = torch.einsum("jv,jviw,iw,i->ij", r, kernel.gradient, r, advantages[row])
    torch.testing.assert_close(G, expected, rtol=1e-10, atol=1e-10)
    expected = torch.einsum("jv,ji,iv,i->ij", r, kernel.representation, r, advantages[row])
    torch.testing.assert_close(R, expected, rtol=1e-10, atol=1e-10)


class Bag(nn.Module):
    """No GPT: the mean of the tokens so far, positions of one row for all, an RMS norm, and no attention."""

    def __init__(self, vocab_size, d):
        super().__init__()
        self.tokens, self.positions = nn.Embedding(vocab_size, d), nn.Embedding(9, d)
        self.norm, self.linear, self.last = nn.RMSNorm(d), nn.Linear(d, 2 * d), nn.Linear(2 * d, d, bias=False)

    def forward(self, tokens):
        T = tokens.size(1)
        x = (self.tokens(tokens) + self.positions(torch.arange(T))).cumsum(dim=1) / torch.arange(1, T + 1)[:, None]
        return x + self.last(torch.tanh(self.linear(self.norm(x))))


class OtherModel(nn.Module):
    def __init__(self, vocab_size=11, d=6):
        super().__init__()
        self.config = SimpleNamespace(vocab_size=vocab_size)
        self.body, self.classifier = Bag(vocab_size, d), nn.Linear(d, vocab_size, bias=False)

    def features(self, tokens):
        return self.body(tokens)

    def forward(self, tokens):
        return self.classifier(self.features(tokens))


@given(seed=seeds, block=st.integers(1, 30), length=st.sampled_from([3, 9]))
def test_influence_is_the_inner_product_of_any_body_s_gradients_token_by_token(seed, block, length):
    """Against one autograd.grad per token, in float64, on a body that is no GPT."""
    torch.manual_seed(seed)
    model = OtherModel().double()
    nn.init.normal_(model.body.norm.weight)
    tokens, advantages = torch.randint(11, (3, length)), torch.randn(3, dtype=torch.float64)
    states = torch.rand(3, length) < 0.6
    states[:, -1], states[0, 0] = False, True
    row, t = states.nonzero(as_tuple=True)
    logp = sequence_logp(model, tokens)[row, t]
    for part, parameters in zip(
        influence(model, tokens, states, advantages, block),
        (model.classifier.parameters(), model.body.parameters()),
        strict=True,
    ):
        parameters = list(parameters)
        gradients = [torch.autograd.grad(each, parameters, retain_graph=True) for each in logp]
        J = torch.stack([torch.cat([part.flatten() for part in gradient]) for gradient in gradients])
        torch.testing.assert_close(part, advantages[row, None] * (J @ J.T), rtol=1e-10, atol=1e-10)


class Largest(TorchDispatchMode):
    """The most numbers that any tensor has which is computed meanwhile."""

    numbers = 0

    def __torch_dispatch__(self, function, types, arguments=(), keywords=None):
        result = function(*arguments, **keywords or {})
        for x in result if isinstance(result, (tuple, list)) else [result]:
            if isinstance(x, torch.Tensor):
                self.numbers = max(self.numbers, x.untyped_storage().nbytes() // x.element_size())
        return result


def test_influence_never_holds_all_tokens_gradients():
    """Nothing is near as many numbers as N tokens' gradients have, and less with smaller blocks."""
    model, tokens, _, states, advantages = batch_of_states(0, rows=30, length=6, model=tiny_gpt(0, 5, 8, 1, 1, 32))
    N, parameters = int(states.sum()), sum(p.numel() for p in model.body.parameters())
    largest = []
    for block in (64, 16):
        with Largest() as seen:
            influence(model, tokens, states, advantages, block)
        largest.append(seen.numbers)
    assert largest[0] < N * parameters / 8 and largest[1] < N * parameters / 16


def measured(model, tokens, mask, advantages, lr):
    """The change of every sampled token's log-probability in one SGD step of size lr on (E3) times its token count."""
    after = copy.deepcopy(model)
    loss = policy_gradient_loss(sequence_logp(after, tokens), advantages, mask[:, 1:]) * mask.sum()
    loss.backward()
    torch.optim.SGD(after.parameters(), lr).step()
    with torch.no_grad():
        return (sequence_logp(after, tokens) - sequence_logp(model, tokens))[mask[:, 1:]]


@given(seed=seeds)
def test_its_column_sums_are_what_one_sgd_step_does_up_to_second_order(seed):
    """Half the step, a quarter of the error: 4 but for the third order, which is under a tenth where the change itself
    is 1e-4 nats. The step is backward()'s, so a parameter that the derivatives left out would show."""
    model, tokens, mask, states, advantages = batch_of_states(seed)
    R, G = influence(model, tokens, states, advantages)
    predicted = (R + G).sum(dim=0)
    rates = [change / predicted.norm() for change in (2e-4, 1e-4)]
    errors = [(measured(model, tokens, mask, advantages, lr) - lr * predicted).norm() for lr in rates]
    assert 3.6 < errors[0] / errors[1] < 4.4
    assert errors[1] < 0.05 * 1e-4  # and the first order is right, not only its trend


@given(seed=seeds)
def test_a_token_teaches_itself_what_its_advantage_says(seed):
    """K(x, x) is positive semidefinite, so r^T K r >= 0: each part of (i, i) has the sign of A_i. Rows without an
    advantage teach nothing."""
    model, tokens, _, states, advantages = batch_of_states(seed)
    advantages[0] = 0.0
    row = states.nonzero(as_tuple=True)[0]
    for part in influence(model, tokens, states, advantages):
        assert (part.diagonal() * advantages[row] >= 0).all()
        assert not part[row == 0].any()


@given(seed=seeds)
def test_influence_does_not_depend_on_what_is_frozen_or_on_the_vocabulary_s_gauge(seed):
    """The body's requires_grad does not matter, and W + 1 v^T is the same policy: 1^T r = 0."""
    model, tokens, _, states, advantages = batch_of_states(seed)
    parts = influence(model, tokens, states, advantages)
    with torch.no_grad():
        model.classifier.weight += torch.randn(model.classifier.weight.size(1), generator=generator(seed))
    model.body.requires_grad_(False)
    for part, again in zip(parts, influence(model, tokens, states, advantages), strict=True):
        torch.testing.assert_close(again, part, rtol=1e-9, atol=1e-9)


def test_what_influence_cannot_do_is_refused():
    model, tokens = tiny_gpt(0), torch.zeros(2, 4, dtype=torch.long)
    mask = torch.zeros(2, 4, dtype=torch.bool)
    with pytest.raises(ValueError, match="mask selects no state"):
        influence(model, tokens, mask, torch.ones(2))
    mask[0, 1] = True
    with pytest.raises(ValueError, match=r"advantages \(3,\) do not fit tokens \(2, 4\)"):
        influence(model, tokens, mask, torch.ones(3))
    with pytest.raises(ValueError, match="block must be a whole number of at least 1, not 0"):
        influence(model, tokens, mask, torch.ones(2), block=0)
    mask[1, 3] = True
    with pytest.raises(ValueError, match="mask selects the last position, which no token follows"):
        influence(model, tokens, mask, torch.ones(2))
