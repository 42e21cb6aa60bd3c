"""The command line: what it prints, and that bad input ends in one sentence."""

import shutil

import pytest
import torch
from tiny_runs import DEFAULT_ARMS, refused, rows_of, run

import train_toy
from experiments import runs, tables
from experiments.arms import ARMS, EXPERIMENTS, Config
from minicfrl import Addition


def test_saved_policies_answer(finished, capsys):
    assert train_toy.main(["--out", str(finished), "--ask", "4+8="]) == 0  # the run's own configuration, no flags
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[-1] for line in lines] == ["sft", *DEFAULT_ARMS]
    assert all(line.startswith("  4+8= ") and ("✗" in line or "✓" in line) for line in lines)


def test_asking_trains_nothing(finished, capsys, tmp_path):
    """Not even what is missing, and writes nothing: an unfinished run answers with the policies that are there."""
    (tmp_path / "unfinished").mkdir()
    shutil.copy(finished / "config.json", tmp_path / "unfinished")
    question = ["--out", str(tmp_path / "unfinished"), "--ask", "4+8="]
    assert "holds no policy yet" in refused(capsys, *question)
    shutil.copy(finished / "cf-rl-seed0.pt", tmp_path / "unfinished")
    assert train_toy.main(question) == 0 and capsys.readouterr().out.count("\n") == 1
    assert {path.name for path in (tmp_path / "unfinished").iterdir()} == {"config.json", "cf-rl-seed0.pt"}


def test_plot_draws_a_picture_and_changes_no_metric(finished, tmp_path):
    """Of an arm that is trained in the same run."""
    pytest.importorskip("matplotlib")
    plot = shutil.copytree(finished, tmp_path / "plot")
    (plot / "cf-rl-seed0.pt").unlink()
    assert run(plot, "--plot") == 0
    assert (plot / "curves.png").read_bytes().startswith(b"\x89PNG")
    assert rows_of(plot) == rows_of(finished)


def widest(capsys):
    """The longest line on stdout, and its length in columns: every character that is printed takes one."""
    line = max(capsys.readouterr().out.splitlines(), key=len)
    return len(line), line


def made_up(config):
    """A summary of all arms at once, every cell as wide as its measure can make it: rates between 0 and 1 that differ
    as much as they can, changes of a probability that are negative, a threshold that was never reached."""
    rates = [float(i % 2) for i in range(config.seeds)]
    measures = {name: rates for _, name, _ in tables.COLUMNS} | {f"share_{p}": rates for p in Addition.patterns}
    measures |= {name: [-0.5 - rate / 2 for rate in rates] for _, name, _ in tables.MICROSCOPE}
    curve = [[rate] * (config.rl_steps + 1) for rate in (0.5, *rates[1:])]
    measures["curves"] = dict.fromkeys(tables.CURVES, curve)
    never = {"updates_to_threshold": [None] * config.seeds}
    return {"sft": measures} | {arm: measures | never for arm in ARMS}


def test_what_a_finished_run_prints_fits_80_columns(finished, tmp_path, capsys):
    """Nothing is missing, so this is the report: tables, curves, worked sums, verdict."""
    shutil.copytree(finished, tmp_path / "again")
    capsys.readouterr()
    assert run(tmp_path / "again") == 0
    width, line = widest(capsys)
    assert 60 < width <= 80, line


@pytest.mark.parametrize("seeds", [1, 5])
def test_the_tables_of_any_arms_fit_80_columns(seeds, capsys):
    config = Config(seeds=seeds, rl_steps=300)
    tables.print_tables(config, made_up(config))
    width, line = widest(capsys)
    assert 60 < width <= 80, line


def test_what_a_run_says_while_it_trains_fits_80_columns(tmp_path, capsys):
    """With its defaults and in every experiment; the jobs themselves are replaced by one that is done at once."""
    for name, flags in {"plain": {}, **EXPERIMENTS}.items():
        (tmp_path / name).mkdir()
        config = Config(**flags)
        with runs.jobs(config, tmp_path / name, 1) as do:
            for arms in (["sft"], config.arm_list):
                assert do(lambda *_: torch.nn.Identity(), arms) == []
    width, line = widest(capsys)
    assert 60 < width <= 80, line


