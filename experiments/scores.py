"""From rows to scores, from scores to verdicts. A score is a number per seed; every verdict is `judge` of differences.

A run's rows become one row of scores for each arm and seed (`collected`), which data/NAME.csv keeps. Two kinds of table
show them: `means`, and `compared`, in which all that a column asks is asked together.
"""

import functools
import math
import statistics
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from experiments.arms import START
from experiments.runs import as_csv, file_of, read_csv, write_whole
from model import check, check_counts

DATA = Path(__file__).parent / "data"
# Two ways of training that differ by less count as equally good. Of accuracy: chosen when some results were known. Of
# the updates that they take, as a share of plain RL's: written down on 2026-11-26, before the runs that it judges.
MARGIN, TIME_MARGIN = 0.02, 0.1
STAGED = ("accuracy", "kernel_G_by_W")
AVERAGED = {"accuracy": "run", "agreement_continuation": "agreement_continuation"}


# ---------------------------------------------------------------------------------------------------------- verdicts


@functools.cache
def quantile(p, freedom):
    """Of Student's t, with so many degrees of freedom."""
    from scipy.stats import t  # slow to import

    return float(t.ppf(p, freedom))


def half_width(values, level=0.95, seeds=None):
    """Of the interval around the values' mean that holds the true mean with that probability; inf for one value. With
    `seeds` as if so many values had the spread of these.

    ValueError if there is no value, or one that is not finite (or so large that its square is not)."""
    check(values and all(abs(v) < 1e150 for v in values), f"values must be finite numbers, at least one, not {values}")
    if len(values) < 2:
        return math.inf
    n = seeds or len(values)
    return quantile((1 + level) / 2, n - 1) * statistics.stdev(values) / math.sqrt(n)


def judge(differences, margin=MARGIN, looks=1, seeds=None):
    """What the seeds allow to say of the true mean of paired differences, at 5%:

    more, less it is above, below 0: the 95% interval excludes 0; and it may be more than the margin
    slightly more, slightly less    the same, but surely less than the margin
    equal      neither, and it lies within +-margin: both one-sided tests say so (the 90% interval lies inside)
    undecided  nothing of this

    `looks` is how many such questions are asked together: each is then asked at 5% / looks (Bonferroni), so that all
    answers hold together. `seeds` is as in half_width. ValueError as there, and for other numbers of looks than 1, 2,
    ... or a margin below 0.
    """
    check_counts(looks=looks)
    check(0 <= margin < math.inf, f"margin must be finite and not negative, not {margin}")
    narrow, wide = (half_width(differences, 1 - level / looks, seeds) for level in (0.1, 0.05))
    mean = statistics.fmean(differences)
    within = abs(mean) + narrow < margin
    if abs(mean) > wide:
        return ("slightly " if within else "") + ("more" if mean > 0 else "less")
    return "equal" if within else "undecided"


def by_ranks(differences):
    """Whether Wilcoxon's signed-rank test decides, at 5%, that they are off 0."""
    from scipy.stats import wilcoxon

    return any(differences) and bool(wilcoxon(differences).pvalue < 0.05)


def seeds_to_decide(differences, margin=MARGIN, looks=1):
    """How many seeds would decide what these do not, 2000 at most, if mean and spread stayed as they are: then the odds
    of a verdict are about even. ValueError as of judge."""
    more = (n for n in range(len(differences), 2000) if judge(differences, margin, looks, n) != "undecided")
    return next(more, 2000)


def over_seeds(values, form):
    """The mean, with its 95% interval if there are several values."""
    text = f"{statistics.fmean(values):{form}}"
    return text if len(values) == 1 else f"{text} ±{half_width(values):{form.lstrip('+')}}"


# ------------------------------------------------------------------------------------------------------------ scores


def scores_of(x, arm, rows, digits):
    """{column: number, or a curve as text} of one run's rows, the start's first: the last row; means over the run;
    under NAME@n what the look after n updates saw, the arm's n or the experiment's, if there is one; and the curves."""
    scores = {name: value for name, value in rows[-1].items() if name not in ("step", "tokens")}
    for name, mean in AVERAGED.items():
        if name in rows[-1]:
            scores[mean] = statistics.fmean(row[name] for row in rows[1:] or rows)
    at_n = [row for row in rows[1:] if row["step"] == (arm.n or x.n)]
    scores |= {f"{name}@n": row[name] for row in at_n for name in STAGED if name in row}
    if rows[1:] and "accuracy" in rows[0]:
        scores["took"] = crossing([row["step"] for row in rows], [row["accuracy"] for row in rows], x.threshold)
    kept = x.curves if rows[1:] else ()
    for name in kept:
        values = (row.get(name, 0) for row in rows)
        scores[f"{name} curve"] = " ".join(f"{v:.{digits}g}" if v < 10 else f"{v:.0f}" for v in values)
    return scores


