"""What the two papers claim, and what came of it: rows of data. Verdicts are read off the runs.

A new claim is one more row of FIRST_PAPER or SECOND_PAPER: claim, Evidence -> verdict, experiment.
Every verdict is experiments.verdicts.judge of paired differences; a row only says in which words.
"""

import statistics

from experiments.measures import MOVES
from experiments.order import at_equal
from experiments.speed import END, time_to
from experiments.tables import RUN, at, over_seeds, paired
from experiments.verdicts import MARGIN, SPEED, in_words, judge

CONTROL = "control"


class Evidence:
    """What the runs of one experiment measured, each number as a mean over the seeds with its 95% interval."""

    def __init__(self, results, experiment, looks=1):
        self.results, (self.config, self.summary), self.looks = results, results[experiment], looks

    def at(self, experiment):
        return Evidence(self.results, experiment, self.looks)

    def says(self, differences, more="yes", less="no, the reverse", equal="", margin=MARGIN):
        """The verdict on paired differences in the words of a claim; of a tie and of doubt it says so."""
        equal = equal or f"no difference (within {margin:g})"
        words = dict(more=more, less=less, equal=equal, undecided="undecided")
        said = judge(differences, margin, self.looks)
        return in_words(said, words, f"by less than {margin:g}")

    def arm(self, name):
        """The arm of that name, or the one cell of a map that is called after it."""
        return next(arm for arm in self.summary if arm == name or arm.startswith(f"{name}-{self.config.rl_steps}x"))

    def measured(self, yardstick, arm):
        """An arm by a yardstick of speed.py."""
        return over_seeds([*yardstick.values(self.config, self.summary, self.arm(arm)).values()], yardstick.form)

    def compared(self, yardstick, arm, base):
        """What a yardstick allows to say of two arms."""
        return yardstick.said(self.config, self.summary, self.arm(arm), self.arm(base), self.looks)

    def values(self, arm, name):
        return self.summary[arm][name]

    def of(self, arm, name, form=".2f"):
        """A measure at the end of an arm."""
        return over_seeds(self.values(arm, name), form)

    def course(self):
        """From which accuracy to which an arm's updates are counted."""
        return f"{statistics.fmean(self.values('sft', 'accuracy')):.2f} to {self.config.threshold:g}"

    def gap(self, arm, base, name=RUN):
        """The same, less that of another arm, seed by seed."""
        return paired(self.summary, arm, base, name)

    def minus(self, arm, base, name=RUN, form="+.2f"):
        return over_seeds(self.gap(arm, base, name), form)

    def lead_of_rest(self, arm):
        """An arm's lead over plain RL, in parts of what plain RL leaves to gain, seed by seed."""
        return [gap / (1 - own) for gap, own in zip(self.gap(arm, "rl"), self.values("rl", RUN), strict=True)]

    def shares_of_W(self, arm):
        """How much of the rise of top-1 probability on fixed states the moves of W explain, seed by seed."""
        parts = (self.values(arm, f"confidence_{name}") for name in ("by_W", "change"))
        return [part / whole for part, whole in zip(*parts, strict=True)]

    def mostly_through_W(self, arm):
        """Is W's part more than half of it?"""
        parts = zip(self.values(arm, "confidence_by_W"), self.values(arm, "confidence_change"), strict=True)
        return self.says([part - whole / 2 for part, whole in parts], less="no", margin=0.0)

    def faster(self, arm, base="rl"):
        return self.speed(self.gap(arm, base))

    def speed(self, differences):
        return self.says(differences, SPEED["more"], SPEED["less"], SPEED["equal"])

    def rises(self, arm):
        """Does the top-1 probability on fixed states rise, and by how much?"""
        return f"{self.says(self.values(arm, 'confidence_change'))}: {self.of(arm, 'confidence_change', '+.2f')}"

    def against(self, base, arm):
        return f"{self.faster(arm, base)}, {self.minus(arm, base)}"

    def free(self):
        """CF-RL's lead over plain RL when its stage 1 is not counted, over the run."""
        return at_equal(self.summary, "cf-rl", "rl", self.config.classifier_steps, "stage 1 for free")

    def of_free(self):
        return f"{self.speed(self.free())}, {mean(self.free(), '+.2f')}"

    def agreement(self, arm, where):
        """How far R alone points where the whole update does, averaged over the logged updates, seed by seed."""
        return [statistics.fmean(curve[1:]) for curve in self.summary[arm]["curves"][f"agreement_{where}"]]

    def gain(self, arm, first, last):
        """The change of accuracy between two updates, seed by seed."""
        before, after = (at(self.summary, arm, "accuracy", step, "curves") for step in (first, last))
        return [y - x for x, y in zip(before, after, strict=True)]

    def grown_G(self, arm):
        """By how much stage 1 multiplies the norm of G through W, less 1."""
        return more_than(1, at(self.summary, arm, "kernel_G_by_W", self.config.classifier_steps))

    def stage_2_gains(self):
        """What stage 2 gains, and what as many updates of plain RL gain from where it is as accurate as stage 2 began:
        two lists, over the seeds on which plain RL gets there with updates to spare."""
        own, other = (self.summary[arm]["curves"] for arm in ("cf-rl", "rl"))
        gains = []
        for steps, mine, theirs in zip(own["step"], own["accuracy"], other["accuracy"], strict=True):
            end = steps.index(self.config.classifier_steps)
            same = next((i for i, accuracy in enumerate(theirs) if accuracy >= mine[end]), len(steps))
            rest = len(steps) - 1 - max(end, same)
            if rest > 0:
                gains.append((mine[end + rest] - mine[end], theirs[same + rest] - theirs[same]))
        return [list(column) for column in zip(*gains, strict=True)]

    def stage_2_lead(self):
        return [x - y for x, y in zip(*self.stage_2_gains(), strict=True)]

    def skilled(self, pattern, least=0.1):
        """The same evidence without the seeds whose start lacks a pattern's skill: its success is below `least`."""
        kept = [i for i, p in enumerate(self.summary["sft"][f"success_{pattern}"]) if p >= least]

        def some(values):
            if isinstance(values, dict):
                return {name: some(each) for name, each in values.items()}
            return [values[i] for i in kept]

        results = {**self.results, "": (self.config, some(self.summary))}
        return Evidence(results, "", self.looks)

    def rise_and_fall(self, arm):
        """The change of accuracy in either half of the run. (At its best a curve is above its ends by noise alone.)"""
        half, last = self.config.rl_steps // 2, self.config.rl_steps
        return self.gain(arm, 0, half), self.gain(arm, half, last)

    def arm_alone(self, part):
        """The arm that trains a part alone, whatever its rate."""
        return next(arm for arm in self.summary if arm.startswith(f"{part}-only-"))

    def alone(self, part):
        """Accuracy at the end of a part trained alone."""
        return self.of(self.arm_alone(part), "accuracy")

    def same_marks(self):
        """Does W grow more and do features move less in both ways of two stages than in one?"""
        pairs = (("cf-rl", "rl"), ("lp-ft", "ft"))
        gaps = [self.gap(two, one, "classifier_norm") for two, one in pairs]
        gaps += [self.gap(one, two, "feature_change") for two, one in pairs]
        return all(self.says(gap, margin=0.0) == "yes" for gap in gaps)

    def halves(self, arm):
        return " then ".join(self.says(change, "helps", "harms") for change in self.rise_and_fall(arm))

    def lowest_share(self, arm):
        """The least that the share of s ever was, the start being 1, seed by seed."""
        return [min(curve) / curve[0] for curve in self.summary[arm]["curves"]["share_s"]]

    def dips(self, arm):
        """By how much more than a twentieth the share of s fell, seed by seed."""
        return [0.95 - lowest for lowest in self.lowest_share(arm)]


