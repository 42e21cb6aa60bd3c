"""Group advantages (E2): centred, invariant to what must not matter, and exactly 0 where a group prefers nothing."""

import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st
from tiny import ROUNDING

from minicfrl import group_advantages

centred_kinds = st.sampled_from(["mean", "std", "rloo"])
reward = st.floats(-100, 100, width=32, allow_subnormal=False)


@st.composite
def groups(draw, elements=reward, min_size=1):
    size = draw(st.integers(min_size, 8))
    rows = draw(st.lists(st.lists(elements, min_size=size, max_size=size), min_size=1, max_size=4))
    return torch.tensor(rows)


binary = groups(st.sampled_from([0.0, 1.0]))
# A standard deviation is only as exact as its group's spread is large beside rounding: whole rewards keep it so.
whole = groups(st.integers(-10, 10).map(float))


@given(rewards=whole, kind=centred_kinds)
def test_the_advantages_of_a_group_sum_to_zero(rewards, kind):
    """sum_i (r_i - mean) = 0, and a common factor keeps it."""
    assert group_advantages(rewards, kind).sum(dim=1).abs().max() < 100 * ROUNDING


@given(rewards=whole, kind=centred_kinds, shift=st.integers(-5, 5))
def test_a_shift_of_all_rewards_changes_nothing(rewards, kind, shift):
    """The mean moves along with the rewards."""
    moved = group_advantages(rewards + shift, kind)
    torch.testing.assert_close(moved, group_advantages(rewards, kind), rtol=0, atol=100 * ROUNDING)


@given(rewards=whole, factor=st.integers(1, 50))
def test_a_scale_of_all_rewards_changes_nothing_after_std_normalisation(rewards, factor):
    """The standard deviation scales along with the rewards. No epsilon spoils it."""
    scaled = group_advantages(rewards * factor, "std")
    torch.testing.assert_close(scaled, group_advantages(rewards, "std"), rtol=0, atol=100 * ROUNDING)


@given(rewards=whole)
def test_std_advantages_have_unit_population_variance_unless_flat(rewards):
    variance = group_advantages(rewards, "std").square().mean(dim=1)
    flat = (rewards == rewards[:, :1]).all(dim=1)
    torch.testing.assert_close(variance, (~flat).to(variance), rtol=0, atol=100 * ROUNDING)


@given(value=reward, size=st.integers(1, 64), kind=centred_kinds, dtype=st.sampled_from([torch.float32, torch.float64]))
@example(value=0.1, size=5, kind="std", dtype=torch.float32)  # 0.9, not 0, if the rounded mean met a rounded std
def test_a_group_of_equal_rewards_gets_exactly_zero(value, size, kind, dtype):
    """Exactly: any rounding error left over would be divided by a standard deviation of its own size."""
    assert (group_advantages(torch.full((2, size), value, dtype=dtype), kind) == 0).all()


precisions = pytest.mark.parametrize("dtype", [torch.float32, torch.float64])


def group_of_two_values(value, ulps, size, dtype):
    """A group of `size` rewards: `value`, and in every third place the float that is `ulps` floats further out."""
    other = torch.tensor(value, dtype=dtype)
    for _ in range(ulps):
        other = other.nextafter(other * 2)
    group = torch.full((size,), value, dtype=dtype)
    group[::3] = other
    return group


@precisions
@given(value=st.floats(0.01, 100), sign=st.sampled_from([-1, 1]), size=st.integers(2, 64), ulps=st.integers(0, 4))
@example(value=0.1, sign=1, size=5, ulps=0)
@example(value=0.1, sign=1, size=64, ulps=4)
def test_a_group_whose_rewards_differ_by_a_few_roundings_gets_exactly_zero(dtype, value, sign, size, ulps):
    """In either precision and by its own roundings: 4 neighbouring floats are at most 4 eps of the value apart. Another
    group of the batch, with a spread, changes nothing about that."""
    flat = group_of_two_values(sign * value, ulps, size, dtype)
    spread = torch.arange(size).to(dtype)
    for kind in ("mean", "std", "rloo"):
        advantages = group_advantages(torch.stack((flat, spread)), kind)
        assert advantages.dtype == dtype and (advantages[0] == 0).all() and (advantages[1] != 0).any()
    assert torch.equal(group_advantages(flat[None], "none")[0], flat)


@precisions
@given(value=st.floats(0.01, 100), size=st.integers(2, 64), ulps=st.integers(10, 100))
def test_a_group_whose_rewards_differ_by_ten_roundings_is_compared(dtype, value, size, ulps):
    """10 neighbouring floats are more than 4 eps of the value apart. The better ones are preferred: subtracting one
    mean and dividing by one std keep the order."""
    rewards = group_of_two_values(value, ulps, size, dtype)
    for kind in ("mean", "std", "rloo"):
        (advantages,) = group_advantages(rewards[None], kind)
        assert advantages.isfinite().all() and advantages[::3].min() > advantages[1]


def test_rewards_that_differ_by_rounding_alone_are_equal():
    """0.1 + 0.2 and 0.3 differ in the last bit; over a std of that size they would be 1 and -1."""
    assert (group_advantages(torch.tensor([[0.1 + 0.2, 0.3]]), "std") == 0).all()


@given(rewards=groups(min_size=2))
def test_rloo_is_the_reward_minus_the_mean_of_the_others(rewards):
    """From the definition: r_i - (sum - r_i)/(S-1) = S/(S-1) (r_i - mean)."""
    others = (rewards.sum(dim=1, keepdim=True) - rewards) / (rewards.size(1) - 1)
    torch.testing.assert_close(group_advantages(rewards, "rloo"), rewards - others, rtol=0, atol=1000 * ROUNDING)


@given(rewards=binary, kind=st.sampled_from(["mean", "std", "rloo", "none"]), seed=st.integers(0, 99))
def test_a_permutation_of_the_samples_permutes_the_advantages(rewards, kind, seed):
    order = torch.randperm(rewards.size(1), generator=torch.Generator().manual_seed(seed))
    permuted = group_advantages(rewards[:, order], kind)
    torch.testing.assert_close(permuted, group_advantages(rewards, kind)[:, order], rtol=0, atol=10 * ROUNDING)


@given(rewards=whole, kind=centred_kinds)
def test_a_group_does_not_see_the_others(rewards, kind):
    """Up to rounding: the order in which a sum is vectorised may depend on the batch."""
    alone = torch.cat([group_advantages(row[None], kind) for row in rewards])
    torch.testing.assert_close(group_advantages(rewards, kind), alone, rtol=0, atol=100 * ROUNDING)


@given(rewards=groups())
def test_no_baseline_means_the_rewards_themselves(rewards):
    advantages = group_advantages(rewards, "none")
    assert torch.equal(advantages, rewards) and advantages.data_ptr() != rewards.data_ptr()


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_reward_that_is_not_finite_is_refused_by_value(bad):
    with pytest.raises(ValueError, match=f"rewards must be finite, not {bad}"):
        group_advantages(torch.tensor([[0.0, 1.0], [bad, 1.0]]))


def test_bad_shape_and_kind_are_refused():
    with pytest.raises(ValueError, match=r"rewards must be \(P, S\) floats with S > 0, not \(3,\)"):
        group_advantages(torch.zeros(3))
    for rewards in (torch.zeros(2, 0), torch.zeros(2, 3, dtype=torch.long)):
        with pytest.raises(ValueError, match=r"floats with S > 0, not \(2, "):
            group_advantages(rewards)
    with pytest.raises(ValueError, match="kind must be one of std, mean, rloo, none, not 'median'"):
        group_advantages(torch.zeros(1, 3), "median")
