"""Teach a tiny GPT to add, with plain RL and with classifier-first RL, and compare the two. It needs no arguments.

Each seed's starting policy comes from supervised fine-tuning. From it every arm trains on the same prompts, with the
same number of samples and updates. At the end: a table, curves, worked samples, and one sentence on who was faster and
whether the matched control was too. With --out DIR the configuration, metrics, summary and policies are kept.
"""

import argparse
import contextlib
import copy
import csv
import importlib.metadata
import importlib.util
import itertools
import json
import math
import multiprocessing
import os
import signal
import statistics
import sys
import tempfile
import textwrap
import time
import zlib
from concurrent.futures import ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path

import torch
import torch.nn.functional as F
from tqdm import tqdm

from assets.tables import print_tables, verdict
from minicfrl import (
    Addition,
    RLConfig,
    SFTConfig,
    diversity,
    evaluate,
    make_probe,
    naming_the_step,
    pattern_rates,
    residuals,
    rollout,
    selection,
    supervised_finetune,
    train_rl,
)
from model import GPT, GPTConfig, check_counts
from ntk import empirical_ntk, microscope

# An arm is a row of this table: what it changes in the RLConfig that the flags describe, which is cf-rl's. What else
# the last ones do is in `updates`.
PLAIN = {"classifier_steps": 0}
ARMS = {
    "rl": lambda config: PLAIN,
    "cf-rl": lambda config: {},
    "rl-classifier-lr": lambda config: {"stage_1": "all"},  # the matched control
    "cf-rl-same-lr": lambda config: {"classifier_lr": config.lr},
    "classifier-only": lambda config: {"classifier_steps": config.rl_steps},
    "rl-sgd": lambda config: {**PLAIN, "optimizer": "sgd", "lr": config.sgd_lr},
    "body-first": lambda config: {"stage_1": "body"},
    "random-reward": lambda config: {**PLAIN, "reward": "coin flips"},
    "random-reward-sgd": lambda config: {**ARMS["rl-sgd"](config), "reward": "coin flips"},
    "self-certainty": lambda config: {**PLAIN, "reward": "self-certainty", "lr": config.lr / 8},
    "self-certainty-sgd": lambda config: {**ARMS["rl-sgd"](config), "reward": "self-certainty"},
    "log-probability": lambda config: {**PLAIN, "reward": "log-probability", "lr": config.lr / 8},
    "kl-0.3": lambda config: {**PLAIN, "kl": 0.3},
    "kl-1": lambda config: {**PLAIN, "kl": 1.0},
    "random-w": lambda config: PLAIN,
    "sft-rl-sgd": lambda config: {**ARMS["rl-sgd"](config), "steps": max(1, config.rl_steps - config.classifier_steps)},
    "ft": lambda config: PLAIN,
    "lp-ft": lambda config: {},
}
CONTROLS = "rl,cf-rl,rl-classifier-lr,cf-rl-same-lr,classifier-only"
# An experiment is other defaults for the flags.
EXPERIMENTS = {
    "confidence": dict(seeds=5, arms=f"{CONTROLS},rl-sgd,random-reward,random-reward-sgd"),
    "learning": dict(seeds=5, arms=CONTROLS, sft_steps=300, rl_steps=160),
    "classifier": dict(seeds=5, arms="rl,cf-rl,rl-classifier-lr,body-first,random-w", sft_steps=300),
    "lp-ft": dict(seeds=5, arms="rl,cf-rl,ft,lp-ft", sft_steps=300),
    "regime-1": dict(
        seeds=5, arms="rl-sgd,self-certainty,log-probability", tilt="0.05,0.45,0.5", rl_steps=160, eval_every=16
    ),
    "regime-2": dict(seeds=5, arms="rl,rl-sgd,sft-rl-sgd", tilt="0.8,0.01,0.19", rl_steps=300, eval_every=10),
    "rlif": dict(seeds=5, arms="self-certainty,self-certainty-sgd,log-probability", rl_steps=160, eval_every=8),
    "kl": dict(seeds=5, arms="rl,kl-0.3,kl-1", sft_steps=300, rl_steps=160, eval_every=8),
}
QUICK = dict(sft_steps=100, rl_steps=12, classifier_steps=4, prompts=16, eval_prompts=16, final_prompts=32)
SAMPLES = 8  # per held-out prompt, in every evaluation


