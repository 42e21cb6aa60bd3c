"""What a list of paired differences, one per seed, allows to say: one function for every verdict of the project."""

import functools
import math
import statistics

import torch

MARGIN = 0.02  # of accuracy, fixed beforehand: two ways of training that differ by less count as equally good

# What judge says, of how fast two ways of training are.
SPEED = {"more": "faster", "less": "slower", "equal": f"as fast (within {MARGIN:g})", "undecided": "undecided"}


@functools.lru_cache
def student_t(p, freedom):
    """The p-quantile, 0 < p < 1, of Student's t with `freedom` degrees of it.

    With t = sqrt(freedom) tan(a) its density is cos(a)^(freedom - 1) da, which is summed here. Textbook.

    >>> round(student_t(0.975, 4), 2), round(student_t(0.975, 9), 2)
    (2.78, 2.26)
    """
    angle = torch.linspace(-math.pi / 2, math.pi / 2, 200_001, dtype=torch.float64)
    below = torch.cumulative_trapezoid(angle.cos().clamp(min=0) ** (freedom - 1), angle)
    at = torch.searchsorted(below, p * below[-1])
    return math.sqrt(freedom) * math.tan((angle[at] + angle[at + 1]).item() / 2)


def half_width(values, level=0.95):
    """Of the interval around the values' mean that holds the true mean with that probability; inf for one value."""
    if len(values) < 2:
        return math.inf
    return student_t((1 + level) / 2, len(values) - 1) * statistics.stdev(values) / math.sqrt(len(values))


def judge(differences, margin=MARGIN, looks=1):
    """What the seeds allow to say of the true mean of paired differences, at 5%:

    equal      it lies within +-margin: both one-sided tests say so (the 90% interval lies inside)
    more, less it is above, below 0: the 95% interval excludes 0
    undecided  neither

    `looks` is how many such questions are asked together: each is then asked at 5% / looks (Bonferroni), so that all
    answers hold together. ValueError if there is no difference, or one that is not finite.
    """
    if not differences or not all(map(math.isfinite, differences)):
        raise ValueError(f"differences must be finite numbers, at least one, not {differences}")
    mean = statistics.fmean(differences)
    if abs(mean) + half_width(differences, 1 - 0.1 / looks) < margin:
        return "equal"
    if abs(mean) > half_width(differences, 1 - 0.05 / looks):
        return "more" if mean > 0 else "less"
    return "undecided"
