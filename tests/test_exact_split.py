"""The exact split of a change of logits, in agreement with (E8)."""

import copy

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tiny import generator, tiny_gpt

from model import confidence, entropy
from ntk import exact_split, logit_change, split_effect


def drawn(seed, *shape, dtype=torch.float64):
    return torch.randn(*shape, generator=generator(seed), dtype=dtype)


@given(st.integers(0, 10**6), st.sampled_from([torch.float64, torch.float32, torch.bfloat16]))
def test_the_parts_add_up_to_what_happened(seed, dtype):
    """(W + dW)(phi + dphi) - W phi, multiplied out. In bfloat16 the differences are taken in float32, where those of
    the inputs are exact or nearly: 1e-5 is a few roundings of numbers below 30."""
    phi0, phi1 = (drawn(seed + i, 5, 4, dtype=dtype) for i in (0, 1))
    W0, W1 = (drawn(seed + i, 7, 4, dtype=dtype) for i in (2, 3))
    parts = exact_split(phi0, W0, phi1, W1)
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    happened = phi1.to(wide) @ W1.to(wide).T - phi0.to(wide) @ W0.to(wide).T
    assert {part.dtype for part in parts} == {wide}
    torch.testing.assert_close(sum(parts), happened, rtol=0, atol=1e-12 if wide == torch.float64 else 1e-5)


def test_each_part_is_what_its_own_move_does():
    """With W at rest only the body's part is there, and the other way round; both move the cross term alone."""
    phi0, phi1, W0, W1 = drawn(0, 5, 4), drawn(1, 5, 4), drawn(2, 7, 4), drawn(3, 7, 4)
    (by_W, body, cross), nothing = exact_split(phi0, W0, phi0, W1), torch.zeros(5, 7)
    torch.testing.assert_close((by_W, body, cross), (phi0 @ (W1 - W0).T, nothing, nothing))
    by_W, body, cross = exact_split(phi0, W0, phi1, W0)
    torch.testing.assert_close((by_W, body, cross), (nothing, (phi1 - phi0) @ W0.T, nothing))
    torch.testing.assert_close(exact_split(phi0, W0, phi1, W1)[2], (phi1 - phi0) @ (W1 - W0).T)


def test_the_first_two_parts_are_those_of_logit_change_up_to_second_order():
    """ntk.logit_change (E8) is their first order in the step. Halve the step, and the difference in the body's part is
    a quarter; that in W's part is none at all, for f is linear in W."""
    model, tokens = tiny_gpt(0), torch.randint(5, (3, 6), generator=generator(1))
    mask = torch.ones_like(tokens, dtype=torch.bool)
    direction = {name: drawn(i, *p.shape) for i, (name, p) in enumerate(model.named_parameters())}
    gaps = []
    for step in (2e-3, 1e-3):
        update = {name: step * d for name, d in direction.items()}
        after = copy.deepcopy(model)
        with torch.no_grad():
            for name, p in after.named_parameters():
                p += update[name]
            states = [(m.features(tokens)[mask], m.classifier.weight) for m in (model, after)]
            through_W, through_body, _ = exact_split(*states[0], *states[1])
        by_W, by_body = logit_change(model, tokens, mask, update)
        torch.testing.assert_close(through_W, by_W, rtol=0, atol=1e-12)
        gaps.append((through_body - by_body).norm().item())
    assert 3.6 < gaps[0] / gaps[1] < 4.4


def test_the_effects_are_those_of_the_parts_alone():
    logits, by_W, body, cross = (drawn(i, 6, 5) for i in range(4))
    row = split_effect(logits, by_W, body, cross)
    for name, measure in (("entropy", entropy), ("confidence", confidence)):
        alone = {
            part: (measure(logits + df) - measure(logits)).mean() for part, df in (("by_W", by_W), ("by_body", body))
        }
        total = (measure(logits + by_W + body + cross) - measure(logits)).mean()
        assert row[f"{name}_change"] == pytest.approx(total.item())
        assert all(row[f"{name}_{part}"] == pytest.approx(value.item()) for part, value in alone.items())
        assert row[f"{name}_residual"] == pytest.approx((total - sum(alone.values())).item())


@pytest.mark.parametrize(
    "shapes", [((5, 4), (7, 4), (6, 4), (7, 4)), ((5, 4), (7, 3), (5, 4), (7, 3)), ((4,), (7, 4), (4,), (7, 4))]
)
def test_shapes_that_disagree_are_refused(shapes):
    with pytest.raises(ValueError, match="before and after alike"):
        exact_split(*(torch.zeros(shape) for shape in shapes))