def option(default, text):
    return field(default=default, metadata={"help": text})


@dataclass(frozen=True)
class Config:
    """A run: the defaults, the flags with their help, and the record in config.json. ValueError for unusable values."""

    digits: int = option(2, "digits of each operand, 1 to 3")
    sft_steps: int = option(SFTConfig.steps, "updates of supervised fine-tuning")
    tilt: str = option("", "shares of D, S and G in 150 more updates of fine-tuning, as 0.8,0.01,0.19, if any")
    rl_steps: int = option(RLConfig.steps, "updates of every arm, those of stage 1 included")
    classifier_steps: int = option(20, "updates of stage 1, in which CF-RL trains the classifier alone")
    prompts: int = option(RLConfig.prompts, "prompts per RL update")
    samples: int = option(RLConfig.samples, "responses per prompt in RL: the group of the baseline")
    lr: float = option(RLConfig.lr, "Adam's learning rate in RL")
    classifier_lr: float = option(RLConfig.classifier_lr, "Adam's learning rate for the classifier in stage 1")
    sgd_lr: float = option(0.02, "SGD's learning rate in the arms that use it")
    baseline: str = option(RLConfig.baseline, "group baseline: std, mean, rloo or none")
    kl: float = option(RLConfig.kl, "strength of the KL penalty to the starting policy, advantage per nat")
    seed: int = option(0, "the first seed")
    seeds: int = option(1, "how many seeds, counted up from --seed")
    arms: str = option("rl,cf-rl,rl-classifier-lr", f"arms, by commas, of {', '.join(ARMS)}")
    eval_every: int = option(4, "updates between two evaluations on held-out prompts")
    eval_prompts: int = option(64, f"held-out prompts of an evaluation, {SAMPLES} samples each")
    final_prompts: int = option(256, "held-out prompts of the first and of the last evaluation")
    threshold: float = option(0.9, "held-out accuracy, 0 to 1, at which the time of an arm is taken")

    def __post_init__(self):
        counts = ("sft_steps", "rl_steps", "prompts", "samples", "seeds", "eval_every", "eval_prompts", "final_prompts")
        check_counts(**{name: getattr(self, name) for name in counts})
        if type(self.seed) is not int:
            raise ValueError(f"seed must be a whole number, not {self.seed!r}")
        for arm in self.arm_list:
            if arm not in ARMS or self.arm_list.count(arm) > 1:
                raise ValueError(
                    f"arm {arm!r} is " + ("there twice" if arm in ARMS else f"not one of {', '.join(ARMS)}")
                )
        if not 0 < self.threshold <= 1:
            raise ValueError(f"threshold must lie between 0 and 1, not {self.threshold}")
        self.finetuning()  # this checks its arguments, and so do
        Addition(self.digits)
        for arm in self.arm_list:
            self.rl(arm)

    @property
    def arm_list(self):
        return self.arms.split(",")

    @property
    def stage_ends(self):
        """The updates after which a stage of CF-RL is over; 0 is the start."""
        return 0, self.classifier_steps, self.rl_steps

    def finetuning(self):
        """What makes the starting policy: SFTConfigs, one after the other."""
        stages = {"sft": SFTConfig(steps=self.sft_steps)}
        if self.tilt:  # all patterns are skills by now: this only makes some rare
            try:
                mixture = tuple(map(float, self.tilt.split(",")))
            except ValueError:
                raise ValueError(f"tilt must be shares such as 0.8,0.01,0.19, not {self.tilt!r}") from None
            stages["tilt"] = SFTConfig(steps=150, lr=1e-3, mixture=mixture)
        return stages

    def rl(self, arm) -> RLConfig:
        """The RLConfig of an arm: the flags of the same names, then the arm's own changes."""
        flags = {f.name: getattr(self, f.name) for f in fields(RLConfig) if hasattr(self, f.name)}
        return replace(RLConfig(steps=self.rl_steps, **flags), **ARMS[arm](self))

    def jobs(self, *arms):
        return [(seed, arm) for seed in range(self.seed, self.seed + self.seeds) for arm in arms]


def generator(seed, purpose):
    """A stream of random numbers of its own for each seed and purpose."""
    return torch.Generator().manual_seed(zlib.crc32(f"{purpose} {seed}".encode()))


