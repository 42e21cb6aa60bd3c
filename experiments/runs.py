"""What long runs need: a folder whose files are whole, jobs in several processes, and going on where a run was cut.

Every arm of every seed is a job. It appends its rows to a file of its own and saves its policy when it is done: so what
is missing is easy to tell, and the same command does it.
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
import textwrap
import threading
import time
import zipfile
from concurrent.futures import ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from dataclasses import asdict, fields

import torch
from tqdm import tqdm

from experiments.arms import Config
from experiments.knobs import add_constant
from minicfrl import Addition, naming_the_step
from model import GPT

try:
    import fcntl
except ImportError:  # Windows
    import msvcrt

# ---------------------------------------------------------------------------------------------------------------- files


class Damaged(ValueError):
    """A file of the run does not hold what the run wrote."""


def write_whole(path, content: bytes):
    """Write beside it, then move that into place: whoever reads `path` sees all of it or what was there before."""
    temporary = path.with_name(path.name + ".part")
    try:
        temporary.write_bytes(content)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)  # of a full disk


def write_text(path, text):
    write_whole(path, text.encode())


def policy_file(out, arm, seed):
    return out / f"{arm}-seed{seed}.pt"


def rows_file(out, arm, seed):
    return out / "parts" / f"{arm}-seed{seed}.csv"


def filled(text):
    """In lines of at most 80 columns, broken at spaces only: the names of arms have hyphens, and stay whole."""
    return textwrap.fill(text, 80, break_on_hyphens=False)


def append_row(path, row):
    """One more csv row, under a header if it is the first. The file is closed after each, so Ctrl-C costs no row."""
    with open(path, "a", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, row, lineterminator="\n")
        if file.tell() == 0:
            writer.writeheader()
        writer.writerow({key: f"{value:.6g}" if isinstance(value, float) else value for key, value in row.items()})


def damaged(path):
    return Damaged(f"{path} is damaged: delete it, and the same command makes it again")


def read_rows(config, out, arm, seed):
    """The rows of a finished job as dicts of floats, the arm's name aside. Damaged if one is missing or not whole."""
    path = rows_file(out, arm, seed)
    expected = [(arm, float(seed), step) for step in range(config.rl_steps + 1) if config.is_looked_at(arm, step)]
    with open(path, newline="", encoding="utf-8") as file:
        try:
            rows = [
                {k: v if k == "arm" else float(v) for k, v in row.items()} for row in csv.DictReader(file, strict=True)
            ]
            complete = [(row["arm"], row["seed"], row["step"]) for row in rows] == expected
            in_range = all(0 <= row.get(name, row["accuracy"]) < 1000 for row in rows for name in NEVER_NAN)
        except (ValueError, TypeError, KeyError, csv.Error):
            raise damaged(path) from None
    if not (complete and in_range):
        raise damaged(path)
    return rows


def merge_rows(out):
    """metrics.csv: the whole rows that the jobs wrote, each into a file of its own, in sorted order."""
    parts = []
    for part in sorted((out / "parts").glob("*.csv")):
        try:
            text = part.read_text(encoding="utf-8")
        except UnicodeDecodeError:
            raise damaged(part) from None
        parts.append(text[: text.rfind("\n") + 1].partition("\n"))  # a full disk or a kill cuts the last row
    headers = {header for header, _, _ in parts if header}
    if len(headers) > 1:
        raise Damaged(f"{out / 'parts'} holds rows of different columns, of another version: choose another --out")
    if headers:
        write_text(out / "metrics.csv", headers.pop() + "\n" + "".join(rows for _, _, rows in parts))


def read_config(out, kind=Config):
    """The record in DIR/config.json. ValueError if that is something else, or of another version of the code."""
    file, known = out / "config.json", {f.name for f in fields(kind)}
    try:
        record = json.loads(file.read_text(encoding="utf-8"))
        names = set(record["config"])
        odd = sorted(names ^ known)
        config = kind(**{name: record["config"][name] for name in names & known})
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        raise ValueError(f"{file} is not the record of a run: choose another --out") from None
    if odd:
        verb = "has" if odd[0] in names else "lacks"
        raise ValueError(f"{file} is of another version, for it {verb} {odd[0]!r}: choose another --out")
    return record, config


def open_out(out, config):
    """Make the folder, or continue one that holds the same run. ValueError or OSError for any other."""
    finetuning = {name: asdict(stage) for name, stage in config.finetuning().items()}
    record = {"config": asdict(config), **finetuning, "versions": config.made_of()}
    record = json.loads(json.dumps(record))  # as it will be read back: json makes tuples lists
    out.mkdir(parents=True, exist_ok=True)
    if {path.name for path in out.iterdir()} <= {"config.json.part"}:  # which a kill may leave
        write_text(out / "config.json", json.dumps(record, indent=2) + "\n")
    elif not (out / "config.json").exists():
        raise ValueError(f"{out} is not empty and holds no run: choose another --out")
    old, _ = read_config(out, type(config))
    for part, values in record.items():
        was = old.get(part)
        if not isinstance(was, dict) or was.keys() != values.keys():
            raise ValueError(f"{out / 'config.json'} is of another version, by its {part!r}: choose another --out")
        for name, value in values.items():
            if was[name] != value:
                raise ValueError(f"{out} holds a run with {name} {was[name]!r}, not {value!r}: choose another --out")
    (out / "parts").mkdir(exist_ok=True)


