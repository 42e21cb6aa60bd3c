"""The command line of a run, of toy.py or of real_model.py: flags, refusals, signals, streams and exit codes.

Flags are the fields of a Config. What is wrong with them is said in one sentence, with exit code 2, before any work.
"""

import argparse
import contextlib
import multiprocessing
import os
import signal
import sys
import tempfile
import textwrap
import threading
from collections.abc import Callable
from dataclasses import dataclass, fields
from pathlib import Path

import torch

from experiments.runs import Damaged, owned_run, read_config
from minicfrl import Addition
from model import check, check_counts

COMMAND = "python -m experiments"


@dataclass(frozen=True)
class Program:
    """A command: what it runs, and what differs between the two."""

    text: str  # what --help begins with
    config: type  # a dataclass, whose fields are flags
    experiments: dict  # {name: other defaults}
    quick: dict  # other defaults
    quick_text: str
    run: Callable  # (config, folder, arguments) -> complaints
    check: Callable  # (arguments, config) -> config; ValueError or OSError, before anything is written
    without: tuple = ()  # fields of the Config that make no flag
    asks: bool = False  # are there --ask and --plot?


class Parser(argparse.ArgumentParser):
    """Says what is wrong in one line, with exit code 2."""

    def error(self, message):
        self.exit(2, f"{self.prog}: error: {message.splitlines()[0]}\n")


class Help(argparse.RawDescriptionHelpFormatter):
    """Breaks lines at spaces only: the names of arms and experiments, and lists of them, stay whole."""

    def _split_lines(self, text, width):
        return textwrap.wrap(" ".join(text.split()), width, break_on_hyphens=False, break_long_words=False)


def make_parser(program):
    """A parser with a flag for each field of the program's Config, and those that all runs have."""
    parser = Parser(f"{COMMAND} run", description=program.text, formatter_class=Help, allow_abbrev=False)
    names = ", ".join(program.experiments)
    parser.add_argument("name", help=f"an experiment, other defaults: {names}", metavar="NAME")

    def flag(name, text, **how):
        parser.add_argument(f"--{name.replace('_', '-')}", help=text, **how)

    for f in fields(program.config):
        if f.name not in program.without:
            text = f"{f.metadata['help']} (default {f.default})"
            flag(f.name, text, type=type(f.default), default=f.default, metavar="X")
    workers = min(2, os.cpu_count() or 1)
    flag("workers", f"processes, one thread each (default {workers})", type=int, default=workers, metavar="X")
    flag("out", "keep the results in DIR; if the same run is there, continue it", type=Path, metavar="DIR")
    quick = ", ".join(f"{name}={value}" for name, value in program.quick.items())
    flag("quick", f"{program.quick_text}: other defaults ({quick})", action="store_true")
    if program.asks:
        flag("plot", "also draw the curves, the kernel and one update into DIR (takes matplotlib)", action="store_true")
        text = "let the policies answer; if --out has a run, nothing is trained and no other flag counts"
        flag("ask", text, metavar="47+85=")
    return parser


def open_streams():
    """Make sure that there are standard streams, and that they can print everything."""
    while (descriptor := os.open(os.devnull, os.O_RDWR)) <= 2:  # one that was closed would be the next file's
        os.set_inheritable(descriptor, True)  # and that of a worker's next file
    os.close(descriptor)
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name)
        if stream is None:
            setattr(sys, name, open(os.devnull, "w", encoding="utf-8"))  # noqa: SIM115  (for the process's life)
        elif hasattr(stream, "reconfigure"):  # an encoding other than this one may lack the ticks
            stream.reconfigure(encoding="utf-8", errors="backslashreplace")


def main(program: Program, argv=None) -> int:
    """Run a command line; returns the exit code: 0; 1, an arm stopped early; 2, bad arguments; 130, Ctrl-C."""
    if getattr(multiprocessing.current_process(), "_inheriting", False):  # a worker is importing the script
        sys.exit("workers import the script that starts them: call main() under `if __name__ == '__main__':`")
    open_streams()
    torch.set_num_threads(1)
    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGTERM, signal.default_int_handler)  # like Ctrl-C: else the workers would outlive it
    argv = sys.argv[1:] if argv is None else argv
    parser = make_parser(program)
    args = parser.parse_args(argv)
    if args.name not in program.experiments:
        parser.error(f"{args.name!r} is no experiment: see {COMMAND} list")
    parser.set_defaults(**program.experiments[args.name] | (program.quick if args.quick else {}))
    args = parser.parse_args(argv)
    clear = "\r\033[J" if sys.stderr.isatty() else ""  # what is left of the progress lines
    with contextlib.ExitStack() as stack:
        try:
            try:
                check_counts(workers=args.workers)
                given = {f.name: getattr(args, f.name) for f in fields(program.config) if f.name in args}
                config = program.check(args, program.config(**given))
                out = args.out or Path(stack.enter_context(tempfile.TemporaryDirectory()))
                if not asking_a_saved_run(args):
                    stack.enter_context(owned_run(out, config))
            except (ValueError, OSError) as error:
                parser.error(str(error))
            complaints = program.run(config, out, args)
        except KeyboardInterrupt:
            kept = f"the rows written so far are kept in {args.out}" if args.out else "nothing is kept without --out"
            print(f"{clear}interrupted: {kept}", file=sys.stderr)
            return 130
        except (Damaged, OSError) as error:  # a full disk, for one
            print(f"{clear}stopped: {error}", file=sys.stderr)
            return 1
        for complaint in complaints:
            print(complaint, file=sys.stderr)
        return 1 if complaints else 0


def asking_a_saved_run(args):
    """Are its policies only to answer, so that nothing is trained and no other flag counts?"""
    return getattr(args, "ask", None) is not None and args.out is not None and (args.out / "config.json").exists()


def check_toy(args, config):
    """The Config to run: that of the saved run, where that is asked. ValueError or OSError for what cannot be done."""
    check(not args.plot or args.out is not None, "--plot needs --out DIR to draw in")
    if args.plot:
        try:
            import matplotlib  # noqa: F401
        except (ImportError, ValueError) as error:  # the latter if MPLBACKEND names no backend
            raise ValueError(f"--plot needs matplotlib (pip install matplotlib): {error}") from None
    if asking_a_saved_run(args):
        _, config = read_config(args.out)
        check(list(args.out.glob("*.pt")), f"{args.out} holds no policy yet: run it first")
    if args.ask is not None:
        Addition(config.digits).operands(args.ask)
    return config