# ---------------------------------------------------------------------------------------------------------------- files


def write_whole(path, write):
    """write(temporary path), then move that into place: whoever reads `path` sees all of it or nothing."""
    temporary = path.with_name(path.name + ".part")
    write(temporary)
    os.replace(temporary, path)


def write_text(path, text):
    write_whole(path, lambda temporary: temporary.write_text(text, encoding="utf-8", newline="\n"))


def policy_file(out, arm, seed):
    return out / f"{arm}-seed{seed}.pt"


def rows_file(out, arm, seed):
    return out / "parts" / f"{arm}-seed{seed}.csv"


def append_row(path, row):
    """One more csv row, under a header if it is the first. The file is closed after each, so Ctrl-C costs no row."""
    with open(path, "a", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, row, lineterminator="\n")
        if file.tell() == 0:
            writer.writeheader()
        writer.writerow({key: f"{value:.6g}" if isinstance(value, float) else value for key, value in row.items()})


def read_rows(path):
    """The rows of a csv file as dicts of floats, the arm's name aside."""
    with open(path, newline="", encoding="utf-8") as file:
        return [{k: v if k == "arm" else float(v) for k, v in row.items()} for row in csv.DictReader(file)]


def merge_rows(out):
    """metrics.csv: the rows that the jobs wrote, each into a file of its own, in sorted order."""
    parts = [part.read_text(encoding="utf-8").partition("\n") for part in sorted((out / "parts").glob("*.csv"))]
    headers = [header for header, _, _ in parts if header]
    if headers:
        write_text(out / "metrics.csv", headers[0] + "\n" + "".join(rows for _, _, rows in parts))


def read_config(out):
    """The record in DIR/config.json. ValueError if that is something else."""
    try:
        record = json.loads((out / "config.json").read_text(encoding="utf-8"))
        return record, Config(**record["config"])
    except (ValueError, KeyError, TypeError, AttributeError):
        raise ValueError(f"{out / 'config.json'} is not the record of a run: choose another --out") from None


def open_out(out, config):
    """Make the folder, or continue one that holds the same run. ValueError or OSError for any other."""
    versions = {name: importlib.metadata.version(name) for name in ("torch", "numpy", "tiktoken")}
    versions["python"] = sys.version.split()[0]
    finetuning = {name: asdict(stage) for name, stage in config.finetuning().items()}
    record = {"config": asdict(config), **finetuning, "versions": versions}
    record = json.loads(json.dumps(record))  # as it will be read back: json makes tuples lists
    out.mkdir(parents=True, exist_ok=True)
    if not any(out.iterdir()):
        write_text(out / "config.json", json.dumps(record, indent=2) + "\n")
    elif not (out / "config.json").exists():
        raise ValueError(f"{out} is not empty and holds no run: choose another --out")
    old, _ = read_config(out)
    for part in record:
        for name, value in record[part].items():
            if (was := (old.get(part) or {}).get(name)) != value:
                raise ValueError(f"{out} holds a run with {name} {was!r}, not {value!r}: choose another --out")
    (out / "parts").mkdir(exist_ok=True)


# ----------------------------------------------------------------------------------------------------------------- jobs

SLOT = 0  # this process's line of the screen


def start_worker(lock, slots):
    """Set up a worker process: its own progress line, one thread (small matrices), Ctrl-C left to the parent."""
    global SLOT
    SLOT = slots.get()
    tqdm.set_lock(lock)
    torch.set_num_threads(1)
    signal.signal(signal.SIGINT, signal.SIG_IGN)


@contextlib.contextmanager
def job_runner(workers):
    """A function that trains a list of jobs, each (config, out, seed, arm), and returns their complaints.

    One worker is this process; more are as many new ones, which import torch while the first jobs are under way.
    """
    if workers == 1:
        yield lambda jobs: [complaint for job in jobs if (complaint := train(*job))]
        return
    context = multiprocessing.get_context("spawn")  # the one way that every system has
    lock, slots = context.RLock(), context.SimpleQueue()
    for slot in range(workers):
        slots.put(slot)
    with ProcessPoolExecutor(workers, context, start_worker, (lock, slots)) as pool:

        def run_jobs(jobs):
            futures = [pool.submit(train, *job) for job in jobs]
            while wait(futures, timeout=0.2).not_done:
                pass  # in short waits: on Windows a Ctrl-C gets in only between two
            return [complaint for future in futures if (complaint := future.result())]

        try:
            yield run_jobs
        except BaseException:  # Ctrl-C above all: do not wait for what the workers are at
            for process in multiprocessing.active_children():
                process.terminate()
            raise


