"""Teach a tiny GPT to add, by reinforcement learning in three ways, and compare them: python train_toy.py

The start is a policy that has imitated demonstrations: it adds, but not well. Then each arm, a line of ARMS, trains a
copy of it, all from the same random seed and with equally many prompts, samples and updates. At the end you see a
table, two sums as each policy answers them, and how many updates each arm took. One seed takes less than a minute on a
laptop's CPU, and gives the same bits again. After Ctrl-C you see what is finished. Nothing is written but --plot's
picture.
"""

import argparse
import copy
import zlib
from dataclasses import replace
from pathlib import Path

import torch
from tqdm import tqdm

from minicfrl import Addition, RLConfig, SFTConfig, Stage, rollout, supervised_finetune, train_rl
from model import GPT, GPTConfig, check, confidence
from ntk import exact_split

# The arms. A Stage says how many updates train what, at which rate of Adam, and the rate of W if that is another. A new
# arm is one line; a stage may also train a part by its name: Stage(20, "body.blocks.1", 4e-4) trains the last block.
ARMS = {
    "rl": (Stage(80, "all", 4e-4),),
    "cf-rl": (Stage(20, "classifier", 8e-3), Stage(60, "all", 4e-4)),
    # Does the freezing help, or only W's high rate? The control has CF-RL's rates, and a fresh optimiser where CF-RL
    # has one, but it freezes nothing. Where it is as fast as CF-RL, the high rate is enough.
    "control": (Stage(20, "all", 4e-4, classifier_lr=8e-3), Stage(60, "all", 4e-4)),
}
PROMPTS, SAMPLES = 32, 8  # per update: prompts, and responses to each prompt, which are compared with each other
EVERY, EVALUATED, AT_THE_END, PROBES = 4, 64, 256, 32  # updates per evaluation; prompts of it, the table, the probe
SFT_LR = 3e-3  # Adam's rate, before its schedule, in the supervised fine-tuning (SFT) that makes the start
SFT_STEPS, THRESHOLD, SHORTER = 1000, 0.9, 1  # updates of SFT; accuracy that arms should reach; divisor of stages
QUICK = 300, 0.2, 5  # --quick: other values of SFT_STEPS, THRESHOLD and SHORTER


def stream(seed, purpose):
    """Random numbers of their own for each seed and purpose."""
    return torch.Generator(torch.get_default_device()).manual_seed(zlib.crc32(f"{purpose} {seed}".encode()))


def make_start(task, seed, sft, **sizes):
    """A policy that has imitated demonstrations. `sft` is an SFTConfig; `sizes` are other sizes of the GPTConfig."""
    model = GPT(GPTConfig(task.vocab_size, task.block_size, **sizes), stream(seed, "init"))
    updates = supervised_finetune(model, task, sft, stream(seed, "sft"))
    list(tqdm(updates, "start", sum(stage.steps for stage in sft.stages), leave=False, disable=None))  # makes them all
    return model


def held_out(model, task, seed, prompts, samples=SAMPLES, purpose="evaluation"):
    """Responses to sums that were never trained on. The random numbers are always the same."""
    questions = [task.prompt(*pair) for pair in task.heldout_pairs[:prompts].tolist()]
    return rollout(model, task, questions, samples, stream(seed, purpose))


def describe(model, task, seed, questions):
    """A policy's first columns of the table: how often it is right, how sure it is, and which patterns it uses. And its
    answers to the questions."""
    batch = held_out(model, task, seed, AT_THE_END)
    first = batch.logits[:, 0].softmax(dim=1).mean(dim=0)  # (V,): the first token of a response chooses its pattern
    shares = "/".join(f"{share:.2f}" for share in first[task.encode(task.patterns)])
    row = f"{batch.rewards.mean():8.2f} {confidence(batch.state_logits).mean():5.2f} {shares}"
    return {"row": row, "answers": [answer(model, task, seed, question) for question in questions]}


def answer(model, task, seed, question):
    """The greedy response, which takes the likeliest token at each state; and how many samples are right."""
    greedy = rollout(model, task, [question], 1)
    right = int(rollout(model, task, [question], SAMPLES, stream(seed, "answers")).rewards.sum())
    return f"{question}{greedy.responses[0]:13} {'right' if greedy.rewards else 'wrong'}, {right}"


@torch.no_grad()
def look(model, probe):
    """The features (N, d) at the N states of `probe`, which is a rollout or has its tokens and state_mask; W (V, d)."""
    return model.features(probe.tokens)[probe.state_mask], model.classifier.weight.clone()