def test_a_run_prints_at_most_two_tables_and_then_the_verdict(finished, tmp_path, capsys, monkeypatch):
    """A table is what `lines_of` makes; all that a finished run prints is its report."""
    shutil.copytree(finished, tmp_path / "again")
    printed, lines_of = [], tables.lines_of
    monkeypatch.setattr(tables, "lines_of", lambda rows: printed.append("table") or lines_of(rows))
    monkeypatch.setattr(train_toy, "verdict", lambda *_: printed.append("verdict") or "So it ends.")
    assert run(tmp_path / "again") == 0
    assert printed in (["table", "verdict"], ["table", "table", "verdict"])
    assert capsys.readouterr().out.endswith("\n\nSo it ends.\n")


@pytest.mark.parametrize(
    "flags, message",
    [
        (["--learning-rate", "1"], "unrecognized arguments: --learning-rate 1"),
        (["--rl-steps", "0"], "rl_steps must be a whole number of at least 1, not 0"),
        (["--rl-steps", "2.5"], "invalid int value: '2.5'"),
        (["--seeds", "-1"], "seeds must be a whole number of at least 1, not -1"),
        (["--workers", "0"], "workers must be a whole number of at least 1, not 0"),
        (["--classifier-steps", "81"], "classifier_steps=81 is not between 0 and steps=80"),
        (["--arms", "rl", "--classifier-steps", "81"], "classifier_steps=81 is not between 0 and steps=80"),
        (["--arms", "rl-sgd,ft", "--classifier-lr", "nan"], "classifier_lr must be finite and not negative, not nan"),
        (["--digits", "4"], "digits must be 1, 2 or 3, not 4"),
        (["--samples", "1"], "samples=1 leaves the baseline 'std' no group to compare with"),
        (["--arms", "rl,sarsa"], "arm 'sarsa' is not one of rl, cf-rl"),
        (["--arms", "rl,rl"], "arm 'rl' is there twice"),
        (["--arms", ""], "arm '' is not one of rl, cf-rl"),
        (["--baseline", "median"], "baseline must be one of std, mean, rloo, none, not 'median'"),
        (["--tilt", "0.8,few"], "tilt must be shares such as 0.8,0.01,0.19, not '0.8,few'"),
        (["--tilt", "0.5,0.5"], "mixture=(0.5, 0.5) does not give one share for each of dsg"),
        (["--lr", "nan"], "lr must be finite and not negative, not nan"),
        (["--threshold", "1.5"], "threshold must lie between 0 and 1, not 1.5"),
        (["--ask", "47+8x="], "'47+8x=' is not a prompt such as '01+02='"),
        (["--plot"], "--plot needs --out DIR to draw in"),
        (["--experiment", "alchemy"], "argument --experiment: invalid choice: 'alchemy'"),
        (["--qui"], "unrecognized arguments: --qui"),
    ],
)
def test_bad_arguments_end_in_one_sentence_and_exit_code_2(capsys, flags, message):
    assert message in refused(capsys, *flags)


def test_help_explains_every_flag(capsys):
    with pytest.raises(SystemExit) as stopped:
        train_toy.main(["--help"])
    assert stopped.value.code == 0
    text = capsys.readouterr().out
    assert all(f"--{name.replace('_', '-')}" in text for name in Config.__dataclass_fields__)


def test_the_quick_run_needs_no_folder(capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    flags = "--quick --arms rl --sft-steps 9 --rl-steps 4 --eval-prompts 4 --final-prompts 4 --workers 1"
    assert train_toy.main(flags.split()) == 0
    assert "No verdict without all of" in capsys.readouterr().out and list(tmp_path.iterdir()) == []
