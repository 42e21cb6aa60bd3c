"""What the pages and data/ say is what is there: numbers, verdicts, tags, columns, links, examples, one update."""

import functools
import itertools
import re

import pytest
import test_readme
import torch
from hypothesis import given, settings
from test_readme import lines_of_code, tags
from tiny import generator, seeds, tiny_gpt
from tiny_runs import ROOT, tiny

from experiments import claims, one_update, report, runs, toy
from experiments.arms import START
from experiments.runs import read_csv
from experiments.scores import DATA, END, Runs
from minicfrl import Addition, rollout

LAB = ROOT / "experiments"
PAGES = {page.name: page.read_text(encoding="utf-8") for page in LAB.glob("*.md")}
README = (ROOT / "README.md").read_text(encoding="utf-8")
FILES = [*LAB.glob("*.py")]


@pytest.fixture(scope="module")
def stored():
    return report.stored()


def test_the_report_would_write_the_same_pages_again(stored):
    """It finds nothing that the data contradict, and there is a table for every mark."""
    assert list(claims.contradicted(stored[0])) == []
    texts = report.sections(*stored)
    assert report.rewritten(texts) == {page: page.read_text(encoding="utf-8") for page in report.PAGES}
    marks = (re.findall(r"<!-- report: (.*?) -->", page.read_text(encoding="utf-8")) for page in report.PAGES)
    assert sorted(itertools.chain(*marks)) == sorted(texts)


def test_what_the_data_contradict_is_refused_before_a_page_is_written(monkeypatch):
    """Here an arm is plainly better, and somebody says that the two are equal, and that it is not more accurate."""
    rows = [{"arm": arm, "seed": seed, "accuracy": a} for arm, a in (("rl", 0.5), ("cf-rl", 0.9)) for seed in (0, 1)]
    asked = ("tiny", "cf-rl", "rl", claims.yes("accuracy"))
    monkeypatch.setattr(claims, "PINS", [("tiny", "cf-rl", "rl", END, 1, said) for said in ("more", "equal")])
    monkeypatch.setattr(claims, "PAPERS", [("up", said, "{}", asked) for said in ("yes", "no")])
    wrong = ["up: yes, not no", "tiny, cf-rl minus rl, accuracy at the end: more, not equal"]
    assert [*claims.contradicted({"tiny": Runs(tiny(), rows)})] == wrong
    monkeypatch.setattr(report, "stored", lambda: ({"tiny": Runs(tiny(), rows)}, {}))
    monkeypatch.setattr(report, "sections", lambda *_: pytest.fail("it goes on"))
    with pytest.raises(ValueError, match=rf"pages say: {wrong[0]}[\s\S]*{wrong[1]}"):
        report.main([])


def test_a_run_that_is_not_finished_is_not_taken(tmp_path, monkeypatch):
    """Nor does it touch what data/ has of it."""
    runs.open_run(tmp_path, report.EXPERIMENTS["lp-ft"])
    monkeypatch.setattr(report.scores, "keep", lambda *_: pytest.fail("it was taken"))
    with pytest.raises(ValueError, match="lacks 25 of the 25 jobs of lp-ft"):
        report.main([tmp_path])


def test_data_has_every_arm_and_seed_of_the_listed_experiments_once():
    names = {f"{name}.csv" for name in report.EXPERIMENTS}
    assert {path.name for path in DATA.iterdir()} == names | {"one_update.json"}
    for name, x in report.EXPERIMENTS.items():
        there = sorted((row["arm"], row["seed"]) for row in read_csv(DATA / f"{name}.csv"))
        assert there == sorted(itertools.product((arm.name for arm in (START, *x.arms)), x.seeds)), name
    assert sum(path.stat().st_size for path in DATA.iterdir()) <= 600_000


def test_every_equation_of_the_results_has_its_line_of_code_and_the_other_way_round():
    """The README names the book's; the laboratory's own is in the results."""
    results, code = PAGES["results.md"] + PAGES["one_update.md"], "".join(path.read_text("utf-8") for path in FILES)
    implemented = tags("".join(re.findall(r"# .*?\(E\d+\)$", code, re.MULTILINE)))
    assert tags(results) - tags(README) == tags(code) - tags(README) == implemented - tags(README) != set()


@pytest.mark.parametrize("page", sorted(LAB.glob("*.md")), ids=lambda page: page.name)
def test_what_the_pages_link_to_is_there(page):
    test_readme.test_what_the_pages_link_to_is_there(page)


def test_columns_md_explains_every_column_of_a_run_s_files_and_no_other(tmp_path):
    (tmp_path / "locks").mkdir()
    x = tiny(measures="all", rl_steps=2, sft_steps=2, prompts=2)
    rows = [row for arm in (START, *x.arms[:1]) for row in toy.rows_of(x, tmp_path, 0, arm)]
    explained = re.findall(r"^\| (\w.*?) \| ", PAGES["columns.md"], re.MULTILINE)[1:]
    assert {name for names in explained for name in names.split(", ")} == {name for row in rows for name in row}


