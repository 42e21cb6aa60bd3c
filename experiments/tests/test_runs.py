"""Runs and the command: they repeat, go on where they were cut, share their work, and end cleanly however they end."""

import contextlib
import errno
import io
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from unittest import mock

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule
from tiny_runs import ROOT, SMALL, contents, files, meeting_rows, quick_rows, tiny

from experiments import __main__ as command
from experiments import report, runs, scores, toy


@pytest.fixture
def run(monkeypatch):
    """What `python -m experiments run tiny` does, in this process, of jobs that take no time."""

    def run(out, *flags, x=None, rows_of=quick_rows):
        monkeypatch.setitem(report.EXPERIMENTS, "tiny", x or tiny())
        monkeypatch.setattr(toy, "rows_of", rows_of)
        return command.main(["run", "tiny", "--out", str(out), "--workers", "1", *flags])

    return run


class RunFolder(RuleBasedStateMachine):
    """What can happen to a folder, in any order. No job is done twice, every result is whole all the time, and in the
    end all files are those of a run to which nothing happened."""

    jobs = st.integers(0, 9)  # in which of the jobs that are left, or that are done

    def __init__(self):
        super().__init__()
        self.out, self.seeds = Path(tempfile.mkdtemp()) / "run", 1

    @property
    def x(self):
        return tiny(seeds=range(self.seeds))

    def go(self, at=0, happens=lambda: None):
        """The command, and the job in which something happens."""
        left = runs.missing(self.x, self.out)
        chosen = left[at % len(left)] if left else None

        def rows_of(x, out, seed, arm):
            """A job, and a file that all jobs of a seed need: the first that comes makes it."""
            assert not runs.file_of(out, seed, arm).exists()
            there = (shared := out / f"sft-seed{seed}.pt").exists()
            runs.once(shared, lambda: pytest.fail("made again") if there else b"policy")
            for row in quick_rows(x, out, seed, arm):
                if (seed, arm) == chosen:
                    happens()
                yield row

        with contextlib.suppress(KeyboardInterrupt, OSError):
            runs.run(self.x, self.out, rows_of)
        return runs.missing(self.x, self.out), chosen

    @rule()
    def the_same_command_goes_on(self):
        assert self.go()[0] == []

    @rule()
    def it_is_given_more_seeds(self):
        self.seeds += 1

    @rule(at=jobs, error=st.sampled_from([KeyboardInterrupt, FloatingPointError]))
    def a_job_is_cut_or_stops(self, at, error):
        """What stops is left, and the others are done."""
        left, job = self.go(at, mock.Mock(side_effect=error("step 1: not finite")))
        assert job is None or job in left and (error is KeyboardInterrupt or left == [job])

    @rule(at=jobs)
    def another_command_takes_the_other_jobs(self, at):
        seen = []
        left, job = self.go(at, lambda: seen.append(self.go()[0]))
        assert left == [] and all(each == [job] for each in seen)

    @rule()
    def the_disk_is_full_within_a_file(self):
        def full(path, content):
            path.write_text(content.decode()[: len(content) // 2], encoding="utf-8")
            raise OSError(errno.ENOSPC, "No space left on device")

        with mock.patch.object(Path, "write_bytes", full):
            self.go()

    @rule(at=jobs, n=st.integers(1, 20), what=st.sampled_from(["loses its end", "loses lines", "gains zeros"]))
    def a_result_is_damaged(self, at, n, what):
        """It is named, and read as no result, until somebody takes it away; the same command does not touch it."""
        self.the_same_command_goes_on()
        path = sorted(self.out.glob("*.csv"))[at % len(self.x.jobs())]
        whole = path.read_bytes()
        kept, end, _ = whole[:-n].rpartition(b"\n")
        damaged = {"loses its end": whole[:-n], "loses lines": kept + end, "gains zeros": whole + bytes(n)}[what]
        path.write_bytes(damaged)
        self.the_same_command_goes_on()
        with pytest.raises(ValueError, match=f"{re.escape(str(path))} is damaged: delete it"):
            list(scores.collected(self.x, self.out))
        assert path.read_bytes() == damaged
        path.rename(path.with_name(f"{path.name}.part0"))  # as a process that was killed leaves it

    @invariant()
    def every_result_is_whole_and_there_are_no_other_parts(self):
        for job in self.x.jobs():
            path, content = runs.file_of(self.out, *job), runs.as_csv([*quick_rows(self.x, self.out, *job)])
            assert not path.exists() or path.read_bytes() == content
        assert all(path.name.endswith(".part0") for path in self.out.glob("*.part*"))

    def teardown(self):
        self.the_same_command_goes_on()
        self.every_result_is_whole_and_there_are_no_other_parts()
        shutil.rmtree(self.out.parent)


TestRunFolder = RunFolder.TestCase
TestRunFolder.settings = settings(stateful_step_count=12)
# As file systems say that have no locks: then the library would make do with one that outlives a killed process.
LOCKLESS = mock.Mock(side_effect=OSError(errno.ENOSYS, "Function not implemented"))
REFUSALS = {
    "holds no run: choose another --out": lambda out, patch: (out / "run.json").rename(out / "thesis.txt"),
    "has no run.json of a run": lambda out, patch: (out / "run.json").write_text('{"name": "ti'),
    "holds a run with other n: choose another --out": lambda out, patch: patch.setitem(SMALL, "n", 3),
    "holds a run with other torch: choose": lambda out, patch: patch.setattr(torch, "__version__", "0.4"),
    "cannot be written and locked (": lambda out, patch: patch.setattr("fcntl.flock", LOCKLESS),
}


@pytest.mark.parametrize("told", REFUSALS)
def test_a_folder_of_another_run_is_refused_and_left_as_it_is(told, tmp_path, run, capsys, monkeypatch):
    """Another torch is another experiment, too, because it can give other numbers."""
    assert run(tmp_path / "run") == 0
    REFUSALS[told](tmp_path / "run", monkeypatch)
    before = files(tmp_path)
    capsys.readouterr()
    assert run(tmp_path / "run") == 2 and files(tmp_path) == before
    assert re.fullmatch(f".*error: {re.escape(f'{tmp_path}/run {told}')}.*\n", capsys.readouterr().err)


def test_a_link_to_nowhere_is_no_place_for_a_run(tmp_path, run, capsys):
    (tmp_path / "run").symlink_to(tmp_path / "nowhere")
    assert run(tmp_path / "run") == 2 and capsys.readouterr().err.endswith("): choose another --out\n")


def elsewhere(out, workers, **how):
    """The command in another terminal. To import the laboratory changes neither environment, threads nor signals."""
    state = "(dict(os.environ), torch.get_num_threads(), [signal.getsignal(s) for s in signal.valid_signals()])"
    code = f"import os, signal, sys, torch, tqdm; before = {state}; import tiny_runs; assert before == {state}; "
    code += f"sys.exit(tiny_runs.run_in_a_terminal({str(out)!r}, {str(workers)!r}))"
    env = os.environ | {"PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "experiments" / "tests")])}
    return subprocess.Popen([sys.executable, "-c", code], env=env, stdout=subprocess.DEVNULL, **how)


def test_a_worker_and_another_command_share_the_jobs_and_write_the_files_of_one_process(tmp_path, run):
    x, out = tiny(seeds=range(2)), tmp_path / "three"
    with elsewhere(out, 1):
        runs.run(x, out, meeting_rows, workers=2)
    notes = [path.read_text(encoding="utf-8").split() for path in (tmp_path / "notes").iterdir()]
    assert len(notes) == 3 and sorted(sum(notes, [])) == sorted(f"{arm.name}-seed{seed}" for seed, arm in x.jobs())
    assert run(tmp_path / "one", x=x) == 0 and contents(out) == contents(tmp_path / "one")


def test_two_seeds_give_the_files_of_each_seed_alone(tmp_path, run):
    for name, first, count in (("both", "0", "2"), ("0", "0", "1"), ("1", "1", "1")):
        assert run(tmp_path / name, "--seed", first, "--seeds", count, rows_of=toy.rows_of) == 0
    both, zero, one = (contents(tmp_path / name) for name in ("both", "0", "1"))
    assert both == zero | one and len(zero) == len(one) == 3 and zero["rl-seed0.csv"] != one["rl-seed1.csv"]


@pytest.mark.skipif(os.name == "nt", reason="POSIX signals")
@pytest.mark.parametrize("how", [signal.SIGINT, signal.SIGKILL], ids=["Ctrl-C", "a kill"])
def test_what_is_done_is_kept_and_no_worker_and_no_lock_outlives_the_run(how, tmp_path):
    """Once two workers are in a job that waits. Ctrl-C reaches all processes of a terminal, a kill only the parent. A
    worker holds its parent's pipe, so that `communicate` would time out if one were left."""
    hear = lambda: signal.signal(signal.SIGINT, signal.default_int_handler)  # noqa: E731  even where a shell is deaf
    out, notes, end = tmp_path / "run", tmp_path / "notes", time.monotonic() + 60
    process = elsewhere(out, 2, stderr=subprocess.PIPE, text=True, preexec_fn=hear, start_new_session=True)
    try:
        while sum(path.read_text().count("rl-seed") for path in notes.glob("*")) < 2 and time.monotonic() < end:
            time.sleep(0.02)
        if how == signal.SIGINT:  # the worker hears it first, and leaves it to its parent
            os.kill(max({int(note.name) for note in notes.iterdir()} - {process.pid}), how)
            time.sleep(0.5)
        process.send_signal(how)
        _, errors = process.communicate(timeout=10)
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.communicate()
    told = "interrupted: what is done is kept, and the same command goes on\n" if how == signal.SIGINT else ""
    assert (errors, process.returncode) == (told, 130 if told else -how)
    assert {*contents(out)} == {"sft-seed0.csv", "sft-seed1.csv"} and not [*out.glob("*.part*")]
    assert runs.run(tiny(seeds=range(2)), out, quick_rows) == [] and len(contents(out)) == 6


absurd = st.sampled_from(["", " ", "nan", "1e400", "9" * 400, "9" * 5000, "٣", "-1", "0", "1_0", "--", "\0", "\udcff"])
values = st.integers(-2, 30).map(str) | st.integers().map(str) | absurd | st.text()
words = values | st.sampled_from(["--seed", "--seeds", "--model", "--device", "--rate", "--see", "--quick", "best"])
where = st.sampled_from(["new", "deep/new", "other", "file", "file/new", "n" * 300, "\0", "\udcff"])


@given(name=st.sampled_from([*report.EXPERIMENTS]) | values, out=where, options=st.lists(words, max_size=5))
@example(name="lp-ft", out="new", options=["--seed", "-3", "--seeds", "1"])
@example(name="lp-ft", out="new", options=["--seeds", "9" * 20])
def test_any_command_line_is_understood_or_refused_in_one_sentence(name, out, options, tmp_path_factory):
    """Without the training. A refusal has exit code 2, and leaves all as it was; what is understood is recorded, and
    then none of its jobs is done."""
    folder, printed, errors = tmp_path_factory.mktemp("any"), io.StringIO(), io.StringIO()
    (folder / "other").mkdir()
    for file in ("file", "other/thesis.txt"):
        (folder / file).write_text("mine", encoding="utf-8")
    before = files(folder)
    with contextlib.redirect_stdout(printed), contextlib.redirect_stderr(errors), pytest.MonkeyPatch.context() as patch:
        patch.setattr(runs, "work", lambda *_: None)
        patch.chdir(folder)
        try:
            code = command.main(["run", name, "--workers", "1", "--out", out, *options])
        except SystemExit as stopped:
            code = stopped.code
    if code == 2:
        assert re.fullmatch("python -m experiments: error: .*\n", errors.getvalue())
        assert printed.getvalue() == "" and files(folder) == before
    else:
        assert code == 1 and re.fullmatch(r"[\s\S]*(\d+) of \1 jobs are not done.*\n", errors.getvalue())
        assert runs.read_record(folder / out)["name"] == name