@contextlib.contextmanager
def owned(out):
    """Within, the folder belongs to this process. ValueError, naming the owner, if it belongs to another.

    Two runs would write the same files. The lock is the system's, so it dies with its owner, however that dies.
    """
    with open(out / "lock", "a+", encoding="utf-8") as file:
        try:
            if os.name == "nt":
                file.seek(2**30)  # a byte that nobody writes: on Windows a locked one cannot be read
                msvcrt.locking(file.fileno(), msvcrt.LK_NBLCK, 1)
            else:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except (BlockingIOError, PermissionError):
            file.seek(0)
            owner = file.read().strip() or "another process"
            raise ValueError(f"{out} is in use by {owner}: wait for it, or choose another --out") from None
        file.truncate(0)
        file.write(f"process {os.getpid()} since {time.strftime('%Y-%m-%d %H:%M:%S')}\n")
        file.flush()
        yield


@contextlib.contextmanager
def owned_run(out, config):
    """Within, the folder holds this run and belongs to this process. ValueError or OSError as of open_out and owned."""
    open_out(out, config)
    with owned(out):
        open_out(out, config)  # again: another process may have come between
        yield


def load_policy(config, out, arm, seed):
    """The task and a saved policy. Damaged if the file is damaged or holds something else."""
    task, file = Addition(config.digits), policy_file(out, arm, seed)
    content = file.read_bytes()
    model = GPT(config.architecture(task))
    if "@s" in arm:
        add_constant(model, 0.0)  # the file knows how large it is
    try:
        if zipfile.ZipFile(io.BytesIO(content)).testzip():
            raise ValueError("a checksum is wrong")  # which torch.load does not notice
        model.load_state_dict(torch.load(io.BytesIO(content), weights_only=True))
    except MemoryError:
        raise
    except Exception:  # of many kinds: what a reader makes of a damaged file
        raise Damaged(f"{file} is no policy of this run: delete it, and the same command makes it again") from None
    return task, model


# ----------------------------------------------------------------------------------------------------------------- rows


class Watch:
    """Looks at a policy as it trains: at every update at what moved it, every few at all that is measured, which makes
    a row of metrics. The view says how: measures.ToyView, or real_model.RealView."""

    def __init__(self, config, out, seed, arm, view, bar, seconds=0.0):
        self.config, self.file, self.view, self.bar = config, rows_file(out, arm, seed), view, bar
        self.row, self.so_far, self.accuracy = {"arm": arm, "seed": seed}, SO_FAR, math.nan
        self.train_seconds, self.eval_seconds, self.clock = seconds, 0.0, time.perf_counter()

    def look(self, record):
        """At the policy after an update, of which train_rl gave this record."""
        self.train_seconds += time.perf_counter() - self.clock
        seen = {"tokens": 0} | record | self.view.moved()
        self.so_far = {name: value + seen.get(name, math.nan) for name, value in self.so_far.items()}
        if self.config.is_looked_at(self.row["arm"], record["step"]):
            with naming_the_step(record["step"]):
                self.write_row(seen | self.so_far)
        live = {"reward": record.get("reward"), "entropy": record.get("entropy"), "acc": self.accuracy}
        self.bar.set_postfix_str(" ".join(f"{k} {v:.2f}" for k, v in live.items() if v is not None), refresh=False)
        self.bar.update()
        self.clock = time.perf_counter()

    def write_row(self, seen):
        """Measure the policy and append a row: about the update, what all updates did so far, what is measured now."""
        clock = time.perf_counter()
        update = {name: seen.get(name, nothing) for name, nothing in (NO_UPDATE | SO_FAR).items()}
        update = {"batch_entropy" if name == "entropy" else name: value for name, value in update.items()}
        measured = self.view.measure(update["step"])
        self.accuracy, self.eval_seconds = measured["accuracy"], self.eval_seconds + time.perf_counter() - clock
        seconds = {"train_seconds": self.train_seconds, "eval_seconds": self.eval_seconds}
        append_row(self.file, self.row | update | measured | seconds)


# A row's columns about its update, where there was none; and those that add up over the updates, before the first.
NO_UPDATE = dict(step=0, stage=0, tokens=0) | dict.fromkeys(("reward", "entropy", "flat", "gradient_norm"), math.nan)
NO_UPDATE |= dict.fromkeys(("agreement_prompt", "agreement_continuation"), math.nan)
SO_FAR = {"tokens": 0} | {
    f"{measure}_{part}": 0.0
    for measure in ("entropy", "confidence")
    for part in ("change", "by_W", "by_body", "residual")
}
# Where a row has them, numbers: probabilities, and an entropy per token. Accuracy is always there.
NEVER_NAN = ("accuracy", "entropy", "confidence", *(f"share_{pattern}" for pattern in Addition.patterns))


