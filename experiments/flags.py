"""Command-line flags from the fields of a Config."""

import argparse
import os
from dataclasses import fields
from pathlib import Path


class Parser(argparse.ArgumentParser):
    """Says what is wrong in one line, with exit code 2."""

    def error(self, message):
        self.exit(2, f"{self.prog}: error: {message}\n")


def make_parser(prog, story, config, names=None):
    """A parser with a flag for each field of the class `config`, or for `names` of them, and --workers and --out."""
    parser = Parser(prog, description=story, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False)
    for f in fields(config):
        if names is None or f.name in names:
            text = f"{f.metadata['help']} (default {f.default})"
            add_flag(parser, f.name, text, type=type(f.default), default=f.default, metavar="X")
    workers = min(2, os.cpu_count() or 1)
    add_flag(
        parser, "workers", f"processes, one thread each (default {workers})", type=int, default=workers, metavar="X"
    )
    text = "keep the results in DIR; if the same run is there, continue it"
    add_flag(parser, "out", text, type=Path, metavar="DIR")
    return parser


def add_flag(parser, name, text, **kwargs):
    parser.add_argument(f"--{name.replace('_', '-')}", help=text, **kwargs)


def config_of(args, config):
    """The Config that parsed arguments describe. ValueError for unusable values."""
    return config(**{f.name: getattr(args, f.name) for f in fields(config) if hasattr(args, f.name)})
