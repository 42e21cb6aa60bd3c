"""What the two papers claim, and what came of it: rows of data. The verdict is ours; the evidence is read off the runs.

A new claim is one more row of FIRST_PAPER or SECOND_PAPER: claim, verdict, Evidence -> text, and its experiment.
"""

import statistics

from experiments.tables import over_seeds


class Evidence:
    """What the runs of one experiment measured, each number as a mean over the seeds with its 95% interval."""

    def __init__(self, results, experiment):
        self.results, (self.config, self.summary) = results, results[experiment]

    def at(self, experiment):
        return Evidence(self.results, experiment)

    def of(self, arm, name, form=".2f"):
        """A measure at the end of an arm."""
        return over_seeds(self.summary[arm][name], form)

    def minus(self, arm, base, name, form="+.2f"):
        """The same, less that of another arm, seed by seed."""
        return over_seeds([x - y for x, y in zip(self.summary[arm][name], self.summary[base][name], strict=True)], form)

    def through_W(self, arm):
        """How much of the rise of top-1 on fixed states the moves of W explain, as a ratio of means."""
        part, whole = (statistics.fmean(self.summary[arm][f"confidence_{name}"]) for name in ("by_W", "change"))
        return f"{part / whole:.0%}"

    def after_stage_1(self, arm, name):
        rows = zip(self.summary[arm]["stages"][name], self.summary[arm]["stages"]["step"], strict=True)
        return over_seeds([values[steps.index(self.config.classifier_steps)] for values, steps in rows], ".2f")

    def gains(self, arm):
        """What accuracy gained by the patterns' shares, and by their success (E11)."""
        return " and ".join(self.of(arm, f"gain_by_{cause}", "+.2f") for cause in ("shares", "success"))

    def highest(self, arm):
        return over_seeds([max(curve) for curve in self.summary[arm]["curves"]["accuracy"]], ".2f")

    def dip(self, arm):
        """How far the share of S ever falls, the start being 1, as a mean."""
        return f"{statistics.fmean(min(curve) / curve[0] for curve in self.summary[arm]['curves']['share_S']):.2f}"


