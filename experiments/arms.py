"""Arms and experiments: rows of data, and the settings they change. A new arm is one more row of ARMS.

An arm is one way to train the starting policy; an experiment runs some arms, from some start, on some seeds.
"""

import copy
import itertools
import math
import re
import zlib
from collections.abc import Callable
from dataclasses import dataclass, field, fields, replace

import torch

from minicfrl import Addition, RLConfig, SFTConfig, supervised_finetune, train_rl
from model import GPT, GPTConfig, check_counts

MEASURED = ("all", "few", "accuracy")  # sets of measures, in measures.py
SAMPLES = 8  # per held-out prompt, in every evaluation


# --------------------------------------------------------------------------------- other judges in the verifier's place


def kl_divergence(logits, reference):
    """KL(softmax(logits) || softmax(reference)) in nats: (..., V) twice -> (...)."""
    logp = logits.log_softmax(dim=-1)
    return (logp.exp() * (logp - reference.log_softmax(dim=-1))).sum(dim=-1)


def coin_flips(batch, generator):
    """0 or 1, whatever the response: what does RL do without anything to learn?"""
    return torch.randint(2, batch.rewards.shape, generator=generator).to(batch.rewards.dtype)


def self_certainty(batch, generator=None):
    """KL(uniform || pi) in nats, averaged over the response's states (Zhao et al., arXiv 2505.19590)."""
    mask = batch.mask[:, 1:]
    certainty = kl_divergence(torch.zeros_like(batch.logits), batch.logits)  # (R, L)
    return (certainty.masked_fill(~mask, 0.0).sum(dim=1) / mask.sum(dim=1)).view_as(batch.rewards)


def log_probability(batch, generator=None):
    """log pi(response) in nats. Its policy gradient (no std) is exactly minus that of the responses' entropy:
    grad H = -E[log pi grad log pi] - E[grad log pi], and the last term is 0. Our derivation."""
    return batch.logp.masked_fill(~batch.mask[:, 1:], 0.0).sum(dim=1).view_as(batch.rewards)


# ----------------------------------------------------------------------------------------------------------------- arms


@dataclass(frozen=True)
class Arm:
    """What makes an arm: each is a function of the Config of the run."""

    changes: Callable = lambda config: {}  # in the RLConfig that the flags describe, which is cf-rl's
    imitate: Callable = lambda config: 0  # updates that imitate correct demonstrations of S, before RL or in its place
    nudge: bool = False  # is W first moved as far as stage 1 moves it, but anywhere?


def plain(config):
    return {"classifier_steps": 0}


def sgd(config):
    return {**plain(config), "optimizer": "sgd", "lr": config.sgd_lr}


def slow(config):  # internal feedback at plain RL's rate is gone in a few updates
    return {**plain(config), "lr": config.lr / 8}


def in_place_of_rl(config):
    return config.rl_steps


ARMS = {
    "rl": Arm(plain),
    "cf-rl": Arm(),
    "rl-classifier-lr": Arm(lambda config: {"stage_1": "all"}),  # the matched control
    "cf-rl-same-lr": Arm(lambda config: {"classifier_lr": config.lr}),
    "classifier-only": Arm(lambda config: {"classifier_steps": config.rl_steps}),
    "rl-sgd": Arm(sgd),
    "body-first": Arm(lambda config: {"stage_1": "body"}),
    "random-reward": Arm(lambda config: {**plain(config), "reward": coin_flips}),
    "random-reward-sgd": Arm(lambda config: {**sgd(config), "reward": coin_flips}),
    "self-certainty": Arm(lambda config: {**slow(config), "reward": self_certainty}),
    "self-certainty-sgd": Arm(lambda config: {**sgd(config), "reward": self_certainty}),
    "log-probability": Arm(lambda config: {**slow(config), "reward": log_probability}),
    "kl-0.3": Arm(lambda config: {**plain(config), "kl": 0.3}),
    "kl-1": Arm(lambda config: {**plain(config), "kl": 1.0}),
    "random-w": Arm(plain, nudge=True),
    "sft-rl-sgd": Arm(
        lambda config: {**sgd(config), "steps": max(1, config.rl_steps - config.classifier_steps)},
        imitate=lambda config: config.classifier_steps,
    ),
    "ft": Arm(plain, imitate=in_place_of_rl),
    "lp-ft": Arm(imitate=in_place_of_rl),
}


