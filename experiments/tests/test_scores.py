"""From rows to scores, from scores to verdicts and claims: made-up numbers of every kind, and hand-made curves."""

import math
import statistics
from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tiny import generator
from tiny_runs import tiny

from experiments import claims, runs, scores
from experiments.arms import START, Arm
from experiments.scores import AREA, COSTS, END, Measure, Runs, at_equal, compared, judge, quantile, time_to

numbers = st.lists(st.floats(-1, 1), min_size=2, max_size=12)
TURNED = {"more": "less", "less": "more", "slightly more": "slightly less", "slightly less": "slightly more"}
VERDICTS = (
    ("more", [0.10, 0.12, 0.11, 0.09, 0.13]),
    ("equal", [0.001, -0.002, 0.0, 0.003, -0.001]),
    ("slightly more", [0.010, 0.011, 0.009, 0.010, 0.010]),  # surely above 0, and surely less than the margin
    ("undecided", [0.02, 0.03, 0.01, 0.025, -0.01]),  # neither excludes 0 nor stays within the margin
    ("equal", [-0.018, -0.018, 0.0, 0.018, 0.018]),  # the 90% interval, .017, is within; the 95% one, .022, is not
    ("undecided", [0.0]),  # one seed says nothing
    ("more", [0.1] * 5),  # no spread at all
)


def test_a_verdict_of_every_kind():
    """2.776 is a textbook's, of four degrees of freedom."""
    assert [judge(differences) for _, differences in VERDICTS] == [said for said, _ in VERDICTS]
    assert quantile(0.975, 4) == pytest.approx(2.776, abs=6e-4)


@given(numbers, st.integers(2, 40))
def test_a_verdict_favours_neither_side_and_asking_more_at_once_never_makes_it_surer(differences, looks):
    """Bonferroni's intervals are wider, so what is said among many looks is said of the differences alone."""
    alone, among_many = judge(differences), judge(differences, looks=looks)
    assert judge([-x for x in differences]) == TURNED.get(alone, alone)
    says = {word: {word.removeprefix("slightly ")} for word in TURNED} | {"equal": set(), "undecided": set()}
    within = {word for word in says if word == "equal" or word.startswith("slightly")}
    assert says[among_many] <= says[alone] and (among_many not in within or alone in within)


def test_no_error_is_more_frequent_than_promised():
    """The whole point of 5%: one in twenty of 400 families of 1 or 20 comparisons without any difference, and of 1000
    differences that are the margin. A binomial exceeds these bounds in .1% of cases; seeded, so it never flickers."""
    for looks in (1, 20):
        draws = torch.randn(400, looks, 5, generator=generator(0)).tolist()
        assert sum(any(judge(row, looks=looks) in TURNED for row in family) for family in draws) <= 34
    draws = (0.02 + 0.01 * torch.randn(1000, 5, generator=generator(0))).tolist()
    assert sum(judge(row) in ("equal", "slightly more", "slightly less") for row in draws) <= 72


@pytest.mark.parametrize("bad", [[], [math.nan, 0.1], [math.inf, 0.1], [1e308, 1e308]])
def test_there_is_no_verdict_without_numbers_whose_squares_are_finite(bad):
    with pytest.raises(ValueError, match="values must be finite numbers, at least one"):
        judge(bad)


@given(numbers, st.sampled_from([1, 8]))
def test_as_many_seeds_as_are_needed_decide_and_fewer_do_not(differences, looks):
    """An independent way to have more seeds of the same mean and, but for n - 1 against n, spread: each of the
    differences several times."""
    needed = scores.seeds_to_decide(differences, looks=looks)
    times = math.ceil(1.1 * needed / len(differences)) + 1
    assert needed == 2000 or judge(differences * times, looks=looks) != "undecided"
    assert needed == len(differences) or judge(differences, looks=looks, seeds=needed - 1) == "undecided"


# -------------------------------------------------------------------------------------------------------------- scores

X = tiny(rl_steps=10, n=2, every=1, curves=("accuracy",), counted=("rl",), threshold=0.5)


def made_up(x=X, **arms):
    """Runs of made-up scores: {arm: a list with a row for each seed}."""
    rows = [{"arm": arm, "seed": seed} | row for arm, each in arms.items() for seed, row in enumerate(each)]
    return Runs(x, [row | {"arm": row["arm"].replace("_", "-")} for row in rows])


def curves(*each):
    """A row of scores for each curve of accuracies."""
    return [{"accuracy": c[-1], "run": statistics.fmean(c[1:]), "accuracy curve": " ".join(map(str, c))} for c in each]