# ----------------------------------------------------------------------------------------------------------------- jobs


SLOT = 0  # this process's line of the screen


def start_worker(lock, slots):
    """Set up a worker process: its own progress line, one thread (small matrices), Ctrl-C left to the parent."""
    global SLOT
    SLOT = slots.get()
    tqdm.set_lock(lock)
    torch.set_num_threads(1)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=end_with_parent, daemon=True).start()


def end_with_parent():
    """A parent that is killed cannot end its workers, and they would go on writing."""
    multiprocessing.connection.wait([multiprocessing.parent_process().sentinel])
    os._exit(1)


@contextlib.contextmanager
def no_ctrl_c_for_new_processes():
    """A process started within never sees one: importing, it would answer with a traceback. This one sees it after."""
    if not hasattr(signal, "pthread_sigmask"):  # Windows
        yield
        return
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


@contextlib.contextmanager
def pool_of(workers):
    """A pool of new processes, which import torch while the first jobs are under way; None for one worker.

    OSError, saying what to do, where the system gives no locks that processes could share."""
    if workers == 1:
        yield None
        return
    context = multiprocessing.get_context("spawn")  # the one way that every system has
    try:
        lock, slots = context.RLock(), context.SimpleQueue()
    except OSError as error:  # of a read-only /dev/shm, for one
        raise OSError(f"processes cannot share locks here ({error}): try --workers 1") from None
    for slot in range(workers):
        slots.put(slot)
    with ProcessPoolExecutor(workers, context, start_worker, (lock, slots)) as pool:
        try:
            with no_ctrl_c_for_new_processes():
                pool.submit(os.getpid)  # starts them all
            yield pool
        except BaseException:  # Ctrl-C above all: do not wait for what the workers are at
            for process in multiprocessing.active_children():
                process.terminate()
            raise


def do_jobs(pool, jobs):
    """Do a list of jobs, each the arguments of `job`; returns their complaints. One alone is done in this process."""
    if pool is None or len(jobs) == 1:
        return [complaint for arguments in jobs if (complaint := job(*arguments))]
    futures = [pool.submit(job, *arguments) for arguments in jobs]
    try:
        while wait(futures, timeout=0.2).not_done:
            pass  # in short waits: on Windows a Ctrl-C gets in only between two
        return [complaint for future in futures if (complaint := future.result())]
    except BrokenProcessPool:
        return ["a worker process died, of what it says above or of too little memory: start again to continue"]


def what_is_done(config, arms):
    if arms != ["sft"]:
        size = f"{config.rl_steps} updates of {config.prompts} prompts x {config.samples} samples each"
        return f"RL from there, {size}: {', '.join(arms)}"
    steps = config.finetuning_steps
    return f"sft, the starting policy: {f'{steps} updates of supervised fine-tuning' if steps else 'as it is'}"


@contextlib.contextmanager
def jobs(config, out, workers):
    """A function that trains some arms on all seeds, `do(train, arms)`, and returns the complaints of those that
    stopped early. What is there already is not done again. metrics.csv is made at the end, however that comes."""

    def do(train, arms):
        files = {job: (policy_file(out, job[1], job[0]), rows_file(out, job[1], job[0])) for job in config.jobs(*arms)}
        missing = [(train, config, out, *job) for job in files if not all(file.exists() for file in files[job])]
        if not missing:
            return []
        clock = time.perf_counter()
        print(filled(what_is_done(config, arms)), flush=True)
        complaints = do_jobs(pool, missing)
        print(f"  {time.perf_counter() - clock:.0f} s")
        return complaints

    try:
        with pool_of(workers) as pool:
            yield do
    finally:
        merge_rows(out)


def job(train, config, out, seed, arm):
    """train(...) -> policy, with a progress line; the policy is saved. Returns why it stopped early, if it did."""
    rows_file(out, arm, seed).unlink(missing_ok=True)  # of a run that was cut short
    torch.optim.Adam([torch.zeros(1)])  # its first use imports for seconds: before the clock of any arm, not on it
    try:
        form = "{desc:18} {percentage:3.0f}% |{bar:8}| {remaining} left{postfix}"  # fits 80 columns
        with tqdm(desc=f"{arm}/{seed}", position=SLOT, leave=False, disable=None, bar_format=form) as bar:
            model = train(config, out, seed, arm, bar)
    except FloatingPointError as error:
        return f"{arm}, seed {seed}, stopped at {error}"
    except Damaged as error:
        return str(error)
    weights = io.BytesIO()
    torch.save(model.state_dict(), weights)
    write_whole(policy_file(out, arm, seed), weights.getvalue())
