"""Arms and experiments, as data: an arm is a way to spend the updates, an experiment is arms, their start and settings.

An arm's name is never taken apart: what an arm does stands in its other fields. `stages` makes minicfrl's Stages
of arms, and `train_as` trains.
"""

import itertools
from dataclasses import dataclass, field, replace

from experiments.judges import KeptAdam, coin_flips, log_probability, self_certainty
from minicfrl import RLConfig, SFTConfig, Stage, supervised_finetune, train_rl
from model import check, check_counts
from train_toy import SFT_LR, SFT_STEPS, stream


@dataclass(frozen=True)
class Arm:
    """n of the updates train `part`, and the others everything at lr. Rates are in multiples of lr."""

    name: str  # in files and tables
    order: str = "first"  # when the n come: first, last, spread evenly, alone (as all updates); "" is plain RL: never
    part: str = "classifier"  # as in a Stage
    n: int | None = None  # None: the experiment's
    rate: float | None = None  # of W in those updates; None: the experiment's
    body_rate: float = 1  # of what else the part holds
    lr: float | None = None  # None: the experiment's
    rl: dict = field(default_factory=dict)  # what else it has in RLConfig
    imitates: int = 0  # so many of its stages, the first, imitate correct demonstrations of s
    knob: tuple = ()  # of the start: ("a", 2) or ("s", 2) for knobs.turn