def collected(x, out, digits=6):
    """A row of scores for each job that is done, numbers of curves with so many digits. ValueError as of read_csv."""
    for seed, arm in x.jobs():
        if file_of(out, seed, arm).exists():
            rows = read_csv(file_of(out, seed, START), x.looks[:1])
            rows += read_csv(file_of(out, seed, arm), x.looks[1:]) if arm != START else []
            yield {"arm": arm.name, "seed": seed} | scores_of(x, arm, rows, digits)


class Runs:
    """What an experiment's runs gave: rows of scores by (name of the arm, seed)."""

    def __init__(self, x, rows):
        self.x, self.rows = x, {(row["arm"], int(row["seed"])): row for row in rows}

    def __add__(self, other):
        """With the others' rows."""
        return Runs(self.x, [*self.rows.values(), *other.rows.values()])

    def score(self, arm, of):
        """{seed: number} over the seeds that have one. `of` is a column, a column of the start, as accuracy@0, or a
        function of these runs, an arm and a seed, None where it has no answer."""
        scores, column = {}, of if callable(of) else of.removesuffix("@0")
        for seed in (seed for name, seed in self.rows if name == arm):
            row = self.rows[arm if column == of else "sft", seed]
            scores[seed] = of(self, arm, seed) if callable(of) else row.get(column)
        return {seed: score for seed, score in scores.items() if score is not None}

    def values(self, arm, of):
        return list(self.score(arm, of).values())

    def gaps(self, arm, base, of):
        """One arm minus another, over the seeds that both have."""
        own, other = self.score(arm, of), self.score(base, of)
        return [own[seed] - other[seed] for seed in own if seed in other]

    def curve(self, arm, seed, name="accuracy"):
        """A number for each of the experiment's looks."""
        return [float(value) for value in self.rows[arm, seed][f"{name} curve"].split()]

    def some(self, keep):
        """The same without the seeds that `keep` refuses, by their row of the start."""
        return Runs(self.x, [row for (_, seed), row in self.rows.items() if keep(self.rows["sft", seed])])


def load(x):
    """The runs that data/ has of an experiment."""
    return Runs(x, read_csv(DATA / f"{x.name}.csv"))


# ---------------------------------------------------------------------------------------------------------- measures


@dataclass(frozen=True)
class Measure:
    """A column of a table: a heading, what it scores, and, where two arms are compared, words and a margin."""

    heading: str
    of: str | Callable  # as in Runs.score
    form: str = ".3f"
    words: tuple = ("higher", "lower", "equal")
    within: float = MARGIN  # the margin,
    timed: bool = False  # or a share of plain RL's

    def margin(self, runs):
        return TIME_MARGIN * statistics.fmean(runs.values("rl", self.of)) if self.timed else self.within

    def mean(self, runs, arm):
        """A cell: the mean over seeds with its interval."""
        return over_seeds(self.gaps(runs, arm, ""), self.form)

    def gaps(self, runs, arm, base):
        """An arm's scores minus a base's, or the arm's if that is "". ValueError if there is none."""
        gaps = runs.gaps(arm, base, self.of) if base else runs.values(arm, self.of)
        check(gaps, f"{runs.x.name} has no {self.heading or self.of!r} of {arm!r}{f' and {base!r}' * bool(base)}")
        return gaps

    def verdict(self, runs, arm, base, looks=1):
        return judge(self.gaps(runs, arm, base), self.margin(runs), looks)

    def said(self, runs, arm, base, looks=1):
        """The verdict on an arm minus a base, or on an arm if that is "", in words. If it is slight, that too. Of times
        also whether a signed-rank test at 5% alone says another thing."""
        _, slight, word = self.verdict(runs, arm, base, looks).rpartition("slightly ")
        said = dict(zip(("more", "less", "equal"), self.words, strict=True)).get(word, word)
        said += ", by less than the margin" if slight else ""
        if not self.timed or said.startswith(self.words[:2]) == by_ranks(self.gaps(runs, arm, base)):
            return said
        return said + (", not by ranks" if said.startswith(self.words[:2]) else ", yet decided by ranks")


