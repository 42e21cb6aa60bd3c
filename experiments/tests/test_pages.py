"""What the laboratory writes into the pages is what is there: tags, numbers, columns, files."""

import re
from pathlib import Path

import pytest
import test_readme
import torch
from test_readme import tags

import minicfrl
from experiments import claims, real_model
from experiments.arms import EXPERIMENTS, Config, train_as, two_stages
from experiments.measures import MOVES, evaluate, make_probe
from experiments.report import PAGES, load_results, rewritten, sections
from train_toy import make_start, stream

ROOT = Path(__file__).parent.parent.parent
README, RESULTS, ONE_UPDATE = (page.read_text(encoding="utf-8") for page in PAGES)


def test_every_equation_of_the_results_has_its_line_of_code_and_the_other_way_round():
    """The README names the book's; the laboratory's own is in the results."""
    laboratory = "".join(path.read_text(encoding="utf-8") for path in (ROOT / "experiments").glob("*.py"))
    assert tags(RESULTS) | tags(ONE_UPDATE) <= tags(README) | tags(laboratory)
    assert tags(laboratory) - tags(README) == tags(RESULTS) - tags(README) == {"(E11)"}


def test_the_numbers_of_the_pages_are_those_that_the_report_writes():
    """experiments/results.json is the report's copy of the runs: from it the pages are written again, to the letter."""
    texts = sections(*load_results())
    assert list(rewritten(texts).values()) == [README, RESULTS, ONE_UPDATE]
    assert set(re.findall(r"<!-- report: (.*?) -->", README + RESULTS + ONE_UPDATE)) == set(texts)


def test_the_results_are_a_page_of_limited_length():
    assert RESULTS.count("\n") <= 650


@pytest.mark.parametrize("page", [*PAGES[1:], ROOT / "experiments" / "README.md"])
def test_what_the_pages_link_to_is_there(page):
    test_readme.test_what_the_pages_link_to_is_there(page)


def test_the_smallest_row_of_the_results_comes_out_again():
    """One seed of `ft`, in float32 as users run it: within the range of the five seeds in results.md, widened by
    itself, for other machines round otherwise. On fewer prompts and states: the tolerances are for that."""
    config = Config(**EXPERIMENTS["lp-ft"])
    torch.set_default_dtype(torch.float32)
    try:
        task = minicfrl.Addition(config.digits)
        model = make_start(task, 0, config.finetuning()["sft"])
        probe = make_probe(model, task, task.heldout_pairs[:8], stream(0, "probe"))
        for _ in train_as("ft", config, 0, task, model):
            pass
        row = evaluate(model, task, task.heldout_pairs[:32], probe, stream(0, "evaluation"))
    finally:
        torch.set_default_dtype(torch.float64)
    _, summary = load_results()[0]["lp-ft"]
    for name, tolerance in (("accuracy", 0.1), ("classifier_norm", 0.0), ("feature_change", 0.05), ("share_s", 0.02)):
        low, high = min(summary["ft"][name]), max(summary["ft"][name])
        assert low - (high - low) - tolerance <= row[name] <= high + (high - low) + tolerance


def test_the_results_explain_every_column_of_the_metrics():
    _, summary = load_results()[0]["confidence"]
    not_columns = {*MOVES, "curves", "stages", "accuracy_over_the_run", "updates_to_threshold"}
    columns = set(summary["rl"]) - not_columns
    page = (ROOT / "experiments" / "columns.md").read_text(encoding="utf-8")
    explained = {name for line in re.findall(r"^\| ([a-z].*?) \|", page, re.MULTILINE) for name in line.split(", ")}
    assert columns <= explained


def test_the_tests_that_the_pages_name_are_there():
    names = re.findall(r"(?:[a-z]+/)+(?:test_\w+|benchmark\w*)\.py", RESULTS)
    assert len(names) > 3 and all((ROOT / name).exists() for name in names)


def test_the_results_are_the_experiments_with_their_defaults():
    """Seeds and arms aside the first is the plain run: whoever starts that gets the first of its seeds."""
    results = load_results()[0]
    results.pop("real-both")  # which is real and real-gpu
    experiments = {name: Config(**flags) for name, flags in EXPERIMENTS.items()}
    experiments |= {name: real_model.RealConfig(**flags) for name, flags in real_model.EXPERIMENTS.items()}
    assert experiments == {name: config for name, (config, _) in results.items()}
    config, _ = results["confidence"]
    assert config == Config(seeds=config.seeds, arms=config.arms)
    assert minicfrl.RLConfig(two_stages()) == config.rl("cf-rl")


def test_a_verdict_on_a_claim_is_short():
    said = [row[1] for row in claims.rows(load_results()[0])]
    assert len(said) > 12 and max(len(verdict.split()) for verdict in said) <= 6
