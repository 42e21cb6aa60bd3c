"""What the README says is what is there: its tags, its numbers, its files."""

import re
from pathlib import Path

import torch

import minicfrl
import train_toy
from assets.report import load_results, rewritten, sections
from model import GPT, GPTConfig

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")
RESULTS = (ROOT / "assets" / "results.md").read_text(encoding="utf-8")


def tags(text):
    return set(re.findall(r"\(E\d+\)", text))


def test_every_equation_of_the_readme_has_its_line_of_code_and_the_other_way_round():
    code = "".join((ROOT / name).read_text(encoding="utf-8") for name in ("model.py", "minicfrl.py", "ntk.py"))
    implemented = tags("".join(re.findall(r"# .*?\(E\d+\)|\(E\d+\)$", code, re.MULTILINE)))
    assert tags(README) == tags(code) == implemented


def test_the_numbers_of_the_pages_are_those_that_the_report_writes():
    """assets/results.json is the report's copy of the runs: from it the pages are written again, to the character."""
    texts = sections(*load_results())
    assert list(rewritten(texts).values()) == [README, RESULTS]
    assert set(re.findall(r"<!-- report: (.*?) -->", README + RESULTS)) == set(texts)


def test_the_smallest_row_of_the_results_comes_out_again():
    """One seed of `ft`, in float32 as users run it: within the range of the five seeds in results.md, widened by
    itself, for other machines round otherwise. On fewer prompts and states: the tolerances are for that."""
    config = train_toy.Config(**train_toy.EXPERIMENTS["lp-ft"])
    torch.set_default_dtype(torch.float32)
    try:
        task = minicfrl.Addition(config.digits)
        model = GPT(GPTConfig(task.vocab_size, task.block_size), train_toy.generator(0, "init"))
        for _ in minicfrl.supervised_finetune(model, task, config.finetuning()["sft"], train_toy.generator(0, "sft")):
            pass
        probe = minicfrl.make_probe(model, task, task.heldout_pairs[:8], train_toy.generator(0, "probe"))
        for _ in train_toy.updates(config, 0, "ft", task, model):
            pass
        row = minicfrl.evaluate(model, task, task.heldout_pairs[:32], probe, train_toy.generator(0, "evaluation"))
    finally:
        torch.set_default_dtype(torch.float64)
    _, summary = load_results()[0]["lp-ft"]
    for name, tolerance in (("accuracy", 0.1), ("classifier_norm", 0.0), ("feature_change", 0.05), ("share_S", 0.02)):
        low, high = min(summary["ft"][name]), max(summary["ft"][name])
        assert low - (high - low) - tolerance <= row[name] <= high + (high - low) + tolerance


def test_the_results_explain_every_column_of_the_metrics():
    _, summary = load_results()[0]["confidence"]
    not_columns = {"curves", "stages", "accuracy_over_the_run", "updates_to_threshold", "full_updates_to_threshold"}
    columns = set(summary["rl"]) - not_columns
    explained = {name for line in re.findall(r"^\| ([a-z].*?) \|", RESULTS, re.MULTILINE) for name in line.split(", ")}
    assert columns <= explained


def test_the_tests_that_the_readme_names_are_there():
    assert all(
        (ROOT / "tests" / name).exists() for name in re.findall(r"test_\w+\.py|mutants\.py|benchmark\.py", README)
    )


def test_the_results_in_the_readme_are_the_experiments_with_their_defaults():
    """Seeds and arms aside the first is the plain run: whoever starts that gets the first of its seeds."""
    results, _ = load_results()
    for name, flags in train_toy.EXPERIMENTS.items():
        assert results[name][0] == train_toy.Config(**flags) and results[name][0].seed == 0
    config, _ = results["confidence"]
    assert config == train_toy.Config(seeds=config.seeds, arms=config.arms)
    assert minicfrl.RLConfig(classifier_steps=config.classifier_steps) == config.rl("cf-rl")
