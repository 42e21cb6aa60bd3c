"""Verdicts on claims, from made-up summaries on which an easier rule would say something else."""

import pytest

from experiments.arms import Config
from experiments.claims import STARTS, Evidence, answers
from experiments.real_model import ALL_FAST, FAST
from experiments.report import load_results
from experiments.speed import END, time_to

CONFIG = Config(seeds=3, rl_steps=8, classifier_steps=4, eval_every=2)


def evidence(looks=1, config=CONFIG, **arms):
    for arm in arms.values():
        arm.setdefault("seed", [0, 1, 2])
    return Evidence({"made up": (config, arms)}, "made up", looks)


def course(*accuracies):
    return {"curves": {"step": [[0, 2, 4, 6, 8]] * len(accuracies), "accuracy": [list(a) for a in accuracies]}}


def test_stage_2_is_compared_with_plain_rl_from_where_that_is_as_accurate():
    """Stage 1 leaves .6. Plain RL is there at update 4 and then gains .1 in two evaluations, as stage 2 does; from its
    start it gains .6 in as many, which is no news of stage 2. A seed on which it never gets there is left out."""
    own, other = (0.2, 0.4, 0.6, 0.65, 0.7), (0.0, 0.3, 0.6, 0.65, 0.7)
    e = evidence(**{"cf-rl": course(own, own, own), "rl": course(other, (0, 0.1, 0.2, 0.6, 0.65), (0,) * 5)})
    gains, plain = e.stage_2_gains()
    assert gains == pytest.approx([0.1, 0.05]) and plain == pytest.approx([0.1, 0.05])
    assert e.says(e.stage_2_lead(), "more", "less", "as much") == "as much"


def test_a_seed_whose_start_lacks_the_skill_is_left_out_and_n_says_so():
    """Of five seeds one has no pattern d, and there nothing dips. With it the dip is undecided, without it beyond
    doubt."""
    curves = {"share_s": [[1.0, low, 1.0] for low in (0.9, 0.905, 0.91, 0.9, 1.0)]}
    sft = {"seed": [0, 1, 2, 3, 4], "success_d": [0.3, 0.31, 0.3, 0.32, 0.05]}
    e = evidence(**{"sft": sft, "rl-sgd": {"seed": [0, 1, 2, 3, 4], "curves": curves}})
    assert e.says(e.dips("rl-sgd")) == "undecided"
    assert e.skilled("d").says(e.skilled("d").dips("rl-sgd")) == "yes"
    assert (
        e.skilled("d").values("sft", "seed") == [0, 1, 2, 3]
        and e.skilled("d", least=0.0).lowest_share("rl-sgd")[4] == 1
    )
    assert e.values("sft", "seed") == [0, 1, 2, 3, 4]


def test_undecided_stays_undecided_in_the_words_of_any_claim():
    """A claim chooses its words for more, less and equal; for doubt there is one."""
    e = evidence()
    assert e.says([0.3, -0.2, 0.1], "yes", "no", "no") == "undecided"
    assert e.says([0.010, 0.011, 0.010], "yes", "no", "no") == "yes, by less than 0.02"
    assert e.says([0.1, 0.11, 0.1]) == "yes" and e.says([-0.1, -0.11, -0.1]) == "no, the reverse"


def test_ten_rows_that_are_asked_together_are_harder_to_decide():
    assert evidence().says([0.05, 0.06, 0.04]) == "yes"
    assert evidence(looks=10).says([0.05, 0.06, 0.04]) == "undecided"
    assert evidence(looks=10).at("made up").looks == 10


def test_a_lead_in_parts_of_what_is_left_does_not_fall_because_less_is_left():
    """Plain RL at .5 and at .9: leads of .2 and .04 are 40% of the rest, both."""
    rl = {"accuracy_over_the_run": [0.5, 0.9, 0.5]}
    e = evidence(**{"rl": rl, "cf-rl": {"accuracy_over_the_run": [0.7, 0.94, 0.7]}})
    assert e.lead_of_rest("cf-rl") == pytest.approx([0.4, 0.4, 0.4])


def test_halves_are_judged_one_by_one_by_the_same_rule():
    e = evidence(**{"arm": course((0.2, 0.3, 0.5, 0.3, 0.1), (0.2, 0.3, 0.51, 0.3, 0.1), (0.2, 0.3, 0.5, 0.3, 0.11))})
    assert e.halves("arm") == "helps then harms"


