"""What a list of paired differences, one per seed, allows to say: one function for every verdict of the project."""

import bisect
import functools
import math
import statistics

import torch

from model import check, check_counts

# Two ways of training that differ by less count as equally good. Of accuracy: chosen when some results were known. Of
# the updates that they take, as a share of plain RL's: written down on 2026-11-26, before the runs that it judges.
MARGIN = 0.02
TIME_MARGIN = 0.1

# What judge says, of how fast two ways of training are.
SPEED = {"more": "faster", "less": "slower", "equal": f"as fast (within {MARGIN:g})", "undecided": "undecided"}


def in_words(said, words, small="by less than the margin"):
    """What judge said, in the words of a question: {more, less, equal, undecided: word}. If it is slight, that too."""
    return words[said.removeprefix("slightly ")] + (f", {small}" if said.startswith("slightly ") else "")


SPEED |= {said: in_words(said, SPEED) for said in ("slightly more", "slightly less")}


@functools.cache
def student_t(p, freedom):
    """The p-quantile, 0 < p < 1, of Student's t with `freedom` degrees of it.

    With t = sqrt(freedom) tan(a) its density is cos(a)^(freedom - 1) da, which is summed here. Textbook. ValueError for
    p nearer to 0 or 1 than 1e-6: there the sum is too coarse.

    >>> round(student_t(0.975, 4), 2), round(student_t(0.975, 9), 2)
    (2.78, 2.26)
    """
    check(1e-6 <= p <= 1 - 1e-6, f"the quantile must lie between 1e-6 and 1 - 1e-6, not {p}")
    angle = torch.linspace(-math.pi / 2, math.pi / 2, 20_001, dtype=torch.float64)
    below = torch.cumulative_trapezoid(angle.cos().clamp(min=0) ** (freedom - 1), angle)
    below = torch.cat((below.new_zeros(1), below / below[-1]))  # at each angle
    i = torch.searchsorted(below, p)  # of the first angle that is not below the quantile
    part = (p - below[i - 1]) / (below[i] - below[i - 1])
    return math.sqrt(freedom) * math.tan(torch.lerp(angle[i - 1], angle[i], part).item())


def half_width(values, level=0.95, seeds=None):
    """Of the interval around the values' mean that holds the true mean with that probability; inf for one value. With
    `seeds` as if so many values had the spread of these.

    ValueError if there is no value, or one that is not finite (or so large that its square is not)."""
    if not values or not all(abs(value) < 1e150 for value in values):
        raise ValueError(f"values must be finite numbers, at least one, not {values}")
    if len(values) < 2:
        return math.inf
    n = seeds or len(values)
    return student_t((1 + level) / 2, n - 1) * statistics.stdev(values) / math.sqrt(n)


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


def seeds_to_decide(differences, margin=MARGIN, looks=1):
    """How many seeds would decide what these do not, 2000 at most, if mean and spread stayed as they are: then the odds
    of a verdict are about even. ValueError as of judge."""
    more = range(len(differences), 2000)
    return bisect.bisect(more, False, key=lambda n: judge(differences, margin, looks, n) != "undecided") + more.start