def mean(values, form=".2f"):
    return over_seeds(values, form)


def more_than(bound, values):
    return [value - bound for value in values]


# Features as they are; made alike by a constant one; and that at a rate of W that keeps the trace of R.
VARIED, ALIKE, ALIKE_KEPT = (f"fast-classifier-40x{rate}" for rate in ("1", "1@s2", "0.2@s2"))
FIRST_PAPER = (
    (
        "RL makes a policy more confident (top-1 probability)",
        lambda e: e.says(e.gap("rl", "sft", "confidence")),
        "confidence",
    ),
    (
        "and less diverse (than imitation, at equal accuracy)",
        lambda e: e.says(e.gap("ft", "rl", "different_answers"), margin=0.0),
        "lp-ft",
    ),
    (
        "confidence rises through R, by moving W (in this parametrisation)",
        lambda e: f"SGD {e.mostly_through_W('rl-sgd')}, Adam {e.mostly_through_W('rl')}",
        "scale",
    ),
    (
        "because features vary little",
        lambda e: (
            f"one rate {e.says(e.gap(ALIKE, VARIED, 'confidence_change'), margin=0.0)}, matched rates "
            f"{e.says(e.gap(ALIKE_KEPT, VARIED, 'confidence_change'), equal='no')}"
        ),
        "variability-sgd",
    ),
    (
        "W shapes G, so that stage 2 learns faster",
        lambda e: (
            f"{e.says(e.grown_G('cf-rl'), 'G grows', 'G shrinks', margin=0.0)}; faster: "
            f"{e.says(e.stage_2_lead(), equal='no')}"
        ),
        "classifier",
    ),
    (
        "part of the gain is concentration: best-of-N catches up",
        lambda e: e.says(
            [x - y for x, y in zip(e.gap("rl", "sft", "best_of_1"), e.gap("rl", "sft", "best_of_64"), strict=True)]
        ),
        "learning",
    ),
    (
        "CF-RL works otherwise than linear probing, then fine-tuning",
        lambda e: "cannot tell: the same marks" if e.same_marks() else "its marks differ",
        "lp-ft",
    ),
)
SECOND_PAPER = (
    (
        "RL selects among patterns whose success stays constant",
        lambda e: e.says(e.gap("rl", "sft", "success_s"), "no: success of s rises too", equal="yes"),
        "confidence",
    ),
    (
        "RL changes a few critical tokens",
        lambda e: e.says(
            [x - y / 2 for x, y in zip(e.values("rl", "kl_first"), e.values("rl", "kl"), strict=True)],
            "yes, one, by design",
            margin=0.0,
        ),
        "confidence",
    ),
    (
        "if only the best pattern beats the average, its share just rises",
        lambda e: e.says(e.gap("rl-sgd", "sft", "share_s")),
        "regime-1",
    ),
    (
        "if a mediocre one beats it too, it first crowds the best out",
        lambda e: (
            f"SGD {e.skilled('d').says(e.skilled('d').dips('rl-sgd'))}, Adam "
            f"{e.skilled('d').says(e.skilled('d').dips('rl'), less='no')}"
        ),
        "regime-2",
    ),
    (
        "imitating the best pattern first shortens that",
        lambda e: e.says(e.skilled("d").gap("sft-rl-sgd", "rl-sgd", "accuracy")),
        "regime-2",
    ),
    (
        "RL on the policy's own certainty first helps, then harms",
        lambda e: f"{e.halves('self-certainty')}; else {e.at('rlif').halves('self-certainty').partition(' then')[0]}",
        "regime-1",
    ),
)


