"""From rows to summary, tables and verdict."""

import pytest

from experiments import tables
from experiments.arms import Config
from experiments.measures import KERNEL
from experiments.runs import append_row, policy_file, rows_file


def test_intervals_are_student_s_and_differences_are_paired_by_seed():
    """Three values 1, 2, 3: the mean's standard error is 1/sqrt(3), Student's t with 2 degrees of freedom 4.30."""
    assert tables.cell({"x": [1.0, 2.0, 3.0]}, "x", ".2f") == "2.00 ±2.48"
    assert tables.cell({"x": [0.0, 1.0] * 50}, "x", ".3f") == "0.500 ±0.100"  # 1.984 x 0.5025 / 10
    names = [name for _, name, _ in tables.PAIRED]
    summary = {"sft": {}, "rl": {"seed": [0, 1]} | dict.fromkeys(names, [1.0, 5.0])}
    summary |= {"cf-rl": {"seed": [0, 1]} | dict.fromkeys(names, [2.0, 6.0]), "kl": {"seed": [0]}}
    heading, row = tables.paired_table(summary)
    assert row == ["cf-rl"] + ["+1.000 ±0.000"] * 5 + ["+1.0 ±0.0"] and len(heading) == 7


def test_the_summary_takes_the_first_crossing_and_counts_stopped_seeds_as_never(tmp_path):
    """Made-up rows: seed 0 crosses 0.9 at update 8, exactly; seed 1 stopped early."""
    config = Config(seeds=2, arms="rl,cf-rl", classifier_steps=5)
    (tmp_path / "parts").mkdir()
    for arm, steps in (("sft", [0]), ("rl", [4, 8, 12]), ("cf-rl", [4, 8, 12])):
        policy_file(tmp_path, arm, 0).write_bytes(b"")
        for step in steps:
            row = dict.fromkeys((*tables.CURVES, "classifier_norm", "feature_change", *KERNEL), 0.5)
            row |= {"arm": arm, "seed": 0, "step": step, "accuracy": [0.1, 0.5, 0.9, 0.95][step // 4]}
            append_row(rows_file(tmp_path, arm, 0), row)
    summary = tables.summarise(config, tmp_path)
    assert summary["rl"]["updates_to_threshold"] == [8, None]
    assert summary["rl"]["accuracy"] == [0.95] and summary["rl"]["curves"]["step"] == [[0, 4, 8, 12]]
    assert summary["rl"]["full_updates_to_threshold"] == [8, None]
    assert summary["cf-rl"]["full_updates_to_threshold"] == [3, None]  # stage 1 for free
    assert summary["rl"]["accuracy_over_the_run"] == [pytest.approx((0.5 + 0.9 + 0.95) / 3)]


def test_the_verdict_says_what_the_numbers_say():
    """Each of its endings, from made-up updates to the threshold; None stands for never, 4 apart is a tie."""

    def verdict(rl, cf_rl, control):
        return tables.verdict(
            Config(seeds=len(rl)),
            {arm: {"updates_to_threshold": n} for arm, n in zip(Config().arm_list, (rl, cf_rl, control), strict=True)},
        )

    assert "took rl 40 updates and cf-rl 12 (one seed): cf-rl was faster" in verdict([40], [12], [20])
    assert "took 20: so training the classifier first helped" in verdict([40], [12], [20])
    assert "so a classifier that learns faster is enough" in verdict([40], [12], [16])
    assert "rl 12 updates and cf-rl more than 80 (one seed): cf-rl was slower" in verdict([12], [None], [12])
    assert "cf-rl was about as fast" in verdict([16], [12], [8])
    assert "neither rl nor cf-rl reached" in verdict([None], [None], [8])
    assert "20 updates and cf-rl 8 (medians of 3 seeds): cf-rl" in verdict([4, 20, None], [8, 4, 80], [9, 9, 9])