def train(config, out, seed, arm):
    """One job: csv rows as it goes, the policy file once all is done. Returns why it stopped early, if it did."""
    rows_file(out, arm, seed).unlink(missing_ok=True)  # of a run that was cut short
    torch.optim.Adam([torch.zeros(1)])  # its first use imports for seconds: before the clock of any arm, not on it
    try:
        form = "{desc:18} {percentage:3.0f}% |{bar:8}| {remaining} left{postfix}"  # fits 80 columns
        with tqdm(desc=f"{arm}/{seed}", position=SLOT, leave=False, disable=None, bar_format=form) as bar:
            model = train_start(config, out, seed, bar) if arm == "sft" else train_arm(config, out, seed, arm, bar)
    except FloatingPointError as error:
        return f"{arm}, seed {seed}, stopped at {error}"
    write_whole(policy_file(out, arm, seed), lambda temporary: torch.save(model.state_dict(), temporary))


def train_start(config, out, seed, bar):
    """Fine-tune the starting policy. Its one row, step 0, begins the curve of every arm."""
    task = Addition(config.digits)
    model = GPT(GPTConfig(task.vocab_size, task.block_size), generator(seed, "init"))
    stages = config.finetuning()
    bar.reset(total=sum(stage.steps for stage in stages.values()))
    clock = time.perf_counter()
    for name, stage in stages.items():
        for record in supervised_finetune(model, task, stage, generator(seed, name)):
            bar.set_postfix_str(f"loss {record['loss']:.2f}", refresh=False)
            bar.update()
    seconds = {"train_seconds": time.perf_counter() - clock}
    probe = start_probe(config, task, model, seed)
    log_row(config, out, seed, "sft", NO_UPDATE, task, model, probe, seconds)
    return model


def train_arm(config, out, seed, arm, bar):
    """Train one arm from the starting policy, on the stream of prompts that every arm of this seed sees."""
    task, model = load_policy(config, out, "sft", seed)
    probe, before = start_probe(config, task, model, seed), copy.deepcopy(model)
    seconds, so_far, accuracy = {"train_seconds": 0.0}, NOTHING_YET, math.nan
    bar.reset(total=config.rl_steps)
    clock = time.perf_counter()
    for record in updates(config, seed, arm, task, model):
        seconds["train_seconds"] += time.perf_counter() - clock
        step = record["step"]
        seen = {"tokens": record["tokens"], **microscope(before, model, probe.tokens, probe.state_mask)}
        so_far = {**seen, **{name: so_far[name] + seen[name] for name in NOTHING_YET}}
        before.load_state_dict(model.state_dict())
        if step % config.eval_every == 0 or step in config.stage_ends:
            with naming_the_step(step):
                row = {**record, **so_far}
                accuracy = log_row(config, out, seed, arm, row, task, model, probe, seconds)
        live = {"reward": record["reward"], "entropy": record["entropy"], "acc": accuracy}
        bar.set_postfix_str(" ".join(f"{name} {value:.2f}" for name, value in live.items()), refresh=False)
        bar.update()
        clock = time.perf_counter()
    return model


def updates(config, seed, arm, task, model):
    """Train `model` as the arm does: a generator of records, one per update, like train_rl's."""
    draws, rl = generator(seed, "rl"), config.rl(arm)
    imitated = {"ft": config.rl_steps, "lp-ft": config.rl_steps, "sft-rl-sgd": config.classifier_steps}.get(arm, 0)
    if imitated:  # demonstrations of S without noise, in place of rewards or before them
        sft = dict(lr=config.lr, classifier_lr=config.classifier_lr, mixture=(0.0, 1.0, 0.0), noise=0.0)
        for record in supervised_finetune(model, task, SFTConfig(imitated, rl.classifier_steps, **sft), draws):
            yield {**NO_UPDATE, "step": record["step"], "stage": record["stage"]}
    if imitated == config.rl_steps:
        return
    if arm == "random-w":  # plain RL, once W has moved as far as stage 1 moves it, but anywhere
        twin = copy.deepcopy(model)
        cf_rl = train_rl(twin, task, config.rl("cf-rl"), generator(seed, "rl"))
        list(itertools.islice(cf_rl, config.classifier_steps))
        direction = torch.randn(model.classifier.weight.shape, generator=generator(seed, "direction"))
        with torch.no_grad():
            distance = (twin.classifier.weight - model.classifier.weight).norm()
            model.classifier.weight += direction * distance / direction.norm()
    for record in train_rl(model, task, rl, draws):
        yield {**record, "step": imitated + record["step"]}


