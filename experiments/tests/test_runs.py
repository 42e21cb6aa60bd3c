"""Long runs: what they leave behind, that they repeat to the byte, and go on where they were cut."""

import contextlib
import errno
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from tiny_runs import COMMAND, DEFAULT_ARMS, TINY, environment, refused, rows_of, rows_without_seconds, run

from experiments import runs, toy
from experiments.arms import Config


def test_a_run_leaves_what_the_readme_says(finished):
    policies = {f"{arm}-seed0.pt" for arm in ["sft", *DEFAULT_ARMS]}
    assert {path.name for path in finished.iterdir()} == policies | {
        "config.json",
        "metrics.csv",
        "lock",
        "summary.json",
        "parts",
    }
    rows = rows_without_seconds(finished / "metrics.csv")
    arms = [(arm, step) for arm in ("cf-rl", "control", "rl") for step in ("2", "4")]  # by file name
    assert [(row["arm"], row["step"]) for row in rows] == [*arms, ("sft", "0")]
    tokens = [int(row["tokens"]) for row in rows[:2]]
    assert tokens[0] < tokens[1] and tokens[1] > 8 * 4 * 7  # so far: more than one update of 32 responses can hold
    assert all(float(row["reward"]) > 0 for row in rows[:-1])  # so there is something to learn, and to repeat
    config = json.loads((finished / "config.json").read_text(encoding="utf-8"))
    assert config["config"]["rl_steps"] == 4 and "torch" in config["versions"]
    summary = json.loads((finished / "summary.json").read_text(encoding="utf-8"))
    assert list(summary) == ["sft", *DEFAULT_ARMS] and summary["rl"]["step"] == [4] and summary["sft"]["step"] == [0]


def test_two_runs_with_one_seed_write_identical_metrics(finished, tmp_path):
    """And the rows of an arm do not depend on which other arms there are."""
    run(tmp_path / "again", "--arms", "cf-rl")
    first, again = (
        [row for row in rows_of(out) if row["arm"] in ("sft", "cf-rl")] for out in (finished, tmp_path / "again")
    )
    assert first == again


def test_a_run_is_continued_with_what_is_missing_and_ends_the_same(finished, tmp_path):
    """As if it had been cut short: one policy gone, its rows half written."""
    cut = tmp_path / "cut"
    shutil.copytree(finished, cut)
    (cut / "cf-rl-seed0.pt").unlink()
    rows = cut / "parts" / "cf-rl-seed0.csv"
    rows.write_text("".join(rows.read_text(encoding="utf-8").splitlines(keepends=True)[:2]), encoding="utf-8")
    untouched = (cut / "rl-seed0.pt").stat().st_mtime_ns
    assert run(cut) == 0
    assert (cut / "rl-seed0.pt").stat().st_mtime_ns == untouched
    (cut / "metrics.csv").unlink()
    assert run(cut) == 0  # nothing is missing but this file
    assert rows_without_seconds(cut / "metrics.csv") == rows_without_seconds(finished / "metrics.csv")


def test_results_are_never_overwritten(capsys, finished, tmp_path):
    before = {path: path.read_bytes() for path in finished.rglob("*") if path.is_file()}
    message = refused(capsys, *TINY, "--seed", "1", "--out", str(finished))
    assert "holds a run with seed 0, not 1: choose another --out" in message
    assert {path: path.read_bytes() for path in finished.rglob("*") if path.is_file()} == before

    (tmp_path / "thesis.txt").write_text("mine", encoding="utf-8")
    assert "is not empty and holds no run" in refused(capsys, "--out", str(tmp_path))
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.txt"]

    (tmp_path / "odd").mkdir()
    for damaged in ('{"lr": 1}', "[]", "", '{"config": {"arms": "rl", "seed": "x"}}'):
        (tmp_path / "odd" / "config.json").write_text(damaged, encoding="utf-8")
        assert "config.json is not the record of a run" in refused(capsys, "--out", str(tmp_path / "odd"))


