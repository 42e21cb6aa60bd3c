"""Tiny runs of the toy, and what tests read from them."""

import csv
import os
import sys
from pathlib import Path

import pytest

from experiments import toy

ROOT = Path(__file__).parent.parent.parent
COMMAND = [sys.executable, "-m", "experiments", "run", "plain"]
TINY = "--workers 1 --digits 1 --sft-steps 40 --rl-steps 4 --classifier-steps 2 --prompts 8 --samples 4".split()
TINY += "--eval-every 2 --eval-prompts 2 --final-prompts 3".split()
DEFAULT_ARMS = ["rl", "cf-rl", "control"]


def run(out, *flags):
    return toy.main(["plain", *TINY, "--out", str(out), *flags])


def rows_without_seconds(path):
    with open(path, newline="", encoding="utf-8") as file:
        return [{k: v for k, v in row.items() if not k.endswith("seconds")} for row in csv.DictReader(file)]


def rows_of(out):
    return rows_without_seconds(out / "metrics.csv")


def environment():
    return {**os.environ, "PYTHONPATH": str(ROOT)}


def refused(capsys, *arguments):
    """Run a command line that must be refused: exit code 2, nothing printed but one line; returns that line."""
    with pytest.raises(SystemExit) as stopped:
        toy.main(["plain", *arguments])
    printed = capsys.readouterr()
    assert stopped.value.code == 2 and printed.out == "" and printed.err.count("\n") == 1
    return printed.err
