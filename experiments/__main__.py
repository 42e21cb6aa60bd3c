"""The laboratory's command. README.md here says how to add an arm, an experiment, a measure or a table.

python -m experiments list                      the experiments: how many jobs of how many updates, and the arms
python -m experiments run NAME --out DIR        train, a file a job; the same command goes on where it was cut
python -m experiments report [DIR ...]          write the pages' numbers and pictures, from runs or from data/
python -m experiments foretell --out DIR        measure, of many starts, whether a faster last layer will help; and see
"""

import argparse
import importlib.util
import os
import sys
from dataclasses import replace
from pathlib import Path

import torch

from experiments import foretell, real_model, report, runs, scores, toy
from model import check, check_counts

COMMAND = "python -m experiments"


class Parser(argparse.ArgumentParser):
    """Says what is wrong in one line, with exit code 2."""

    def error(self, message):
        self.exit(2, f"{COMMAND}: error: {message.splitlines()[0]}\n")


def make_parser():
    parser = Parser(COMMAND, description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True, metavar="list | run | report | foretell")
    commands.add_parser("list")
    commands.add_parser("report").add_argument("folders", nargs="*", type=Path, metavar="DIR")
    run, foretold = commands.add_parser("run"), commands.add_parser("foretell")
    run.add_argument("name", metavar="NAME", help="an experiment of the list")
    for each in (run, foretold):
        each.add_argument("--out", type=Path, required=True, metavar="DIR", help="where the files of the jobs are kept")
        each.add_argument("--workers", type=int, default=min(2, os.cpu_count() or 1), help="processes (%(default)s)")
    run.add_argument("--seed", type=int, help="the first seed, of the experiment's if not given")
    run.add_argument("--seeds", type=int, help="how many seeds, as many as the experiment's if not given")
    run.add_argument("--quick", action="store_true", help="seconds a job: sums of one digit, or a random Llama")
    run.add_argument("--model", help="of the real model: the folder of another checkpoint of transformers")
    run.add_argument("--device", help="of the real model: where torch computes, cpu (default), cuda, ...")
    return parser


def chosen(args):
    """The module that does the jobs, and the experiment as the flags change it. ValueError for what cannot be run."""
    check(args.name in report.EXPERIMENTS, f"{args.name!r} is no experiment: see {COMMAND} list")
    check(importlib.util.find_spec("scipy"), 'intervals need SciPy: pip install -e ".[report]"')
    kind, x = real_model if args.name in real_model.EXPERIMENTS else toy, report.EXPERIMENTS[args.name]
    given = {name: value for name in ("model", "device") if (value := getattr(args, name)) is not None}
    check(kind is real_model or not given, f"--{' and --'.join(given)}: {args.name} trains the toy")
    x = replace(x, **(kind.QUICK if args.quick else {}) | given)
    first, count = (args.seed, x.seeds.start), (args.seeds, len(x.seeds))
    first, count = (default if value is None else value for value, default in (first, count))
    check(0 < count <= 10_000, f"seeds={count} is not between 1 and 10000")
    x = replace(x, seeds=range(first, first + count))
    kind.check_start(x)
    return kind, x


def do(args):
    """What a command says; returns its exit code."""
    if args.command == "list":
        for name, x in report.EXPERIMENTS.items():
            print(f"{name:21}{len(x.jobs()):4} x {x.rl_steps:<4}{', '.join(arm.name for arm in x.arms)}"[:80])
        return 0
    if args.command == "report":
        return report.main(args.folders)
    torch.set_num_threads(1)
    check_counts(workers=args.workers)
    if args.command == "foretell":
        return foretell.main(args.out, args.workers)
    kind, x = chosen(args)
    left = runs.run(x, args.out, kind.rows_of, args.workers)
    print(scores.shown(x, args.out))
    if left:
        print(f"{len(left)} of {len(x.jobs())} jobs are not done; the same command tries again", file=sys.stderr)
    return 1 if left else 0


def main(argv=None) -> int:
    """Returns the exit code: 0; 2, an error ended the command; 1, jobs are not done; 130, Ctrl-C. What is wrong is said
    in one sentence."""
    args = make_parser().parse_args(argv)
    try:
        return do(args) or 0
    except (ValueError, ImportError, OSError) as error:
        print(f"{COMMAND}: error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("interrupted: what is done is kept, and the same command goes on", file=sys.stderr)
        return 130


if __name__ == "__main__":
    sys.exit(main())
