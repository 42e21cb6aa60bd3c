"""What a list of paired differences allows to say: made-up lists of every kind."""

import math
import statistics

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from experiments.verdicts import SPEED, half_width, judge, seeds_to_decide, student_t

numbers = st.lists(st.floats(-1, 1), min_size=2, max_size=12)


@pytest.mark.parametrize(
    "p, freedom, t",
    [(0.975, 1, 12.706), (0.975, 4, 2.776), (0.95, 4, 2.132), (0.999, 4, 7.173), (0.975, 9, 2.262), (0.975, 60, 2.000)],
)
def test_quantiles_of_student_s_t_are_the_textbook_s(p, freedom, t):
    """Three decimals are printed there."""
    assert abs(student_t(p, freedom) - t) < 6e-4
    assert student_t(1 - p, freedom) == pytest.approx(-student_t(p, freedom), rel=1e-9)


@given(st.floats(1e-6, 1 - 1e-6))
def test_quantiles_of_student_s_t_are_exact_where_a_formula_is_known(p):
    """One degree of freedom is Cauchy's distribution, tan(pi (p - 1/2)); two have (2p - 1) sqrt(2 / (1 - (2p - 1)^2)).
    The former is a straight line in the angle; of the latter the sum misses .06% at the outermost p."""
    s = 2 * p - 1
    assert student_t(p, 1) == pytest.approx(math.tan(math.pi * (p - 0.5)), rel=1e-6, abs=1e-9)
    assert student_t(p, 2) == pytest.approx(s * math.sqrt(2 / (1 - s * s)), rel=1e-3, abs=1e-6)


@pytest.mark.parametrize(
    "differences, said",
    [
        ([0.10, 0.12, 0.11, 0.09, 0.13], "more"),
        ([-0.10, -0.12, -0.11, -0.09, -0.13], "less"),
        ([0.001, -0.002, 0.0, 0.003, -0.001], "equal"),
        ([0.010, 0.011, 0.009, 0.010, 0.010], "slightly more"),  # surely above 0, and surely less than the margin
        ([-0.010, -0.011, -0.009, -0.010, -0.010], "slightly less"),
        ([0.3, -0.2, 0.1, 0.0, -0.1], "undecided"),
        ([0.02, 0.03, 0.01, 0.025, -0.01], "undecided"),  # neither excludes 0 nor stays within the margin
        ([0.5], "undecided"),  # one seed says nothing
        ([0.0], "undecided"),
        ([0.1] * 5, "more"),  # no spread at all
        ([0.0] * 5, "equal"),
    ],
)
def test_a_verdict_of_every_kind(differences, said):
    assert judge(differences) == said


@given(numbers)
def test_the_opposite_differences_get_the_opposite_verdict(differences):
    """The rule treats both sides alike; so neither side of a comparison is favoured by being named first."""
    turned = {"more": "less", "less": "more", "slightly more": "slightly less", "slightly less": "slightly more"}
    said = judge(differences)
    assert judge([-x for x in differences]) == turned.get(said, said)


@given(numbers, st.integers(2, 40))
def test_asking_more_at_once_never_makes_a_verdict_surer(differences, looks):
    """Bonferroni's intervals are wider: what is said among many looks, of the side and of the margin each, is said of
    the differences alone."""

    def claims(said):
        side, within = said.removeprefix("slightly "), said == "equal" or said.startswith("slightly")
        return {side} & {"more", "less"} | ({"within the margin"} if within else set())

    assert claims(judge(differences, looks=looks)) <= claims(judge(differences))


@pytest.mark.parametrize("looks", [1, 20])
def test_true_ties_are_called_otherwise_no_more_often_than_promised(looks):
    """The whole point of 5%: of 400 families of `looks` comparisons without any difference, at most one in twenty holds
    a false `more` or `less`. Binomial(400, .05) exceeds 34 with a chance of .1%; seeded, so it never flickers."""
    draws = torch.randn(400, looks, 5, generator=torch.Generator().manual_seed(0))
    false = sum(
        any(judge(row.tolist(), looks=looks) not in ("equal", "undecided") for row in family) for family in draws
    )
    assert false <= 34