def crossing(looks, accuracies, threshold):
    """Updates until accuracy is at the threshold, linear between two looks; those of the last look if it never is."""
    there = next((i for i, accuracy in enumerate(accuracies) if accuracy >= threshold), None)
    if there is None:
        return looks[-1]
    return float(np.interp(threshold, *(values[max(0, there - 1) : there + 1] for values in (accuracies, looks))))


def time_to(threshold):
    """Updates until held-out accuracy reaches it; all of the run's where it does not."""

    def took(runs, arm, seed):
        return crossing(runs.x.looks, runs.curve(arm, seed), threshold)

    return Measure(f"updates to {threshold:g}", took, ".1f", ("slower", "faster", "as fast"), timed=True)


def times_by_ratio(threshold):
    """The updates' log2: a difference of 1 is half the time, or twice. (Less than 0.1 counts as 0.1.)"""
    took = time_to(threshold).of
    of = lambda runs, arm, seed: math.log2(max(0.1, took(runs, arm, seed)))  # noqa: E731
    return Measure("log2 of the updates", of, ".2f", ("slower", "faster", "as fast"), within=math.log2(1 + TIME_MARGIN))


def early(runs, arm, seed):
    """Mean accuracy in as many updates as CF-RL's stage 1 has."""
    return statistics.fmean(runs.curve(arm, seed)[1 : runs.x.looks.index(runs.x.n) + 1])


def never(runs, arm):
    """The seeds on which an arm's accuracy never is at the threshold."""
    return [seed for seed in runs.score(arm, "run") if max(runs.curve(arm, seed)) < runs.x.threshold]


def lost(runs, arm, seed):
    """Of the looks from the first at the threshold on, the share below it; None if there is none."""
    curve = runs.curve(arm, seed)
    later = next((curve[i:] for i, accuracy in enumerate(curve) if accuracy >= runs.x.threshold), None)
    return later and sum(accuracy < runs.x.threshold for accuracy in later) / len(later)


RUN = Measure("accuracy over the run", "run")
END = Measure("accuracy at the end", "accuracy")
EARLY = Measure("accuracy in stage 1", early)


def speed(x, off):
    """How fast an arm is: the time to the threshold, to `off` below it and above it; and accuracy."""
    return (*(time_to(round(x.threshold + d, 2)) for d in (-off, 0, off)), RUN, END)


def closely(x):
    """What tells two ways apart."""
    times = time_to(x.threshold), times_by_ratio(x.threshold)
    return (*times, EARLY, RUN, END, Measure("below it again", lost, ".2f"))


# ------------------------------------------------------------------------------------------------------------ tables


def means(runs, measures, arms=None):
    """A row for each arm: lists of texts, the heading first."""
    arms = [arm.name for arm in runs.x.arms] if arms is None else arms
    return [["arm", *(m.heading for m in measures)]] + [[f"`{a}`", *(m.mean(runs, a) for m in measures)] for a in arms]


def compared(runs, measures, pairs, looks=None):
    """A row for each (arm, base): the difference and what it allows to say, all rows asked together, or `looks`;
    if undecided, how many seeds would decide."""
    rows, looks = [["", *(m.heading for m in measures)]], looks or len(pairs)
    for arm, base in pairs:
        rows.append([f"`{arm}`" + f" − `{base}`" * bool(base)])
        for m in measures:
            gaps, said = m.gaps(runs, arm, base), m.said(runs, arm, base, looks)
            if said.startswith("undecided"):
                said += f" ({seeds_to_decide(gaps, m.margin(runs), looks)} seeds)"
            rows[-1].append(f"{over_seeds(gaps, '+' + m.form)}: {said}")
    return rows


def markdown(heading, *rows):
    return "\n".join(f"| {' | '.join(row)} |" for row in (heading, ["---"] * len(heading), *rows))


def shown(x, out):
    """What a run prints at its end."""
    runs = Runs(x, collected(x, out))
    return markdown(*means(runs, (END, RUN), list(dict.fromkeys(arm for arm, _ in runs.rows))))


def keep(x, out):
    """Write what a run gave into data/: six digits of the real model, four of the toy."""
    digits = 6 if x.name.startswith("real") else 4
    write_whole(DATA / f"{x.name}.csv", as_csv(list(collected(x, out, digits)), digits))
