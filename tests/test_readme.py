"""What the README says is what is there: its tags, its numbers, its files."""

import re
from pathlib import Path

import minicfrl
import train_toy
from assets.report import load_results, rewrite, sections

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")


def tags(text):
    return set(re.findall(r"\(E\d\)", text))


def test_every_equation_of_the_readme_has_its_line_of_code_and_the_other_way_round():
    code = "".join((ROOT / name).read_text(encoding="utf-8") for name in ("model.py", "minicfrl.py", "ntk.py"))
    implemented = tags("".join(re.findall(r"# .*?\(E\d\)|\(E\d\)$", code, re.MULTILINE)))
    assert tags(README) == tags(code) == implemented


def test_the_numbers_of_the_readme_are_those_that_the_report_writes():
    """assets/results.json is the report's copy of a run: from it the README is written again, to the character."""
    assert rewrite(README, sections(*load_results())) == README


def test_the_readme_explains_every_column_of_the_metrics():
    _, summary = load_results()
    columns = {name for name in summary["rl"] if name not in ("seed", "curves", "stages", "updates_to_threshold")}
    explained = {name for line in re.findall(r"^\| ([a-z].*?) \|", README, re.MULTILINE) for name in line.split(", ")}
    assert columns <= explained


def test_the_tests_that_the_readme_names_are_there():
    assert all(
        (ROOT / "tests" / name).exists() for name in re.findall(r"test_\w+\.py|mutants\.py|benchmark\.py", README)
    )


def test_the_results_in_the_readme_are_those_of_the_defaults():
    """Seeds and arms aside: whoever runs the defaults gets the first of the five seeds."""
    config, _ = load_results()
    defaults = train_toy.Config(seeds=config.seeds, arms=config.arms)
    assert config == defaults and config.seed == 0
    assert minicfrl.RLConfig(classifier_steps=config.classifier_steps) == config.rl("cf-rl")
