"""Who teaches whom (E10): against the kernel itself, against autograd token by token, and what is refused. That its
column sums are what a step does is a claim of test_one_update.py."""

from unittest.mock import patch

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from profiles import dear
from strategies import Batch, Policy, batches, vectors
from tiny import ROUNDING
from torch.utils._python_dispatch import TorchDispatchMode

import fast_ntk
from model import residuals
from ntk import empirical_ntk, influence

tiles = st.integers(1, 6).map(lambda size: patch.object(fast_ntk, "TILE", size))


def influence_of(batch, block=256):
    return influence(batch.model, batch.tokens, batch.states, batch.A, block)


def assert_equal(actual, expected):
    """Both are exact: 1e-10 leaves room for sums over some thousand parameters."""
    for one, other in zip(actual, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-10, atol=1e-10)


@dear
@given(batch=batches(rows=(1, 3)), block=st.integers(1, 20), tile=tiles)
def test_influence_is_the_kernel_between_residuals_whatever_the_block_and_the_tile(batch, block, tile):
    """Entry by entry A_i r_j^T K(x_j, x_i) r_i, with K from empirical_ntk, which never forms a token's gradient."""
    kernel = empirical_ntk(batch.model, batch.tokens, batch.states)
    row, t = batch.states.nonzero(as_tuple=True)
    r = residuals(batch.model(batch.tokens)[batch.states].detach(), batch.tokens[row, t + 1])
    R = torch.einsum("jv,ji,iv,i->ij", r, kernel.representation, r, batch.A[row])
    with tile:
        parts = influence_of(batch, block)
    assert_equal(parts, (R, torch.einsum("jv,jviw,iw,i->ij", r, kernel.gradient, r, batch.A[row])))


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
    batch, largest = Batch(Policy(V=5, d=32), 2, ((0, 1, 2, 3),) * 12, (1.0,) * 12), []
    numbers = int(batch.states.sum()) * sum(p.numel() for p in batch.model.body.parameters())
    for block in (32, 8):
        with Largest() as seen:
            influence_of(batch, block)
        largest.append(seen.numbers)
    assert largest[0] < numbers / 8 and largest[1] < numbers / 16


@given(batch=batches())
def test_a_token_teaches_itself_what_its_advantage_says(batch):
    """K(x, x) is positive semidefinite, so r^T K r >= 0: each part of (i, i) has the sign of A_i. Rows without an
    advantage teach nothing."""
    A = batch.A[batch.states.nonzero(as_tuple=True)[0]]
    for part in influence_of(batch):
        assert (part.diagonal() * A >= -ROUNDING).all()
        assert not part[A == 0].any()


@dear
@given(batch=batches(rows=(1, 4)), data=st.data())
def test_influence_does_not_depend_on_what_is_frozen_or_on_the_vocabulary_s_gauge(batch, data):
    """The body's requires_grad does not matter, and W + 1 v^T is the same policy: 1^T r = 0."""
    parts = influence_of(batch)
    with torch.no_grad():
        batch.model.classifier.weight += data.draw(vectors(batch.policy.d))
    batch.model.body.requires_grad_(False)
    for part, again in zip(parts, influence_of(batch), strict=True):
        torch.testing.assert_close(again, part, rtol=1e-9, atol=1e-9)


@dear
@given(batch=batches(rows=(1, 4)), data=st.data())
def test_a_permutation_of_the_rows_permutes_who_teaches_whom(batch, data):
    """A pair of tokens is compared whatever stands around it."""
    order = torch.tensor(data.draw(st.permutations(range(len(batch.A)))))
    place = torch.zeros_like(batch.tokens)
    place[batch.states] = torch.arange(int(batch.states.sum()))
    states = batch.states[order]
    again, old = influence(batch.model, batch.tokens[order], states, batch.A[order]), place[order][states]
    assert_equal(again, [part[old][:, old] for part in influence_of(batch)])


def test_what_influence_cannot_do_is_refused():
    model, tokens = Policy(V=5).model, torch.zeros(2, 4, dtype=torch.long)
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
