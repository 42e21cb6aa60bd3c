"""Kill real runs at random moments, fill their disk, and see: python experiments/tests/faults.py. POSIX.

Flags: --kills 50, --seed 0.

After every kill no process of the run may live on, and every file must be what a run writes, or its beginning. The same
command then continues: what is finished is not done again, and the end is that of a run nobody disturbed. A violation
is one sentence and exit code 1, and the folder is kept.
"""

import argparse
import collections
import contextlib
import csv
import json
import os
import random
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).parent.parent.parent))

from tiny_runs import COMMAND, TINY, environment, rows_of  # noqa: E402

# Two jobs at a time, four in turn, of a few seconds together.
RUN = [*COMMAND, *TINY, *"--workers 2 --seeds 2 --arms rl,cf-rl".split()]
RUN += "--sft-steps 60 --rl-steps 24 --classifier-steps 8 --eval-every 1".split()
SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGKILL)
SECONDS_TO_DIE, SECONDS_TO_FINISH = 5, 120


class Violation(Exception):
    """What a run must never do, as a sentence."""


def require(condition, sentence):
    if not condition:
        raise Violation(sentence)


# -------------------------------------------------------------------------------------------------------- its processes


def living(group):
    """The processes of a group but for those that nobody has buried yet."""
    found = []
    for stat in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):  # gone in the meantime
            state, _, its_group = stat.read_text().rpartition(")")[2].split()[:3]
            if int(its_group) == group and state not in "ZX":
                found.append(int(stat.parent.name))
    return found


@contextlib.contextmanager
def started(out):
    """The command at work in a process group of its own, of which nothing is left afterwards."""
    process = subprocess.Popen(
        [*RUN, "--out", str(out)],
        env=environment(),
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # a shell's background jobs ignore it
    )
    try:
        yield process
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.communicate()


def completed(out):
    """Run the command to its end: (exit code, what it said on stderr)."""
    with started(out) as process:
        _, errors = process.communicate(timeout=SECONDS_TO_FINISH)
        return process.returncode, errors


def killed(out, number, moment):
    """Run the command and end it after `moment` seconds: (exit code, stderr); if it was faster, its own."""
    with started(out) as process:
        with contextlib.suppress(subprocess.TimeoutExpired):
            _, errors = process.communicate(timeout=moment)
            return process.returncode, errors
        if number == signal.SIGINT:
            os.killpg(process.pid, number)  # as a terminal does: to the workers too
        else:
            process.send_signal(number)
        deadline = time.monotonic() + SECONDS_TO_DIE
        while (process.poll() is None or living(process.pid)) and time.monotonic() < deadline:
            time.sleep(0.02)
        survivors = living(process.pid)
        name = signal.Signals(number).name
        require(not survivors, f"{SECONDS_TO_DIE} s after {name} at {moment:.2f} s processes {survivors} still live")
        _, errors = process.communicate()
        return process.returncode, errors


# ------------------------------------------------------------------------------------------------------------ its files


def check_rows(file, cut):
    """Rows as wide as the header, each arm's and seed's in the order of their steps; the last may be cut."""
    text = file.read_text(encoding="utf-8")
    require(cut or text.endswith("\n"), f"{file} ends within a row")
    rows = list(csv.reader(text[: text.rfind("\n") + 1].splitlines()))
    if not rows:
        return
    columns, last = rows[0], {}
    require(len(set(columns)) == len(columns) and columns[:3] == ["arm", "seed", "step"], f"{file} has no header")
    for row in rows[1:]:
        require(len(row) == len(columns), f"{file} has a row of {len(row)} columns under {len(columns)}")
        [float(value) for value in row[1:]]
        arm, seed, step = row[0], int(row[1]), int(row[2])
        require(step > last.get((arm, seed), -1), f"{file} has step {step} of {arm} out of order or twice")
        require(cut is False or file.stem == f"{arm}-seed{seed}", f"{file} has a row of {arm}, seed {seed}")
        last[arm, seed] = step


def check_files(out):
    """Every file is what a run writes; returns when each policy was written."""
    policies = {}
    for file in sorted(path for path in out.rglob("*") if path.is_file()):
        try:
            if file.suffix == ".csv":
                check_rows(file, cut=file.parent.name == "parts")
            elif file.suffix == ".json":
                json.loads(file.read_text(encoding="utf-8"))
            elif file.suffix == ".pt":
                torch.load(file, weights_only=True)
                policies[file.name] = file.stat().st_mtime_ns
            else:
                require(file.name == "lock" or file.suffix == ".part", f"{file} is nothing that a run writes")
        except Violation:
            raise
        except Exception as error:  # whatever a damaged file makes of its reader
            raise Violation(f"{file} cannot be read: {type(error).__name__}") from error
    return policies


