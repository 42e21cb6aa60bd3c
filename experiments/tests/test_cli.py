"""The command line: what it prints, and that bad input ends in one sentence."""

import contextlib
import io
import multiprocessing
import os
import re
import shutil
import signal
import subprocess
import sys
import threading

import pytest
import torch
from tiny_runs import DEFAULT_ARMS, TINY, environment, refused, rows_of, run

from experiments import __main__ as command
from experiments import cli, real_model, runs, tables, toy
from experiments.arms import ARMS, EXPERIMENTS, Config, arm_named
from minicfrl import Addition


def test_saved_policies_answer(finished, capsys):
    assert toy.main(["plain", "--out", str(finished), "--ask", "4+8="]) == 0  # the run's own configuration, no flags
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
    assert toy.main(["plain", *question]) == 0 and capsys.readouterr().out.count("\n") == 1
    assert {path.name for path in (tmp_path / "unfinished").iterdir()} == {"config.json", "cf-rl-seed0.pt"}


def test_plot_draws_a_picture_and_changes_no_metric(finished, tmp_path, monkeypatch):
    """Of an arm that is trained in the same run. A backend that is not there, as a notebook's in another environment,
    does no harm: that counts where matplotlib is imported for the first time, which is here if all tests are run."""
    monkeypatch.setenv("MPLBACKEND", "module://nowhere")
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
    monkeypatch.setattr(toy, "verdict", lambda *_: printed.append("verdict") or "So it ends.")
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
        (["--qui"], "unrecognized arguments: --qui"),
        (["speed"], "unrecognized arguments: speed"),
    ],
)
def test_bad_arguments_end_in_one_sentence_and_exit_code_2(capsys, flags, message):
    assert message in refused(capsys, *flags)


@pytest.mark.parametrize(
    "arguments, message",
    [
        ([], "it takes list, run NAME --out DIR or report [DIR ...]"),
        (["lsit"], "it takes list, run NAME --out DIR or report [DIR ...]"),
        (["list", "speed"], "it takes list, run NAME --out DIR or report [DIR ...]"),
        (["run"], "the following arguments are required: NAME"),
        (["run", "alchemy"], "'alchemy' is no experiment: see python -m experiments list"),
        (["run", "real"], "--out DIR is missing: the runs are too long to be thrown away"),
        (["run", "--out", "real"], "the following arguments are required: NAME"),
    ],
)
def test_a_command_that_does_not_exist_ends_in_one_sentence_and_exit_code_2(capsys, arguments, message):
    try:
        code = command.main(arguments)
    except SystemExit as stopped:
        code = stopped.code
    printed = capsys.readouterr()
    assert code == 2 and printed.out == "" and printed.err.count("\n") == 1 and message in printed.err


def test_a_report_of_no_run_is_refused_before_anything_is_written(capsys, tmp_path):
    pytest.importorskip("matplotlib")
    assert command.main(["report", str(tmp_path)]) == 2
    assert capsys.readouterr().err == f"python -m experiments: error: {tmp_path} is not the folder of a finished run\n"


