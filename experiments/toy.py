"""Teach a tiny GPT to add, by some arms on some seeds, and compare them: the experiments on the toy.

    python -m experiments run NAME --out DIR      # NAME: plain, which is train_toy.py's run, or a row of EXPERIMENTS

Each seed's starting policy comes from supervised fine-tuning. From it every arm (a row of experiments/arms.py) trains
with the same random numbers and the same number of samples and updates. At the end: two tables, curves, worked samples,
and one sentence on who was faster and whether the matched control was too. With --out DIR the configuration, metrics,
summary and policies are kept.
"""

import time

from experiments import cli
from experiments.arms import EXPERIMENTS, QUICK, SAMPLES, Config, train_as, turn_knob
from experiments.figures import draw_run
from experiments.measures import ToyView
from experiments.order import print_map
from experiments.runs import Watch, jobs, load_policy, policy_file
from experiments.tables import filled, print_tables, verdict, write_summary
from minicfrl import Addition, rollout, supervised_finetune
from train_toy import make_start, stream


def train_start(config, out, seed, arm, bar):
    """The policy that every arm starts from: a GPT that has imitated demonstrations. It adds, but not well."""
    task, finetuning, clock = Addition(config.digits), config.finetuning(), time.perf_counter()
    model = make_start(task, seed, finetuning.pop("sft"), n_layer=config.layers, n_embd=config.width)
    for name, tilt in finetuning.items():
        for _ in supervised_finetune(model, task, tilt, stream(seed, name)):
            bar.update()
    watch = Watch(config, out, seed, arm, ToyView(config, seed, task, model), bar, time.perf_counter() - clock)
    watch.write_row({})  # step 0 of every arm's curve
    return model


def train_arm(config, out, seed, arm, bar):
    """The one loop: sample, compare, gradient, step (for most arms train_as is just minicfrl.train_rl), and look.

    Every arm of a seed starts from the same policy with the same random numbers.
    """
    task, model = load_policy(config, out, "sft", seed)
    turn_knob(arm, config, seed, task, model)  # of most arms it does nothing
    watch = Watch(config, out, seed, arm, ToyView(config, seed, task, model), bar)
    bar.reset(total=config.rl_steps)
    for record in train_as(arm, config, seed, task, model):
        watch.look(record)
    return model


def show_answers(config, out, prompts):
    """Each policy's most likely response to each prompt with the verifier's verdict, and its score in 8 samples."""
    for prompt in prompts:
        for arm in ("sft", *config.arm_list):
            if policy_file(out, arm, config.seed).exists():
                task, model = load_policy(config, out, arm, config.seed)
                greedy = rollout(model, task, [prompt], 1)
                right = int(rollout(model, task, [prompt], SAMPLES, stream(config.seed, "answers")).rewards.sum())
                tick = "✓" if greedy.rewards.item() else "✗"
                print(f"  {prompt} {greedy.responses[0]:14} {tick}  {right} of {SAMPLES} samples right   {arm}")


def run(config, out, args):
    """The whole story. Returns the complaints of what stopped early."""
    if cli.asking_a_saved_run(args):
        show_answers(config, out, [args.ask])
        return []
    with jobs(config, out, args.workers) as do:  # in processes of their own; what is there already is not done again
        complaints = do(train_start, ["sft"]) or do(train_arm, config.arm_list)
    summary = write_summary(config, out)
    if args.ask is not None:
        show_answers(config, out, [args.ask])
    elif config.cells:
        print_map(config, summary)
    elif summary:
        print_tables(config, summary)
        print("\nHeld-out sums: the most likely response, judged by the verifier")
        task = Addition(config.digits)
        show_answers(config, out, [task.prompt(a, b) for a, b in task.heldout_pairs[-2:].tolist()])
        print("\n" + filled(verdict(config, summary)))
    if args.plot:
        draw_run(config, out, summary)
    return complaints


def main(argv=None):
    """The command line (experiments/cli.py). Returns the exit code."""
    about_quick = "about 20 seconds, with a start that hardly adds"
    named = {"plain": {}, **EXPERIMENTS}
    toy = cli.Program(__doc__, Config, named, QUICK, about_quick, run, cli.check_toy, asks=True)
    return cli.main(toy, argv)
