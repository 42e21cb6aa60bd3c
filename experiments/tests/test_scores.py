"""From rows to scores, from scores to verdicts and claims: made-up numbers of every kind, and hand-made curves."""

import itertools
import math
import statistics

import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st
from scipy.stats import ttest_1samp
from tiny import generator
from tiny_runs import tiny

from experiments import claims, runs, scores
from experiments.arms import Arm, some
from experiments.scores import END, Measure, Runs, judge, time_to

spreads = st.lists(st.integers(-8, 8), min_size=2, max_size=12).filter(lambda ns: len(set(ns)) > 1)
numbers = st.builds(lambda m, k, ns: [m / 64 + n / 2**k for n in ns], st.integers(-8, 8), st.integers(6, 10), spreads)


@given(numbers, st.sampled_from((0.0, 0.02, 0.1)) | st.floats(0, 0.5), st.integers(1, 40))
@example([-0.018, -0.018, 0.0, 0.018, 0.018], 0.02, 1)  # equal: the 90% interval, .017, is within the margin, the
@example([-0.018, -0.018, 0.0, 0.018, 0.018], 0.02, 2)  # 95% one, .022, is not
def test_a_verdict_is_that_of_student_s_tests(differences, margin, looks):
    """SciPy's, each at 5% over the looks (Bonferroni): a two-sided test against 0; and, of equivalence, two one-sided
    ones against both ends of the margin."""

    def surely(side, end, level=0.05):
        return ttest_1samp(differences, end, alternative=side).pvalue < level / looks

    within = surely("less", margin) and surely("greater", -margin)
    word = "more" if surely("greater", 0, 0.025) else "less" if surely("less", 0, 0.025) else ""
    verdict = f"slightly {word}" if word and within else word or ("equal" if within else "undecided")
    assert judge(differences, margin, looks) == verdict


def test_one_seed_says_nothing_no_spread_is_certainty_and_other_numbers_have_no_verdict():
    assert [judge(values) for values in ([0.0], [0.1] * 5, [0.0] * 5)] == ["undecided", "more", "equal"]
    for bad in ([], [math.nan, 0.1], [math.inf, 0.1], [1e308, 1e308]):
        with pytest.raises(ValueError, match="values must be finite numbers, at least one"):
            judge(bad)


def test_no_error_is_more_frequent_than_promised():
    """The whole point of 5%: one in twenty of 400 families of 20 comparisons without any difference, and of 1000
    differences that are the margin. A binomial exceeds these bounds in .1% of cases; seeded, so it never flickers."""
    families = torch.randn(400, 20, 5, generator=generator(0)).tolist()
    assert sum(any(judge(row, 0, looks=20) != "undecided" for row in family) for family in families) <= 34
    draws = (0.02 + 0.01 * torch.randn(1000, 5, generator=generator(0))).tolist()
    assert sum(judge(row) in ("equal", "slightly more", "slightly less") for row in draws) <= 72


@given(numbers, st.sampled_from([1, 8]))
def test_as_many_seeds_as_are_needed_decide_and_one_less_does_not(differences, looks):
    """More seeds of the same mean, and of no larger spread: each difference several times."""
    needed = scores.seeds_to_decide(differences, looks=looks)
    times = math.ceil(needed / len(differences))
    assert needed == 2000 or judge(differences * times, looks=looks) != "undecided"
    assert needed == len(differences) or judge(differences, looks=looks, seeds=needed - 1) == "undecided"


X = tiny(rl_steps=10, n=2, every=1, curves=("accuracy",), threshold=0.5)


def made_up(x=X, **arms):
    """Runs of made-up scores: {arm: a list with a row for each seed}."""
    rows = [{"arm": arm.replace("_", "-"), "seed": n} | row for arm, each in arms.items() for n, row in enumerate(each)]
    return Runs(x, rows)


def curves(*each):
    """A row of scores for each curve of accuracies."""
    return [{"accuracy": c[-1], "run": statistics.fmean(c[1:]), "accuracy curve": " ".join(map(str, c))} for c in each]


def rising(*rises):
    """Accuracies that rise by so much an update, up to 1."""
    return curves(*([min(1.0, n * rise) for n in range(11)] for rise in rises))


def test_what_a_run_wrote_is_kept_as_its_scores(tmp_path, monkeypatch):
    """The last row, means over the run, the end of stage 1 (an arm's own n, if it has one), and the curves, to four
    digits. Of a job that is missing nothing is kept."""
    x = tiny([*some("rl"), Arm("own", n=4), *some("cf-rl")], curves=("accuracy",))
    for name, steps in (("sft", [0]), ("rl", [2, 4]), ("own", [2, 4])):
        rows = [{"step": step, "tokens": 7 * step, "accuracy": step / 3, "top": step} for step in steps]
        (tmp_path / f"{name}-seed0.csv").write_bytes(runs.as_csv(rows))
    monkeypatch.setattr(scores, "DATA", tmp_path)
    scores.keep(x, tmp_path)
    kept = scores.load(x)
    last = {"accuracy": 1.333, "top": 4, "run": 1.0, "took": 2.7, "accuracy curve": "0 0.6667 1.333", "seed": 0}
    assert kept.rows["rl", 0] == last | {"arm": "rl", "accuracy@n": 0.6667}
    assert kept.rows["own", 0] == last | {"arm": "own", "accuracy@n": 1.333}
    assert kept.rows["sft", 0] == {"arm": "sft", "seed": 0, "accuracy": 0, "top": 0, "run": 0} and len(kept.rows) == 3
    assert kept.score("rl", "accuracy@0") == {0: 0} and kept.curve("rl", 0) == [0, 0.6667, 1.333]


