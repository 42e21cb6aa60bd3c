"""What the pages and data/ say is what is there: numbers, verdicts, tags, columns, links, examples, one update."""

import functools
import itertools
import re

import pytest
import test_readme
import torch
from test_readme import lines_of_code, tags
from tiny import generator, tiny_gpt
from tiny_runs import ROOT, tiny

import minicfrl
import ntk
from experiments import claims, one_update, report, runs, scores
from experiments.arms import START
from experiments.scores import DATA, END, Runs
from minicfrl import Addition

LAB = ROOT / "experiments"
PAGES = {page.name: page.read_text(encoding="utf-8") for page in LAB.glob("*.md")}
README = (ROOT / "README.md").read_text(encoding="utf-8")
FILES = [*LAB.glob("*.py")]


stored = functools.cache(report.stored)


def test_the_report_would_write_the_same_pages_again():
    assert list(claims.contradicted(stored()[0])) == []
    texts = report.sections(*stored())
    assert report.rewritten(texts) == {page: page.read_text(encoding="utf-8") for page in report.PAGES}
    marks = (re.findall(r"<!-- report: (.*?) -->", page.read_text(encoding="utf-8")) for page in report.PAGES)
    assert sorted(itertools.chain(*marks)) == sorted(texts)


def test_what_the_data_contradict_is_refused_before_a_page_is_written(monkeypatch):
    """Here an arm is plainly better, and somebody says that the two are equal, and that it is not more accurate."""
    rows = [{"arm": arm, "seed": seed, "accuracy": a} for arm, a in (("rl", 0.5), ("cf-rl", 0.9)) for seed in (0, 1)]
    asked = ("tiny", "cf-rl", "rl", claims.yes("accuracy"))
    monkeypatch.setattr(claims, "PINS", [("tiny", "cf-rl", "rl", END, 1, said) for said in ("more", "equal")])
    monkeypatch.setattr(claims, "PAPERS", [("up", said, "{}", asked) for said in ("yes", "no")])
    monkeypatch.setattr(report, "stored", lambda: ({"tiny": Runs(tiny(), rows)}, {}))
    with pytest.raises(ValueError, match="say: up: yes, not no; tiny, cf-rl minus rl, accuracy at the end: more, not"):
        report.main([])


def test_all_that_a_column_asks_of_a_start_is_asked_together(monkeypatch):
    """At 5% over as many as the column has rows; and the first page asks as one of the same family."""
    R, looks, judge = stored()[0], [], scores.judge
    monkeypatch.setattr(scores, "judge", lambda *question: looks.append(question[2]) or judge(*question))
    monkeypatch.setattr(scores, "seeds_to_decide", lambda *question: 0)
    monkeypatch.setattr(claims, "SETTINGS", {"again": claims.SETTINGS["again"]})
    tables = [
        (claims.answers, R),
        (scores.compared, R["best"], [END], claims.OF_BEST),
    ]
    for make, *given in tables:
        looks.clear()
        make(*given)
        assert set(looks) == {len(claims.OF_AGAIN) if make == claims.answers else len(looks)}, make


def test_the_families_of_the_claims_and_the_words_of_three():
    """That of its table; the two of an arm's internal feedback, or of critical tokens; all others together. Effective
    learning depends on W where the body alone is lower over the run and at the end; not where it is lower in neither.
    Few tokens change if they have most of the KL and change seldom; not if one of this is false."""
    asked = [claims.family(name, how) for _, _, _, *questions in claims.PAPERS for name, _, _, how in questions]
    assert asked.count(9) == 6 and asked.count(2) == 8 and asked.count(len(asked) - 14) == len(asked) - 14
    said = claims.depends("lower", "lower", "lower", "undecided", "higher", "equal")
    assert said == "frozen W is worse: toy 1 yes, toy 2 lower, undecided, SmolLM2 no"
    said = [claims.few(*both, "one") for both in (("yes", "yes"), ("yes", "undecided"), ("undecided", "no"))]
    assert said == [f"toy: one; SmolLM2: {word}" for word in ("yes", "undecided", "one token of three")]
    said = claims.first_helps("helps", "harms", "undecided", "harms", "helps", "equal")
    assert said == "d rare: yes; SGD: first helps, then equal; toy 1: first undecided, then harms"


def test_a_run_that_is_not_finished_is_not_taken(tmp_path, monkeypatch):
    """Nor does it touch what data/ has of it."""
    runs.open_run(tmp_path, report.EXPERIMENTS["lp-ft"])
    monkeypatch.setattr(report.scores, "keep", lambda *_: pytest.fail("it was taken"))
    with pytest.raises(ValueError, match="lacks 25 of the 25 jobs of lp-ft"):
        report.main([tmp_path])


def test_data_has_every_arm_and_seed_of_the_listed_experiments_once():
    names = {f"{name}.csv" for name in report.EXPERIMENTS}
    assert {path.name for path in DATA.iterdir()} == names | {"one_update.json", "foretell.csv"}
    for name, x in report.EXPERIMENTS.items():
        there = sorted((row["arm"], row["seed"]) for row in runs.read_csv(DATA / f"{name}.csv"))
        assert there == sorted(itertools.product((arm.name for arm in (START, *x.arms)), x.seeds)), name