def test_what_a_part_reaches_alone_is_found_whatever_its_rate():
    e = evidence(**{"norm-only-80x100": {"accuracy": [0.9, 0.9, 0.9]}, "norm-first-20x100": {"accuracy": [0.1] * 3}})
    assert e.alone("norm") == "0.90 ±0.00"


def test_the_first_table_asks_all_of_a_column_together():
    """Differences that three seeds would decide alone are undecided among four; the last row is about the end."""
    accuracy, base = [0.5, 0.6, 0.7], course(*[(0, 0, 0, 0, 1)] * 3)
    fast = course((0, 0, 1, 1, 1), (0, 0, 1, 1, 1), (0, 0, 0, 1, 1))
    arms = {"rl": base, "cf-rl": fast, "control": fast, "fast-classifier-8x5": fast, "classifier-last": base}
    summary = {arm: {"seed": [0, 1, 2], "accuracy": accuracy, **row} for arm, row in arms.items()}
    summary["sft"] = {"seed": [0, 1, 2], "accuracy": [0.1, 0.2, 0.3]}
    rows = list(answers(dict.fromkeys(STARTS, (CONFIG, summary))))
    assert [len(row) for row in rows] == [4] * 6 and rows[0][1:] == [
        f"{title}: 0.20 to 0.9, 3 seeds" for title in STARTS.values()
    ]
    assert rows[1][1] == "8.0 ±0.0" and rows[2][1] == "4.7 ±2.9, undecided" and rows[5][1] == "equal"
    assert evidence(**summary).compared(time_to(0.9), "fast-classifier", "rl") == "faster"


def test_an_arm_is_found_by_its_name_or_as_the_cell_that_runs_throughout():
    e = evidence(**{"cf-rl-4x5": {}, "cf-rl": {}, "fast-classifier-8x70": {}})
    assert e.arm("cf-rl") == "cf-rl" and e.arm("fast-classifier") == "fast-classifier-8x70"
    assert evidence(**{"fast-classifier": {}}).arm("fast-classifier") == "fast-classifier"


def test_the_marks_of_linear_probing_are_there_only_if_all_four_are():
    rows = {name: {"classifier_norm": [size, size + 0.1, size], "feature_change": [1 - size, 1.1 - size, 1 - size]}
            for name, size in {"rl": 0.1, "ft": 0.1, "cf-rl": 0.5, "lp-ft": 0.5}.items()}  # fmt: skip
    assert evidence(**rows).same_marks()
    rows["lp-ft"] = rows["lp-ft"] | {"feature_change": [0.2, 1.5, 1.0]}
    assert not evidence(**rows).same_marks()


def test_the_sentences_of_the_first_screen_rest_on_these_verdicts():
    """Updates to the threshold, and the end, at 5% among the comparisons of the results' own tables."""
    results = load_results()[0]
    toy, hard, real = (
        Evidence(results, name, looks) for name, looks in (("speed", 8), ("speed-learning", 8), ("real-both", 6))
    )

    def time(e, arm, base):
        return e.compared(time_to(e.config.threshold), arm, base)

    assert [time(e, "fast-classifier", "rl") for e in (toy, real)] == ["faster", "faster"]
    gained = real.measured(time_to(0.6), "rl"), real.measured(time_to(0.6), "fast-classifier")
    assert 0 < float(gained[0].split()[0]) - float(gained[1].split()[0]) < 1
    assert [time(e, "cf-rl", "control") for e in (toy, hard, real)] == ["slower", "undecided", "slower"]
    ends = [e.compared(END, "cf-rl", "classifier-last") for e in (toy, hard, real)]
    assert ends == ["equal", "undecided", "undecided"]
    assert max(load_results()[2]["shares"]["start"]["adam"]) < 0.01  # R's share of a step in SmolLM2
    alone = Evidence(results, "parts")
    assert alone.compared(END, "classifier-only-80x100", "everything-only-80x1") in ("equal", "higher")
    gained = [real.gap(arm, "sft", "accuracy") for arm in (real.arm("classifier-only"), "rl")]
    assert max(gained[0]) < 0.1 * min(gained[1])
    later = Evidence(results, "real", looks=7)
    assert {time(later, arm, base) for arm in ALL_FAST for base in ("rl", FAST)} == {"faster"}
    again = Evidence(results, "real-again", looks=2)
    assert time(again, "cf-rl", "rl") == "slower" and again.compared(END, "cf-rl", "classifier-last") == "undecided"