def test_the_examples_of_the_laboratory_s_page_run(tmp_path, monkeypatch, capsys):
    """An arm, an experiment, a measure, a table: one after the other in one namespace, as somebody would type them. But
    for two numbers, so that it takes seconds."""
    monkeypatch.chdir(tmp_path)
    blocks = re.findall(r"^```python\n(.*?)^```", PAGES["README.md"], re.DOTALL | re.MULTILINE)
    code = "\n".join(blocks)
    for old, new in (("sft_steps=50", "sft_steps=2"), ("seeds=range(2)", "seeds=range(1), prompts=2, last_prompts=2")):
        assert code.count(old) == 1
        code = code.replace(old, new)
    exec(code, {"__name__": "__main__"})
    assert len(blocks) >= 4 and "answers lost" in capsys.readouterr().out


def test_the_laboratory_is_short():
    """Limits that this project has set itself, because it is there to be read."""
    counts = {path.name: lines_of_code(path) for path in FILES}
    assert PAGES["results.md"].count("\n") <= 350 and sum(lines for lines, _ in counts.values()) <= 1600
    for name, (lines, functions) in counts.items():
        assert lines <= 340 and max(functions, default=0) <= 50, name


# ---------------------------------------------------------------------------------------------------------- one update


class Generous(Addition):
    """Rewards an even number of characters, so that a policy that knows nothing is right half of the time."""

    def verify(self, prompt, response):
        return float(len(response) % 2 == 0)


@settings(max_examples=3)
@given(seed=seeds)
def test_half_the_step_leaves_a_quarter_of_the_difference(seed):
    """Between what R and G say of the patterns' probabilities and what happened, by SGD and by Adam. The ratio is 4 up
    to third order, under a tenth at steps this small; a difference at rounding's size has no ratio."""
    differences = {"": [], "adam_": []}
    for half in (1, 2):
        with pytest.MonkeyPatch.context() as patch:
            patch.setitem(one_update.STEPS, "", functools.partial(torch.optim.SGD, lr=2e-3 / half))
            patch.setitem(one_update.STEPS, "adam_", functools.partial(torch.optim.Adam, lr=2e-5 / half))
            update = one_update.closely(Generous(1), tiny_gpt(seed, 17, 11), generator(seed))
        for step, each in differences.items():
            by_R, by_G, after = (torch.tensor(update[f"{step}{name}"]) for name in ("by_R", "by_G", "after"))
            each.append((after - by_R - by_G).norm())
            assert each[-1] < 0.05 * after.norm()
    for whole, half in differences.values():
        assert 3.6 < whole / half < 4.4 or whole < 1e-12


def test_adam_s_first_step_is_a_sign():
    """Down the gradient, up to Adam's epsilon; and what the step is said to be is what it did."""
    model = torch.nn.Linear(3, 1, bias=False)
    after, update = one_update.stepped(model, [torch.tensor([[2.0, -3.0, 0.0]])], one_update.STEPS["adam_"])
    torch.testing.assert_close(update["weight"], 4e-4 * torch.tensor([[-1.0, 1.0, 0.0]]), rtol=1e-6, atol=0)
    torch.testing.assert_close(after.weight, model.weight + update["weight"])


def test_the_group_is_the_first_that_tells_most():
    """Of 64 prompts, asked one by one: most patterns, and then as many right responses as wrong ones."""
    task, model, draws, told = Generous(1), tiny_gpt(0, 17, 11), generator(0), []
    prompt, batch = one_update.telling_group(model, task, generator(0))
    for pair in task.train_pairs[torch.randint(len(task.train_pairs), (64,), generator=draws)].tolist():
        group = rollout(model, task, [task.prompt(*pair)], 4, draws)
        right = int(group.rewards.sum())
        told.append((len({r[:1] for r in group.responses}), min(right, 4 - right), task.prompt(*pair), group.responses))
    first = next(each for each in told if each[:2] == max(each[:2] for each in told))
    assert (prompt, batch.responses) == first[2:]


def test_the_example_on_the_page_obeys_the_equations(stored):
    """(E2); the residuals e_y - pi; and that the pi terms cancel, because the advantages add up to 0. Six digits are
    kept. The prediction is within a tenth of what happened, as second order leaves it at this step; by SGD most goes
    through W, by Adam more through the body."""
    texts = {name: stored[1][name] for name in ("prompt", "responses", "labels")}
    update = {name: torch.tensor(each) for name, each in stored[1].items() if name not in texts}
    rewards, responses = update["rewards"], texts["responses"]
    assert [Addition().verify(texts["prompt"], response) for response in responses] == rewards.tolist()
    advantages = (rewards - rewards.mean()) / rewards.std(correction=0)
    chosen = torch.tensor([[float(response[:1] == pattern) for pattern in "dsg"] for response in responses])
    expected = {"advantages": advantages, "residuals": chosen - update["probabilities"], "pushes": advantages @ chosen}
    for name, values in expected.items():
        torch.testing.assert_close(update[name], values, rtol=0, atol=1e-4)
    for step in ("", "adam_"):
        told = update[f"{step}by_R"] + update[f"{step}by_G"]
        torch.testing.assert_close(told, update[f"{step}after"], rtol=0.1, atol=0)
    assert update["by_R"].norm() > 10 * update["by_G"].norm()
    assert update["adam_by_R"].norm() < update["adam_by_G"].norm()
