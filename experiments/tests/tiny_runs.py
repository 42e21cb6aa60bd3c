"""Tiny experiments, jobs that take no time, and what several tests read from a run's files.

The jobs are functions of a module because a worker process imports what it does by its name.
"""

import os
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
    for step in x.looks[:1] if arm == START else x.looks[1:]:
        yield {"step": step, "accuracy": torch.randint(99, (), generator=draws).item(), "confidence": 0.5}


def meeting_rows(x, out, seed, arm):
    """A job that notes which process does it; an arm's begins once three are at work, or after a minute."""
    notes, end = out.parent / "notes", time.monotonic() + 60
    notes.mkdir(exist_ok=True)
    with open(notes / str(os.getpid()), "a", encoding="utf-8") as file:
        file.write(f"{arm.name}-seed{seed}\n")
    while arm != START and len([*notes.iterdir()]) < 3 and time.monotonic() < end:
        time.sleep(0.02)
    yield from quick_rows(x, out, seed, arm)


def run_in_a_terminal(out, workers):
    report.EXPERIMENTS["tiny"], toy.rows_of = tiny(seeds=range(2)), meeting_rows
    return command.main(["run", "tiny", "--out", out, "--workers", workers])


def contents(out):
    """{name of a finished job's file: its rows, seconds aside}."""
    return {path.name: [{**row, "seconds": 0} for row in runs.read_csv(path)] for path in out.glob("*.csv")}


def files(folder):
    """{path: content} of all that is there, but for locks."""
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file() and path.parent.name != "locks"}
