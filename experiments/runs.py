"""A run is a folder with a small file for each job, and a worker is a process that does the jobs whose file is missing.

So a run that was cut goes on with the same command, the same command in another terminal is one more worker, and no
file is ever half written. A job that was cut is done again.
"""

import contextlib
import csv
import io
import json
import math
import multiprocessing
import multiprocessing.connection
import os
import signal
import sys
import threading
import warnings
from dataclasses import asdict

import torch
from filelock import FileLock, Timeout  # torch brings it
from tqdm import tqdm

from model import check


def write_whole(path, content: bytes):
    """Write beside it, then move that into place: whoever reads `path` sees all of it, or what was there before."""
    part = path.with_name(f"{path.name}.part{os.getpid()}")
    try:
        part.write_bytes(content)
        os.replace(part, path)
    finally:
        part.unlink(missing_ok=True)  # of a full disk


@contextlib.contextmanager
def locked(path, **how):
    """Within, `path` is this process's to write. The system ends a lock with its owner, however that ends. OSError,
    saying what to do, where there can be none."""
    lock = FileLock(path.parent / "locks" / path.name, **how)
    try:
        (path.parent / "locks").mkdir(parents=True, exist_ok=True)
        with warnings.catch_warnings():
            warnings.filterwarnings("error", "flock")  # instead of a lock that would outlive a killed process
            lock.acquire()
    except Timeout:
        raise
    except (OSError, NotImplementedError, UserWarning) as error:
        raise OSError(f"{path.parent} cannot be written and locked ({error}): choose another --out") from None
    try:
        yield
    finally:
        lock.release()


def as_csv(rows, digits=6):
    """A column for every key; what a row lacks is nan. Texts are in quotes, and numbers are not."""
    text, columns = io.StringIO(), list(dict.fromkeys(key for row in rows for key in row))
    writer = csv.DictWriter(text, columns, math.nan, quoting=csv.QUOTE_NONNUMERIC, lineterminator="\n")
    writer.writeheader()
    writer.writerows(
        {k: float(f"{v:.{digits}g}") if isinstance(v, float) else v for k, v in row.items()} for row in rows
    )
    return text.getvalue().encode()


def read_csv(path, steps=None):
    """The rows, without what is nan. ValueError, naming the file, if it is none of as_csv's, or lost its end, or has
    not one row for each of these steps."""
    with contextlib.suppress(ValueError, csv.Error):
        *lines, end = path.read_text(encoding="utf-8").split("\n")
        heading, *rows = csv.reader(lines, quoting=csv.QUOTE_NONNUMERIC)
        rows = [{key: value for key, value in zip(heading, row, strict=True) if value == value} for row in rows]
        if not end and (steps is None or [row.get("step") for row in rows] == steps):
            return rows
    raise ValueError(f"{path} is damaged: delete it, and a run makes it again")


def record_of(x):
    """What an experiment is, as it will be read back. Not its seeds: more of them are no other experiment."""
    record = {name: value for name, value in asdict(x).items() if name != "seeds"} | {"torch": torch.__version__}
    return json.loads(json.dumps(record, default=lambda function: function.__name__))


def open_run(out, x):
    """Make the folder of a run, or continue it. ValueError or OSError if it holds another."""
    file, record = out / "run.json", record_of(x)
    other = [name for name in (os.listdir(out) if out.exists() else ()) if not name.startswith(("locks", "run.json"))]
    check(file.exists() or not other, f"{out} holds no run: choose another --out")
    with locked(file):
        if not file.exists():
            write_whole(file, json.dumps(record, indent=1).encode())
        old = read_record(out)
    odd = [name for name in old | record if old.get(name) != record.get(name)]
    check(not odd, f"{out} holds a run with other {', '.join(odd)}: choose another --out")


def read_record(out):
    """What run.json says. ValueError if that is no record."""
    try:
        return dict(json.loads((out / "run.json").read_text(encoding="utf-8")))
    except (ValueError, TypeError, OSError):
        raise ValueError(f"{out} has no run.json of a run") from None


def once(path, make):
    """The content of a file that is made by whoever comes first, while the others wait."""
    with locked(path):
        if not path.exists():
            write_whole(path, make())
    return path.read_bytes()


def file_of(out, seed, arm):
    return out / f"{arm.name}-seed{seed}.csv"


def missing(x, out):
    return [job for job in x.jobs() if not file_of(out, *job).exists()]


def work(x, out, rows_of, bar):
    """Do every job that is not done and that nobody is doing. `rows_of` an (experiment, folder, seed, arm) does it."""
    for seed, arm in x.jobs():
        file = file_of(out, seed, arm)
        with contextlib.suppress(Timeout), locked(file, timeout=0):
            if not file.exists():
                try:
                    rows = []
                    for row in rows_of(x, out, seed, arm):
                        rows.append(row)
                        bar.set_postfix_str(f"{arm.name}, seed {seed}, update {row['step']}")
                    write_whole(file, as_csv(rows))
                except FloatingPointError as error:
                    bar.write(f"{arm.name}, seed {seed}, stopped at {error}", file=sys.stderr)
        bar.update(bar.total - len(missing(x, out)) - bar.n)


def work_for_parent(x, out, rows_of):
    """What a worker process does. A parent that is killed cannot end it, and it would go on writing: so it watches."""

    def end_with_parent():
        multiprocessing.connection.wait([multiprocessing.parent_process().sentinel])
        os._exit(1)

    threading.Thread(target=end_with_parent, daemon=True).start()
    torch.set_num_threads(1)
    tqdm.set_lock(threading.RLock())
    try:
        work(x, out, rows_of, tqdm(total=len(x.jobs()), disable=True))
    except OSError as error:
        sys.exit(f"a worker stopped: {error}")


def run(x, out, rows_of, workers=1):
    """Do all jobs in so many processes. Returns those that are still not done. ValueError or OSError as
    of open_run."""
    open_run(out, x)
    tqdm.set_lock(threading.RLock())  # because tqdm's own is a semaphore, and a killed process leaves a warning of it
    context, jobs = multiprocessing.get_context("spawn"), len(x.jobs())
    helpers = [context.Process(target=work_for_parent, args=(x, out, rows_of), daemon=True) for _ in range(workers - 1)]
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)  # which they inherit: Ctrl-C is for this process to see
    for helper in helpers:
        helper.start()
    signal.signal(signal.SIGINT, before)
    try:
        with tqdm(desc=x.name, total=jobs, initial=jobs - len(missing(x, out)), unit="job", disable=None) as bar:
            work(x, out, rows_of, bar)
            for helper in helpers:
                helper.join()
    except OSError as error:  # a full disk, for one
        print(f"stopped: {error}", file=sys.stderr)
    finally:
        for helper in helpers:
            helper.terminate()
    return missing(x, out)
