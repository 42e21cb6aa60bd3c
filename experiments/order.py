"""Does it matter what comes first? Maps over the length of stage 1 and W's rate, and budgets counted in four ways.

In every cell cf-rl stands beside three arms with the same rates: its control, which freezes nothing; and, with its own
budgets for W and body to the update, classifier-last, in the other order, and spread, which has no order.
"""

import statistics

import numpy as np

from experiments.arms import MAPPED
from experiments.runs import filled
from experiments.speed import END, OVER_THE_RUN
from experiments.tables import RUN, lines_of, over_seeds
from experiments.verdicts import judge

CF_RL, *BASES = MAPPED


def arm_at(arm, cell):
    length, multiple = cell
    return f"{arm}-{length}x{multiple:g}"


def finished_in_stage_1(config, summary, cell):
    """Does cf-rl reach the threshold at an evaluation within stage 1, as a mean over the seeds?"""
    curves = summary[arm_at(CF_RL, cell)]["curves"]
    accuracy = [statistics.fmean(values) for values in zip(*curves["accuracy"], strict=True)]
    within = zip(curves["step"][0], accuracy, strict=True)
    return any(step <= cell[0] and value >= config.threshold for step, value in within)


def map_table(config, summary, yardstick):
    """A row per cell: cf-rl minus each of the three, by the yardstick, with what that allows to say, all cells and
    bases asked together; in brackets where stage 1 alone reaches the threshold."""
    looks, rows = len(config.cells) * len(BASES), [["n, rate of W", *(f"minus {base}" for base in BASES)]]
    for cell in config.cells:
        rows.append([f"{cell[0]}, {cell[1]:g}x"])
        for base in BASES:
            pair = arm_at(CF_RL, cell), arm_at(base, cell)
            gaps = yardstick.gaps(config, summary, *pair) if all(arm in summary for arm in pair) else []
            if not gaps:  # they stopped, or on different seeds
                rows[-1].append("stopped")
                continue
            said = f"{over_seeds(gaps, '+.3f')}: {yardstick.said(config, summary, *pair, looks)}"
            rows[-1].append(f"({said})" if finished_in_stage_1(config, summary, cell) else said)
    return rows


def ways(config):
    """The ways to spend two learning rates, each with the cells of the map."""
    constant = [arm_at("fast-classifier", (config.rl_steps, m)) for m in config.grid("rate_multiples", float)]
    return {arm: [arm_at(arm, cell) for cell in config.cells] for arm in MAPPED} | {"fast-classifier": constant}


def tuned(config, summary):
    """{way: the arm that did best over the run on a map}. For other seeds: on these it is the best by luck as well."""
    return {way: max(arms, key=lambda arm: statistics.fmean(summary[arm][RUN])) for way, arms in ways(config).items()}


def asked_again(best):
    """The comparisons that fresh seeds decide: the best cf-rl and the best constant rates with plain RL, and cf-rl with
    those, with the best control, and with what has its own cell."""
    first, constant = best[CF_RL], best["fast-classifier"]
    beside = [first.replace(CF_RL, base) for base in BASES]
    bases = dict.fromkeys(["rl", constant, best["control"], *beside])
    return [(first, base) for base in bases] + [(constant, "rl")]


# ------------------------------------------------------------------------------------------------- what a run has cost


ACCOUNTS = ("stage 1 for free", "samples", "tokens", "operations")


def cost(curves, i, length, of):
    """What every evaluation of the i-th run has cost so far, counted in one of four ways."""
    steps = np.array(curves["step"][i])
    if of == "stage 1 for free":
        return np.maximum(steps - length, 0)
    if of == "samples":
        return steps
    tokens = np.array(curves["tokens"][i])
    if of == "tokens":
        return tokens
    # A token is sampled (1) and scored (1), and in stage 2 differentiated (2): in forward passes.
    return np.cumsum(np.diff(tokens, prepend=0) * np.where(steps <= length, 2, 4))


def at_equal(summary, arm, base, length, of):
    """Mean accuracy of `arm` minus that of `base` over the budgets that both reach, per seed; `length` is arm's n, at
    which there is an evaluation."""
    gaps = []
    for seed in (seed for seed in summary[arm]["seed"] if seed in summary[base]["seed"]):
        runs = []
        for name, n in ((arm, length), (base, 0)):
            curves, i = summary[name]["curves"], summary[name]["seed"].index(seed)
            paid, accuracy = cost(curves, i, n, of), np.array(curves["accuracy"][i])
            last = np.append(np.diff(paid) > 0, True)  # of several evaluations at one cost, as with stage 1 for free
            runs.append((paid[last], accuracy[last]))
        grid = np.linspace(0, min(paid[-1] for paid, _ in runs), 201)
        own, other = (np.interp(grid, *run).mean() for run in runs)
        gaps.append(float(own - other))
    return gaps


def accounting_table(config, summary, bases=("rl", "control")):
    """cf-rl minus plain RL, and minus its control, at equal budgets of four kinds, all asked together."""
    rows = [["cf-rl", *(f"at equal {of}" if of != ACCOUNTS[0] else of for of in ACCOUNTS)]]
    for base in bases:
        gaps = [at_equal(summary, CF_RL, base, config.classifier_steps, of) for of in ACCOUNTS]
        said = [f"{over_seeds(gap, '+.3f')}: {judge(gap, looks=len(ACCOUNTS) * len(bases))}" for gap in gaps]
        rows.append([f"minus {base}", *said])
    return rows


# -------------------------------------------------------------------------------------------------- what a run prints


def print_map(config, summary):
    """The map as a run prints it."""
    heading = (
        "Held-out accuracy, cf-rl minus its control, classifier-last and spread, paired by seed, for each length n of "
        "stage 1 and each rate of W in it, in multiples of --lr; all questions asked together; in brackets where stage "
        "1 alone reaches the threshold, which says nothing of the order."
    )
    print("\n" + filled(heading))
    for yardstick in (OVER_THE_RUN, END):
        print("\n" + yardstick.heading)
        print(*lines_of(map_table(config, summary, yardstick)), sep="\n")