def train_arm(start, task, seed, name, stages, threshold, questions):
    """Train a copy of the start as an arm does. train_rl makes the updates: it samples, compares, finds the gradient
    and steps. After each of them we look at what it did to the top-1 probability, through W and through the body.
    """
    model, curve, rise = copy.deepcopy(start), {}, torch.zeros(2, dtype=torch.float64)  # through W, through the body
    probe = held_out(start, task, seed, PROBES, samples=1, purpose="probe")  # at its states we follow the arm
    now = look(model, probe)
    updates = train_rl(model, task, RLConfig(stages, PROMPTS, SAMPLES), stream(seed, "rl"))
    bar = tqdm(updates, name, sum(stage.steps for stage in stages), leave=False, disable=None)
    for step, _ in enumerate(bar, start=1):
        (phi, W), now = now, look(model, probe)
        logits, parts = phi @ W.T, exact_split(phi, W, *now)[:2]  # what W's change did to the logits, and the body's
        rise += torch.stack([(confidence(logits + part) - confidence(logits)).mean() for part in parts])
        if step % EVERY == 0:
            curve[step] = held_out(model, task, seed, EVALUATED).rewards.mean().item()
            bar.set_postfix_str(f"accuracy {curve[step]:.2f}")
    run = {**describe(model, task, seed, questions), "curve": curve}
    run["took"] = next((step for step, accuracy in curve.items() if accuracy >= threshold), "never")
    run["row"] += f" {run['took']:>7} {rise[0]:+9.3f} {rise[1]:+12.3f}"
    return run


def tell(runs, threshold):
    """Print what is known of the runs: the table, the answers, and how many updates each arm took."""
    table = [f"{name:8} {run['row']}" for name, run in runs.items()]
    answers = [f"{name:8} {'     '.join(run['answers'])}" for name, run in runs.items()]
    print(f"""\nHeld-out accuracy; top-1, the likeliest token's probability; shares of direct/
scratch/guess; updates to accuracy {threshold}; rise of top-1 at the start's states:
policy   accuracy top-1          d/s/g updates through W through body""")
    print(*table, f"\nGreedy responses, and how many of {SAMPLES} samples are right:", *answers, sep="\n")
    if {"rl", "cf-rl", "control"} <= runs.keys():
        rl, cf_rl, control = (runs[name]["took"] for name in ("rl", "cf-rl", "control"))
        print(f"\nUpdates to accuracy {threshold} on this seed: plain RL {rl}, CF-RL {cf_rl}, the control")
        print(f"(it freezes nothing) {control}; but one seed decides nothing (the README has ten).")


def draw(runs, path):
    """Save a picture of accuracy against updates."""
    from matplotlib.figure import Figure

    axes = Figure(layout="constrained").subplots()
    for name, run in list(runs.items())[1:]:  # the start has no curve
        axes.plot(run["curve"].keys(), run["curve"].values(), label=name)
    axes.set(xlabel="updates", ylabel="accuracy on held-out sums", ylim=(0, 1))
    axes.legend()
    axes.figure.savefig(path)


def parse(argv):
    """The arguments, the task, and the sums to answer. What is wrong is said in one sentence, with exit code 2."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.error = lambda message: parser.exit(2, f"{parser.prog}: {' '.join(message.split())}\n")
    parser.add_argument("--seed", type=int, default=0, help="of all random numbers")
    parser.add_argument("--digits", type=int, default=2, choices=(1, 2, 3), help="of each operand")
    parser.add_argument("--quick", action="store_true", help="a quarter of the time, from a start that hardly adds")
    parser.add_argument("--ask", nargs=1, metavar="47+85=", help="a sum to answer, in place of two held-out ones")
    parser.add_argument("--plot", metavar="FILE.png", type=Path, help="draw accuracy against updates")
    args = parser.parse_args(argv)
    task = Addition(args.digits)
    questions = args.ask or [task.prompt(*pair) for pair in task.heldout_pairs[-2:].tolist()]
    try:
        task.operands(questions[0])
        if args.plot:
            check(args.plot.suffix == ".png" and args.plot.parent.is_dir(), f"{args.plot} is no .png in a folder")
            import matplotlib  # noqa: F401  before anything is trained
    except (ValueError, ImportError) as error:
        parser.error(str(error))
    return args, task, questions


@torch.random.fork_rng(devices=[])  # making a GPT draws from torch's global random numbers, which are our caller's
def main(argv=None):
    """Returns the exit code: 0, or 130 after Ctrl-C. A bad argument exits with 2."""
    args, task, questions = parse(argv)
    sft_steps, threshold, shorter = QUICK if args.quick else (SFT_STEPS, THRESHOLD, SHORTER)
    runs, threads = {}, torch.get_num_threads()
    torch.set_num_threads(1)  # More are slower on small matrices, and change the last bits of the results.
    try:
        start = make_start(task, args.seed, SFTConfig((Stage(sft_steps, lr=SFT_LR),)))
        runs["start"] = describe(start, task, args.seed, questions)
        for name, stages in ARMS.items():
            stages = tuple(replace(stage, steps=max(1, stage.steps // shorter)) for stage in stages)
            runs[name] = train_arm(start, task, args.seed, name, stages, threshold, questions)
    except KeyboardInterrupt:
        print("Interrupted. This is what was finished:")
    finally:  # whatever stopped us, what is finished is told
        torch.set_num_threads(threads)
        tell(runs, threshold)
        if args.plot:
            draw(runs, args.plot)
    return 0 if ARMS.keys() <= runs.keys() else 130


if __name__ == "__main__":
    raise SystemExit(main())