def stages(arm, x) -> tuple[Stage, ...]:
    """An arm's updates in an experiment, those that imitate first. ValueError for n that is not between 1 and all."""
    lr, n, rate = (getattr(x, f) if getattr(arm, f) is None else getattr(arm, f) for f in ("lr", "n", "rate"))
    check(arm.order in ("", "first", "last", "spread", "alone"), f"arm {arm.name!r} has no such order: {arm.order!r}")
    check(type(n) is int and 0 < n <= x.rl_steps, f"n={n!r} of arm {arm.name!r} is not between 1 and {x.rl_steps}")
    if not arm.order:
        return (Stage(x.rl_steps, "all", lr),)
    steps = x.rl_steps if arm.order == "alone" else n
    part = Stage(steps, arm.part, arm.body_rate * lr, rate * lr)
    if steps == x.rl_steps:
        return (part,)
    rest = Stage(x.rl_steps - steps, "all", lr)
    if arm.order == "spread":
        cuts = [i * rest.steps // (n + 1) for i in range(n + 2)]
        between = [replace(rest, steps=b - a) if b > a else None for a, b in itertools.pairwise(cuts)]
        pairs = itertools.zip_longest(between, [replace(part, steps=1)] * n)
        return tuple(stage for pair in pairs for stage in pair if stage)
    return (rest, part) if arm.order == "last" else (part, rest)


SGD = dict(optimizer="sgd")
WAYS = {arm.name: arm for arm in (
    Arm("rl", ""),
    Arm("cf-rl"),
    Arm("control", part="all"),
    Arm("cf-rl-same-lr", rate=1),
    Arm("classifier-only", "alone"),
    Arm("classifier-last", "last"),
    Arm("fast-classifier", "alone", "all"),
    Arm("spread", "spread", rl=dict(optimizer=KeptAdam)),  # a fresh one for each update of W would be another method
    Arm("rl-sgd", "", lr=0.02, rl=SGD),
    Arm("random-reward", "", rl=dict(reward=coin_flips)),
    Arm("random-reward-sgd", "", lr=0.02, rl=SGD | dict(reward=coin_flips)),
    Arm("self-certainty", "", lr=5e-5, rl=dict(reward=self_certainty)),  # at plain RL's rate it is soon gone
    Arm("self-certainty-sgd", "", lr=0.02, rl=SGD | dict(reward=self_certainty)),
    Arm("log-probability", "", lr=5e-5, rl=dict(reward=log_probability)),
    Arm("sft-rl-sgd", part="all", rate=0.02, body_rate=0.02, lr=0.02, rl=SGD, imitates=1),
    Arm("ft", "", imitates=1),
    Arm("lp-ft", imitates=2),
)}  # fmt: skip
START = Arm("sft", "")  # what stands in an arm's place where the start itself is meant


def some(names, **changes):
    return [replace(WAYS[name], **changes) for name in names.split()]


def at(name, rate, n=None):
    """An arm with another rate of W, and another n."""
    return replace(WAYS[name], name=f"{name}-{n or ''}x{rate:g}", rate=rate, n=n)


def tried(name, lr, rate=None):
    """A way at another rate of everything, and of W."""
    return replace(WAYS[name], name=f"{name}-{lr:g}" + f"x{rate}" * bool(rate), lr=lr, rate=rate)


def tries(alone, bases, multiples):
    """Plain RL at some rates, and each way with two rates at pairs of them."""
    pairs = itertools.product(("cf-rl", "control", "fast-classifier"), bases, multiples)
    return [tried("rl", lr) for lr in alone] + [tried(*pair) for pair in pairs]


def best(plain, cf_rl, control, fast):
    """What is compared once each way has its best rates: (lr, rate of W) of plain RL, CF-RL, the control and W fast."""
    names = "rl cf-rl control fast-classifier classifier-last spread".split()
    rates = zip(names, (plain, cf_rl, control, fast, cf_rl, cf_rl), strict=True)
    arms = [replace(WAYS[name], lr=lr, rate=rate) for name, (lr, rate) in rates]
    return arms + [Arm(*way, "body", rate=1, lr=plain[0]) for way in (("body-only", "alone"), ("body-first", "first"))]


def matched(*rates):
    """The first five of these ways, and a control with CF-RL's rates."""
    arms = best(*rates)[:5]
    return [*arms, replace(arms[1], name="matched", part="all")]


@dataclass(frozen=True)
class Experiment:
    """Its fields but `seeds` go into a run's record. ValueError for unusable settings."""

    name: str
    arms: list
    seeds: range = range(5)
    digits: int = 2
    policy: dict = field(default_factory=dict)  # sizes in GPTConfig
    sft_steps: int = SFT_STEPS
    tilt: tuple = ()  # shares of d, s and g in 150 more updates of fine-tuning
    before: int = 0  # updates of plain RL that belong to the start
    rl_steps: int = 80
    n: int = 20  # updates of stage 1
    lr: float = 4e-4
    rate: float = 20
    rl: dict = field(default_factory=dict)  # what else all arms have in RLConfig
    every: int = 4  # updates between two looks
    prompts: int = 64  # of a look, held out
    last_prompts: int = 256  # of the first and the last one
    measures: str = "all"  # or few, accuracy, tokens
    curves: tuple = ()  # what is kept of every look
    threshold: float = 0.9

    def __post_init__(self):
        names = [START.name, *(arm.name for arm in self.arms)]
        check(names[1:] and len(set(names)) == len(names), f"{self.name} has no arm, or two of one name: {names}")
        check(len(self.seeds) > 0, f"seeds={self.seeds} holds no seed")
        check_counts(every=self.every, prompts=self.prompts, last_prompts=self.last_prompts)
        check(self.measures in ("all", "few", "accuracy", "tokens"), f"no such measures: {self.measures!r}")
        for arm in self.arms:
            RLConfig(stages(arm, self), **self.rl | arm.rl)
        list(self.finetuning())

    def jobs(self):
        """(seed, arm), the starts first."""
        return [*itertools.product(self.seeds, [START]), *itertools.product(self.seeds, self.arms)]

    @property
    def ends(self):
        """Where CF-RL's stages end; 0 is the start."""
        return 0, self.n, self.rl_steps

    @property
    def looks(self):
        return [step for step in range(self.rl_steps + 1) if step % self.every == 0 or step in self.ends]

    def finetuning(self):
        """What makes the starting policy: (name, SFTConfig), one after the other."""
        yield "sft", SFTConfig((Stage(self.sft_steps, lr=SFT_LR),))
        if self.tilt:  # this makes some patterns rare, and goes on teaching
            yield "tilt", SFTConfig((Stage(150, lr=1e-3),), mixture=self.tilt)


def check_parts(x, names):
    """ValueError if an arm trains what is not among the names of a policy's parameters."""
    for arm in x.arms:
        there = arm.part == "all" or any(f"{name}.".startswith(f"{arm.part}.") for name in names)
        check(there, f"arm {arm.name!r} trains {arm.part}, and the policy has no parameter of that name")


# -------------------------------------------------------------------------------------------------- the experiments


UNTAUGHT = dict(sft_steps=300)  # a start that does not know how to add yet,
SLOW = UNTAUGHT | dict(rl_steps=160, threshold=0.3)  # and learns it slowly
HALVES = dict(curves=("accuracy_even", "accuracy_odd", "share_s"), seeds=range(600, 605))
HALVES |= dict(rl_steps=160, prompts=128, last_prompts=128)
CURVED, SHARES = dict(curves=("accuracy",)), dict(curves=("accuracy", "share_s"))
# Each way to spend two rates at its best, by the rules of rules.md; and what that chose, on fresh seeds.
TRIED = dict(seeds=range(100, 103), measures="accuracy", every=2, prompts=32)
TRIED["arms"] = tries((2e-4, 3e-4, 4e-4, 6e-4, 8e-4, 1e-3, 1.2e-3, 1.6e-3, 2e-3), (4e-4, 6e-4, 8e-4), (5, 15, 40))
BEST, SLOW_BEST = ((6e-4, None), (8e-4, 40), (6e-4, 40), (6e-4, 40)), ((4e-4, None), (4e-4, 40), (4e-4, 15), (4e-4, 15))
AT_BEST = CURVED | dict(seeds=range(600, 610), measures="accuracy", every=1)


def turned(arm, *knob):
    return replace(arm, name="{}@{}{:g}".format(arm.name, *knob), knob=knob)


SCALED = [arm if a == 1 else turned(arm, "a", a) for arm in some("rl cf-rl control rl-sgd") for a in (0.5, 1, 2)]
# A constant feature, in |phi|, at one rate of W; and at that which keeps the trace of R, 1 / (1 + s^2).
CONSTANTS = {1: 0.5, 2: 0.2, 4: 0.05882}
ALIKE = [at("fast-classifier", 1), *(turned(at("fast-classifier", 1), "s", s) for s in CONSTANTS)]
ALIKE += [turned(at("fast-classifier", rate), "s", s) for s, rate in CONSTANTS.items()]
CERTAIN = some("rl-sgd self-certainty log-probability")
CONTROLS = some("rl cf-rl control cf-rl-same-lr classifier-only")
LISTED = {
    "confidence": CURVED | dict(arms=CONTROLS + some("rl-sgd random-reward random-reward-sgd")),
    "learning": UNTAUGHT | dict(arms=CONTROLS, rl_steps=160),
    "best-tuning": TRIED,
    "best-tuning-learning": TRIED | SLOW,
    "best": AT_BEST | dict(arms=best(*BEST)),
    "best-learning": AT_BEST | SLOW | dict(seeds=range(600, 620), every=2) | dict(arms=best(*SLOW_BEST)),
    "again": AT_BEST | dict(arms=matched(*BEST), seeds=range(700, 710)),
    "again-learning": AT_BEST | SLOW | dict(arms=matched(*SLOW_BEST), seeds=range(700, 720), every=2),
    "variability-sgd": dict(arms=ALIKE, rl_steps=40, measures="few", lr=0.02, rl=SGD),
    "scale": dict(arms=SCALED, measures="few"),
    "classifier": CURVED | UNTAUGHT | dict(arms=some("rl cf-rl control") + [Arm("body-first-x1", part="body", rate=1)]),
    "lp-ft": UNTAUGHT | dict(arms=some("rl cf-rl ft lp-ft")),
    "regime-1": HALVES | dict(arms=CERTAIN, tilt=(0.05, 0.45, 0.5)),
    "regime-2": SHARES | dict(arms=some("rl rl-sgd sft-rl-sgd"), tilt=(0.8, 0.01, 0.19), rl_steps=300, every=10),
    "rlif": HALVES | dict(arms=some("self-certainty self-certainty-sgd log-probability")),
}
# Starts of many kinds: foretell.py says how much a fast W helps. The first five were meant not to add yet.
AT_START, LATE = CURVED | dict(arms=some("rl"), rl_steps=60, n=5, every=2, measures="accuracy"), dict(rl_steps=120)
STARTS = {
    "300 updates": UNTAUGHT | LATE, "300, wide": UNTAUGHT | LATE | dict(policy=dict(n_embd=96)),
    "300, one block": UNTAUGHT | LATE | dict(policy=dict(n_layer=1)), "300, then RL": UNTAUGHT | LATE | dict(before=20),
    "three digits": LATE | dict(digits=3), "one digit": dict(digits=1, sft_steps=300),
    "500 updates": dict(sft_steps=500), "800 updates": dict(sft_steps=800), "1000 updates": {},
    "then RL": dict(before=10), "narrow": dict(policy=dict(n_embd=48)), "wide": dict(policy=dict(n_embd=96)),
    "one block": dict(policy=dict(n_layer=1)), "four blocks": dict(policy=dict(n_layer=4)),
    "mostly d": dict(tilt=(0.8, 0.1, 0.1)), "mostly g": dict(tilt=(0.1, 0.1, 0.8)),
}  # fmt: skip
STARTS |= {f"of {P} x {S}": dict(rl=dict(prompts=P, samples=S)) for P, S in ((16, 16), (64, 4), (128, 8))}
STARTS = {name: Experiment(name, **AT_START | start) for name, start in STARTS.items()}
EXPERIMENTS = {name: Experiment(name, **settings) for name, settings in LISTED.items()}


# ------------------------------------------------------------------------------------------------------------- training


def train_as(arm, x, seed, task, model):
    """Train `model` as the arm does: a generator of records, one per update. For most arms it is just train_rl."""
    draws, plan = stream(seed, "rl"), stages(arm, x)
    if arm.imitates:
        of_s = SFTConfig(plan[: arm.imitates], mixture=tuple(float(p == "s") for p in task.patterns), noise=0.0)
        yield from supervised_finetune(model, task, of_s, draws)
    before, plan = sum(stage.steps for stage in plan[: arm.imitates]), plan[arm.imitates :]
    for record in train_rl(model, task, RLConfig(plan, **x.rl | arm.rl), draws) if plan else ():
        yield record | {"step": before + record["step"]}