ANSWERS = {
    "plain RL": "rl",
    "CF-RL": "cf-rl",
    "control: CF-RL's rates, nothing frozen": CONTROL,
    "W fast throughout, nothing frozen": "fast-classifier",
}
STARTS = {"speed": "toy that can add", "speed-learning": "toy that cannot yet", "real-both": "SmolLM2"}


def answers(results):
    """The first table: how many updates each way takes, in the toy and in a real model, and whether W first is better
    than W last. All that a column asks is asked together."""
    starts = {name: Evidence(results, name, looks=len(ANSWERS)) for name in STARTS}
    yield ["", *(f"{STARTS[name]}: {e.course()}, {e.config.seeds} seeds" for name, e in starts.items())]
    for label, arm in ANSWERS.items():
        cells = []
        for e in starts.values():
            time = time_to(e.config.threshold)
            cells.append(e.measured(time, arm) + (f", {e.compared(time, arm, 'rl')}" if arm != "rl" else ""))
        yield [label, *cells]
    yield [
        "CF-RL against W last, accuracy at the end",
        *(e.compared(END, "cf-rl", "classifier-last") for e in starts.values()),
    ]


# On the toy and on a real model: claim, Evidence -> verdict and numbers. The arms and measures are the same in both.
BOTH = (
    ("CF-RL against plain RL", lambda e: e.against("rl", "cf-rl")),
    ("its control against plain RL", lambda e: e.against("rl", CONTROL)),
    ("CF-RL against its control", lambda e: e.against(CONTROL, "cf-rl")),
    ("CF-RL against plain RL, stage 1 not counted, as the paper is said to count", lambda e: e.of_free()),
    ("W alone, in all updates, against plain RL", lambda e: e.against("rl", e.arm("classifier-only"))),
    ("plain RL raises confidence (top-1 probability) on fixed states", lambda e: e.rises("rl")),
    ("and so does plain RL on coin flips", lambda e: e.rises("random-reward")),
    (
        "nine in ten inner products of features within responses are positive",
        lambda e: (
            f"{e.says(more_than(0.9, e.values('sft', 'positive_continuation')), less='no')}: "
            f"{e.of('sft', 'positive_continuation', '.0%')}, mean cosine {e.of('sft', 'cosine_continuation')}"
        ),
    ),
    (
        "within responses, in plain RL, R alone points where the whole update does (cosine above .5)",
        lambda e: (
            f"{e.says(more_than(0.5, e.agreement('rl', 'continuation')), less='no')}: "
            f"{mean(e.agreement('rl', 'continuation'))} (at prompt ends {mean(e.agreement('rl', 'prompt'))})"
        ),
    ),
)


def side_by_side(results):
    """A row per claim: what the toy says of it, and what the real model does. Then how far each arm moved."""
    toy, real = (Evidence(results, name, looks=len(BOTH)) for name in ("confidence", "real-both"))
    yield ["accuracy over the run", f"toy, {toy.config.seeds} seeds", f"SmolLM2, {real.config.seeds} seeds"]
    for claim, verdict in BOTH:
        yield [claim, verdict(toy), verdict(real)]
    for arm in ("rl", "cf-rl"):
        moved = ("; ".join(e.of(arm, name, ".2%") for name in MOVES) for e in (toy, real))
        yield [f"how far `{arm}` moves W, and the body, in parts of their norms", *moved]


def rows(results):
    """The rows of a table: claim, verdict, and the experiment that shows it."""
    yield ["claim", "here", "numbers"]
    for number, claims in enumerate((FIRST_PAPER, SECOND_PAPER), start=1):
        for claim, verdict, name in claims:
            said = verdict(Evidence(results, name))
            yield [f"{number}: {claim}", said, f"[`{name}`](experiments/results.md#{name})"]
