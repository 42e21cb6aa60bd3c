"""The laboratory's command.

python -m experiments list                            the experiments and their arms
python -m experiments run NAME --out DIR [flags]      train; run NAME --help explains the flags
python -m experiments report [DIR ...]                write the pages' numbers and pictures
"""

import sys
import textwrap

from experiments import real_model, report, toy
from experiments.arms import EXPERIMENTS, Config
from experiments.cli import COMMAND, open_streams


def show_experiments():
    """One line each, of 80 columns at most."""
    configs = {"plain": Config()} | {name: Config(**flags) for name, flags in EXPERIMENTS.items()}
    configs |= {name: real_model.RealConfig(**flags) for name, flags in real_model.EXPERIMENTS.items()}
    for name, config in configs.items():
        arms = ", ".join(config.arm_list)
        print(f"{name:21}", textwrap.shorten(arms, 58, break_on_hyphens=False, placeholder=" ..."))


def main(argv=None) -> int:
    """Returns the exit code. What is wrong is said in one sentence, with exit code 2."""
    command, *rest = (sys.argv[1:] if argv is None else argv) or [""]
    if command == "run":
        return (real_model if rest[:1] and rest[0] in real_model.EXPERIMENTS else toy).main(rest)
    open_streams()
    try:
        match command:
            case "report":
                report.main(rest)
            case "list" if not rest:
                show_experiments()
            case "-h" | "--help":
                print(__doc__)
            case _:
                raise ValueError("it takes list, run NAME --out DIR or report [DIR ...]")
    except (ValueError, ImportError, OSError) as error:
        print(f"{COMMAND}: error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
