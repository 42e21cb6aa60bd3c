"""What the pages say is what is there: their tags, their numbers, their files."""

import re
from pathlib import Path

import pytest
import torch

import minicfrl
from experiments import claims, real_model
from experiments.arms import EXPERIMENTS, Config, generator, train_as
from experiments.measures import MOVES, evaluate, make_probe
from experiments.report import PAGES, load_results, rewritten, sections
from model import GPT, GPTConfig

ROOT = Path(__file__).parent.parent
README, RESULTS, ONE_UPDATE = (page.read_text(encoding="utf-8") for page in PAGES)
TESTS = (ROOT / "tests" / "README.md").read_text(encoding="utf-8")


def tags(text):
    return set(re.findall(r"\(E\d+\)", text))


def test_every_equation_of_the_pages_has_its_line_of_code_and_the_other_way_round():
    """The README names the book's; the laboratory's own is in the results. Each is defined once."""
    book = "".join((ROOT / name).read_text(encoding="utf-8") for name in ("model.py", "minicfrl.py", "ntk.py"))
    implemented = tags("".join(re.findall(r"# .*?\(E\d+\)|\(E\d+\)$", book, re.MULTILINE)))
    assert tags(README) == tags(book) == implemented
    laboratory = "".join(path.read_text(encoding="utf-8") for path in (ROOT / "experiments").glob("*.py"))
    assert tags(RESULTS) | tags(ONE_UPDATE) <= tags(README) | tags(laboratory)
    assert tags(laboratory) - tags(README) == tags(RESULTS) - tags(README) == {"(E11)"}


def test_the_numbers_of_the_pages_are_those_that_the_report_writes():
    """experiments/results.json is the report's copy of the runs: from it the pages are written again, to the letter."""
    texts = sections(*load_results())
    assert list(rewritten(texts).values()) == [README, RESULTS, ONE_UPDATE]
    assert set(re.findall(r"<!-- report: (.*?) -->", README + RESULTS + ONE_UPDATE)) == set(texts)


def test_the_readme_is_a_page_and_the_book_is_short():
    """Limits that this project has set itself: lines of the README, and of the code that a reader is asked to read."""
    assert README.count("\n") <= 150 and RESULTS.count("\n") <= 650 and README.count("±") <= 30
    for row in re.findall(r"^\| (.*) \|$", README, re.MULTILINE):
        assert all(len(cell.split()) <= 14 for cell in row.split(" | ") if " = " not in cell), row
    counts = [int(n) for n in re.findall(r"(?:are|py) (\d+)", RESULTS[RESULTS.index("The four files are") :])][:5]
    assert counts[0] == sum(counts[1:]) <= 700 and counts[4] <= 80


@pytest.mark.parametrize("page", [*PAGES, ROOT / "tests" / "README.md", ROOT / "experiments" / "README.md"])
def test_what_the_pages_link_to_is_there(page):
    """Files beside the page, and headings or anchors in them, as a code host names them."""
    text = page.read_text(encoding="utf-8")
    for target in re.findall(r"\]\((?!https?:)(.*?)\)", text):
        name, _, anchor = target.partition("#")
        file = (page.parent / name) if name else page
        assert file.exists(), target
        if anchor:
            there = file.read_text(encoding="utf-8")
            headings = [
                re.sub(r"[^\w\- ]", "", h.lower()).replace(" ", "-") for h in re.findall(r"^#+ (.*)", there, re.M)
            ]
            assert anchor in headings or f'<a id="{anchor}">' in there, target


def test_the_smallest_row_of_the_results_comes_out_again():
    """One seed of `ft`, in float32 as users run it: within the range of the five seeds in results.md, widened by
    itself, for other machines round otherwise. On fewer prompts and states: the tolerances are for that."""
    config = Config(**EXPERIMENTS["lp-ft"])
    torch.set_default_dtype(torch.float32)
    try:
        task = minicfrl.Addition(config.digits)
        model = GPT(GPTConfig(task.vocab_size, task.block_size), generator(0, "init"))
        for _ in minicfrl.supervised_finetune(model, task, config.finetuning()["sft"], generator(0, "sft")):
            pass
        probe = make_probe(model, task, task.heldout_pairs[:8], generator(0, "probe"))
        for _ in train_as("ft", config, 0, task, model):
            pass
        row = evaluate(model, task, task.heldout_pairs[:32], probe, generator(0, "evaluation"))
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
    names = re.findall(r"test_\w+\.py|mutants\.py|benchmark\.py|tiny\.py", README + RESULTS + TESTS)
    assert len(names) > 20 and all((ROOT / "tests" / name).exists() for name in names)


def test_the_results_are_the_experiments_with_their_defaults():
    """Seeds and arms aside the first is the plain run: whoever starts that gets the first of its seeds."""
    results = load_results()[0]
    results.pop("real-both")  # which is real and real-gpu
    experiments = {name: Config(**flags) for name, flags in EXPERIMENTS.items()}
    experiments |= {name: real_model.RealConfig(**flags) for name, flags in real_model.EXPERIMENTS.items()}
    assert experiments == {name: config for name, (config, _) in results.items()}
    config, _ = results["confidence"]
    assert config == Config(seeds=config.seeds, arms=config.arms)
    assert minicfrl.RLConfig() == config.rl("cf-rl")


def test_a_verdict_on_a_claim_is_short():
    said = [row[1] for row in claims.rows(load_results()[0])]
    assert len(said) > 12 and max(len(verdict.split()) for verdict in said) <= 6
