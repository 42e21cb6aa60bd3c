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
import tempfile
import time
from pathlib import Path

import pytest
import torch
from filelock import FileLock  # torch brings it
from hypothesis import example, given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule, run_state_machine_as_test
from tiny_runs import ROOT, contents, environment, files, noted_rows, quick_rows, tiny

from experiments import __main__ as command
from experiments import report, runs, toy


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


# ------------------------------------------------------------------------------------------------------ a run's folder


class Cut(Exception):
    """What ends a job, and the run with it."""


class RunFolder(RuleBasedStateMachine):
    """What can happen to a folder, in any order. No job is done twice, and every result is whole all the time."""

    jobs = st.integers(0, 9)  # in which of the jobs that are left

    @initialize()
    def begins(self):
        self.temporary, self.seeds = tempfile.TemporaryDirectory(), 1
        self.out, self.uncut = (Path(self.temporary.name) / name for name in ("run", "uncut"))

    @property
    def x(self):
        return tiny(seeds=range(self.seeds))

    def go(self, at=0, happens=lambda: None, out=None):
        """The command, and the job in which something happens."""
        out = out or self.out
        left = runs.missing(self.x, out)
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

        with contextlib.suppress(Cut):
            runs.run(self.x, out, rows_of)
        return runs.missing(self.x, out), chosen

    @rule()
    def the_same_command_goes_on(self):
        assert self.go()[0] == []

    @rule()
    def it_is_given_more_seeds(self):
        self.seeds += 1

    @rule(at=jobs, error=st.sampled_from([Cut, FloatingPointError]))
    def a_job_is_cut_or_stops(self, at, error):
        """What stops is left, and the others are done."""

        def happens():
            raise error("step 1: not finite")

        left, job = self.go(at, happens)
        assert job is None or job in left and (error is Cut or left == [job])

    @rule(at=jobs)
    def another_command_takes_the_other_jobs(self, at):
        seen = []
        left, job = self.go(at, lambda: seen.append(self.go()[0]))
        assert left == [] and all(each == [job] for each in seen)

    @rule(at=jobs)
    def the_disk_is_full_within_a_file(self, at):
        job = self.x.jobs()[at % len(self.x.jobs())]
        write, name = Path.write_bytes, runs.file_of(self.out, *job).name

        def full(path, content):
            if not path.name.startswith(name):
                return write(path, content)
            write(path, content[: len(content) // 2])
            raise OSError(errno.ENOSPC, "No space left on device", str(path))

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(Path, "write_bytes", full)
            self.go()

    @rule(at=jobs)
    def a_file_is_lost_and_a_process_that_was_killed_leaves_half_of_it(self, at):
        if there := sorted(self.out.glob("*.csv")):
            path = there[at % len(there)]
            path.rename(path.with_name(f"{path.name}.part0")).write_text('"step","acc', encoding="utf-8")

    @invariant()
    def every_result_is_whole_and_there_are_no_other_parts(self):
        for job in self.x.jobs():
            path, content = runs.file_of(self.out, *job), runs.as_csv([*quick_rows(self.x, self.out, *job)])
            assert not path.exists() or path.read_bytes() == content
        assert all(path.name.endswith(".part0") for path in self.out.glob("*.part*"))

    def teardown(self):
        """In the end all files are those of a run to which nothing happened."""
        self.go()
        self.go(out=self.uncut)
        end, other = ({path.name: content for path, content in files(out).items()} for out in (self.out, self.uncut))
        self.temporary.cleanup()
        assert {name: content for name, content in end.items() if ".part" not in name} == other


def test_whatever_happens_to_a_run_it_ends_with_the_same_files():
    run_state_machine_as_test(RunFolder, settings=settings(stateful_step_count=12))


def test_a_folder_that_holds_no_such_run_or_cannot_be_locked_is_refused_and_left_as_it_is(tmp_path, run, capsys):
    """Another torch is another experiment, too, because it can give other numbers. Some file systems have no locks."""
    things, old, cut, file = (tmp_path / name for name in ("things", "old", "cut", "file"))
    assert run(old) == run(cut) == 0
    things.mkdir()
    for path in (things / "thesis.txt", cut / "run.json", file):
        path.write_text('{"name": "ti', encoding="utf-8")
    before = files(tmp_path)
    capsys.readouterr()

    def refused(folder, told, **how):
        assert run(folder, **how) == 2
        assert f"{folder} {told}" in one_line(capsys.readouterr().err) and files(tmp_path) == before

    refused(things, "holds no run: choose another --out")
    refused(cut, "has no run.json of a run")
    refused(old, "holds a run with other n, lr: choose another --out", x=tiny(lr=1.0, n=3))

    def no_locks(lock):
        raise OSError(errno.ENOLCK, "No locks available")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch, "__version__", "0.4")
        refused(old, "holds a run with other torch: choose another --out")
        patch.setattr(FileLock, "acquire", no_locks)
        refused(tmp_path / "new", "cannot be written and locked ([Errno 37] No locks available): choose another --out")
    assert run(file / "run") == 2 and str(file) in one_line(capsys.readouterr().err)


# -------------------------------------------------------------------------------------------------- several processes


def elsewhere(call, **how):
    """A Python process that calls a function of tiny_runs. It has a session of its own, so that we can end it whole."""
    line = [sys.executable, "-c", f"import tiny_runs; tiny_runs.{call}"]
    return subprocess.Popen(line, env=environment(), start_new_session=True, text=True, **how)


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


@pytest.mark.skipif(os.name == "nt", reason="POSIX signals")
@pytest.mark.parametrize("how", [signal.SIGINT, signal.SIGKILL], ids=["Ctrl-C", "a kill"])
def test_what_is_done_is_kept_and_no_worker_and_no_lock_outlives_the_run(how, tmp_path):
    """Once two workers are in a job that never ends. Ctrl-C reaches all processes of a terminal, a kill only the
    parent. A worker holds its parent's pipe, so that `communicate` would time out if one were left."""
    hear = lambda: signal.signal(signal.SIGINT, signal.default_int_handler)  # noqa: E731  even where a shell is deaf
    out, begun = tmp_path / "run", time.monotonic()
    pipes = dict(stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, preexec_fn=hear)
    process = elsewhere(f"run_endlessly({str(out)!r})", **pipes)
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
