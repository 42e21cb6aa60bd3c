"""Teach a tiny GPT to add, with plain RL and with classifier-first RL, and compare the two. It needs no arguments.

Each seed's starting policy comes from supervised fine-tuning. From it every arm (a row of experiments/arms.py) trains
with the same random numbers and the same number of samples and updates. At the end: two tables, curves, worked samples,
and one sentence on who was faster and whether the matched control was too. With --out DIR the configuration, metrics,
summary and policies are kept.
"""

import contextlib
import importlib.util
import json
import signal
import sys
import tempfile
import textwrap
import time
from pathlib import Path

import torch

from experiments.arms import EXPERIMENTS, QUICK, SAMPLES, Config, generator, train_as
from experiments.flags import add_flag, config_of, make_parser
from experiments.order import print_map
from experiments.runs import Damaged, Watch, load_policy, owned_run, policy_file, read_config, run, write_text
from experiments.tables import print_tables, summarise, verdict
from minicfrl import Addition, rollout, supervised_finetune
from model import GPT, check_counts

# ------------------------------------------------------------------------------------------------------------ the story


def train_start(config, out, seed, bar):
    """The policy that every arm starts from: a GPT that has imitated demonstrations. It adds, but not well."""
    task = Addition(config.digits)
    model = GPT(config.architecture(task), generator(seed, "init"))
    stages = config.finetuning()
    bar.reset(total=sum(stage.steps for stage in stages.values()))
    clock = time.perf_counter()
    for name, stage in stages.items():
        for record in supervised_finetune(model, task, stage, generator(seed, name)):
            bar.set_postfix_str(f"loss {record['loss']:.2f}", refresh=False)
            bar.update()
    seconds = time.perf_counter() - clock
    Watch(config, out, seed, "sft", task, model, seconds).write_row({})  # step 0 of every arm's curve
    return model


def train_arm(config, out, seed, arm, bar):
    """The one loop: sample, compare, gradient, step (minicfrl.train_rl), and look. Every arm of a seed starts from the
    same policy with the same random numbers."""
    task, model = load_policy(config, out, "sft", seed)
    watch = Watch(config, out, seed, arm, task, model)
    bar.reset(total=config.rl_steps)
    for record in train_as(arm, config, seed, task, model):
        accuracy = watch.look(record)
        live = {"reward": record.get("reward"), "entropy": record.get("entropy"), "acc": accuracy}
        bar.set_postfix_str(" ".join(f"{k} {v:.2f}" for k, v in live.items() if v is not None), refresh=False)
        bar.update()
    return model


def train(config, out, seed, arm, bar):
    return train_start(config, out, seed, bar) if arm == "sft" else train_arm(config, out, seed, arm, bar)


def show_answers(config, out, prompts):
    """Each policy's most likely response to each prompt with the verifier's verdict, and its score in 8 samples."""
    for prompt in prompts:
        for arm in ("sft", *config.arm_list):
            if policy_file(out, arm, config.seed).exists():
                task, model = load_policy(config, out, arm, config.seed)
                greedy = rollout(model, task, [prompt], 1)
                right = int(rollout(model, task, [prompt], SAMPLES, generator(config.seed, "answers")).rewards.sum())
                tick = "✓" if greedy.rewards.item() else "✗"
                print(f"  {prompt} {greedy.responses[0]:14} {tick}  {right} of {SAMPLES} samples right   {arm}")


def report(args, config, out):
    """What came of it: the answer to --ask, or summary.json, the tables, two worked sums and the verdict; pictures."""
    if asking_a_saved_run(args):
        return show_answers(config, out, [args.ask])
    summary = summarise(config, out)
    write_text(out / "summary.json", json.dumps(summary, indent=2) + "\n")
    if args.ask is not None:
        show_answers(config, out, [args.ask])
    elif config.cells:
        print_map(config, summary)
    elif summary:
        print_tables(config, summary)
        print("\nHeld-out sums: the most likely response, judged by the verifier")
        task = Addition(config.digits)
        show_answers(config, out, [task.prompt(a, b) for a, b in task.heldout_pairs[-2:].tolist()])
        print("\n" + textwrap.fill(verdict(config, summary), 80))
    if args.plot:
        from experiments.figures import draw_run

        draw_run(config, out, summary)


# ----------------------------------------------------------------------------------------------------- the command line


def parser_of_flags():
    parser = make_parser("train_toy.py", __doc__, Config)
    text = f"other defaults: {', '.join(EXPERIMENTS)} (README)"
    add_flag(parser, "experiment", text, choices=EXPERIMENTS, metavar="NAME")
    quick = ", ".join(f"{name}={value}" for name, value in QUICK.items())
    text = f"about 15 seconds, too short to learn much: other defaults ({quick})"
    add_flag(parser, "quick", text, action="store_true")
    text = "also draw the curves, the kernel and one update into DIR (takes matplotlib)"
    add_flag(parser, "plot", text, action="store_true")
    text = "let the policies answer; if --out has a run, nothing is trained and no other flag counts"
    add_flag(parser, "ask", text, metavar="47+85=")
    return parser


def asking_a_saved_run(args):
    return args.ask is not None and args.out is not None and (args.out / "config.json").exists()


def prepare(args, stack):
    """Arguments -> (Config, folder for the results). Whatever is wrong raises ValueError or OSError before any work."""
    check_counts(workers=args.workers)
    config = config_of(args, Config)
    if args.plot and args.out is None:
        raise ValueError("--plot needs --out DIR to draw in")
    if args.plot and importlib.util.find_spec("matplotlib") is None:
        raise ValueError("--plot needs matplotlib: pip install matplotlib")
    if asking_a_saved_run(args):  # whatever run it is
        _, config = read_config(args.out)
        if not list(args.out.glob("*.pt")):
            raise ValueError(f"{args.out} holds no policy yet: run it first")
    if args.ask is not None:
        Addition(config.digits).operands(args.ask)
    out = args.out or Path(stack.enter_context(tempfile.TemporaryDirectory()))
    if not asking_a_saved_run(args):
        stack.enter_context(owned_run(out, config))
    return config, out


def main(argv=None):
    """Run the command line; returns the exit code: 0; 1, an arm stopped early; 2, bad arguments; 130, Ctrl-C."""
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):  # a Windows console's own encoding may lack the ticks
            stream.reconfigure(encoding="utf-8", errors="backslashreplace")
    torch.set_num_threads(1)
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # like Ctrl-C: else the workers would outlive it
    argv = sys.argv[1:] if argv is None else argv
    parser = parser_of_flags()
    args = parser.parse_args(argv)
    parser.set_defaults(**{**EXPERIMENTS.get(args.experiment, {}), **(QUICK if args.quick else {})})
    args = parser.parse_args(argv)
    with contextlib.ExitStack() as stack:
        try:
            config, out = prepare(args, stack)
        except (ValueError, OSError) as error:
            parser.error(str(error))
        clear = "\r\033[J" if sys.stderr.isatty() else ""  # what is left of the progress lines
        try:
            complaints = [] if asking_a_saved_run(args) else run(config, out, args.workers, train)
            report(args, config, out)
        except KeyboardInterrupt:
            kept = f"the rows written so far are kept in {out}" if args.out else "nothing is kept without --out"
            print(f"{clear}interrupted: {kept}", file=sys.stderr)
            return 130
        except (Damaged, OSError) as error:  # a full disk, for one
            print(f"{clear}stopped: {error}", file=sys.stderr)
            return 1
        for complaint in complaints:
            print(complaint, file=sys.stderr)
        return 1 if complaints else 0


if __name__ == "__main__":
    sys.exit(main())
