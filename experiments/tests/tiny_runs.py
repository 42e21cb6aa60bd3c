"""Tiny experiments, jobs that take no time, and what several tests read from a run's files.

The jobs are functions of a module because a worker process imports what it does by its name.
"""

import os
import sys
import time
from pathlib import Path

import torch

from experiments import __main__ as command
from experiments import report, runs, toy
from experiments.arms import START, Experiment, some
from train_toy import stream

ROOT = Path(__file__).parent.parent.parent
SMALL = dict(digits=1, sft_steps=20, rl_steps=4, n=2, every=2, prompts=3, last_prompts=4, seeds=range(1))
SMALL |= dict(rl=dict(prompts=8, samples=4), measures="few", policy=dict(n_embd=32))


def tiny(arms="rl cf-rl", **changes):
    """An experiment whose jobs take tenths of a second."""
    return Experiment("tiny", some(arms) if isinstance(arms, str) else arms, **SMALL | changes)


def quick_rows(x, out, seed, arm):
    """The job of a seed and an arm as far as runs.py knows: numbers that only they decide."""
    draws = stream(seed, arm.name)
    for step in x.looks if arm != START else [0]:
        yield {"step": step, "accuracy": torch.rand((), generator=draws).item(), "confidence": 0.5, "seconds": 0.0}


def noted_rows(x, out, seed, arm):
    """A job of the toy that notes which process does it, and begins once three processes are at work."""
    notes, end = out.parent / "notes", time.monotonic() + 60
    notes.mkdir(exist_ok=True)
    with open(notes / str(os.getpid()), "a", encoding="utf-8") as file:
        file.write(f"{arm.name}-seed{seed}\n")
    while len([*notes.iterdir()]) < 3 and time.monotonic() < end:
        time.sleep(0.02)
    yield from toy.rows_of(x, out, seed, arm)


def help_out(out):
    """One more process, as from another terminal."""
    torch.set_num_threads(1)
    runs.run(tiny(seeds=range(2)), Path(out), noted_rows)


def endless_rows(x, out, seed, arm):
    """The start is done at once; an arm's job leaves a note that it has begun, and never ends."""
    yield {"step": 0, "accuracy": 0.5, "confidence": 0.5}
    while arm != START:
        (out.parent / f"{arm.name}-began").touch()
        time.sleep(0.05)


def run_endlessly(out):
    """What a user sees of a long run in two processes."""
    report.EXPERIMENTS["tiny"], toy.rows_of = tiny(), endless_rows
    sys.exit(command.main(["run", "tiny", "--out", out, "--workers", "2"]))


def environment():
    """Of a process that imports the laboratory and these tests, whatever its folder."""
    return {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "experiments" / "tests")])}


def contents(out):
    """{name of a finished job's file: its rows, seconds aside}."""
    return {path.name: [{**row, "seconds": 0} for row in runs.read_csv(path)] for path in out.glob("*.csv")}


def files(folder):
    """{path: content} of all that is there, but for locks."""
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file() and path.parent.name != "locks"}