def rising(*rises, wait=0, tokens=10):
    """Accuracies that rise by so much an update after the first `wait`, up to 1, and so many tokens an update."""
    accuracies = curves(*([min(1.0, max(0, n - wait) * rise) for n in range(11)] for rise in rises))
    return [row | {"tokens curve": " ".join(str(n * tokens) for n in range(11))} for row in accuracies]


def test_scores_are_the_last_row_the_means_over_the_run_the_end_of_stage_1_and_the_curves():
    """The start is the first row. The tokens are kept of a counted arm alone, and an arm's own n is its stage 1."""
    rows, x = [{"step": step, "tokens": 7 * step, "accuracy": step / 8, "top": step} for step in (0, 2, 4)], tiny()
    x = replace(x, curves=("accuracy",), counted=("rl",))
    last = {"accuracy": 0.5, "top": 4, "run": 0.375, "accuracy curve": "0 0.25 0.5"}
    assert scores.scores_of(x, Arm("cf-rl"), rows, 4) == last | {"accuracy@n": 0.25}
    assert scores.scores_of(x, Arm("rl", n=4), rows, 4) == last | {"accuracy@n": 0.5, "tokens curve": "0 14 28"}
    assert scores.scores_of(x, START, rows[:1], 4) == {"accuracy": 0, "top": 0, "run": 0}


def test_what_a_run_wrote_is_kept_as_its_scores(tmp_path, monkeypatch):
    """To four digits, and without the job that is missing."""
    for name, values in (("sft", [1 / 3]), ("cf-rl", [2 / 3, 1.0])):
        rows = [{"step": 2 * i, "accuracy": value} for i, value in enumerate(values, start=name != "sft")]
        (tmp_path / f"{name}-seed0.csv").write_bytes(runs.as_csv(rows))
    x = tiny(curves=("accuracy",))
    monkeypatch.setattr(scores, "DATA", tmp_path)
    scores.keep(x, tmp_path)
    kept = scores.load(x)
    assert {*kept.rows} == {("sft", 0), ("cf-rl", 0)} and kept.curve("cf-rl", 0) == [0.3333, 0.6667, 1.0]
    assert kept.score("cf-rl", "accuracy@0") == {0: 0.3333} and kept.score("cf-rl", "accuracy@n") == {0: 0.6667}
    assert scores.shown(x, tmp_path).endswith("\n| `cf-rl` | 1.000 | 0.833 |")


def test_gaps_are_paired_by_seed():
    """Seeds differ by more than the arms. What only one of the arms has is left out, and so is a score of None. Seeds
    of two machines are others, also where their numbers are the same."""
    r = made_up(a=[{"s": 1.5}, {"s": 5.5}, {"s": 9.0}, {}], b=[{"s": 1.0}, {"s": 5.0}, {}, {"s": 3.0}])
    assert r.gaps("a", "b", "s") == [0.5, 0.5] and r.gaps("b", "a", "s") == [-0.5, -0.5]
    assert r.score("a", lambda runs, arm, seed: seed or None) == {1: 1, 2: 2, 3: 3}
    both = scores.together(r, made_up(a=[{"s": 2.0}], b=[{"s": 1.0}]))
    assert both.gaps("a", "b", "s") == [0.5, 0.5, 1.0] and [*both.score("a", "s")] == [0, 1, 2, 4]


def test_the_time_is_the_first_update_at_the_threshold_or_all_of_them():
    """A rise of .25 is at .5 after 2 updates; one of .03 never gets there in 10. What is there already takes none."""
    r = made_up(rl=rising(0.25, 0.125, 0.03) + curves([0.9] * 11))
    assert r.values("rl", time_to(0.5).of) == [2, 4, 10, 0]
    assert time_to(0.5).margin(r) == pytest.approx(0.1 * 4)  # a tenth of plain RL's


def test_the_area_is_up_to_plain_rl_s_time_of_the_same_seed():
    """Plain RL takes 2 and 4 updates: of a rise of .1 the means are (.1 + .2) / 2 and (.1 + ... + .4) / 4. At least one
    look counts, where plain RL is there at once; and seed 3 has no plain RL."""
    r = made_up(rl=rising(0.25, 0.125) + curves([0.9] * 11), slow=rising(0.1, 0.1, 0.1, 0.1))
    assert r.score("slow", AREA.of) == {0: pytest.approx(0.15), 1: pytest.approx(0.25), 2: pytest.approx(0.1)}