def check_end(out, whole):
    """The same rows, the clocks aside, and the same weights as the run that nobody disturbed."""
    policies = check_files(out)
    require(rows_of(out) == rows_of(whole), f"{out / 'metrics.csv'} is not that of an undisturbed run")
    require(policies.keys() == check_files(whole).keys(), f"{out} lacks a policy")
    for name in policies:
        weights, wanted = (torch.load(folder / name, weights_only=True) for folder in (out, whole))
        require(all(torch.equal(weights[key], wanted[key]) for key in wanted), f"{out / name} has other weights")


def check_kept(before, after, out):
    redone = [name for name, written in before.items() if after.get(name) != written]
    require(not redone, f"{out} lost or did again {', '.join(redone)}")


# ----------------------------------------------------------------------------------------------------------- the faults


def kill_runs(folder, whole, seconds, kills, draws):
    """Kill runs until they were killed often enough, and let the last finish. Returns how each signal ended how often,
    and how often each run was killed."""
    ends, killed_runs, runs = collections.Counter(), [], 0
    with tqdm(total=kills, desc="kills") as bar:
        while bar.n < kills:
            out, policies, times, runs = folder / f"run-{runs}", {}, 0, runs + 1
            while True:
                number = draws.choice(SIGNALS)
                moment = draws.uniform(0, seconds) if bar.n < kills else SECONDS_TO_FINISH
                code, errors = killed(out, number, moment)
                written = check_files(out)
                check_kept(policies, written, out)
                policies = written
                if code == 0:
                    break
                require(code in (130, -number), f"{out}: exit code {code}, {errors.strip()[-300:]!r}")
                said = f"interrupted: the rows written so far are kept in {out}\n"
                require(code != 130 or errors == said, f"{out}: {signal.Signals(number).name}, {errors[-500:]!r}")
                ends[signal.Signals(number).name, code] += 1
                times += 1
                bar.update()
            check_end(out, whole)
            killed_runs.append(times)
            shutil.rmtree(out)
    return ends, killed_runs


def mount(*arguments):
    return subprocess.run(["mount", "-t", "tmpfs", *arguments], capture_output=True, text=True)


def fill_disk(folder, whole):
    """Runs on disks too small by half and by less, to which room is then added. Returns a sentence for the summary."""
    if sys.platform != "linux" or os.geteuid() != 0:
        return "full disk: skipped, only root on Linux can make a small one"
    size = sum(-(-path.stat().st_size // 4096) * 4096 for path in whole.rglob("*") if path.is_file())
    shares = (0.1, 0.5, 0.9)
    for share in tqdm(shares, desc="disks"):
        disk = folder / f"disk-{share}"
        disk.mkdir()
        done = mount("-o", f"size={int(share * size)}", "tmpfs", str(disk))
        if done.returncode:
            return f"full disk: skipped, {done.stderr.strip()}"
        try:
            out = disk / "run"
            code, errors = completed(out)
            require(code == 1 and errors.count("\n") == 1, f"{out} on a full disk: exit code {code}, {errors[-500:]!r}")
            require("No space left on device" in errors, f"{out} on a full disk says {errors!r}")
            policies = check_files(out)
            done = mount("-o", f"remount,size={4 * size}", "tmpfs", str(disk))
            require(done.returncode == 0, done.stderr)
            code, errors = completed(out)
            require(code == 0 and errors == "", f"{out} with room again: exit code {code}, {errors[-500:]!r}")
            check_kept(policies, check_files(out), out)
            check_end(out, whole)
        finally:
            subprocess.run(["umount", str(disk)], check=True)
    return f"full disk: at {', '.join(f'{share:.0%}' for share in shares)} of the room; a sentence, then the same end"


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=50)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    folder, begun = Path(tempfile.mkdtemp(prefix="faults-")), time.monotonic()
    try:
        whole, clock = folder / "whole", time.monotonic()
        code, errors = completed(whole)
        seconds = time.monotonic() - clock
        require(code == 0 and errors == "", f"the undisturbed run: exit code {code}, {errors[-500:]!r}")
        disks = fill_disk(folder, whole)
        ends, killed_runs = kill_runs(folder, whole, seconds, args.kills, random.Random(args.seed))
    except Violation as violation:
        print(f"VIOLATION (--seed {args.seed}): {violation}", file=sys.stderr)
        return 1
    print(f"undisturbed: {seconds:.1f} s, {len(rows_of(whole))} rows")
    print(disks)
    print(f"kills: {sum(ends.values())} of {len(killed_runs)} runs, ", end="")
    print(f"up to {max(killed_runs)} (median {statistics.median(killed_runs):g}) of one; all ended the same")
    print("exit codes: " + ", ".join(f"{name} {code} x {times}" for (name, code), times in sorted(ends.items())))
    print(f"{time.monotonic() - begun:.0f} s, no violation")
    shutil.rmtree(folder)
    return 0


if __name__ == "__main__":
    sys.exit(main())
