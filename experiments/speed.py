"""How fast is an arm? Updates to a threshold, and the area under the curve up to plain RL's time: what is asked first.

A comparison is (arm, base); all that one table asks is asked together. The rules were written down before the runs: see
results.md.
"""

import statistics
from collections.abc import Callable
from dataclasses import dataclass

from experiments.tables import RUN, over_seeds
from experiments.verdicts import MARGIN, TIME_MARGIN, in_words, judge, seeds_to_decide


def times(config, summary, arm, threshold=None):
    """Updates until held-out accuracy reaches the threshold, {seed: n}; all of the run's where it does not."""
    threshold, curves = threshold or config.threshold, summary[arm]["curves"]
    reached = [
        next((step for step, value in zip(steps, accuracy, strict=True) if value >= threshold), config.rl_steps)
        for steps, accuracy in zip(curves["step"], curves["accuracy"], strict=True)
    ]
    return dict(zip(summary[arm]["seed"], reached, strict=True))


def areas(config, summary, arm):
    """Mean accuracy after the updates up to plain RL's time of that seed, {seed: mean}."""
    until, curves, means = times(config, summary, "rl"), summary[arm]["curves"], {}
    for seed, steps, accuracy in zip(summary[arm]["seed"], curves["step"], curves["accuracy"], strict=True):
        if seed in until:
            means[seed] = statistics.fmean(
                a for step, a in zip(steps, accuracy, strict=True) if 0 < step <= max(until[seed], steps[1])
            )
    return means


def column(name):
    return lambda config, summary, arm: dict(zip(summary[arm]["seed"], summary[arm][name], strict=True))


def accuracy_margin(config, summary):
    return MARGIN


def time_margin(config, summary, threshold=None):
    return TIME_MARGIN * statistics.fmean(times(config, summary, "rl", threshold).values())


@dataclass(frozen=True)
class Yardstick:
    """A measure of an arm, seed by seed, with the margin below which two count as equally good."""

    heading: str
    values: Callable  # of (config, summary, arm) -> {seed: value}
    margin: Callable = accuracy_margin
    form: str = ".3f"
    words: tuple = ("higher", "lower", "equal")  # of what is more, less and equal

    def gaps(self, config, summary, arm, base):
        """One arm minus another, over the seeds that both have."""
        own, other = (self.values(config, summary, each) for each in (arm, base))
        return [own[seed] - other[seed] for seed in own if seed in other]

    def said(self, config, summary, arm, base, looks=1, margins=1.0):
        """The verdict in words, at that many times the margin."""
        gaps, (more, less, equal) = self.gaps(config, summary, arm, base), self.words
        verdict = judge(gaps, margins * self.margin(config, summary), looks)
        return in_words(verdict, {"more": more, "less": less, "equal": equal, "undecided": "undecided"})


def time_to(threshold):
    return Yardstick(
        f"updates to {threshold:g}",
        lambda config, summary, arm: times(config, summary, arm, threshold),
        lambda config, summary: time_margin(config, summary, threshold),
        ".1f",
        ("slower", "faster", "as fast"),
    )


FAST = ("faster", "slower", "as fast")
AREA = Yardstick("accuracy up to plain RL's time", areas, words=FAST)
OVER_THE_RUN = Yardstick("accuracy over the run", column(RUN), words=FAST)
END = Yardstick("accuracy at the end", column("accuracy"))


def yardsticks(config):
    """Those of a start: one that can add is timed to the run's threshold, one that cannot yet to two."""
    timed = [time_to(config.threshold)] + [time_to(0.5)] * (config.threshold < 0.5)
    return (*timed, AREA, OVER_THE_RUN, END)


ASKED = (
    *((arm, "rl") for arm in ("cf-rl", "control", "fast-classifier", "cf-rl-same-lr")),
    *(("cf-rl", base) for base in ("control", "classifier-last", "spread", "fast-classifier")),
)


def arms_table(config, summary, arms=None):
    """Each arm by each yardstick."""
    rows = [["arm", *(each.heading for each in yardsticks(config))]]
    for arm in arms or config.arm_list:
        measured = [each.values(config, summary, arm).values() for each in yardsticks(config)]
        cells = (over_seeds([*values], y.form) for values, y in zip(measured, yardsticks(config), strict=True))
        rows.append([f"`{arm}`", *cells])
    return rows


def compared_table(config, summary, pairs=ASKED):
    """Each comparison by each yardstick: the difference and what it allows to say, all rows asked together; of what is
    undecided, how many seeds would decide."""
    rows = [["", *(each.heading for each in yardsticks(config))]]
    for arm, base in pairs:
        rows.append([f"`{arm}` − `{base}`"])
        for each in yardsticks(config):
            gaps, said = each.gaps(config, summary, arm, base), each.said(config, summary, arm, base, len(pairs))
            if said == "undecided":
                said += f" ({seeds_to_decide(gaps, each.margin(config, summary), len(pairs))} seeds)"
            rows[-1].append(f"{over_seeds(gaps, '+' + each.form)}: {said}")
    return rows


SETTING_ASKED = (
    *((AREA, arm, "rl") for arm in ("cf-rl", "control", "fast-classifier")),
    *((AREA, "cf-rl", base) for base in ("control", "fast-classifier")),
    (END, "cf-rl", "classifier-last"),  # which is plain RL until then
)


def robust_table(results):
    """Does it depend on the setting? A setting a row, its comparisons asked together."""
    asked = [f"`{arm}` − `{base}`{', at the end' * (each is END)}" for each, arm, base in SETTING_ASKED]
    rows = [["setting", "plain RL, updates to 0.9", *asked]]
    for name, (config, summary) in results.items():
        rows.append([name, over_seeds([*times(config, summary, "rl").values()], ".0f")])
        for each, arm, base in SETTING_ASKED:
            gaps = over_seeds(each.gaps(config, summary, arm, base), "+.3f")
            rows[-1].append(f"{gaps}: {each.said(config, summary, arm, base, len(SETTING_ASKED))}")
    return rows
