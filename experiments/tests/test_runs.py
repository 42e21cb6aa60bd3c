"""Runs and the command: they repeat, go on where they were cut, share their work, and end cleanly however they end."""

import contextlib
import errno
import io
import itertools
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from filelock import FileLock  # torch brings it
from hypothesis import example, given
from hypothesis import strategies as st
from tiny_runs import ROOT, contents, environment, files, noted_rows, quick_rows, tiny

from experiments import __main__ as command
from experiments import report, runs, toy
from experiments.arms import some
from experiments.judges import coin_flips


@pytest.fixture
def run(monkeypatch):
    """What `python -m experiments run tiny` does, in this process, of jobs that take no time."""

    def run(out, *flags, x=None, rows_of=quick_rows):
        monkeypatch.setitem(report.EXPERIMENTS, "tiny", x or tiny())
        monkeypatch.setattr(toy, "rows_of", rows_of)
        return command.main(["run", "tiny", "--out", str(out), "--workers", "1", *flags])

    return run


@pytest.fixture
def float32():
    """As users run it, and as a worker does, which does not see what the tests set."""
    torch.set_default_dtype(torch.float32)
    yield
    torch.set_default_dtype(torch.float64)


def one_line(errors):
    assert errors.count("\n") == 1 and errors.endswith("\n")
    return errors


def elsewhere(call, **how):
    """A Python process that calls a function of tiny_runs. It has a session of its own, so that we can end it whole."""
    line = [sys.executable, "-c", f"import tiny_runs; tiny_runs.{call}"]
    return subprocess.Popen(line, env=environment(), start_new_session=True, text=True, **how)


def test_a_run_that_was_cut_goes_on_and_ends_the_same(tmp_path, float32):
    """We take away the files of the start and of one arm, whose job was cut before it could write them. More seeds are
    no other run. What is done is not done again: so the start's policy is older than what uses it."""
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    assert runs.run(tiny(), whole, toy.rows_of) == runs.run(tiny(), cut, toy.rows_of) == []
    for name in ("sft-seed0.pt", "sft-seed0.csv", "cf-rl-seed0.csv"):
        (cut / name).unlink()
    kept = (cut / "rl-seed0.csv").stat().st_mtime_ns
    assert runs.run(tiny(), cut, toy.rows_of) == [] and contents(cut) == contents(whole)
    assert runs.run(tiny(seeds=range(2)), cut, quick_rows) == [] and len(contents(cut)) == 6
    assert (cut / "rl-seed0.csv").stat().st_mtime_ns == kept
    policy, rows = (whole / f"sft-seed0.{kind}" for kind in ("pt", "csv"))
    assert policy.stat().st_mtime_ns <= rows.stat().st_mtime_ns
    assert policy.read_bytes() == (cut / "sft-seed0.pt").read_bytes()


def test_a_worker_and_another_command_share_the_jobs_and_write_the_files_of_one_process(tmp_path, float32):
    """No job is done twice. The jobs wait until three processes are at work, so that none does everything."""
    x, out = tiny(seeds=range(2)), tmp_path / "three"
    with elsewhere(f"help_out({str(out)!r})") as process:
        runs.run(x, out, noted_rows, workers=2)
        assert process.wait(60) == 0
    notes = [path.read_text(encoding="utf-8").split() for path in (tmp_path / "notes").iterdir()]
    assert len(notes) == 3 and sorted(sum(notes, [])) == sorted(f"{arm.name}-seed{seed}" for seed, arm in x.jobs())
    runs.run(x, tmp_path / "one", toy.rows_of)
    assert contents(out) == contents(tmp_path / "one") and len(contents(out)) == 6


# --------------------------------------------------------------------------------------------------- nothing is lost


