"""The exact split of a change of logits. Its agreement with (E8) is a claim of test_one_update.py."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from strategies import numbers, vectors
from tiny import ROUNDING

from model import confidence, entropy
from ntk import exact_split, split_effect


@st.composite
def two_policies(draw):
    """Features (N, d) and classifiers (V, d), before and after."""
    N, V, d = (draw(st.integers(1, 4)) for _ in range(3))
    return [draw(vectors(rows * d, numbers)).view(rows, d) for rows in (N, V, N, V)]


@given(two_policies(), st.sampled_from([torch.float64, torch.float32, torch.bfloat16]))
def test_the_parts_add_up_to_what_happened(policies, dtype):
    """(W + dW)(phi + dphi) - W phi, multiplied out. In bfloat16 the differences are taken in float32, where those of
    the inputs are exact or nearly: 1e-4 is a few roundings of sums of up to 4 x 64."""
    phi0, W0, phi1, W1 = policies = [x.to(dtype) for x in policies]
    parts = exact_split(*policies)
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    happened = phi1.to(wide) @ W1.to(wide).T - phi0.to(wide) @ W0.to(wide).T
    assert {part.dtype for part in parts} == {wide}
    torch.testing.assert_close(sum(parts), happened, rtol=0, atol=1e-12 if wide == torch.float64 else 1e-4)


@given(two_policies())
def test_each_part_is_what_its_own_move_does(policies):
    """With W at rest only the body's part is there, and the other way round; both move the cross term alone."""
    phi0, W0, phi1, W1 = policies
    nothing = torch.zeros(len(phi0), len(W0))
    torch.testing.assert_close(exact_split(phi0, W0, phi0, W1), (phi0 @ (W1 - W0).T, nothing, nothing))
    torch.testing.assert_close(exact_split(phi0, W0, phi1, W0), (nothing, (phi1 - phi0) @ W0.T, nothing))
    torch.testing.assert_close(exact_split(*policies)[2], (phi1 - phi0) @ (W1 - W0).T)


@given(two_policies())
def test_the_effects_are_those_of_the_parts_alone(policies):
    """Each part is added to the logits by itself; the residual is what only both together do."""
    logits, parts = policies[0] @ policies[1].T, exact_split(*policies)
    row = split_effect(logits, *parts)
    for name, measure in (("entropy", entropy), ("confidence", confidence)):

        def effect(change, measure=measure):
            return (measure(logits + change) - measure(logits)).mean().item()

        whole, by_W, by_body = effect(sum(parts)), effect(parts[0]), effect(parts[1])
        expected = {"change": whole, "by_W": by_W, "by_body": by_body, "residual": whole - by_W - by_body}
        assert {key: row[f"{name}_{key}"] for key in expected} == pytest.approx(expected, abs=ROUNDING)


@pytest.mark.parametrize(
    "shapes", [((5, 4), (7, 4), (6, 4), (7, 4)), ((5, 4), (7, 3), (5, 4), (7, 3)), ((4,), (7, 4), (4,), (7, 4))]
)
def test_shapes_that_disagree_are_refused(shapes):
    with pytest.raises(ValueError, match="before and after alike"):
        exact_split(*(torch.zeros(shape) for shape in shapes))
