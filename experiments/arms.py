"""Arms and experiments: rows of data, and the settings they change. A new arm is one more row of ARMS.

An arm is one way to train the starting policy; an experiment runs some arms, from some start, on some seeds.
"""

import copy
import itertools
import math
import re
import zlib
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from types import SimpleNamespace

import torch

from minicfrl import Addition, RLConfig, SFTConfig, Stage, supervised_finetune, train_rl, two_stages
from model import GPT, GPTConfig, check, check_counts

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
    """What makes an arm. The stages are functions of the Config of the run."""

    stages: Callable  # of RL
    rl: dict = field(default_factory=dict)  # what else is not as the flags say, in RLConfig
    imitation: Callable = lambda config: ()  # stages of imitating correct demonstrations of s, before those of RL
    nudge: bool = False  # is W first moved as far as stage 1 moves it, but anywhere?


def cf_rl(config, **changes):
    """The stages that the flags describe, cf-rl's; or others, by the arguments of two_stages that differ."""
    flags = dict(steps=config.rl_steps, classifier_steps=config.classifier_steps)
    return two_stages(**{**flags, "lr": config.lr, "classifier_lr": config.classifier_lr, **changes})


def plain(config, **changes):
    return cf_rl(config, classifier_steps=0, **changes)


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
    "rl-sgd": Arm(sgd, {"optimizer": "sgd"}),
    "body-first": Arm(lambda config: cf_rl(config, trains="body")),
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
}


def arm_named(name) -> Arm:
    """A row of ARMS, or a cell of a map: cf-rl-8x20 is cf-rl with 8 updates of stage 1, W at 20 times --lr in them.

    ValueError for any other name."""
    cell = re.fullmatch(r"(.+)-([0-9]+)x([0-9]+(?:\.[0-9]+)?(?:e[+-]?[0-9]+)?)", name)
    if name in ARMS:
        return ARMS[name]
    if not cell or cell[1] not in ARMS:
        raise ValueError(f"arm {name!r} is not one of {', '.join(ARMS)}")
    arm, length, multiple = ARMS[cell[1]], int(cell[2]), float(cell[3])

    def stages(config):
        changes = {"classifier_steps": length, "classifier_lr": multiple * config.lr}
        return arm.stages(SimpleNamespace(**{**vars(config), **changes}))

    return replace(arm, stages=stages)


CONTROLS = "rl,cf-rl,control,cf-rl-same-lr,classifier-only"
(SFT,) = SFTConfig().stages
FIVE = dict(seeds=5)
UNTAUGHT = dict(sft_steps=300)  # a start that does not know how to add yet
MAP = dict(seeds=10, arms="rl", measures="accuracy", stage_lengths="2,4,8,16,32", rate_multiples="1,5,20,40")
# What was best on a map, each way to spend two rates, on seeds that chose nothing; and its cf-rl's own control.
AGAIN = dict(seed=10, seeds=20, measures="accuracy")
CHOSEN = "rl,cf-rl-8x40,control-16x40,control-80x40,control-8x40"
CHOSEN_UNTAUGHT = "rl,cf-rl-32x40,control-32x20,control-80x20,control-32x40"
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
    "classifier": FIVE | UNTAUGHT | dict(arms="rl,cf-rl,control,body-first,random-w"),
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
QUICK = dict(sft_steps=400, rl_steps=16, classifier_steps=4, eval_prompts=32, final_prompts=32, threshold=0.4)


# ------------------------------------------------------------------------------------------------------------- settings


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
        self.architecture(Addition(self.digits))
        cf_rl(self)  # these check their arguments, and so does each arm
        self.finetuning()
        for arm in self.arm_list:
            self.rl(arm)

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
        """Of the map, if there is one: (length of stage 1, multiple of --lr). At length rl_steps nothing ever changes
        back: that is plain RL with two constant rates."""
        return list(itertools.product(self.grid("stage_lengths", int), self.grid("rate_multiples", float)))

    @property
    def arm_list(self):
        constant = [(self.rl_steps, multiple) for multiple in self.grid("rate_multiples", float)]
        arms = {"cf-rl": self.cells, "control": self.cells + constant}
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
            configs["tilt"] = SFTConfig((Stage(150, lr=1e-3),), mixture=mixture)
        return configs

    @property
    def finetuning_steps(self):
        return sum(stage.steps for sft in self.finetuning().values() for stage in sft.stages)

    def stages(self, arm):
        """All that an arm does, stage by stage."""
        return arm_named(arm).imitation(self) + arm_named(arm).stages(self)

    def rl(self, arm):
        """The RLConfig of an arm, from the flags of the same names and what the arm changes; None if it has no RL."""
        stages, flags = arm_named(arm).stages(self), ("prompts", "samples", "baseline", "kl")
        return RLConfig(stages, **{name: getattr(self, name) for name in flags} | arm_named(arm).rl) if stages else None

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
    draws, imitation, rl = generator(seed, "rl"), arm_named(arm).imitation(config), config.rl(arm)
    if imitation:
        of_s = SFTConfig(imitation, mixture=(0.0, 1.0, 0.0), noise=0.0)
        yield from supervised_finetune(model, task, of_s, draws)
    if arm_named(arm).nudge:
        direction = torch.randn(model.classifier.weight.shape, generator=generator(seed, "direction"))
        with torch.no_grad():
            moved = after_stage_1(config, seed, task, model).classifier.weight - model.classifier.weight
            model.classifier.weight += direction * moved.norm() / direction.norm()
    before = sum(stage.steps for stage in imitation)
    for record in train_rl(model, task, rl, draws) if rl else ():
        yield {**record, "step": before + record["step"], "stage": len(imitation) + record["stage"]}
