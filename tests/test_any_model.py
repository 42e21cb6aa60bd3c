"""The microscope for any model: exact, in agreement with the toy's, and honest about its rounding."""

import copy

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tiny import generator, tiny_gpt
from torch.func import functional_call

from experiments.any_model import exact_split, feature_change, split_effect
from model import confidence, entropy
from ntk import logit_change


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


def test_the_first_two_parts_are_the_toy_s_up_to_second_order():
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


@pytest.mark.parametrize("share", [1e-2, 1e-3, 1e-4, 1e-5, 1e-6, 1e-7])
def test_the_change_of_features_is_as_exact_as_it_says(share):
    """In float32, for updates from a hundredth of the weights to a ten-millionth: the difference of two passes for the
    large, the derivative for the small, held against float64. What it says of its error is a rule of thumb, so it may
    be off by 10 either way above; and no update is known worse than to 1%."""
    wide, tokens = tiny_gpt(0), torch.randint(5, (3, 6), generator=generator(1))
    body = {name: p.detach() for name, p in wide.body.named_parameters()}
    before = {name: p.float() for name, p in body.items()}
    size = torch.stack([p.norm() for p in before.values()]).norm()
    moves = {name: drawn(i, *p.shape).float() for i, (name, p) in enumerate(before.items())}
    scale = share * size / torch.stack([m.norm() for m in moves.values()]).norm()
    after = {name: p + scale * moves[name] for name, p in before.items()}

    def features(parameters):
        return functional_call(wide.body, parameters, (tokens,)).flatten(0, 1)

    got, said = feature_change(features, before, after)
    double = [features({name: p.double() for name, p in each.items()}) for each in (after, before)]
    true = double[0] - double[1]
    wrong = ((got.double() - true).norm() / true.norm()).item()
    assert wrong < 10 * said and said < 0.01 and wrong < 0.01


def test_no_update_moves_no_feature():
    model, tokens = tiny_gpt(0), torch.randint(5, (2, 4), generator=generator(1))
    body = {name: p.detach() for name, p in model.body.named_parameters()}
    got, said = feature_change(lambda p: functional_call(model.body, p, (tokens,)).flatten(0, 1), body, dict(body))
    assert said == 0 and not got.any()


@pytest.mark.parametrize(
    "shapes", [((5, 4), (7, 4), (6, 4), (7, 4)), ((5, 4), (7, 3), (5, 4), (7, 3)), ((4,), (7, 4), (4,), (7, 4))]
)
def test_shapes_that_disagree_are_refused(shapes):
    with pytest.raises(ValueError, match="before and after alike"):
        exact_split(*(torch.zeros(shape) for shape in shapes))
