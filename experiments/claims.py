"""What the two papers claim, and what came of it: rows of data. The verdict is ours; the evidence is read off the runs.

A new claim is one more row of FIRST_PAPER or SECOND_PAPER: claim, verdict, Evidence -> text, and its experiment.
"""

import statistics

from experiments.tables import at, over_seeds


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
        return over_seeds(at(self.summary, arm, name, self.config.classifier_steps), ".2f")

    def gains(self, arm):
        """What accuracy gained by the patterns' shares, and by their success (E11)."""
        return " and ".join(self.of(arm, f"gain_by_{cause}", "+.2f") for cause in ("shares", "success"))

    def gain(self, arm, first, last):
        """The change of accuracy between two updates."""
        before, after = (at(self.summary, arm, "accuracy", step, "curves") for step in (first, last))
        return over_seeds([y - x for x, y in zip(before, after, strict=True)], "+.2f")

    def highest(self, arm):
        return over_seeds([max(curve) for curve in self.summary[arm]["curves"]["accuracy"]], ".2f")

    def dip(self, arm):
        """How far the share of S ever falls, the start being 1, as a mean."""
        return f"{statistics.fmean(min(curve) / curve[0] for curve in self.summary[arm]['curves']['share_S']):.2f}"


RUN = "accuracy_over_the_run"
FIRST_PAPER = (
    (
        "RL makes a policy more confident",
        "yes, by the reward: with coin flips in its place SGD moves nothing (Adam wrecks the policy)",
        lambda e: (
            f"top-1 {e.of('sft', 'confidence')} → {e.of('rl', 'confidence')}; coin flips, SGD "
            f"{e.minus('random-reward-sgd', 'sft', 'confidence')}; Adam: accuracy {e.of('random-reward', 'accuracy')}"
        ),
        "confidence",
    ),
    (
        "RL makes a policy less diverse",
        "yes",
        lambda e: (
            f"different answers among 64 samples {e.of('sft', 'different_answers', '.0f')} → "
            f"{e.of('rl', 'different_answers', '.0f')}"
        ),
        "confidence",
    ),
    (
        "features are alike, their inner products positive",
        "at the ends of prompts, not within responses",
        lambda e: (
            f"mean cosine {e.of('sft', 'cosine_prompt')}, within {e.of('sft', 'cosine_continuation')}; share of "
            f"positive ones {e.of('sft', 'positive_prompt', '.0%')}, {e.of('sft', 'positive_continuation', '.0%')}"
        ),
        "confidence",
    ),
    (
        "so confidence rises through R, by moving W",
        "where W moves fast or the optimiser is SGD; in plain RL with Adam mostly through the body",
        lambda e: (
            f"W's part of the rise on fixed states: SGD {e.through_W('rl-sgd')}, cf-rl {e.through_W('cf-rl')}, "
            f"control {e.through_W('rl-classifier-lr')}, rl {e.through_W('rl')}"
        ),
        "confidence",
    ),
    (
        "CF-RL learns faster than RL",
        "yes; so does the control; at one common rate CF-RL is slower",
        lambda e: (
            f"accuracy over the run, minus rl's: cf-rl {e.minus('cf-rl', 'rl', RUN)}, control "
            f"{e.minus('rl-classifier-lr', 'rl', RUN)}, one rate {e.minus('cf-rl-same-lr', 'rl', RUN)}; cf-rl minus "
            f"control {e.minus('cf-rl', 'rl-classifier-lr', RUN)}"
        ),
        "confidence",
    ),
    (
        "CF-RL learns faster where features must be learnt",
        "over the run yes, at its end not; whether the control does is undecided",
        lambda e: (
            f"over the run {e.minus('cf-rl', 'rl', RUN)}, control {e.minus('rl-classifier-lr', 'rl', RUN)}; at "
            f"the end {e.minus('cf-rl', 'rl', 'accuracy')}; cf-rl minus control "
            f"{e.minus('cf-rl', 'rl-classifier-lr', RUN)}"
        ),
        "learning",
    ),
    (
        "stage 1 alone gains little",
        "no: all of the gain, or most of it where features must be learnt",
        lambda e: (
            f"W alone ends at {e.at('confidence').of('classifier-only', 'accuracy')} "
            f"(rl {e.at('confidence').of('rl', 'accuracy')}); in `learning` {e.of('classifier-only', 'accuracy')} "
            f"(rl {e.of('rl', 'accuracy')}, start {e.of('sft', 'accuracy')})"
        ),
        "learning",
    ),
    (
        "W shapes G, so that stage 2 learns faster",
        "it shapes G, frozen body or not; stage 2 gains no more than plain RL does in its first 60 updates",
        lambda e: (
            f"norm of G × {e.after_stage_1('cf-rl', 'kernel_G_by_W')}, control × "
            f"{e.after_stage_1('rl-classifier-lr', 'kernel_G_by_W')}, W moved at random × "
            f"{e.after_stage_1('random-w', 'kernel_G_by_W')}; gain {e.gain('cf-rl', 20, 80)}, rl {e.gain('rl', 0, 60)}"
        ),
        "classifier",
    ),
    (
        "part of the gain is concentration: best-of-N catches up",
        "yes",
        lambda e: (
            f"rl's lead over the start with 1 sample {e.minus('rl', 'sft', 'best_of_1')}, with 64 "
            f"{e.minus('rl', 'sft', 'best_of_64')}"
        ),
        "learning",
    ),
    (
        "CF-RL works otherwise than linear probing, then fine-tuning (`lp-ft`)",
        "not seen: W grows and features move less in both",
        lambda e: (
            f"norm of W: cf-rl {e.of('cf-rl', 'classifier_norm')} (rl {e.of('rl', 'classifier_norm')}), lp-ft "
            f"{e.of('lp-ft', 'classifier_norm')} (ft {e.of('ft', 'classifier_norm')}); features moved "
            f"{e.of('cf-rl', 'feature_change')} ({e.of('rl', 'feature_change')}), {e.of('lp-ft', 'feature_change')} "
            f"({e.of('ft', 'feature_change')})"
        ),
        "lp-ft",
    ),
)
SECOND_PAPER = (
    (
        "RL selects among patterns whose success stays constant",
        "mostly, where the skills are there; else it is half of the gain",
        lambda e: f"gain by shares and by success {e.gains('rl')}; in `learning` {e.at('learning').gains('rl')}",
        "confidence",
    ),
    (
        "RL changes a few critical tokens",
        "yes, the pattern's, as the task was built to have",
        lambda e: (
            f"{e.of('rl', 'kl_first')} of {e.of('rl', 'kl')} nats of KL to the start; the likeliest first token "
            f"changes on {e.of('rl', 'changed_first', '.0%')} of prompts, later ones on "
            f"{e.of('rl', 'changed_later', '.1%')}"
        ),
        "confidence",
    ),
    (
        "if only the best pattern beats the average, its share just rises",
        "yes",
        lambda e: f"share of S {e.of('sft', 'share_S')} → {e.of('rl-sgd', 'share_S')}, never below its start",
        "regime-1",
    ),
    (
        "if a mediocre one (D) beats it too, it first crowds the best out",
        "with SGD; Adam hardly notices",
        lambda e: (
            f"share of S falls to {e.dip('rl-sgd')} of its start (Adam {e.dip('rl')}); accuracy at the end "
            f"{e.of('rl-sgd', 'accuracy')} (Adam {e.of('rl', 'accuracy')})"
        ),
        "regime-2",
    ),
    (
        "imitating the best pattern first shortens that",
        "yes: 20 updates of it free SGD",
        lambda e: f"accuracy at the end {e.of('sft-rl-sgd', 'accuracy')}, without {e.of('rl-sgd', 'accuracy')}",
        "regime-2",
    ),
    (
        "RL on the policy's own certainty first helps, then harms",
        "yes where D is rare, not always elsewhere; patterns grow sure of wrong answers",
        lambda e: (
            f"accuracy {e.of('sft', 'accuracy')}, at best {e.highest('self-certainty')}, at the end "
            f"{e.of('self-certainty', 'accuracy')}; gain by shares and by success {e.gains('self-certainty')}"
        ),
        "regime-1",
    ),
)


def rows(results):
    """The rows of a table: claim, verdict, evidence, and the experiment that shows it."""
    yield ["claim", "here", "evidence", "experiment"]
    for paper, claims in {"First paper": FIRST_PAPER, "Second paper": SECOND_PAPER}.items():
        yield [f"**{paper}**", "", "", ""]
        for claim, verdict, evidence, name in claims:
            yield [claim, verdict, evidence(Evidence(results, name)), f"[`{name}`](experiments/results.md#{name})"]
