"""Arms and experiments: rows of data, and the settings they change. A new arm is one more row of ARMS.

An arm is one way to train the starting policy; an experiment runs some arms, from some start, on some seeds.
"""

import copy
import functools
import importlib.metadata
import itertools
import math
import re
import sys
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from types import SimpleNamespace

import torch

from experiments import knobs
from experiments.variations import JUDGES, OPTIMIZERS, coin_flips, log_probability, self_certainty, train_twice
from minicfrl import Addition, RLConfig, SFTConfig, Stage, rollout, supervised_finetune, train_rl
from model import GPT, GPTConfig, check, check_counts
from train_toy import SFT_LR, SFT_STEPS, stream

MEASURED = ("all", "few", "accuracy")  # sets of measures, in measures.py
SAMPLES = 8  # per held-out prompt, in every evaluation


# ----------------------------------------------------------------------------------------------------------------- arms


@dataclass(frozen=True)
class Arm:
    """What makes an arm. The stages are functions of the Config of the run."""

    stages: Callable  # of RL
    rl: dict = field(default_factory=dict)  # what else is not as the flags say, in RLConfig
    imitation: Callable = lambda config: ()  # stages of imitating correct demonstrations of s, before those of RL
    nudge: bool = False  # is W first moved as far as stage 1 moves it, but anywhere?
    scattered: bool = False  # does the first stage train as many parameters as W has, drawn from all?
    knob: tuple = ()  # of knobs.py, and how far it is turned


def two_stages(steps=80, classifier_steps=20, lr=4e-4, classifier_lr=8e-3, trains="classifier") -> tuple[Stage, ...]:
    """CF-RL: of all `steps` updates the first `classifier_steps` train W alone, at a rate of its own, the rest
    everything at `lr`. Its rate matters most: here it is 20 times `lr`, and at `lr` CF-RL is slower than plain RL.

    So is it the rate that helps, or the freezing? trains="all" makes the **matched control**: the same rates, the same
    fresh optimiser, and nothing is frozen. classifier_steps=0 makes plain RL, of one stage. ValueError unless
    0 <= classifier_steps <= steps.
    """
    right = type(classifier_steps) is int and 0 <= classifier_steps <= steps
    check(right, f"classifier_steps={classifier_steps!r} is not between 0 and steps={steps}")
    first = [Stage(classifier_steps, trains, lr, classifier_lr)] if classifier_steps else []
    return (*first, Stage(steps - classifier_steps, "all", lr)) if classifier_steps < steps else tuple(first)


def cf_rl(config, **changes):
    """The stages that the flags describe, cf-rl's; or others, by the arguments of two_stages that differ."""
    flags = dict(steps=config.rl_steps, classifier_steps=config.classifier_steps)
    return two_stages(**{**flags, "lr": config.lr, "classifier_lr": config.classifier_lr, **changes})


def plain(config, **changes):
    return cf_rl(config, classifier_steps=0, **changes)