def arm_named(name) -> Arm:
    """A row of ARMS, or a cell of a map: cf-rl-8x20 is cf-rl with 8 updates of stage 1, W at 20 times --lr in them.

    ValueError for any other name."""
    cell = re.fullmatch(r"(cf-rl|rl-classifier-lr)-([0-9]+)x([0-9.e-]+)", name)
    if not cell and name not in ARMS:
        raise ValueError(f"arm {name!r} is not one of {', '.join(ARMS)}")
    if not cell:
        return ARMS[name]
    arm, length, multiple = ARMS[cell[1]], int(cell[2]), float(cell[3])
    return replace(
        arm,
        changes=lambda config: {
            **arm.changes(config),
            "classifier_steps": length,
            "classifier_lr": multiple * config.lr,
        },
    )


CONTROLS = "rl,cf-rl,rl-classifier-lr,cf-rl-same-lr,classifier-only"
FIVE = dict(seeds=5)
UNTAUGHT = dict(sft_steps=300)  # a start that does not know how to add yet
MAP = dict(seeds=10, arms="rl", measures="accuracy", stage_lengths="2,4,8,16,32", rate_multiples="1,5,20,40")
# What was best on a map, each way to spend two rates, on seeds that chose nothing; and its cf-rl's own control.
AGAIN = dict(seed=10, seeds=20, measures="accuracy")
CHOSEN = "rl,cf-rl-8x40,rl-classifier-lr-16x40,rl-classifier-lr-80x40,rl-classifier-lr-8x40"
CHOSEN_UNTAUGHT = "rl,cf-rl-32x40,rl-classifier-lr-32x20,rl-classifier-lr-80x20,rl-classifier-lr-32x40"
SIZE = dict(arms="rl,cf-rl,rl-classifier-lr,rl-sgd", measures="few", eval_every=8)
# Features, blocks, the rate of fine-tuning, that of RL, seeds; how the rates were chosen is in results.md.
SIZES = (
    (32, 2, SFTConfig.lr, 4e-4, 5),
    (64, 2, SFTConfig.lr, 4e-4, 5),
    (128, 2, SFTConfig.lr, 4e-4, 5),
    (256, 2, 1e-3, 2e-4, 3),
    (64, 4, SFTConfig.lr, 4e-4, 5),
)
# An experiment is other defaults for the flags.
EXPERIMENTS = {
    "confidence": FIVE | dict(arms=f"{CONTROLS},rl-sgd,random-reward,random-reward-sgd"),
    "learning": FIVE | UNTAUGHT | dict(arms=CONTROLS, rl_steps=160),
    "classifier": FIVE | UNTAUGHT | dict(arms="rl,cf-rl,rl-classifier-lr,body-first,random-w"),
    "lp-ft": FIVE | UNTAUGHT | dict(arms="rl,cf-rl,ft,lp-ft"),
    "regime-1": FIVE
    | dict(arms="rl-sgd,self-certainty,log-probability", tilt="0.05,0.45,0.5", rl_steps=160, eval_every=16),
    "regime-2": FIVE | dict(arms="rl,rl-sgd,sft-rl-sgd", tilt="0.8,0.01,0.19", rl_steps=300, eval_every=10),
    "rlif": FIVE | dict(arms="self-certainty,self-certainty-sgd,log-probability", rl_steps=160, eval_every=8),
    "kl": FIVE | UNTAUGHT | dict(arms="rl,kl-0.3,kl-1", rl_steps=160, eval_every=8),
    "order": MAP,
    "order-learning": MAP | UNTAUGHT,
    "order-again": AGAIN | dict(arms=CHOSEN),
    "order-learning-again": AGAIN | UNTAUGHT | dict(arms=CHOSEN_UNTAUGHT),
} | {
    f"size-{width}x{layers}": SIZE
    | dict(width=width, layers=layers, sft_lr=sft_lr, lr=lr, classifier_lr=20 * lr, seeds=seeds)
    for width, layers, sft_lr, lr, seeds in SIZES
}
QUICK = dict(sft_steps=100, rl_steps=12, classifier_steps=4, prompts=16, eval_prompts=16, final_prompts=32)


# ------------------------------------------------------------------------------------------------------------- settings


def option(default, text):
    return field(default=default, metadata={"help": text})