def test_a_folder_with_another_experiment_or_other_things_is_refused_and_left_as_it_is(tmp_path, run, capsys):
    """Another torch is another experiment, too, because it can give other numbers."""
    things, old, cut = (tmp_path / name for name in ("things", "old", "cut"))
    for folder in (old, cut):
        run(folder)
    things.mkdir()
    (things / "thesis.txt").write_text("mine", encoding="utf-8")
    (cut / "run.json").write_text('{"name": "ti', encoding="utf-8")
    before = files(tmp_path)
    capsys.readouterr()
    for folder, told in (
        (things, "run: choose another --out"),
        (old, "a run with other n, lr: "),
        (cut, "run.json of"),
    ):
        assert run(folder, x=tiny(lr=1.0, n=3)) == 2
        assert re.search(f"{folder} (holds|has) (no )?{told}", one_line(capsys.readouterr().err))
    with pytest.MonkeyPatch.context() as patch, pytest.raises(ValueError, match="holds a run with other torch: choose"):
        patch.setattr(torch, "__version__", "0.4")
        runs.open_run(old, tiny())
    assert files(tmp_path) == before


def test_a_folder_that_cannot_be_made_or_locked_is_refused(tmp_path, run, capsys, monkeypatch):
    """Some file systems have no locks. (Root may write in any folder, so that we cannot forbid it here.)"""
    (tmp_path / "file").touch()
    assert run(tmp_path / "file" / "run") == 2
    assert str(tmp_path / "file") in one_line(capsys.readouterr().err)

    def refuse(lock):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(FileLock, "acquire", refuse)
    assert run(tmp_path / "run") == 2
    assert "cannot be written and locked ([Errno 37] No locks" in one_line(capsys.readouterr().err)
    assert [*files(tmp_path)] == [tmp_path / "file"]