def spread(config):
    """cf-rl's updates of W alone, one at a time and evenly between the others."""
    stages, n = cf_rl(config), config.classifier_steps
    if len(stages) == 1:  # there is nothing to spread, or nothing to spread it among
        return stages
    alone, rest = stages
    cuts = [i * rest.steps // (n + 1) for i in range(n + 2)]
    between = [replace(rest, steps=b - a) if b > a else None for a, b in itertools.pairwise(cuts)]
    each = replace(alone, steps=1)
    return tuple(stage for pair in itertools.zip_longest(between, [each] * n) for stage in pair if stage)


# Parts of the policy, as the beginning of parameter names; "last-block" is that of the default size. A shift adds the
# same to the logits of all states: W times the bias of the final norm.
PARTS = {
    "shift": "body.norm.bias",
    "norm": "body.norm",
    "last-block": "body.blocks.1",
    "first-block": "body.blocks.0",
    "embeddings": "body.token_embedding",
    "body": "body",
    "scattered": "all",  # as many numbers as W has, drawn from all parameters
}


def part_first(config, part):
    """cf-rl's stages with another part in W's place, at W's rate."""
    return (Stage(config.classifier_steps, part, config.classifier_lr), *cf_rl(config)[1:])


def part_alone(config, part):
    return (Stage(config.rl_steps, part, config.classifier_lr),)


def sgd(config):
    return plain(config, lr=config.sgd_lr)


def slow(config):  # internal feedback at plain RL's rate is gone in a few updates
    return plain(config, lr=config.lr / 8)


ARMS = {
    "rl": Arm(plain),
    "cf-rl": Arm(cf_rl),
    "control": Arm(lambda config: cf_rl(config, trains="all")),
    "cf-rl-same-lr": Arm(lambda config: cf_rl(config, classifier_lr=config.lr)),
    "classifier-only": Arm(lambda config: cf_rl(config, classifier_steps=config.rl_steps)),
    "classifier-last": Arm(lambda config: cf_rl(config)[::-1]),
    "fast-classifier": Arm(lambda config: cf_rl(config, classifier_steps=config.rl_steps, trains="all")),
    "spread": Arm(spread, {"optimizer": "adam-kept"}),  # a fresh one for each update of W would be another method
    "rl-sgd": Arm(sgd, {"optimizer": "sgd"}),
    "random-reward": Arm(plain, {"reward": coin_flips}),
    "random-reward-sgd": Arm(sgd, {"optimizer": "sgd", "reward": coin_flips}),
    "self-certainty": Arm(slow, {"reward": self_certainty}),
    "self-certainty-sgd": Arm(sgd, {"optimizer": "sgd", "reward": self_certainty}),
    "log-probability": Arm(slow, {"reward": log_probability}),
    "kl-0.3": Arm(plain, {"kl": 0.3}),
    "kl-1": Arm(plain, {"kl": 1.0}),
    "random-w": Arm(plain, nudge=True),
    "sft-rl-sgd": Arm(
        lambda config: plain(config, steps=config.rl_steps - config.classifier_steps, lr=config.sgd_lr),
        {"optimizer": "sgd"},
        imitation=lambda config: plain(config, steps=config.classifier_steps),
    ),
    "ft": Arm(lambda config: (), imitation=plain),
    "lp-ft": Arm(lambda config: (), imitation=cf_rl),
    "everything-only": Arm(lambda config: part_alone(config, "all")),
}
WAYS_TO_TRAIN = {"first": part_first, "only": part_alone}
ARMS |= {
    f"{name}-{way}": Arm(functools.partial(stages, part=part), scattered=name == "scattered")
    for name, part in PARTS.items()
    for way, stages in WAYS_TO_TRAIN.items()
}


def arm_named(name) -> Arm:
    """A row of ARMS; a part of the policy by the beginning of its parameters' names, first or alone, as in
    body.blocks.0.mlp-only; a cell of a map: cf-rl-8x20 is cf-rl with 8 updates of stage 1, W at 20 times --lr in them;
    or any from a start with a turned knob: rl@a2 with W scaled by 2, rl@s4 with a constant feature of 4 |phi|.

    ValueError for any other name."""
    number = r"[0-9]+(?:\.[0-9]+)?(?:e[+-]?[0-9]+)?"
    found = re.fullmatch(rf"(.+?)(?:-([0-9]+)x({number}))?(?:@([as])({number}))?", name)
    part = found and re.fullmatch(r"(body(?:\.\w+)+)-(first|only)", found[1])
    if not (part or found and found[1] in ARMS):
        raise ValueError(f"arm {name!r} is not one of {', '.join(ARMS)}")
    arm = Arm(functools.partial(WAYS_TO_TRAIN[part[2]], part=part[1])) if part else ARMS[found[1]]
    if found[2]:
        length, multiple, inner = int(found[2]), float(found[3]), arm.stages

        def stages(config):
            changes = {"classifier_steps": length, "classifier_lr": multiple * config.lr}
            return inner(SimpleNamespace(**{**vars(config), **changes}))

        arm = replace(arm, stages=stages)
    knob = (found[4], float(found[5])) if found[4] else ()
    check(knob[:1] != ("a",) or knob[1] > 0, f"arm {name!r}: a scale must be positive")
    check(all(map(math.isfinite, knob[1:])), f"arm {name!r}: a knob cannot be turned infinitely far")
    return replace(arm, knob=knob)


CONTROLS = "rl,cf-rl,control,cf-rl-same-lr,classifier-only"
WAYS = "rl,cf-rl,control,classifier-last,spread,fast-classifier"
SFT = Stage(SFT_STEPS, lr=SFT_LR)
FIVE = dict(seeds=5)
UNTAUGHT = dict(sft_steps=300)  # a start that does not know how to add yet
SPEED = dict(seeds=10, arms=f"{WAYS},cf-rl-same-lr", measures="accuracy", eval_every=1)
MAP = dict(seeds=10, arms="rl", measures="accuracy", eval_every=2, eval_prompts=32)
MAP |= dict(stage_lengths="8,32", rate_multiples="5,40")
# What was best on a map, each way to spend two rates, and what has its cf-rl's own cell: on seeds that chose nothing.
AGAIN = dict(seed=10, seeds=20, measures="accuracy", eval_every=1)
BEST = "rl,cf-rl-32x40,control-32x40,classifier-last-32x40,spread-32x40,fast-classifier-80x40"
BEST_UNTAUGHT = "rl,cf-rl-32x40,control-32x40,classifier-last-32x40,spread-32x40,fast-classifier-80x5"
# Each part alone, at some multiples of plain RL's rate.
ALONE = [f"{part}-only" for part in (*PARTS, "classifier", "everything")]
TUNING = dict(seed=100, seeds=3, measures="accuracy", eval_every=8)
TUNING |= dict(arms=",".join(f"{arm}-80x{multiple}" for arm in ALONE for multiple in (1, 5, 20, 100)))
# What tuning chose: the same from both starts, but for W.
CHOSEN = {"shift": 100, "norm": 100, "last-block": 5, "first-block": 1, "embeddings": 20, "body": 1, "scattered": 100}


def parts_arms(W_rate):
    """Plain RL; each part alone at its chosen rate; and each first, in W's place."""
    rates = CHOSEN | {"classifier": W_rate}
    first = [f"{part}-first-20x{rate}".replace("classifier-first", "cf-rl") for part, rate in rates.items()]
    return ",".join(["rl", *(f"{part}-only-80x{rate}" for part, rate in (rates | {"everything": 1}).items()), *first])


PART = FIVE | dict(measures="accuracy", eval_every=4)
ROBUST = dict(seeds=5, rl_steps=60, arms="rl,cf-rl,control,classifier-last,fast-classifier", measures="accuracy")
ROBUST |= dict(eval_every=1)
CONSTANTS = {1: 1 / 2, 2: 1 / 5, 4: 1 / 17}  # a constant feature, in |phi|, and the rate of W that keeps the trace of R


def constant_arms(way, length):
    """An arm from the start as it is; with a constant feature; and with that, W at the rate that keeps R's trace."""
    alike = ",".join(f"{way}-{length}x1@s{s}" for s in CONSTANTS)
    kept = ",".join(f"{way}-{length}x{multiple:.4g}@s{s}" for s, multiple in CONSTANTS.items())
    return f"{way}-{length}x1,{alike},{kept}"


VARIABILITY = dict(seeds=5, rl_steps=40, measures="few", eval_every=4)
VARIABILITY |= dict(arms=f"{constant_arms('fast-classifier', 40)},{constant_arms('classifier-only', 40)}")
SCALED = [f"{arm}{a}" for arm in ("rl", "cf-rl", "control", "rl-sgd") for a in ("@a0.5", "", "@a2")]
BY_SGD = dict(optimizer="sgd", lr=0.02)
SIZE = dict(arms="rl,cf-rl,control,rl-sgd", measures="few", eval_every=8)
# Features, blocks, the rate of fine-tuning, that of RL, seeds; how the rates were chosen is in results.md.
SIZES = (
    (32, 2, SFT.lr, 4e-4, 5),
    (64, 2, SFT.lr, 4e-4, 5),
    (128, 2, SFT.lr, 4e-4, 5),
    (256, 2, 1e-3, 2e-4, 3),
    (64, 4, SFT.lr, 4e-4, 5),
)
# An experiment is other defaults for the flags.
EXPERIMENTS = {
    "confidence": FIVE | dict(arms=f"{CONTROLS},rl-sgd,random-reward,random-reward-sgd"),
    "learning": FIVE | UNTAUGHT | dict(arms=CONTROLS, rl_steps=160),
    "speed": SPEED,
    "speed-learning": SPEED | UNTAUGHT | dict(rl_steps=160, threshold=0.3),
    "order": MAP,
    "order-learning": MAP | UNTAUGHT,
    "order-again": AGAIN | dict(arms=BEST),
    "order-learning-again": AGAIN | UNTAUGHT | dict(arms=BEST_UNTAUGHT, threshold=0.3),
    "tuning": TUNING,
    "tuning-learning": TUNING | UNTAUGHT,
    "parts": PART | dict(arms=parts_arms(W_rate=100)),
    "parts-learning": PART | UNTAUGHT | dict(arms=parts_arms(W_rate=20)),
    "variability": VARIABILITY,
    "variability-sgd": VARIABILITY | BY_SGD,
    "variability-coins": VARIABILITY | dict(judge="coin-flips"),
    "variability-coins-sgd": VARIABILITY | BY_SGD | dict(judge="coin-flips"),
    "scale": FIVE | dict(measures="few", arms=",".join(SCALED)),
    "classifier": FIVE | UNTAUGHT | dict(arms="rl,cf-rl,control,body-first-20x1,random-w"),
    "lp-ft": FIVE | UNTAUGHT | dict(arms="rl,cf-rl,ft,lp-ft"),
    "regime-1": FIVE
    | dict(arms="rl-sgd,self-certainty,log-probability", tilt="0.05,0.45,0.5", rl_steps=160, eval_every=16),
    "regime-2": FIVE | dict(arms="rl,rl-sgd,sft-rl-sgd", tilt="0.8,0.01,0.19", rl_steps=300, eval_every=10),
    "rlif": FIVE | dict(arms="self-certainty,self-certainty-sgd,log-probability", rl_steps=160, eval_every=8),
}
EXPERIMENTS |= {
    f"size-{width}x{layers}": SIZE
    | dict(width=width, layers=layers, sft_lr=sft_lr, lr=lr, classifier_lr=20 * lr, seeds=seeds)
    for width, layers, sft_lr, lr, seeds in SIZES
}
EXPERIMENTS |= {
    f"robust-{name}": ROBUST | setting
    for name, setting in {
        "graded": dict(judge="graded"),
        "pairs": dict(samples=2, prompts=128),
        "mean": dict(baseline="mean"),
        "rloo": dict(baseline="rloo"),
        "kl": dict(kl=0.3),
        "kept": dict(optimizer="adam-kept"),
        "beta2": dict(optimizer="adam-beta2"),
        "decay": dict(optimizer="adamw"),
        "clipped": dict(optimizer="adam-clipped"),
        "passes": dict(passes=2),
    }.items()
}
QUICK = dict(sft_steps=400, rl_steps=16, classifier_steps=4, eval_prompts=32, final_prompts=32, threshold=0.4)


# ------------------------------------------------------------------------------------------------------------- settings


def versions(*packages):
    return {name: importlib.metadata.version(name) for name in packages}


def option(default, text):
    return field(default=default, metadata={"help": text})


@dataclass(frozen=True)
class Config:
    """A run: the defaults, the flags with their help, and the record in config.json. ValueError for unusable values."""

    digits: int = option(2, "digits of each operand, 1 to 3")
    sft_steps: int = option(SFT.steps, "updates of supervised fine-tuning")
    sft_lr: float = option(SFT.lr, "Adam's learning rate in fine-tuning")
    tilt: str = option("", "shares of d, s and g in 150 more updates of fine-tuning, as 0.8,0.01,0.19, if any")
    rl_steps: int = option(80, "updates of every arm, those of stage 1 included")
    classifier_steps: int = option(20, "updates of stage 1, in which CF-RL trains the classifier alone")
    prompts: int = option(RLConfig.prompts, "prompts per RL update")
    samples: int = option(RLConfig.samples, "responses per prompt in RL: the group of the baseline")
    lr: float = option(Stage.lr, "Adam's learning rate in RL")
    classifier_lr: float = option(8e-3, "Adam's learning rate for the classifier in stage 1")
    sgd_lr: float = option(0.02, "SGD's learning rate in the arms that use it")
    baseline: str = option(RLConfig.baseline, "group baseline: std, mean, rloo or none")
    kl: float = option(RLConfig.kl, "strength of the KL penalty to the starting policy, advantage per nat")
    optimizer: str = option(RLConfig.optimizer, f"of RL: {', '.join(OPTIMIZERS)}")
    judge: str = option("verifier", f"who gives the rewards: {', '.join(JUDGES)}")
    passes: int = option(1, "how often each batch is learnt from, 1 or 2: the second time by the clipped ratio")
    seed: int = option(0, "the first seed")
    seeds: int = option(1, "how many seeds, counted up from --seed")
    arms: str = option("rl,cf-rl,control", f"arms, by commas, of {', '.join(ARMS)}")
    stage_lengths: str = option("", "a map: cf-rl and its control for each of these lengths of stage 1, as 2,4,8")
    rate_multiples: str = option("", "and for each of these classifier rates in stage 1, in multiples of --lr, as 1,5")
    eval_every: int = option(4, "updates between two evaluations on held-out prompts")
    eval_prompts: int = option(64, f"held-out prompts of an evaluation, {SAMPLES} samples each")
    final_prompts: int = option(256, "held-out prompts of the first and of the last evaluation")
    measures: str = option("all", f"what is measured: {', '.join(MEASURED)}")
    layers: int = option(GPTConfig.n_layer, "blocks of the policy")
    width: int = option(GPTConfig.n_embd, "features of the policy")
    threshold: float = option(0.9, "held-out accuracy, 0 to 1, at which the time of an arm is taken")

    def __post_init__(self):
        counts = ("sft_steps", "rl_steps", "prompts", "samples", "seeds", "eval_every", "eval_prompts", "final_prompts")
        check_counts(**{name: getattr(self, name) for name in counts})
        check(type(self.seed) is int, f"seed must be a whole number, not {self.seed!r}")
        if bool(self.stage_lengths) != bool(self.rate_multiples):
            grid = f"stage_lengths={self.stage_lengths!r} and rate_multiples={self.rate_multiples!r}"
            raise ValueError(f"{grid}: a map takes both")
        for arm in self.arm_list:
            arm_named(arm)
            check(self.arm_list.count(arm) == 1, f"arm {arm!r} is there twice")
        check(0 < self.threshold <= 1, f"threshold must lie between 0 and 1, not {self.threshold}")
        check(0 <= self.sgd_lr < math.inf, f"sgd_lr must be finite and not negative, not {self.sgd_lr}")
        check(self.measures in MEASURED, f"measures must be one of {', '.join(MEASURED)}, not {self.measures!r}")
        check(self.judge in JUDGES, f"judge must be one of {', '.join(JUDGES)}, not {self.judge!r}")
        known = ", ".join(OPTIMIZERS)
        check(self.optimizer in OPTIMIZERS, f"optimizer must be one of {known}, not {self.optimizer!r}")
        check(self.passes in (1, 2), f"passes must be 1 or 2, not {self.passes!r}")
        check(self.passes == 1 or not self.kl, f"passes=2 has no KL penalty, so kl={self.kl} must be 0")
        self.architecture(Addition(self.digits))
        cf_rl(self)  # these check their arguments, and so does each arm
        self.finetuning()
        for arm in self.arm_list:
            self.rl(arm)
        if self.named_parts:  # for a policy costs a second of torch's imports
            self.check_parts()

    @property
    def named_parts(self):
        """What arms train by the beginning of parameter names: (arm, part)."""
        parts = [(arm, stage.trains) for arm in self.arm_list for stage in self.stages(arm)]
        return [(arm, part) for arm, part in parts if part not in ("all", "classifier")]

    def check_parts(self):
        """ValueError if an arm trains a part that the policy does not have."""
        architecture = self.architecture(Addition(self.digits))
        with torch.device("meta"):
            self.check_names(name for name, _ in GPT(architecture).named_parameters())

    def check_names(self, names):
        """ValueError if an arm trains what is not among the names."""
        names = [f"{name}." for name in names]
        for arm, part in self.named_parts:
            there = any(name.startswith(f"{part}.") for name in names)
            check(there, f"arm {arm!r} trains {part}, and the policy has no parameter of that name")

    def grid(self, name, kind):
        """The numbers of a list that a flag gives; none for an empty one."""
        text = getattr(self, name)
        try:
            values = [kind(number) for number in text.split(",")] if text else []
        except ValueError:
            raise ValueError(f"{name} must be numbers by commas, such as 2,4,8, not {text!r}") from None
        check(all(0 < value < math.inf for value in values), f"{name} must be positive, not {text!r}")
        return values

    @property
    def cells(self):
        """Of the map, if there is one: (length of stage 1, multiple of --lr)."""
        return list(itertools.product(self.grid("stage_lengths", int), self.grid("rate_multiples", float)))

    @property
    def arm_list(self):
        constant = [(self.rl_steps, multiple) for multiple in self.grid("rate_multiples", float)] if self.cells else []
        arms = dict.fromkeys(MAPPED, self.cells) | {"fast-classifier": constant}
        return self.arms.split(",") + [f"{arm}-{n}x{multiple:g}" for arm in arms for n, multiple in arms[arm]]

    @property
    def stage_ends(self):
        """The updates after which a stage of CF-RL is over; 0 is the start."""
        return 0, self.classifier_steps, self.rl_steps

    def is_looked_at(self, arm, step):
        """Is there a row of metrics about the policy after this update of an arm?"""
        if arm == "sft" or step == 0:  # the start has one row, which is every arm's first
            return arm == "sft" and step == 0
        return step % self.eval_every == 0 or step in self.stage_ends

    def architecture(self, task):
        """Sizes of the policy."""
        return GPTConfig(task.vocab_size, task.block_size, self.layers, n_embd=self.width)

    def finetuning(self):
        """What makes the starting policy: SFTConfigs, one after the other."""
        configs = {"sft": SFTConfig((Stage(self.sft_steps, lr=self.sft_lr),))}
        if self.tilt:  # all patterns are skills by now: this only makes some rare
            try:
                mixture = tuple(map(float, self.tilt.split(",")))
            except ValueError:
                raise ValueError(f"tilt must be shares such as 0.8,0.01,0.19, not {self.tilt!r}") from None
            check(len(mixture) == len(Addition.patterns), f"{mixture=} does not give one share for each of dsg")
            configs["tilt"] = SFTConfig((Stage(150, lr=1e-3),), mixture=mixture)
        return configs

    def made_of(self):
        """What a record says that it was made with."""
        return versions("torch", "numpy", "tiktoken") | {"python": sys.version.split()[0]}

    @property
    def finetuning_steps(self):
        return sum(stage.steps for sft in self.finetuning().values() for stage in sft.stages)

    def stages(self, arm):
        """All that an arm does, stage by stage."""
        return arm_named(arm).imitation(self) + arm_named(arm).stages(self)

    def rl(self, arm):
        """The RLConfig of an arm, from the flags of the same names and what the arm changes; None if it has no RL."""
        stages, flags = arm_named(arm).stages(self), ("prompts", "samples", "baseline", "kl", "optimizer")
        flags = {name: getattr(self, name) for name in flags} | {"reward": JUDGES[self.judge]} | arm_named(arm).rl
        return RLConfig(stages, **flags | {"optimizer": OPTIMIZERS[flags["optimizer"]]}) if stages else None

    def jobs(self, *arms):
        return [(seed, arm) for seed in range(self.seed, self.seed + self.seeds) for arm in arms]


MAPPED = ("cf-rl", "control", "classifier-last", "spread")  # the arms that a map crosses with its cells


# ------------------------------------------------------------------------------------------------------------- training


def after_stage_1(config, seed, task, start: GPT) -> GPT:
    """What cf-rl's stage 1 makes of a starting policy, which stays as it is."""
    model = copy.deepcopy(start)
    updates = train_rl(model, task, config.rl("cf-rl"), stream(seed, "rl"))
    list(itertools.islice(updates, config.classifier_steps))
    return model


@torch.no_grad()
def turn_knob(arm, config, seed, task, model):
    """Turn the arm's knob at a starting policy, in place, if it has one. A constant feature is measured by the length
    of the features in a few responses (root mean square)."""
    match arm_named(arm).knob:
        case "a", a:
            knobs.scale(model, a)
        case "s", s:
            prompts = [task.prompt(a, b) for a, b in task.train_pairs[:: len(task.train_pairs) // 32][:32].tolist()]
            batch = rollout(model, task, prompts, 1, stream(seed, "knob"))
            phi = model.features(batch.tokens)[batch.state_mask]  # (N, d)
            knobs.add_constant(model, s * phi.square().sum(dim=1).mean().sqrt().item())


def scatter(model, draws):
    """Let as many parameters as W has, drawn from all, have gradients. Returns the hooks that hold the others'."""
    sizes = [p.numel() for p in model.parameters()]
    chosen = torch.zeros(sum(sizes))
    chosen[torch.randperm(len(chosen), generator=draws)[: model.classifier.weight.numel()]] = 1
    masks = [mask.view_as(p) for p, mask in zip(model.parameters(), chosen.split(sizes), strict=True)]
    return [p.register_hook(mask.__mul__) for p, mask in zip(model.parameters(), masks, strict=True)]


def train_as(arm, config, seed, task, model):
    """Train `model` as the arm does: a generator of records, one per update. For most arms it is just train_rl."""
    draws, imitation, rl = stream(seed, "rl"), arm_named(arm).imitation(config), config.rl(arm)
    if imitation:
        of_s = SFTConfig(imitation, mixture=(0.0, 1.0, 0.0), noise=0.0)
        yield from supervised_finetune(model, task, of_s, draws)
    if arm_named(arm).nudge:
        direction = torch.randn(model.classifier.weight.shape, generator=stream(seed, "direction"))
        after = after_stage_1(config, seed, task, model).classifier.weight
        with torch.no_grad():
            moved = after - model.classifier.weight
            model.classifier.weight += direction * moved.norm() / direction.norm()
    hooks = scatter(model, stream(seed, "scattered")) if arm_named(arm).scattered else []
    before, train = sum(stage.steps for stage in imitation), train_twice if config.passes == 2 else train_rl
    for record in train(model, task, rl, draws) if rl else ():
        yield {**record, "step": before + record["step"], "stage": len(imitation) + record["stage"]}
        while hooks and record["step"] == rl.stages[0].steps:  # what comes after the first stage is for all
            hooks.pop().remove()