def load_policy(config, out, arm, seed):
    task = Addition(config.digits)
    model = GPT(GPTConfig(task.vocab_size, task.block_size))
    model.load_state_dict(torch.load(policy_file(out, arm, seed), weights_only=True))
    return task, model


def start_probe(config, task, model, seed):
    return make_probe(model, task, task.heldout_pairs[: min(32, config.eval_prompts)], generator(seed, "probe"))


# A row's columns about its update, where there was none; and those that add up over the updates, before the first.
NO_UPDATE = dict(step=0, stage=0, tokens=0) | dict.fromkeys(("reward", "entropy", "flat", "gradient_norm"), math.nan)
NO_UPDATE |= dict.fromkeys(("agreement_prompt", "agreement_continuation"), math.nan)
NOTHING_YET = {"tokens": 0} | {
    f"{measure}_{part}": 0.0
    for measure in ("entropy", "confidence")
    for part in ("change", "by_W", "by_body", "residual")
}


def log_row(config, out, seed, arm, record, task, model, probe, seconds):
    """Evaluate, with the same random numbers each time: only the policy differs. Append a row; return the accuracy."""
    clock, step = time.perf_counter(), record["step"]
    some, all_pairs = (task.heldout_pairs[:prompts] for prompts in (config.eval_prompts, config.final_prompts))
    at_end = step in (0, config.rl_steps)
    measures = evaluate(model, task, all_pairs if at_end else some, probe, generator(seed, "evaluation"), SAMPLES)
    measures |= dict.fromkeys(AT_ENDS + KERNEL, math.nan)
    if at_end:
        measures |= diversity(model, task, some, generator(seed, "diversity"))
        rates = [pattern_rates(m, task, all_pairs, generator(seed, "selection")) for m in (probe.start, model)]
        measures |= selection(*rates)
    if step in config.stage_ends:
        measures |= kernel_row(model, probe)
    seconds["eval_seconds"] = seconds.get("eval_seconds", 0.0) + time.perf_counter() - clock
    record = {**NO_UPDATE, **NOTHING_YET, **record}  # so all rows have one order of columns
    training = {"batch_entropy" if name == "entropy" else name: value for name, value in record.items()}
    append_row(rows_file(out, arm, seed), {"arm": arm, "seed": seed, **training, **measures, **seconds})
    return measures["accuracy"]


AT_ENDS = tuple(f"best_of_{2**i}" for i in range(7)) + ("different_answers", "gain_by_shares", "gain_by_success")
KERNEL = ("kernel_R", "kernel_G", "kernel_G_by_W", "kernel_G_cosine", "kernel_G_alignment")
KERNEL += tuple(f"{what}_{where}" for where in ("prompt", "continuation") for what in ("cosine", "positive", "centred"))