@pytest.mark.parametrize(
    "damage, complaint",
    [
        (lambda record: record["config"].pop("tilt"), "of another version, for it lacks 'tilt'"),
        (lambda record: record["config"].update(gamma=0.9), "of another version, for it has 'gamma'"),
        (lambda record: record["sft"].pop("noise"), "of another version, by its 'sft'"),
        (lambda record: record["sft"].update(warmup=20), "of another version, by its 'sft'"),
        (lambda record: record.pop("versions"), "of another version, by its 'versions'"),
        (lambda record: record["versions"].update(torch="0.4"), "holds a run with torch '0.4', not "),
    ],
)
def test_a_run_of_another_version_of_the_code_is_not_continued(finished, capsys, tmp_path, damage, complaint):
    record = json.loads((finished / "config.json").read_text(encoding="utf-8"))
    damage(record)
    text = json.dumps(record)
    (tmp_path / "config.json").write_text(text, encoding="utf-8")
    message = refused(capsys, *TINY, "--out", str(tmp_path))
    assert complaint in message and message.endswith(": choose another --out\n")
    assert [path.name for path in tmp_path.iterdir()] == ["config.json"]
    assert (tmp_path / "config.json").read_text(encoding="utf-8") == text


@pytest.fixture
def read_only(finished, tmp_path, monkeypatch):
    """A finished run in a folder that nobody may write in: not even root, for whom the system makes an exception, so it
    is Python's own calls that refuse."""
    out = shutil.copytree(finished, tmp_path / "run")
    (out / "metrics.csv").unlink()
    opened, made = open, os.mkdir

    def refuse(path):
        raise PermissionError(errno.EACCES, "Permission denied", os.fspath(path))

    def guarded_open(path, mode="r", *args, **kwargs):
        writes = set(mode) & set("wax+") and not isinstance(path, int) and Path(path).is_relative_to(out)
        return refuse(path) if writes else opened(path, mode, *args, **kwargs)

    def guarded_mkdir(path, *args, **kwargs):
        makes = Path(path).is_relative_to(out) and not Path(path).exists()
        return refuse(path) if makes else made(path, *args, **kwargs)

    monkeypatch.setattr("builtins.open", guarded_open)
    monkeypatch.setattr("io.open", guarded_open)  # pathlib's
    monkeypatch.setattr("os.mkdir", guarded_mkdir)
    return out


def test_a_folder_that_cannot_be_written_to_is_refused_and_still_answers(read_only, capsys):
    """A finished run, and a new folder within it."""
    before = sorted(read_only.rglob("*"))
    for folder in (read_only, read_only / "new"):
        assert f"Permission denied: '{folder}" in refused(capsys, *TINY, "--out", str(folder))
    assert toy.main(["plain", "--out", str(read_only), "--ask", "4+8="]) == 0
    assert sorted(read_only.rglob("*")) == before


def test_a_kill_before_the_record_was_written_leaves_a_folder_that_can_be_used(tmp_path):
    (tmp_path / "config.json.part").write_text('{"config', encoding="utf-8")
    runs.open_out(tmp_path, Config())
    assert runs.read_config(tmp_path)[1] == Config() and not (tmp_path / "config.json.part").exists()


def test_a_half_written_row_is_no_part_of_the_metrics(copied):
    """As a kill or a full disk cuts it, in the file of an arm that is not the last."""
    part = copied / "parts" / "cf-rl-seed0.csv"
    whole = (copied / "metrics.csv").read_text(encoding="utf-8")
    with open(part, "a", encoding="utf-8") as file:
        file.write("cf-rl,0,6,")
    (copied / "parts" / "a-seed0.csv").write_text("arm,se", encoding="utf-8")
    runs.merge_rows(copied)
    assert (copied / "metrics.csv").read_text(encoding="utf-8") == whole


def test_a_folder_that_cannot_be_made_is_refused(capsys, tmp_path):
    (tmp_path / "file").write_text("", encoding="utf-8")
    assert str(tmp_path / "file") in refused(capsys, "--out", str(tmp_path / "file" / "results"))


def test_an_arm_that_is_not_finite_stops_with_step_and_quantity_and_the_others_go_on(capsys, tmp_path):
    """An absurd learning rate in stage 1 breaks the arms that use it, not plain RL."""
    flags = ["--classifier-lr", "1e308", "--sft-steps", "3", "--measures", "few"]
    assert run(tmp_path / "broken", *flags, "--arms", "rl,cf-rl") == 1
    printed = capsys.readouterr()
    assert "cf-rl, seed 0, stopped at step 2: the policy's logits are not finite" in printed.err
    assert (tmp_path / "broken" / "rl-seed0.pt").exists() and not (tmp_path / "broken" / "cf-rl-seed0.pt").exists()
    assert "No verdict without all of" in printed.out
    assert run(tmp_path / "at-evaluation", *flags, "--arms", "cf-rl", "--eval-every", "1") == 1
    assert "cf-rl, seed 0, stopped at step 1: the policy's logits are not finite" in capsys.readouterr().err


class DeadlyPath(type(Path())):
    """Kills the process that unpickles it, as a worker does with its job."""

    def __reduce__(self):
        return os._exit, (1,)


