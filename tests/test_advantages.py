"""Group advantages (E2): centred, invariant to what must not matter, and exactly 0 where a group prefers nothing."""

import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st
from strategies import rewards
from tiny import ROUNDING

from minicfrl import BASELINES, group_advantages

centred_kinds = st.sampled_from(["mean", "std", "rloo"])


def assert_rows_equal(actual, expected, rewards, kind="std"):
    """Up to rounding: that of the row's own rewards, or of numbers of order 1 after a division by their std."""
    unit = 1.0 if kind == "std" else rewards.abs().amax(dim=1, keepdim=True)
    assert ((actual - expected).abs() <= 100 * ROUNDING * unit).all()


@given(rewards=rewards(), kind=centred_kinds)
def test_the_advantages_of_a_group_sum_to_zero(rewards, kind):
    """sum_i (r_i - mean) = 0, and a common factor keeps it."""
    sums = group_advantages(rewards, kind).sum(dim=1, keepdim=True)
    assert_rows_equal(sums, torch.zeros_like(sums), rewards, kind)


@given(rewards=rewards(), kind=centred_kinds, shift=st.integers(-5, 5))
def test_a_shift_of_all_rewards_of_a_group_changes_nothing(rewards, kind, shift):
    """The mean moves along with the rewards. The shift is in units of the group, in which it is exact."""
    unit = rewards.abs().amax(dim=1, keepdim=True)
    assert_rows_equal(group_advantages(rewards + shift * unit, kind), group_advantages(rewards, kind), rewards, kind)


@given(rewards=rewards(), factor=st.integers(1, 50))
def test_a_scale_of_all_rewards_changes_nothing_after_std_normalisation(rewards, factor):
    """The standard deviation scales along with the rewards. No epsilon spoils it."""
    assert_rows_equal(group_advantages(rewards * factor, "std"), group_advantages(rewards, "std"), rewards)


@given(rewards=rewards())
def test_std_advantages_have_unit_population_variance_unless_flat(rewards):
    variance = group_advantages(rewards, "std").square().mean(dim=1)
    flat = (rewards == rewards[:, :1]).all(dim=1)
    torch.testing.assert_close(variance, (~flat).to(variance), rtol=0, atol=100 * ROUNDING)


@given(rewards=rewards(samples=(2, 8)))
def test_rloo_is_the_reward_minus_the_mean_of_the_others(rewards):
    """From the definition: r_i - (sum - r_i)/(S-1) = S/(S-1) (r_i - mean)."""
    others = (rewards.sum(dim=1, keepdim=True) - rewards) / (rewards.size(1) - 1)
    assert_rows_equal(group_advantages(rewards, "rloo"), rewards - others, rewards, "rloo")


@given(rewards=rewards(), kind=st.sampled_from(BASELINES), data=st.data())
def test_a_permutation_of_the_samples_permutes_the_advantages(rewards, kind, data):
    """A sample is not judged by its place in the group."""
    order = data.draw(st.permutations(range(rewards.size(1))))
    expected = group_advantages(rewards, kind)[:, order]
    assert_rows_equal(group_advantages(rewards[:, order], kind), expected, rewards, kind)


@given(rewards=rewards(groups=(2, 4)), kind=centred_kinds)
@example(rewards=torch.tensor([[0, 2.0**-30], [0, 2.0**30]]), kind="std")
def test_a_group_does_not_see_the_others_however_much_larger_their_rewards_are(rewards, kind):
    """Up to rounding: the order in which a sum is vectorised may depend on the batch. Beside rewards of 10^9 a spread
    of 10^-9 is below their rounding, but not below its own group's."""
    alone = torch.cat([group_advantages(row[None], kind) for row in rewards])
    assert_rows_equal(group_advantages(rewards, kind), alone, rewards, kind)


@given(rewards=rewards())
def test_no_baseline_means_the_rewards_themselves(rewards):
    """A copy of them, because whoever subtracts a penalty in place must not change the record."""
    advantages = group_advantages(rewards, "none")
    assert torch.equal(advantages, rewards) and advantages.data_ptr() != rewards.data_ptr()


# ------------------------------------------------------------------------------------------------------------- rounding


def group_of_two_values(value, ulps, size, dtype):
    """A group of `size` rewards: `value`, and in every third place the float that is `ulps` floats further out."""
    other = torch.tensor(value, dtype=dtype)
    for _ in range(ulps):
        other = other.nextafter(other * 2)
    group = torch.full((size,), value, dtype=dtype)
    group[::3] = other
    return group


precisions = st.sampled_from([torch.float32, torch.float64])
values, sizes = st.floats(0.01, 100), st.integers(2, 64)


@given(dtype=precisions, value=values, sign=st.sampled_from([1, -1]), size=sizes, ulps=st.integers(0, 4))
@example(dtype=torch.float32, value=0.1, sign=1, size=5, ulps=0)  # 0.9, not 0, if a rounded mean met a rounded std
@example(dtype=torch.float64, value=0.1, sign=1, size=64, ulps=4)
def test_a_group_whose_rewards_differ_by_a_few_roundings_gets_exactly_zero(dtype, value, sign, size, ulps):
    """0.1 + 0.2 and 0.3 are the same reward: over a std of that size they would be 1 and -1. In either precision and by
    its own roundings: 4 neighbouring floats are at most 4 eps apart. A group with a spread beside it changes nothing.
    """
    flat = group_of_two_values(sign * value, ulps, size, dtype)
    for kind in ("mean", "std", "rloo"):
        advantages = group_advantages(torch.stack((flat, torch.arange(size).to(dtype))), kind)
        assert advantages.dtype == dtype and (advantages[0] == 0).all() and (advantages[1] != 0).any()


@given(dtype=precisions, value=values, size=sizes, ulps=st.integers(10, 100), larger=st.sampled_from([0.0, 1e9]))
def test_a_group_whose_rewards_differ_by_ten_roundings_is_compared(dtype, value, size, ulps, larger):
    """10 neighbouring floats are more than 4 eps of the value apart. The better ones are preferred: subtracting one
    mean and dividing by one std keep the order, also beside a group of larger rewards."""
    rewards = group_of_two_values(value, ulps, size, dtype)
    for kind in ("mean", "std", "rloo"):
        advantages = group_advantages(torch.stack((rewards, torch.full_like(rewards, larger))), kind)[0]
        assert advantages.isfinite().all() and advantages[::3].min() > advantages[1]


# -------------------------------------------------------------------------------------------------------- bad arguments


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_reward_that_is_not_finite_is_refused_by_value(bad):
    with pytest.raises(ValueError, match=f"rewards must be finite, not {bad}"):
        group_advantages(torch.tensor([[0.0, 1.0], [bad, 1.0]]))


def test_bad_shape_and_kind_are_refused():
    for bad in (torch.zeros(3), torch.zeros(2, 0), torch.zeros(2, 3, dtype=torch.long)):
        with pytest.raises(ValueError, match=r"rewards must be \(P, S\) floats with S > 0, not \("):
            group_advantages(bad)
    with pytest.raises(ValueError, match="kind must be one of std, mean, rloo, none, not 'median'"):
        group_advantages(torch.zeros(1, 3), "median")
