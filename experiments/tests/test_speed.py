"""How fast an arm is: times, areas and verdicts, from made-up curves."""

from dataclasses import replace

import pytest

from experiments.arms import Config
from experiments.report import together
from experiments.speed import (
    AREA,
    ASKED,
    END,
    OVER_THE_RUN,
    areas,
    arms_table,
    compared_table,
    robust_table,
    time_margin,
    time_to,
    times,
    yardsticks,
)

CONFIG = Config(seeds=3, rl_steps=10, classifier_steps=2, eval_every=1, threshold=0.5)


def arm(*rises, seeds=None):
    """Accuracies that rise by so much an update up to 1, a run for each."""
    curves = {
        "step": [list(range(11))] * len(rises),
        "accuracy": [[min(1.0, step * rise) for step in range(11)] for rise in rises],
    }
    over = [sum(curve[1:]) / 10 for curve in curves["accuracy"]]
    ends = [curve[-1] for curve in curves["accuracy"]]
    seeds = seeds or list(range(len(rises)))
    return {"seed": seeds, "curves": curves, "accuracy_over_the_run": over, "accuracy": ends}


def test_the_time_is_the_first_update_at_the_threshold_or_all_of_them():
    """A rise of .25 is at .5 after 2 updates, exactly; one of .03 never gets there in 10."""
    summary = {"rl": arm(0.25, 0.125, 0.03)}
    assert times(CONFIG, summary, "rl") == {0: 2, 1: 4, 2: 10}
    assert times(CONFIG, summary, "rl", 0.25) == {0: 1, 1: 2, 2: 9}
    assert [*time_to(0.25).values(CONFIG, summary, "rl").values()] == [1, 2, 9]


def test_a_start_that_is_there_already_takes_no_update():
    summary = {"rl": arm(0.25, 0.25)}
    summary["rl"]["curves"]["accuracy"][1] = [0.9] * 11
    assert times(CONFIG, summary, "rl") == {0: 2, 1: 0}
    assert areas(CONFIG, summary, "rl")[1] == pytest.approx(0.9)  # over one update, the fewest that there are


def test_the_area_is_up_to_plain_rl_s_time_of_the_same_seed():
    """Plain RL takes 2 and 4 updates: of a rise of .1 the means are (.1 + .2) / 2 and (.1 + ... + .4) / 4."""
    summary = {"rl": arm(0.25, 0.125), "slow": arm(0.1, 0.1), "other": arm(0.1, 0.1, seeds=[1, 7])}
    assert areas(CONFIG, summary, "slow") == {0: pytest.approx(0.15), 1: pytest.approx(0.25)}
    assert areas(CONFIG, summary, "other") == {1: pytest.approx(0.25)}  # seed 7 has no plain RL
    assert AREA.gaps(CONFIG, summary, "slow", "rl") == [pytest.approx(0.15 - 0.375), pytest.approx(0.25 - 0.3125)]


def test_the_margin_of_time_is_a_tenth_of_plain_rl_s():
    assert time_margin(CONFIG, {"rl": arm(0.25, 0.125, 0.03)}) == pytest.approx(0.1 * (2 + 4 + 10) / 3)


def test_fewer_updates_are_faster_and_more_accuracy_is_too():
    summary = {"rl": arm(0.05, 0.05, 0.05), "cf-rl": arm(0.25, 0.25, 0.25)}
    first, second = time_to(0.5), OVER_THE_RUN
    assert first.said(CONFIG, summary, "cf-rl", "rl") == second.said(CONFIG, summary, "cf-rl", "rl") == "faster"
    assert first.said(CONFIG, summary, "rl", "cf-rl") == second.said(CONFIG, summary, "rl", "cf-rl") == "slower"
    assert END.said(CONFIG, summary, "cf-rl", "rl") == "higher" and first.said(CONFIG, summary, "rl", "rl") == "as fast"


def test_a_margin_says_how_much_slower_and_never_hides_that_it_is():
    """Plain RL takes 10 updates, so the margin is 1; an arm takes 9. That is faster by less than one and a half times
    the margin, and plainly faster than a hundredth of it."""
    summary = {"rl": arm(*[0.05] * 12), "arm": arm(*[0.05] * 12)}
    for curve in summary["arm"]["curves"]["accuracy"]:
        curve[9] = 0.5
    assert time_to(0.5).said(CONFIG, summary, "arm", "rl", margins=1.5) == "faster, by less than the margin"
    assert time_to(0.5).said(CONFIG, summary, "arm", "rl", margins=0.01) == "faster"


def everything(**changes):
    arms = dict.fromkeys({name for pair in ASKED for name in pair}, arm(*[0.1] * 10))
    return {**arms, **changes}


def test_runs_of_two_machines_are_paired_each_on_its_own():
    """Seed 0 of one is another run than seed 0 of the other. What only one machine ran stays as it is."""
    ours = {"rl": arm(0.01, 0.02, 0.03), "cf-rl": arm(0.02, 0.04, 0.06), "control": arm(0.05)}
    theirs = {"rl": arm(0.04, 0.05), "cf-rl": arm(0.05, 0.07)}
    config, both = together((CONFIG, ours), (replace(CONFIG, seeds=2), theirs))
    gaps = [END.gaps(config, summary, "cf-rl", "rl") for summary in (ours, theirs, both)]
    assert gaps[2] == gaps[0] + gaps[1] and config.seeds == 5
    assert [*times(config, both, "rl")] == both["rl"]["seed"] == [0, 1, 2, 3, 4]
    assert both["control"] == ours["control"]


def test_all_comparisons_of_a_table_are_asked_together():
    """Ten seeds whose ends differ by .03 +- .035 are decided alone, and not beside seven other questions."""
    noisy = arm(*[0.1] * 10)
    noisy["accuracy"] = [1.03 + sign * 0.035 for sign in (1, -1)] * 5
    summary = everything(**{"cf-rl": noisy})
    assert END.said(CONFIG, summary, "cf-rl", "rl") == "higher"
    assert compared_table(CONFIG, summary)[1][-1].endswith("undecided (16 seeds)")  # that would do, were they alike
    results = {"plain": (CONFIG, summary)}
    assert len(robust_table(results)) == 2 and robust_table(results)[1][0] == "plain"


def test_a_start_that_cannot_add_yet_is_timed_to_two_thresholds():
    heading = [each.heading for each in yardsticks(Config(threshold=0.3))]
    assert heading[:2] == ["updates to 0.3", "updates to 0.5"] and len(heading) == 5
    assert [each.heading for each in yardsticks(Config())][0] == "updates to 0.9" and len(yardsticks(Config())) == 4


def test_every_arm_is_a_row_with_every_yardstick():
    summary = everything()
    rows = arms_table(Config(arms="rl,cf-rl", threshold=0.5), summary)
    assert [row[0] for row in rows] == ["arm", "`rl`", "`cf-rl`"] and {len(row) for row in rows} == {5}
    assert rows[1][1] == "5.0 ±0.0"