def test_every_equation_of_the_results_has_its_line_of_code_and_the_other_way_round():
    """The README names the book's; the laboratory's own is in the results."""
    results, code = (
        "".join(PAGES[f"{name}.md"] for name in ("results", "one_update", "foretell")),
        "".join(path.read_text("utf-8") for path in FILES),
    )
    implemented = tags("".join(re.findall(r"# .*?\(E\d+\)$", code, re.MULTILINE)))
    assert tags(results) - tags(README) == tags(code) - tags(README) == implemented - tags(README) != set()


@pytest.mark.parametrize("page", sorted(LAB.glob("*.md")), ids=lambda page: page.name)
def test_what_the_pages_link_to_is_there(page):
    test_readme.test_what_the_pages_link_to_is_there(page)


def test_the_page_s_examples_run_and_columns_md_explains_what_they_write(tmp_path, monkeypatch, capsys):
    """An arm, an experiment, a measure, a table: one after the other in one namespace, as somebody would type
    them. Made smaller, so that it takes seconds."""
    monkeypatch.chdir(tmp_path)
    code = "\n".join(re.findall(r"^```python\n(.*?)^```", PAGES["README.md"], re.DOTALL | re.MULTILINE))
    for old, new in (("sft_steps=50", "sft_steps=2"), ("seeds=range(2)", "seeds=range(1), prompts=2, last_prompts=2")):
        assert code.count(old) == 1
        code = code.replace(old, new)
    exec(code, {"__name__": "__main__"})
    assert "answers lost" in capsys.readouterr().out
    explained = re.findall(r"^\| (\w.*?) \| ", PAGES["columns.md"], re.MULTILINE)[1:]
    rows = itertools.chain(*map(runs.read_csv, (tmp_path / "runs" / "mine").glob("*.csv")))
    assert set(", ".join(explained).split(", ")) == set(itertools.chain(*rows))


def test_the_lines_that_one_update_md_ends_with_run():
    """On a policy that knows nothing: a number for each pair of tokens."""
    code = re.search(r"^```python\n(.*?)^```", PAGES["one_update.md"], re.DOTALL | re.MULTILINE)[1]
    names, task = {**vars(minicfrl), **vars(ntk), "torch": torch}, Addition()
    exec(code, names | {"task": task, "model": tiny_gpt(0, task.vocab_size, task.block_size)}, there := {})
    N = int(there["batch"].mask.sum())
    assert there["through_W"].shape == there["through_body"].shape == (N, N)


def test_the_laboratory_is_short():
    """Limits that this project has set itself, because it is there to be read."""
    counts = {path.name: lines_of_code(path) for path in FILES}
    assert PAGES["results.md"].count("\n") <= 350 and sum(lines for lines, _ in counts.values()) <= 1700
    assert sum(path.stat().st_size for path in scores.DATA.iterdir()) <= 610_000
    for name, (lines, functions) in counts.items():
        assert lines <= 340 and max(functions, default=0) <= 50, name


@pytest.mark.parametrize("seed", [None, *range(5)], ids=lambda seed: "the page" if seed is None else f"seed {seed}")
def test_one_update_obeys_the_equations(seed, monkeypatch):
    """(E2); the residuals e_y - pi; and that the pi terms cancel, because the advantages add up to 0. Six digits are
    kept. The prediction is within a tenth of what happened, as second order leaves it at these steps."""
    update, task = stored()[1], Addition()
    if seed is not None:  # a policy that knows nothing, and is often right; and steps that are small for it
        monkeypatch.setattr(Addition, "verify", lambda self, prompt, response: float(len(response) % 2 == 0))
        small = {"": functools.partial(torch.optim.SGD, lr=2e-3), "adam_": functools.partial(torch.optim.Adam, lr=2e-5)}
        monkeypatch.setattr(one_update, "STEPS", small)
        update = one_update.closely(Addition(1), tiny_gpt(seed, 17, 11), generator(seed))
    responses, texts = update["responses"], ("prompt", "responses", "labels")
    update = {name: each if name in texts else torch.tensor(each) for name, each in update.items()}
    rewards = update["rewards"]
    assert [task.verify(update["prompt"], response) for response in responses] == rewards.tolist()
    assert len({response[:1] for response in responses}) > 1 and 0 < rewards.mean() < 1  # a group that tells much
    advantages = (rewards - rewards.mean()) / rewards.std(correction=0)
    chosen = torch.tensor([[float(response[:1] == pattern) for pattern in "dsg"] for response in responses])
    expected = {"advantages": advantages, "residuals": chosen - update["probabilities"], "pushes": advantages @ chosen}
    for name, values in expected.items():
        torch.testing.assert_close(update[name], values, rtol=0, atol=1e-5)
    for step in ("", "adam_"):
        by_R, by_G, after = (update[f"{step}{name}"] for name in ("by_R", "by_G", "after"))
        assert (by_R + by_G - after).norm() < 0.1 * after.norm()
        if seed is None:  # by SGD most goes through W, by Adam more through the body
            assert by_R.norm() < by_G.norm() if step else by_R.norm() > 10 * by_G.norm()