def test_a_worker_that_dies_ends_the_run_with_a_sentence(tmp_path):
    """Instead of waiting for it for ever."""
    with runs.jobs(Config(seeds=2), DeadlyPath(tmp_path), 2) as do:
        (complaint,) = do(toy.train_arm, ["rl"])
    assert "a worker process died" in complaint


POSIX = pytest.mark.skipif(os.name == "nt", reason="POSIX signals")


def begin_long_run(out):
    """A run of two arms in two workers. Ctrl-C reaches it even if the shell that started the tests ignores it."""
    command = [*COMMAND, *TINY, "--workers", "2", "--out", str(out)]
    command += ["--rl-steps", "100000", "--arms", "rl,cf-rl"]
    return subprocess.Popen(
        command,
        env=environment(),
        stderr=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        start_new_session=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
    )


@pytest.fixture
def long_run(tmp_path):
    """Once both of its arms have begun: (its process, its folder). It and its workers end with the test."""
    out = tmp_path / "run"
    process, started = begin_long_run(out), time.monotonic()
    try:
        while not all((out / "parts" / f"{arm}-seed0.csv").exists() for arm in ("rl", "cf-rl")):
            assert process.poll() is None and time.monotonic() - started < 60
            time.sleep(0.1)
        yield process, out
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.communicate()


@POSIX
def test_ctrl_c_keeps_the_rows_written_so_far_and_leaves_no_worker(finished, long_run):
    """The workers leave it to the parent, for which a kill is the same. They hold its pipes: had one stayed,
    `communicate` would time out."""
    assert toy.main(["plain", "--out", str(finished), "--ask", "4+8="]) == 0
    assert signal.getsignal(signal.SIGTERM) is signal.default_int_handler  # since any command line ran
    process, out = long_run
    os.killpg(process.pid, signal.SIGINT)  # as a terminal does: to the workers too
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 130 and errors == f"interrupted: the rows written so far are kept in {out}\n"
    rows = rows_without_seconds(out / "metrics.csv")
    assert {row["arm"] for row in rows} == {"sft", "rl", "cf-rl"} and all(row["success_g"] for row in rows)


@POSIX
def test_a_folder_has_one_owner_and_outlives_it_and_workers_do_not(long_run, capsys):
    """A second start is refused while the first is at work. Killed, which no process can prepare for, that leaves no
    worker after five seconds (they hold its pipes) and no lock; all its rows but the last are whole."""
    process, out = long_run
    command = [*TINY, "--out", str(out), "--rl-steps", "100000", "--arms", "rl,cf-rl"]
    assert re.search(rf"{out} is in use by process {process.pid} since \d{{4}}-", refused(capsys, *command))
    process.kill()
    process.communicate(timeout=5)
    with runs.owned(out):
        assert (out / "lock").read_text(encoding="utf-8").startswith(f"process {os.getpid()} since ")
    for part in (out / "parts").glob("*.csv"):
        header, *rows = part.read_text(encoding="utf-8").splitlines()
        steps = [int(row.split(",")[2]) for row in rows[:-1]]
        assert steps == sorted(set(steps)) and all(row.count(",") == header.count(",") for row in rows[:-1])


@pytest.fixture
def copied(finished, tmp_path):
    """A finished run that may be damaged."""
    return shutil.copytree(finished, tmp_path / "copied")


def stopped(capsys, out, *flags):
    """Continue a damaged run: exit code 1 and one line, which is returned."""
    capsys.readouterr()
    assert run(out, *flags) == 1
    errors = capsys.readouterr().err
    assert errors.count("\n") == 1
    return errors