@torch.no_grad()
def kernel_row(model, probe):
    """The kernel (E7) on 32 states of the probe, what W has done to it since the start, and how alike features are."""
    states = probe.state_mask.nonzero()
    chosen = torch.zeros_like(probe.state_mask)
    chosen[tuple(states[:: max(1, len(states) // 32)][:32].T)] = True
    moved_W = copy.deepcopy(probe.start)
    moved_W.classifier = model.classifier
    old, by_W, now = (empirical_ntk(policy, probe.tokens, chosen) for policy in (probe.start, moved_W, model))
    R = now.representation.norm() * math.sqrt(now.gradient.size(1))  # times the norm of I_V
    row = [R, now.gradient.norm(), by_W.gradient.norm() / old.gradient.norm()]
    row.append(F.cosine_similarity(by_W.gradient.flatten(), old.gradient.flatten(), dim=0))
    features = model.features(probe.tokens)  # (B, T, d)
    i, t = chosen.nonzero(as_tuple=True)
    g = residuals(model.classifier(features)[chosen], probe.tokens[i, t + 1])
    g *= probe.advantages[i, None]  # (N, V), those of the probe's own responses
    pushed = torch.einsum("nv,nvmw,mw->", g, now.gradient, g)
    row.append(pushed / (g.square().sum() * now.gradient.norm()).clamp(min=1e-30))
    first = probe.state_mask & (probe.state_mask.cumsum(dim=1) == 1)  # in each row the end of the prompt
    for kind in (first, probe.state_mask & ~first):
        raw, centred = cosines(features[kind]), cosines(features[kind] - features[kind].mean(dim=0))
        row += [raw.mean(), (raw > 0).float().mean(), centred.square().mean().sqrt()]
    return dict(zip(KERNEL, torch.stack(row).tolist(), strict=True))


def cosines(features):
    """Those of all pairs of different rows of (N, d)."""
    unit = F.normalize(features, dim=1)
    return (unit @ unit.T)[~torch.eye(len(unit), dtype=torch.bool)]


# --------------------------------------------------------------------------------------------------------------- report

CURVES = ("step", "accuracy", "entropy", "confidence", "share_S", "agreement_prompt", "agreement_continuation")


def summarise(config, out):
    """{arm: {measure: [the last row's value, per seed], "curves": {measure: [[a value per row], per seed]}}}.

    "stages" is like "curves" for what is measured at the stages' ends only. updates_to_threshold is null where the
    accuracy did not get there. What stopped early is left out of the rest.
    """
    summary = {}
    for arm in ("sft", *config.arm_list):
        seeds = [seed for seed, _ in config.jobs(arm) if policy_file(out, arm, seed).exists()]
        runs = [
            [row for name in dict.fromkeys(("sft", arm)) for row in read_rows(rows_file(out, name, seed))]
            for seed in seeds
        ]
        if runs:
            reached = [[int(row["step"]) for row in rows if row["accuracy"] >= config.threshold] for rows in runs]
            names = [name for name, value in runs[0][-1].items() if name != "arm" and not math.isnan(value)]
            summary[arm] = {name: [rows[-1][name] for rows in runs] for name in names}
            reached += [[]] * (config.seeds - len(seeds))  # a seed that stopped early never got there
            if arm != "sft":
                summary[arm]["updates_to_threshold"] = [min(steps, default=None) for steps in reached]
                free = config.rl(arm).classifier_steps
                summary[arm]["full_updates_to_threshold"] = [
                    n if n is None else max(0, n - free) for n in summary[arm]["updates_to_threshold"]
                ]
            summary[arm]["accuracy_over_the_run"] = [
                statistics.fmean(row["accuracy"] for row in rows[1:] or rows) for rows in runs
            ]
            summary[arm]["curves"] = {name: [[row[name] for row in rows] for rows in runs] for name in CURVES}
            names = ("step", "classifier_norm", "feature_change", *KERNEL)
            ends = [[row for row in rows if row["step"] in config.stage_ends] for rows in runs]
            summary[arm]["stages"] = {name: [[row[name] for row in rows] for rows in ends] for name in names}
    return summary


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


def print_report(config, out, summary):
    print_tables(config, summary)
    print("\nheld-out sums: the most likely response, judged by the verifier")
    task = Addition(config.digits)
    show_answers(config, out, [task.prompt(a, b) for a, b in task.heldout_pairs[-2:].tolist()])
    print("\n" + textwrap.fill(verdict(config, summary), 80))


# --------------------------------------------------------------------------------------------------------- command line


class Parser(argparse.ArgumentParser):
    def error(self, message):
        self.exit(2, f"{self.prog}: error: {message}\n")


def make_parser():
    form = argparse.RawDescriptionHelpFormatter
    parser = Parser("train_toy.py", description=__doc__, formatter_class=form, allow_abbrev=False)

    def add(name, text, **kwargs):
        parser.add_argument(f"--{name.replace('_', '-')}", help=text, **kwargs)

    for f in fields(Config):
        text = f"{f.metadata['help']} (default {f.default})"
        add(f.name, text, type=type(f.default), default=f.default, metavar="X")
    workers = min(2, os.cpu_count() or 1)
    add("workers", f"processes, one thread each (default {workers})", type=int, default=workers, metavar="X")
    add("experiment", f"other defaults: {', '.join(EXPERIMENTS)} (README)", choices=EXPERIMENTS, metavar="NAME")
    quick = ", ".join(f"{name}={value}" for name, value in QUICK.items())
    add("quick", f"about 15 seconds, too short to learn much: other defaults ({quick})", action="store_true")
    add("out", "keep the results in DIR; if the same run is there, continue it", type=Path, metavar="DIR")
    add("plot", "also draw DIR/curves.png (takes --out, matplotlib, and a clone)", action="store_true")
    text = (
        "let the policies before and after RL answer; if --out has a run, nothing is trained and no other flag counts"
    )
    add("ask", text, metavar="47+85=")
    return parser


def asking_a_saved_run(args):
    return args.ask is not None and args.out is not None and (args.out / "config.json").exists()


def prepare(args, stack):
    """Arguments -> (Config, folder for the results). Whatever is wrong raises ValueError or OSError before any work."""
    check_counts(workers=args.workers)
    config = Config(**{f.name: getattr(args, f.name) for f in fields(Config)})
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
    open_out(out, config)
    return config, out


def run(config, out, workers):
    """Train what is missing; returns the complaints of the jobs that stopped."""

    def missing(*arms):
        files = {job: (policy_file(out, job[1], job[0]), rows_file(out, job[1], job[0])) for job in config.jobs(*arms)}
        return [(config, out, *job) for job in files if not all(file.exists() for file in files[job])]

    complaints, clock = [], time.perf_counter()
    try:
        with job_runner(workers) as run_jobs:
            if missing("sft"):
                print(f"sft, the starting policy: {config.sft_steps} updates of supervised fine-tuning", flush=True)
                complaints = run_jobs(missing("sft"))
                print(f"  {time.perf_counter() - clock:.0f} s")
            clock = time.perf_counter()
            if missing(*config.arm_list) and not complaints:
                size = f"{config.rl_steps} updates of {config.prompts} prompts x {config.samples} samples each"
                print(f"RL from there: {config.arms}; {size}", flush=True)
                complaints = run_jobs(missing(*config.arm_list))
                print(f"  {time.perf_counter() - clock:.0f} s")
    except BrokenProcessPool:
        complaints.append("a worker process died, of too little memory perhaps: start again to continue")
    finally:
        merge_rows(out)
    return complaints


def main(argv=None):
    """Run the command line; returns the exit code: 0; 1, an arm stopped early; 2, bad arguments; 130, Ctrl-C."""
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):  # a Windows console's own encoding may lack the ticks
            stream.reconfigure(encoding="utf-8", errors="backslashreplace")
    torch.set_num_threads(1)
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # like Ctrl-C: else the workers would outlive it
    argv = sys.argv[1:] if argv is None else argv
    parser = make_parser()
    args = parser.parse_args(argv)
    parser.set_defaults(**{**EXPERIMENTS.get(args.experiment, {}), **(QUICK if args.quick else {})})
    args = parser.parse_args(argv)
    with contextlib.ExitStack() as stack:
        try:
            config, out = prepare(args, stack)
        except (ValueError, OSError) as error:
            parser.error(str(error))
        if asking_a_saved_run(args):
            show_answers(config, out, [args.ask])
            return 0
        try:
            complaints = run(config, out, args.workers)
        except KeyboardInterrupt:
            kept = f"the rows written so far are kept in {out}" if args.out else "nothing is kept without --out"
            clear = "\r\033[J" if sys.stderr.isatty() else ""  # what is left of the progress lines
            print(f"{clear}interrupted: {kept}", file=sys.stderr)
            return 130
        summary = summarise(config, out)
        write_text(out / "summary.json", json.dumps(summary, indent=2) + "\n")
        if args.ask is not None:
            show_answers(config, out, [args.ask])
        elif summary:
            print_report(config, out, summary)
        if args.plot:
            from assets.report import plot_curves

            plot_curves(config, summary, out / "curves.png")
        for complaint in complaints:
            print(complaint, file=sys.stderr)
        return 1 if complaints else 0


if __name__ == "__main__":
    sys.exit(main())