@dataclass(frozen=True)
class Config:
    """A run: the defaults, the flags with their help, and the record in config.json. ValueError for unusable values."""

    digits: int = option(2, "digits of each operand, 1 to 3")
    sft_steps: int = option(SFTConfig.steps, "updates of supervised fine-tuning")
    sft_lr: float = option(SFTConfig.lr, "Adam's learning rate in fine-tuning")
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
        if type(self.seed) is not int:
            raise ValueError(f"seed must be a whole number, not {self.seed!r}")
        if bool(self.stage_lengths) != bool(self.rate_multiples):
            grid = f"stage_lengths={self.stage_lengths!r} and rate_multiples={self.rate_multiples!r}"
            raise ValueError(f"{grid}: a map takes both")
        for arm in self.arm_list:
            arm_named(arm)
            if self.arm_list.count(arm) > 1:
                raise ValueError(f"arm {arm!r} is there twice")
        if not 0 < self.threshold <= 1:
            raise ValueError(f"threshold must lie between 0 and 1, not {self.threshold}")
        if not 0 <= self.sgd_lr < math.inf:
            raise ValueError(f"sgd_lr must be finite and not negative, not {self.sgd_lr}")
        if self.measures not in MEASURED:
            raise ValueError(f"measures must be one of {', '.join(MEASURED)}, not {self.measures!r}")
        self.architecture(Addition(self.digits))
        self.finetuning()  # this checks its arguments, and so does each arm
        for arm in self.arm_list:
            self.rl(arm)

    def grid(self, name, kind):
        """The numbers of a list that a flag gives; none for an empty one."""
        text = getattr(self, name)
        try:
            values = [kind(number) for number in text.split(",")] if text else []
        except ValueError:
            raise ValueError(f"{name} must be numbers by commas, such as 2,4,8, not {text!r}") from None
        if not all(0 < value < math.inf for value in values):
            raise ValueError(f"{name} must be positive, not {text!r}")
        return values

    @property
    def cells(self):
        """Of the map, if there is one: (length of stage 1, multiple of --lr). At length rl_steps nothing ever changes
        back: that is plain RL with two constant rates."""
        return list(itertools.product(self.grid("stage_lengths", int), self.grid("rate_multiples", float)))

    @property
    def arm_list(self):
        constant = [(self.rl_steps, multiple) for multiple in self.grid("rate_multiples", float)]
        arms = {"cf-rl": self.cells, "rl-classifier-lr": self.cells + constant}
        return self.arms.split(",") + [f"{arm}-{k}x{multiple:g}" for arm in arms for k, multiple in arms[arm]]

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
        stages = {"sft": SFTConfig(steps=self.sft_steps, lr=self.sft_lr)}
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
        return replace(RLConfig(steps=self.rl_steps, **flags), **arm_named(arm).changes(self))

    def jobs(self, *arms):
        return [(seed, arm) for seed in range(self.seed, self.seed + self.seeds) for arm in arms]


def generator(seed, purpose):
    """A stream of random numbers of its own for each seed and purpose."""
    return torch.Generator(torch.get_default_device()).manual_seed(zlib.crc32(f"{purpose} {seed}".encode()))


# ------------------------------------------------------------------------------------------------------------- training


def after_stage_1(config, seed, task, start: GPT) -> GPT:
    """What cf-rl's stage 1 makes of a starting policy, which stays as it is."""
    model = copy.deepcopy(start)
    updates = train_rl(model, task, config.rl("cf-rl"), generator(seed, "rl"))
    list(itertools.islice(updates, config.classifier_steps))
    return model


def train_as(arm, config, seed, task, model):
    """Train `model` as the arm does: a generator of records, one per update. For most arms it is just train_rl."""
    draws, rl = generator(seed, "rl"), config.rl(arm)
    imitated = arm_named(arm).imitate(config)
    if imitated:
        sft = dict(lr=config.lr, classifier_lr=config.classifier_lr, mixture=(0.0, 1.0, 0.0), noise=0.0)
        yield from supervised_finetune(model, task, SFTConfig(imitated, rl.classifier_steps, **sft), draws)
    if imitated == config.rl_steps:
        return
    if arm_named(arm).nudge:
        direction = torch.randn(model.classifier.weight.shape, generator=generator(seed, "direction"))
        with torch.no_grad():
            moved = after_stage_1(config, seed, task, model).classifier.weight - model.classifier.weight
            model.classifier.weight += direction * moved.norm() / direction.norm()
    for record in train_rl(model, task, rl, draws):
        yield {**record, "step": imitated + record["step"]}
