"""From rows to summary, tables and verdict."""

import math
import statistics

import pytest
import torch

from experiments import tables
from experiments.arms import Config
from experiments.measures import KERNEL
from experiments.runs import NEVER_NAN, append_row, policy_file, rows_file

ENDS = ("classifier_norm", "feature_change", *KERNEL)


def test_intervals_are_student_s_and_differences_are_paired_by_seed():
    """Three values 1, 2, 3: the mean's standard error is 1/sqrt(3), Student's t with 2 degrees of freedom 4.30."""
    assert tables.cell({"x": [1.0, 2.0, 3.0]}, "x", ".2f") == "2.00 ±2.48"
    assert tables.cell({"x": [0.0, 1.0] * 50}, "x", ".3f") == "0.500 ±0.100"  # 1.984 x 0.5025 / 10
    summary = {"rl": {"seed": [0, 1], "x": [1.0, 5.0]}, "cf-rl": {"seed": [1, 0, 2], "x": [6.0, 2.0, 9.0]}}
    assert tables.paired(summary, "cf-rl", "rl", "x") == [1.0, 1.0]


def test_the_factor_of_an_interval_is_the_quantile_of_student_s_t():
    """The interval of n values with standard deviation sqrt(n) is the factor itself. Its density, integrated by the
    midpoint rule, leaves 2.5% above it: 3e-4 beside that for the factor's own two digits, or the formula's error."""
    for n in range(2, 60):
        spread = math.sqrt((n - n % 2) / (n - 1))  # of values -1 and 1, and a 0 if n is odd
        values = [math.sqrt(n) / spread * sign for sign in [-1, 1] * (n // 2) + [0] * (n % 2)]
        factor = float(tables.over_seeds(values, ".4f").partition("±")[2])
        t, nu = (torch.arange(200_000) + 0.5) * (factor / 200_000), n - 1
        constant = math.exp(math.lgamma((nu + 1) / 2) - math.lgamma(nu / 2)) / math.sqrt(nu * math.pi)
        inside = constant * ((1 + t**2 / nu) ** (-(nu + 1) / 2)).sum().item() * factor / 200_000
        assert abs(0.5 - inside - 0.025) < 3e-4


@pytest.mark.parametrize(
    "values, form, text",
    [
        ([0.25], "+.2f", "+0.25"),
        ([-1.0, 1.0], "+.1f", "+0.0 ±12.7"),
        ([2.0, 2.0], ".0%", "200% ±0%"),
        ([None], ".0f", "never"),
        ([3, None, 5], ".0f", "never in 1 of 3"),
        ([None, None], ".0f", "never in 2 of 2"),
    ],
)
def test_a_cell_says_how_sure_it_is(values, form, text):
    """One value has no interval; an interval has no sign; a mean over runs that never got there would be a lie."""
    assert tables.over_seeds(values, form) == text


def test_a_difference_is_of_one_seed_at_the_last_row(tmp_path):
    """Made-up rows, 10 a step and a number per seed and arm in no order: so the last row's value, the pairing and the
    mean are all told from any other. An arm that lacks a seed is not compared."""
    config = Config(seeds=3, arms="rl,cf-rl,kl-1", classifier_steps=4, rl_steps=8)
    (tmp_path / "parts").mkdir()
    own = {"sft": (0.1, 0.2, 0.3), "rl": (5.0, 1.0, 3.0), "cf-rl": (4.5, 6.5, 1.0), "kl-1": (0.0, 0.0)}
    for arm, numbers in own.items():
        for seed, number in enumerate(numbers):
            policy_file(tmp_path, arm, seed).write_bytes(b"")
            for step in [0] if arm == "sft" else [4, 8]:
                row = dict.fromkeys((*tables.CURVES, *NEVER_NAN, "best_of_64", *ENDS), number)
                row |= {name: math.nan for name in ("best_of_64", "kernel_R") if step == 4}
                row = {name: value + 10 * step for name, value in row.items()}
                append_row(rows_file(tmp_path, arm, seed), {**row, "arm": arm, "seed": seed, "step": step})
    summary = tables.summarise(config, tmp_path)
    for arm, numbers in own.items():
        last = 0 if arm == "sft" else 80
        assert summary[arm]["entropy"] == summary[arm]["best_of_64"] == [last + number for number in numbers]
    assert summary["cf-rl"]["seed"] == [0, 1, 2] and summary["kl-1"]["seed"] == [0, 1]
    assert summary["rl"]["curves"]["entropy"] == [
        [x, 40 + y, 80 + y] for x, y in zip(own["sft"], own["rl"], strict=True)
    ]
    assert summary["rl"]["stages"]["step"] == [[0, 4, 8]] * 3
    # -0.5, 5.5 and -2 have the mean 1 and the standard deviation sqrt(15.75): 4.303 x 3.969 / sqrt(3) = 9.86.
    for name in ("entropy", tables.RUN):
        assert tables.over_seeds(tables.paired(summary, "cf-rl", "rl", name), "+.3f") == "+1.000 ±9.859"
    assert tables.paired(summary, "rl", "kl-1", "entropy") == [5.0, 1.0]


def test_the_summary_takes_the_first_crossing_and_counts_stopped_seeds_as_never(tmp_path):
    """Made-up rows: seed 0 crosses 0.9 at update 8, exactly; seed 1 stopped early."""
    config = Config(seeds=2, arms="rl,cf-rl", rl_steps=12, classifier_steps=5)
    (tmp_path / "parts").mkdir()
    for arm, steps in (("sft", [0]), ("rl", [4, 5, 8, 12]), ("cf-rl", [4, 5, 8, 12])):
        policy_file(tmp_path, arm, 0).write_bytes(b"")
        for step in steps:
            row = dict.fromkeys((*tables.CURVES, *NEVER_NAN, *ENDS), 0.5)
            row |= {"arm": arm, "seed": 0, "step": step, "accuracy": [0.1, 0.5, 0.9, 0.95][step // 4]}
            append_row(rows_file(tmp_path, arm, 0), row)
    summary = tables.summarise(config, tmp_path)
    assert summary["rl"]["updates_to_threshold"] == [8, None]
    assert summary["rl"]["accuracy"] == [0.95] and summary["rl"]["curves"]["step"] == [[0, 4, 5, 8, 12]]
    assert summary["rl"]["accuracy_over_the_run"] == [pytest.approx((0.5 + 0.5 + 0.9 + 0.95) / 4)]


@pytest.mark.parametrize(
    "cf_rl, control, said, cause",
    [
        ([0.8, 0.81, 0.79], [0.8, 0.8, 0.79], ("faster", "faster", "as fast (within 0.02)"), "nothing need be frozen"),
        ([0.8, 0.81, 0.79], [0.6, 0.61, 0.59], ("faster", "faster", "faster"), "training the classifier first helped"),
        ([0.6, 0.61, 0.59], [0.8, 0.81, 0.79], ("faster", "faster", "slower"), "nothing need be frozen"),
        ([0.3, 0.31, 0.29], [0.5, 0.501, 0.5], ("slower", "as fast (within 0.02)", "slower"), ""),
        ([0.1, 0.9, 0.5], [0.8, 0.81, 0.79], ("undecided", "faster", "undecided"), ""),
        ([0.8], [0.9], ("undecided", "undecided", "undecided"), ""),  # one seed
    ],
)
def test_the_verdict_says_what_the_numbers_say(cf_rl, control, said, cause):
    """Each of its endings, from made-up accuracies over the run beside 0.5 for rl; one seed never gets there."""
    values = dict(zip(Config().arm_list, ([0.5] * len(cf_rl), cf_rl, control), strict=True))
    summary = {
        arm: {"seed": list(range(len(cf_rl))), tables.RUN: own, "updates_to_threshold": [12] * (len(own) - 1) + [None]}
        for arm, own in values.items()
    }
    text = tables.verdict(Config(seeds=len(cf_rl)), summary)
    parts = text.partition(": ")[2].split(". ")[0] if len(cf_rl) == 1 else text.partition(". The control")[0]
    words = [part.rpartition(": ")[2] for part in parts.split("; ")]
    assert len(words) == 3 and (len(cf_rl) == 1 or tuple(words) == said)
    gap = statistics.fmean(cf_rl) - statistics.fmean(control)
    assert f"cf-rl minus control {gap:+.3f}" in text
    assert cause in text if cause else " So " not in text
    assert ("One seed decides nothing" in text) == (len(cf_rl) == 1)
    took = "rl after 12, cf-rl after 12, control after 12" if len(cf_rl) > 1 else "rl never, cf-rl never, control never"
    assert f"Of 80 updates, accuracy 0.9 was reached: {took}." in text
    assert "No verdict" in tables.verdict(Config(), {})
    summary["cf-rl"]["seed"] = [-1]
    assert "No verdict" in tables.verdict(Config(), summary)