def test_a_full_disk_ends_in_a_sentence_and_leaves_no_half_file(tmp_path, run, capsys, monkeypatch):
    """It has room for the start, and for half of the next file. Once there is room, the same command goes on."""
    write_bytes = Path.write_bytes

    def full(path, content):
        if path.name.startswith("rl-seed0.csv"):
            write_bytes(path, content[: len(content) // 2])
            raise OSError(errno.ENOSPC, "No space left on device", str(path))
        return write_bytes(path, content)

    with monkeypatch.context() as patch:
        patch.setattr(Path, "write_bytes", full)
        assert run(tmp_path) == 1
    assert re.fullmatch(r"stopped: .Errno 28. No space left .*\n2 of 3 jobs are not done.*\n", capsys.readouterr().err)
    assert {path.name for path in files(tmp_path)} == {"run.json", "sft-seed0.csv"}
    assert run(tmp_path) == 0 and len(contents(tmp_path)) == 3


def test_a_job_that_is_not_finite_is_told_and_the_others_go_on(tmp_path, run, capsys, float32):
    """An absurd rate of W breaks the arm that uses it, and not plain RL. Tried again, it breaks again. (The rewards are
    coin flips, because this start is never right, and then nothing moves.)"""
    x = tiny(some("rl cf-rl", rl=dict(reward=coin_flips)), rate=5e40, policy={})
    for _ in range(2):
        assert run(tmp_path, x=x, rows_of=toy.rows_of) == 1
        printed = capsys.readouterr()
        assert "cf-rl, seed 0, stopped at step 2: the policy's logits are not finite\n" in printed.err
        assert printed.err.endswith("1 of 3 jobs are not done; the same command tries again\n")
        assert "`rl`" in printed.out and {*contents(tmp_path)} == {"sft-seed0.csv", "rl-seed0.csv"}


@pytest.mark.skipif(os.name == "nt", reason="POSIX signals")
@pytest.mark.parametrize("how", [signal.SIGINT, signal.SIGKILL], ids=["Ctrl-C", "a kill"])
def test_what_is_done_is_kept_and_no_worker_and_no_lock_outlives_the_run(how, tmp_path):
    """Once two workers are in a job that never ends. Ctrl-C reaches all processes of a terminal, a kill only the
    parent. A worker holds its parent's pipe, so that `communicate` would time out if one were left."""
    pipes = dict(stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
    hear = dict(
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler)
    )  # even where a shell is deaf
    out, begun = tmp_path / "run", time.monotonic()
    process = elsewhere(f"run_endlessly({str(out)!r})", **pipes, **hear)
    try:
        while len([*tmp_path.glob("*-began")]) < 2:
            assert process.poll() is None and time.monotonic() - begun < 60
            time.sleep(0.02)
        os.killpg(process.pid, how) if how == signal.SIGINT else process.kill()
        _, errors = process.communicate(timeout=10)
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.communicate()
    told = "interrupted: what is done is kept, and the same command goes on\n" if how == signal.SIGINT else ""
    assert (errors, process.returncode) == (told, 130 if told else -how)
    assert [*contents(out)] == ["sft-seed0.csv"] and not [*out.glob("*.part*")]
    assert runs.run(tiny(), out, quick_rows) == [] and len(contents(out)) == 3


# ---------------------------------------------------------------------------------------------------------- the command


def test_a_run_ends_with_a_table_and_the_list_names_all_experiments(tmp_path, run, capsys):
    """In 80 columns."""
    assert run(tmp_path, "--quick", rows_of=toy.rows_of) == 0
    heading, _, *rows = capsys.readouterr().out.splitlines()
    assert heading.startswith("| arm |") and [row.split()[1] for row in rows] == ["`sft`", "`rl`", "`cf-rl`"]
    assert command.main(["list"]) == 0
    listed = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in listed] == [*report.EXPERIMENTS] and max(map(len, rows + listed)) <= 80


absurd = st.sampled_from(["", " ", "nan", "1e400", "9" * 400, "9" * 5000, "٣", "-1", "0", "1_0", "--", "\0", "\udcff"])
values = st.integers(-2, 30).map(str) | st.integers().map(str) | absurd | st.text()
option = st.tuples(st.sampled_from(["--seed", "--seeds", "--model", "--device", "--rate", "--see"]), values)
options = st.lists(option | st.tuples(st.sampled_from(["--quick", "--seeds", "speed"]) | values), max_size=3)
where = st.sampled_from(["new", "deep/new", "other", "file", "file/new", "n" * 300, "\0", "\udcff"])


@given(name=st.sampled_from([*report.EXPERIMENTS]) | values, out=where, options=options)
@example(name="lp-ft", out="new", options=[("--seed", "-3"), ("--seeds", "1")])
@example(name="lp-ft", out="new", options=[("--seeds", "9" * 20)])
def test_any_command_line_is_understood_or_refused_in_one_sentence(name, out, options, tmp_path_factory):
    """Without the training. A refusal has exit code 2, and leaves all as it was; what is understood is recorded, and
    then none of its jobs is done."""
    folder = tmp_path_factory.mktemp("any")
    (folder / "other").mkdir()
    for file in ("file", "other/thesis.txt"):
        (folder / file).write_text("mine", encoding="utf-8")
    before, streams = files(folder), [io.TextIOWrapper(io.BytesIO(), "utf-8", "backslashreplace") for _ in range(2)]
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(streams[0]):
        patch.setattr(sys, "stderr", streams[1])
        patch.setattr(runs, "work", lambda *_: None)
        patch.chdir(folder)
        try:
            code = command.main(["run", name, "--workers", "1", "--out", out, *itertools.chain(*options)])
        except SystemExit as stopped:
            code = stopped.code
    printed, errors = ((stream.flush(), stream.buffer.getvalue().decode())[1] for stream in streams)
    if code == 2:
        assert one_line(errors).startswith("python -m experiments: error: ")
        assert printed == "" and files(folder) == before
    else:
        assert code == 1 and re.fullmatch(r"[\s\S]*(\d+) of \1 jobs are not done.*\n", errors)
        assert runs.read_record(folder / out)["name"] == name


def test_to_import_the_laboratory_changes_nothing_of_the_process():
    """Neither the environment nor torch's threads nor what signals do."""
    modules = [path.stem for path in (ROOT / "experiments").glob("*.py") if not path.stem.startswith("trl_")]
    state = "(dict(os.environ), torch.get_num_threads(), [signal.getsignal(s) for s in signal.valid_signals()])"
    imports = "".join(f"import experiments.{name};" for name in modules)
    code = f"import os, signal, torch, tqdm; before = {state}; {imports} assert before == {state}"
    ran = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert ran.returncode == 0, ran.stderr