def test_gaps_are_paired_by_seed():
    """Seeds differ by more than the arms. What only one of the arms has is left out, and so is a score of None; a pair
    without a seed is refused."""
    r = made_up(a=[{"s": 1.5}, {"s": 5.5}, {"s": 9.0}, {}], b=[{"s": 1.0}, {"s": 5.0}, {}, {"s": 3.0}])
    assert r.gaps("a", "b", "s") == [0.5, 0.5] and r.gaps("b", "a", "s") == [-0.5, -0.5]
    assert r.score("a", lambda runs, arm, seed: seed or None) == {1: 1, 2: 2, 3: 3}
    with pytest.raises(ValueError, match="has no 'C' of 'a' and 'rl'"):
        scores.compared(r, [Measure("C", "s")], [("a", "rl")])


def test_the_time_is_where_the_curve_first_is_at_the_threshold():
    """A rise of .2 is at .5 after 2.5 updates, between two looks, one of .125 after 4; one of .03 never gets there in
    10, and counts with all of them. What is there already takes none."""
    r = made_up(rl=rising(0.2, 0.125, 0.03) + curves([0.9] * 11))
    assert r.values("rl", time_to(0.5).of) == pytest.approx([2.5, 4, 10, 0])
    assert time_to(0.5).margin(r) == pytest.approx(0.1 * 4.125)


def test_fewer_updates_are_faster_more_accuracy_higher_and_words_say_where_a_margin_hides_it():
    """And where a verdict on times is not borne out by ranks, as with fewer than six seeds it cannot be."""
    r = made_up(rl=rising(*[0.08] * 6), fast=rising(*[0.25] * 6), near=curves(*[[0.81] * 11] * 6))
    pairs = itertools.product(("rl", "fast"), repeat=2)
    said = {pair: [m.said(r, *pair) for m in scores.speed(X, 0.1)] for pair in pairs}
    assert said["fast", "rl"] == ["faster"] * 3 + ["higher"] * 2
    assert said["rl", "fast"] == ["slower"] * 3 + ["lower"] * 2 and said["rl", "rl"] == ["as fast"] * 3 + ["equal"] * 2
    assert END.said(r, "near", "rl") == "higher, by less than the margin"
    few = made_up(rl=rising(*[0.08] * 5), fast=rising(*[0.25] * 5))
    assert time_to(0.5).said(few, "fast", "rl") == "faster, not by ranks"
    skewed = made_up(rl=rising(*[0.051] * 8), wild=rising(*[0.055] * 7, 0.2))
    assert time_to(0.5).said(skewed, "wild", "rl") == "undecided, yet decided by ranks"


def test_what_tells_two_ways_apart_by_hand():
    """At .5 after 1.5 updates; .5 on average in the 2 of stage 1; and of 9 looks from then on two are below. What never
    gets there loses nothing."""
    r = made_up(a=curves([0, 0.2, 0.8, 0.4, 0.6, 0.3] + [0.7] * 5, [0.1] * 11))
    assert r.values("a", scores.times_by_ratio(0.5).of) == pytest.approx([math.log2(1.5), math.log2(10)])
    assert r.values("a", scores.early) == pytest.approx([0.5, 0.1]) and r.score("a", scores.lost) == {0: 2 / 9}


def test_stage_2_is_compared_with_plain_rl_from_where_that_is_as_accurate():
    """Stage 1 leaves .6 at update 4. Plain RL is there at update 4, too, or at 6, with one look to go, or never."""
    plain = curves([0, 0.3, 0.6, 0.65, 0.72], [0, 0.1, 0.2, 0.6, 0.64], [0] * 5)
    r = made_up(tiny(rl_steps=8, n=4, every=2), cf_rl=curves(*[[0.2, 0.4, 0.6, 0.65, 0.7]] * 3), rl=plain)
    assert r.score("cf-rl", claims.stage_2_lead) == {0: pytest.approx(-0.02), 1: pytest.approx(0.01)}


def test_a_peak_is_found_on_even_prompts_after_the_start_and_judged_on_odd_ones():
    """At the second look after it, though the odd ones are highest at the first."""
    r = made_up(a=[{"accuracy_even curve": "0.9 0.4 0.6 0.3", "accuracy_odd curve": "0.25 0.9 0.5 0.125"}])
    assert [r.values("a", claims.gain(after, "even", "odd")) for after in (0, 1)] == [[0.25], [-0.375]]


def test_arms_are_compared_where_they_first_are_as_accurate_as_plain_rl_ends():
    """Or at their end. Of plain RL itself it is the end, also if it was as accurate before."""
    other = {"accuracy": 0.9, "accuracy curve": "0.1 0.4 0.6 0.9", "kl": 4.0, "kl curve": "0 1 2 4"}
    r = made_up(rl=[{"accuracy": 0.5, "accuracy curve": "0.1 0.7 0.5 0.5", "kl": 3.0}] * 2)
    r = made_up(rl=[*r.rows.values()], a=[other, other | {"accuracy curve": "0.1 0.1 0.1 0.1"}])
    assert [r.values(arm, claims.as_accurate("kl")) for arm in ("rl", "a")] == [[3, 3], [2, 4]]