@pytest.mark.parametrize("content", [b"", b"not a policy", "half", "another shape"])
def test_a_file_that_is_no_policy_ends_in_one_sentence(copied, capsys, content):
    file = copied / "sft-seed0.pt"
    if content == "half":
        content = file.read_bytes()[: file.stat().st_size // 2]
    elif content == "another shape":
        torch.save({"classifier.weight": torch.zeros(3, 2)}, file)
        content = file.read_bytes()
    file.write_bytes(content)
    (copied / "rl-seed0.pt").unlink()
    assert f"{file} is no policy of this run: delete it" in stopped(capsys, copied)
    assert file.read_bytes() == content


def test_rows_that_are_damaged_or_of_another_version_end_in_one_sentence(copied, capsys):
    part = copied / "parts" / "rl-seed0.csv"
    text = part.read_text(encoding="utf-8")
    part.write_text(text[: len(text) * 3 // 4], encoding="utf-8")
    assert f"{part} is damaged: delete it, and the same command makes it again" in stopped(capsys, copied)
    part.write_text(text.replace("accuracy", "precision", 1), encoding="utf-8")
    metrics = (copied / "metrics.csv").read_bytes()
    assert "holds rows of different columns, of another version" in stopped(capsys, copied)
    assert (copied / "metrics.csv").read_bytes() == metrics
    part.unlink()  # as the first sentence said
    assert run(copied) == 0


def test_rows_of_a_seed_that_no_float_can_hold_are_whole(tmp_path):
    seed = 2**53 + 1
    row = dict.fromkeys(runs.NEVER_NAN, 0.5) | {"arm": "sft", "seed": seed, "step": 0}
    (tmp_path / "parts").mkdir()
    runs.append_row(runs.rows_file(tmp_path, "sft", seed), row)
    assert len(runs.read_rows(Config(seed=seed), tmp_path, "sft", seed)) == 1


@pytest.mark.parametrize("name", ["accuracy", "entropy", "share_d"])
@pytest.mark.parametrize("value", [-0.5, float("nan"), float("inf"), 1e9])
def test_a_number_that_cannot_be_is_damage(name, value, tmp_path):
    row = dict.fromkeys(runs.NEVER_NAN, 0.5) | {"arm": "sft", "seed": 0, "step": 0, name: value}
    (tmp_path / "parts").mkdir()
    runs.append_row(runs.rows_file(tmp_path, "sft", 0), row)
    with pytest.raises(runs.Damaged, match="is damaged"):
        runs.read_rows(Config(), tmp_path, "sft", 0)


def test_a_full_disk_ends_in_one_sentence_and_leaves_no_half_file(copied, capsys, monkeypatch):
    """Where the policy of the one missing arm is written."""
    (copied / "rl-seed0.pt").unlink()
    write_bytes = Path.write_bytes

    def full(path, content):
        if path.name == "rl-seed0.pt.part":
            write_bytes(path, content[:100])
            raise OSError(errno.ENOSPC, "No space left on device", str(path))
        return write_bytes(path, content)

    monkeypatch.setattr(Path, "write_bytes", full)
    assert "stopped: [Errno 28] No space left on device" in stopped(capsys, copied)
    assert not list(copied.glob("rl-seed0.pt*"))


def test_a_file_written_twice_holds_the_second_text(tmp_path):
    for text in ("a longer first text\n", "second\n"):
        runs.write_text(tmp_path / "file", text)
    assert (tmp_path / "file").read_bytes() == b"second\n" and len(list(tmp_path.iterdir())) == 1


AT_ODDS = """
import os, sys
from experiments import toy
answers = toy.show_answers
toy.show_answers = lambda *those: (os.write(2, b"of stderr"), answers(*those))
sys.exit(toy.main(["plain", *sys.argv[1:]]))
"""


@POSIX
def test_two_workers_in_other_circumstances_write_the_rows_of_one(tmp_path):
    """Each arm of each seed draws its own random numbers, in whatever process, so the order of the arms, the working
    folder, the hash seed and the threads of the environment play no part. In float32, as users run it. Nor does it
    matter that standard input and error are closed and the output is of ASCII: what is opened in their place gets
    nothing that belongs there, and ticks are printed. Nothing is written but in the run's folder."""
    out, elsewhere = tmp_path / "two", tmp_path / "elsewhere"
    elsewhere.mkdir()
    command = ["sh", "-c", 'exec "$0" "$@" <&- 2>&-', sys.executable, "-c", AT_ODDS]
    command += [*TINY, "--workers", "2", "--arms", "rl,cf-rl", "--out", str(out)]
    circumstances = {"PYTHONHASHSEED": "1", "OMP_NUM_THREADS": "2", "PYTHONIOENCODING": "ascii"}
    ran = subprocess.run(
        command, cwd=elsewhere, env=environment() | circumstances, stdout=subprocess.PIPE, encoding="utf-8", timeout=120
    )
    assert ran.returncode == 0 and "✗" in ran.stdout and "No verdict without all of" in ran.stdout
    assert list(elsewhere.iterdir()) == []
    assert [path for path in out.rglob("*") if path.is_file() and b"of stderr" in path.read_bytes()] == []
    torch.set_default_dtype(torch.float32)
    try:
        assert run(tmp_path / "one", "--arms", "cf-rl,rl") == 0
    finally:
        torch.set_default_dtype(torch.float64)
    assert rows_of(tmp_path / "one") == rows_of(out)