def test_a_real_difference_of_the_margin_is_called_equal_no_more_often_than_promised():
    """The error that counts for an equivalence: a true difference of exactly the margin must not pass as none."""
    draws = 0.02 + 0.01 * torch.randn(1000, 5, generator=torch.Generator().manual_seed(0))
    within = ("equal", "slightly more", "slightly less")
    assert sum(judge(row.tolist()) in within for row in draws) <= 72  # Binomial(1000, .05) exceeds it in .1% of cases


@given(numbers)
def test_an_interval_grows_with_its_level_and_one_value_has_none(values):
    assert half_width(values, 0.9) <= half_width(values, 0.95) <= half_width(values, 0.999)
    spread = statistics.stdev(values) / math.sqrt(len(values))
    assert half_width(values) == pytest.approx(student_t(0.975, len(values) - 1) * spread)
    assert half_width(values[:1]) == math.inf


@pytest.mark.parametrize("values", [[], [math.nan, 0.1], [math.inf, 0.1], [1e308, 1e308]])
def test_there_is_no_verdict_and_no_interval_without_finite_numbers(values):
    """Nor of numbers whose sum or square is not finite."""
    for of in (judge, half_width):
        with pytest.raises(ValueError, match="values must be finite numbers, at least one"):
            of(values)


@pytest.mark.parametrize("bad", [dict(looks=0), dict(looks=1.5), dict(margin=math.nan), dict(margin=-0.1)])
def test_a_question_that_makes_no_sense_is_refused_by_name(bad):
    (name, value), *_ = bad.items()
    with pytest.raises(ValueError, match=f"{name} must be .*{value}"):
        judge([0.1, 0.2], **bad)


def test_a_quantile_beyond_the_table_is_refused():
    with pytest.raises(ValueError, match="between 1e-6 and 1 - 1e-6, not 0.9999999999"):
        student_t(0.9999999999, 1)


def test_equal_takes_the_ninety_percent_interval_within_the_margin():
    """Two one-sided tests at 5% each: half of that interval is .017 here, of the 95% interval .022."""
    spread = 0.008 * math.sqrt(5)
    values = [-spread, -spread, 0.0, spread, spread]
    assert half_width(values, 0.9) < 0.02 < half_width(values, 0.95)
    assert judge(values, margin=0.02) == "equal"


def test_where_the_interval_excludes_0_a_verdict_says_so_whatever_the_margin():
    """A hundredth with no doubt about it is slower by less than the margin of two hundredths, and plainly slower than
    the margin of half a hundredth; it is never as fast."""
    values = [-0.010, -0.011, -0.009, -0.010, -0.010]
    assert [judge(values, margin=margin) for margin in (0.005, 0.01, 0.02)] == ["less", "less", "slightly less"]
    assert SPEED["slightly less"] == "slower, by less than the margin"


@given(numbers, st.integers(1, 10))
def test_as_many_seeds_as_are_needed_decide_and_fewer_do_not(differences, looks):
    """An independent way to have more seeds of the same mean and, but for n - 1 against n, spread: each of the
    differences several times."""
    needed = seeds_to_decide(differences, looks=looks)
    assert len(differences) <= needed <= 2000
    assert (needed == len(differences)) == (judge(differences, looks=looks) != "undecided")
    times = math.ceil(1.1 * needed / len(differences)) + 1
    assert needed == 2000 or judge(differences * times, looks=looks) != "undecided"
    assert needed == len(differences) or judge(differences, looks=looks, seeds=needed - 1) == "undecided"


def test_twice_the_spread_takes_four_times_the_seeds():
    """Of a difference that is none and a margin that is small against the spread: textbook, n grows as its square."""
    differences = [0.2, -0.2] * 4
    few, many = seeds_to_decide(differences), seeds_to_decide([2 * x for x in differences])
    assert 3.9 < many / few < 4.1


def test_what_no_number_of_seeds_would_decide_is_said_to_take_2000():
    assert seeds_to_decide([5.0, -5.0, 0.0], margin=0.0) == 2000