def test_the_list_has_every_experiment_with_arms_that_exist(capsys):
    """Where there are too many for 80 columns, the first of them."""
    assert command.main(["list"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines] == ["plain", *EXPERIMENTS, *real_model.EXPERIMENTS]
    assert max(map(len, lines)) <= 80
    for line in lines:
        arms = line[21:].removesuffix(" ...").strip(", ").split(", ")
        assert arms and all(map(arm_named, arms))


def test_plot_without_matplotlib_is_refused(capsys, tmp_path, monkeypatch):
    """Where it is missing, and where it does not start: MPLBACKEND can name what it does not know."""
    for content, reason in (("raise ImportError('no')", "no"), ("raise ValueError('Key backend')", "Key backend")):
        (tmp_path / "matplotlib.py").write_text(content, encoding="utf-8")
        monkeypatch.syspath_prepend(tmp_path)
        monkeypatch.delitem(sys.modules, "matplotlib", raising=False)
        message = refused(capsys, "--plot", "--out", str(tmp_path / "run"))
        assert message.endswith(f"--plot needs matplotlib (pip install matplotlib): {reason}\n")
        shutil.rmtree(tmp_path / "__pycache__", ignore_errors=True)
    assert not (tmp_path / "run").exists()


def test_help_explains_every_flag(capsys):
    with pytest.raises(SystemExit) as stopped:
        toy.main(["--help"])
    assert stopped.value.code == 0
    text = capsys.readouterr().out
    assert all(f"--{name.replace('_', '-')}" in text for name in Config.__dataclass_fields__)


def whole(name, text):
    """Is the name there, with no more of a name before or after it?"""
    return re.search(rf"(?<![\w-]){re.escape(name)}(?![\w-])", text)


@pytest.mark.parametrize("columns", [50, 80, 97])
@pytest.mark.parametrize("program", [toy, real_model])
def test_help_keeps_the_names_of_arms_and_experiments_whole(program, columns, monkeypatch, capsys):
    """So that one can copy or search them, however wide the screen."""
    monkeypatch.setenv("COLUMNS", str(columns))
    with pytest.raises(SystemExit) as stopped:
        program.main(["--help"])
    assert stopped.value.code == 0
    names = [*program.EXPERIMENTS, *(ARMS if program is toy else program.RealConfig.arms.split(","))]
    text = capsys.readouterr().out
    assert [name for name in names if not whole(name, text)] == []


def test_what_a_run_says_keeps_the_names_of_arms_whole():
    """In 80 columns, wherever a name begins."""
    for start in range(40, 80):
        text = runs.filled("x" * start + " " + ", ".join(ARMS))
        assert all(whole(name, text) for name in ARMS) and max(map(len, text.splitlines())) <= 80


@pytest.mark.parametrize("program", [toy, real_model])
def test_a_stream_of_any_encoding_prints_ticks(program, monkeypatch):
    """Both programs make it so, before they print anything; and what is no text at all is printed as backslashes."""
    streams = {name: io.TextIOWrapper(io.BytesIO(), encoding="ascii") for name in ("stdout", "stderr")}
    for name, stream in streams.items():
        monkeypatch.setattr(sys, name, stream)
    with pytest.raises(SystemExit):
        program.main(["--help"])
    for stream in streams.values():
        print("✓ ✗ \ud800", file=stream, flush=True)
        assert stream.buffer.getvalue().decode().endswith("✓ ✗ \\ud800\n")


def test_a_stream_that_is_not_there_takes_what_is_printed(monkeypatch):
    monkeypatch.setattr(sys, "stderr", None)
    cli.open_streams()
    with sys.stderr:
        print("✓", file=sys.stderr, flush=True)


def test_a_thread_can_run_the_command_line(finished, tmp_path):
    """Only the main thread may handle signals; another trains without."""
    out, codes = shutil.copytree(finished, tmp_path / "thread"), []
    (out / "cf-rl-seed0.pt").unlink()
    thread = threading.Thread(target=lambda: codes.append(run(out)))
    thread.start()
    thread.join()
    assert codes == [0] and (out / "cf-rl-seed0.pt").exists()


def test_a_system_without_locks_is_told_to_use_one_worker(finished, tmp_path, capsys, monkeypatch):
    """As where /dev/shm cannot be written to. With one worker there is nothing to share."""

    def no_lock():
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(multiprocessing.get_context("spawn"), "RLock", no_lock)
    out = shutil.copytree(finished, tmp_path / "locks")
    assert run(out, "--workers", "2") == 1
    errors = capsys.readouterr().err
    assert errors == "stopped: processes cannot share locks here ([Errno 13] Permission denied): try --workers 1\n"
    assert run(out) == 0


# -------------------------------------------------------------------------------------------------- processes elsewhere

POSIX = pytest.mark.skipif(os.name == "nt", reason="a POSIX shell, and process groups")


@POSIX
def test_a_script_that_does_not_guard_its_call_is_told_so(finished, tmp_path):
    """Its workers would start runs of their own. It ends; multiprocessing's own complaint is thirty lines long."""
    out, script = shutil.copytree(finished, tmp_path / "out"), tmp_path / "unguarded.py"
    for arm in ("rl", "cf-rl"):
        (out / f"{arm}-seed0.pt").unlink()
    script.write_text("import sys\nfrom experiments import toy\nsys.exit(toy.main(sys.argv[1:]))\n", encoding="utf-8")
    command = [sys.executable, str(script), "plain", *TINY, "--workers", "2", "--out", str(out)]
    pipes = dict(stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, encoding="utf-8")
    process = subprocess.Popen(command, env=environment(), start_new_session=True, **pipes)
    try:
        _, errors = process.communicate(timeout=60)
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.communicate()
    told = "workers import the script that starts them: call main() under `if __name__ == '__main__':`"
    (rest,) = filter(None, errors.replace(told, "").split("\n"))  # two workers may say it in one line
    assert process.returncode == 1 and told in errors and "a worker process died" in rest
    assert not (out / "rl-seed0.pt").exists()


def test_ctrl_c_while_the_arguments_are_checked_ends_in_one_sentence_too(monkeypatch, capsys):
    """To load a real model takes its time."""

    def interrupted(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr("experiments.cli.check_toy", interrupted)
    try:
        code = toy.main(["plain"])
    except KeyboardInterrupt:  # which would end the tests, and not only this one
        code = None
    assert code == 130 and capsys.readouterr().err.endswith("interrupted: nothing is kept without --out\n")


def test_the_quick_run_needs_no_folder(capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    flags = "--quick --arms rl --sft-steps 9 --rl-steps 4 --eval-prompts 4 --final-prompts 4 --workers 1"
    assert toy.main(["plain", *flags.split()]) == 0
    assert "No verdict without all of" in capsys.readouterr().out and list(tmp_path.iterdir()) == []