def test_equal_budgets_of_four_kinds_by_hand():
    """An arm that gains nothing in its 4 updates of stage 1 and then as plain RL does, over 10 updates."""
    arms = dict(cf_rl=rising(0.1, wait=4), gains=rising(0.1), long=rising(0.1, tokens=20))
    r = made_up(replace(X, n=4), rl=rising(0.1), **arms)

    def ahead(arm, cost):
        return at_equal(COSTS[cost])(r, arm, 0)

    assert ahead("cf-rl", "stage 1 for free") == pytest.approx(0.0, abs=1e-9)  # then it is plain RL
    # What stage 1 gains is there from the first paid update on: .4 more.
    assert ahead("gains", "stage 1 for free") == pytest.approx(0.4, abs=1e-9)
    # Over updates 0 to 10: -(.1 n) up to 4, then -.4: areas .8 and 2.4 over 10; the grid has 201 points.
    assert ahead("cf-rl", "at equal samples") == pytest.approx(-0.32, abs=2e-3)
    # Twice the tokens cost half the budget: up to 100, .1 b / 20 against .1 b / 10, on average .25 against .5.
    assert ahead("long", "at equal tokens") == pytest.approx(-0.25, abs=1e-9)
    # An update of stage 1 costs half: the arm waits for 2 and ends at 8 of plain RL's: -(.1 b), then -.2: 1.4 over 8.
    assert ahead("cf-rl", "at equal operations") == pytest.approx(-1.4 / 8, abs=2e-3)


def test_all_that_a_column_asks_is_asked_together():
    """Ten seeds that differ by .03 +- .035 are decided alone, t = 2.6, and not beside seven others; 16 would do."""
    r = made_up(rl=[{"accuracy": 1.0}] * 10, cf_rl=[{"accuracy": 1.03 + sign * 0.035} for sign in (1, -1)] * 5)
    pair, more = [("cf-rl", "rl")], "+0.030 ±0.026: undecided (16 seeds)"
    assert compared(r, [END], pair) == [["", END.heading], ["`cf-rl` − `rl`", "+0.030 ±0.026: higher"]]
    assert [row[1] for row in compared(r, [END], pair * 8)[1:]] == [more] * 8 == [compared(r, [END], pair, 8)[1][1]] * 8


def test_a_table_of_means_has_a_row_for_each_arm_and_refuses_a_score_that_is_not_there():
    r = made_up(sft=[{"a": 0.5}], rl=[{"a": 1.0, "c": 2.0}] * 2)
    rows = scores.means(r, [Measure("A", "a", ".1f")], ["sft", "rl"])
    assert rows == [["arm", "A"], ["`sft`", "0.5"], ["`rl`", "1.0 ±0.0"]]
    with pytest.raises(ValueError, match="has no 'C' of 'sft'"):
        scores.means(r, [Measure("C", "c")], ["rl", "sft"])


# -------------------------------------------------------------------------------------------------------------- claims

Y = tiny(rl_steps=8, n=4, every=2)


def test_stage_2_is_compared_with_plain_rl_from_where_that_is_as_accurate():
    """Stage 1 leaves .6 at update 4. Plain RL is there at update 4, too, or at 6, with one look to go, or never."""
    plain = curves([0, 0.3, 0.6, 0.65, 0.72], [0, 0.1, 0.2, 0.6, 0.64], [0] * 5)
    r = made_up(Y, cf_rl=curves(*[[0.2, 0.4, 0.6, 0.65, 0.7]] * 3), rl=plain)
    assert r.score("cf-rl", claims.stage_2_lead) == {0: pytest.approx(-0.02), 1: pytest.approx(0.01)}


def test_the_first_table_asks_all_of_a_column_together():
    """Differences that three seeds would decide alone are undecided among four."""
    base, fast = curves(*[[0, 0, 0, 0, 1]] * 3), curves([0, 0, 1, 1, 1], [0, 0, 1, 1, 1], [0, 0, 0, 1, 1])
    arms = dict.fromkeys(("cf_rl", "control", "fast-classifier", "fast-classifier-x70"), fast)
    r = made_up(Y, sft=[{"accuracy": a} for a in (0.1, 0.2, 0.3)], rl=base, classifier_last=base, **arms)
    rows = claims.answers(dict.fromkeys(claims.STARTS, r))
    assert rows[0][1:] == [f"{start}: 0.20 to 0.9, 3 seeds" for start in claims.STARTS.values()]
    assert [row[1] for row in rows[1:]] == ["8.0 ±0.0", *["4.7 ±2.9, undecided"] * 3, "equal"]
    assert time_to(0.9).said(r, "cf-rl", "rl") == "faster"