RUN = "accuracy_over_the_run"
FIRST_PAPER = (
    (
        "RL makes a policy more confident",
        "yes, by the reward: with coin flips for rewards and SGD nothing moves",
        lambda e: (
            f"top-1 {e.of('sft', 'confidence')} → {e.of('rl', 'confidence')}; "
            f"coin flips {e.minus('random-reward-sgd', 'sft', 'confidence')}"
        ),
        "confidence",
    ),
    (
        "and less diverse",
        "yes",
        lambda e: (
            f"different answers among 64: {e.of('sft', 'different_answers', '.0f')} → "
            f"{e.of('rl', 'different_answers', '.0f')}"
        ),
        "confidence",
    ),
    (
        "features vary little, their inner products are positive",
        "at the ends of prompts; not within responses",
        lambda e: (
            f"mean cosine {e.of('sft', 'cosine_prompt')} and {e.of('sft', 'cosine_continuation')}; positive "
            f"{e.of('sft', 'positive_prompt', '.0%')} and {e.of('sft', 'positive_continuation', '.0%')}"
        ),
        "confidence",
    ),
    (
        "so confidence rises through R",
        "with SGD; with Adam mostly through the body",
        lambda e: f"W's part of the rise of top-1: SGD {e.through_W('rl-sgd')}, Adam {e.through_W('rl')}",
        "confidence",
    ),
    (
        "CF-RL learns faster than RL",
        "yes; so does the control that freezes nothing; at one common rate it is slower",
        lambda e: (
            f"accuracy over the run, minus rl's: {e.minus('cf-rl', 'rl', RUN)}; "
            f"control {e.minus('rl-classifier-lr', 'rl', RUN)}; one rate {e.minus('cf-rl-same-lr', 'rl', RUN)}"
        ),
        "confidence",
    ),
    (
        "also where features must still be learnt",
        "over the run, as does the control; not at its end",
        lambda e: (
            f"{e.minus('cf-rl', 'rl', RUN)}; control {e.minus('rl-classifier-lr', 'rl', RUN)}; "
            f"at the end {e.minus('cf-rl', 'rl', 'accuracy')}"
        ),
        "learning",
    ),
    (
        "stage 1 alone gains little",
        "no: all of the gain, or most of it where features must be learnt",
        lambda e: (
            f"W alone ends at {e.at('confidence').of('classifier-only', 'accuracy')} "
            f"(rl {e.at('confidence').of('rl', 'accuracy')}) and {e.of('classifier-only', 'accuracy')} "
            f"(rl {e.of('rl', 'accuracy')})"
        ),
        "learning",
    ),
    (
        "W shapes G, so that stage 2 learns faster",
        "it shapes G; stage 2 is no faster",
        lambda e: (
            f"norm of G × {e.after_stage_1('cf-rl', 'kernel_G_by_W')}; W moved as far at random "
            f"× {e.after_stage_1('random-w', 'kernel_G_by_W')}"
        ),
        "classifier",
    ),
    (
        "part of the gain is concentration: best-of-N catches up",
        "yes",
        lambda e: (
            f"lead over the start with 1 sample {e.minus('rl', 'sft', 'best_of_1')}, "
            f"with 64 {e.minus('rl', 'sft', 'best_of_64')}"
        ),
        "learning",
    ),
    (
        "it is not linear probing, then fine-tuning (LP-FT)",
        "not seen: both marks of LP-FT are there, a longer W and features that move less",
        lambda e: (
            f"norm of W {e.of('cf-rl', 'classifier_norm')} (rl {e.of('rl', 'classifier_norm')}); "
            f"features moved {e.of('cf-rl', 'feature_change')} (rl {e.of('rl', 'feature_change')})"
        ),
        "lp-ft",
    ),
)
SECOND_PAPER = (
    (
        "RL selects among patterns whose success stays constant",
        "where the skills are there; else it is half of the gain",
        lambda e: f"gain by shares and by success {e.gains('rl')}; in `learning` {e.at('learning').gains('rl')}",
        "confidence",
    ),
    (
        "it changes a few critical tokens",
        "yes, the pattern's, as the task was built to have",
        lambda e: (
            f"{e.of('rl', 'kl_first')} of {e.of('rl', 'kl')} nats of KL; its likeliest token changes on "
            f"{e.of('rl', 'changed_first', '.0%')} of prompts, later ones on {e.of('rl', 'changed_later', '.1%')}"
        ),
        "confidence",
    ),
    (
        "if only the best pattern beats the average, its share just rises",
        "yes",
        lambda e: (
            f"share of S {e.of('sft', 'share_S')} → {e.of('rl-sgd', 'share_S')}, lowest {e.dip('rl-sgd')} of its start"
        ),
        "regime-1",
    ),
    (
        "if a mediocre one does too, they are entangled, and it is slow",
        "with SGD; Adam hardly notices",
        lambda e: (
            f"share of S falls to {e.dip('rl-sgd')} of its start (Adam {e.dip('rl')}); accuracy "
            f"{e.of('rl-sgd', 'accuracy')} (Adam {e.of('rl', 'accuracy')})"
        ),
        "regime-2",
    ),
    (
        "imitation first shortens that",
        "yes: 20 updates of it free SGD",
        lambda e: f"accuracy {e.of('sft-rl-sgd', 'accuracy')}",
        "regime-2",
    ),
    (
        "RL on the policy's own certainty first helps, then harms",
        "yes where D is rare, not always elsewhere; and by answers grown sure and wrong, not by shares",
        lambda e: (
            f"accuracy {e.of('sft', 'accuracy')}, at best {e.highest('self-certainty')}, at the end "
            f"{e.of('self-certainty', 'accuracy')}; by success {e.of('self-certainty', 'gain_by_success', '+.2f')}"
        ),
        "regime-1",
    ),
)


def rows(results):
    """The rows of a table: claim, verdict, evidence, and the experiment that shows it."""
    yield ["the paper says", "here", "evidence", "experiment"]
    for paper, claims in {"First paper": FIRST_PAPER, "Second paper": SECOND_PAPER}.items():
        yield [f"**{paper}**", "", "", ""]
        for claim, verdict, evidence, name in claims:
            yield [claim, verdict, evidence(Evidence(results, name)), f"[`{name}`](experiments/results.md#{name})"]
