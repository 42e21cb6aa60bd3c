"""Order or rate? What a map over stage lengths and classifier rates says: cf-rl minus its control, cell by cell.

The control moves W at the same rates and freezes nothing. What is between the two is that cf-rl's body rests for n
updates: what that costs, and what it may bring to train W first.
"""

import copy
import statistics

import numpy as np
import torch

from experiments.arms import generator
from experiments.runs import filled, load_policy
from experiments.tables import RUN, lines_of, over_seeds, paired
from experiments.verdicts import judge
from minicfrl import group_advantages, policy_gradient_loss, rollout, sequence_logp

CF_RL, CONTROL = "cf-rl", "control"


def arm_at(arm, cell):
    length, multiple = cell
    return f"{arm}-{length}x{multiple:g}"


def finished_in_stage_1(config, summary, cell):
    """Does cf-rl reach the threshold at an evaluation within stage 1, as a mean over the seeds?"""
    curves = summary[arm_at(CF_RL, cell)]["curves"]
    accuracy = [statistics.fmean(values) for values in zip(*curves["accuracy"], strict=True)]
    within = zip(curves["step"][0], accuracy, strict=True)
    return any(step <= cell[0] and value >= config.threshold for step, value in within)


def differences(config, summary, name=RUN):
    """{cell: cf-rl minus control, per seed} for the cells that have finished."""
    pairs = {cell: (arm_at(CF_RL, cell), arm_at(CONTROL, cell)) for cell in config.cells}
    gaps = {cell: paired(summary, *arms, name) for cell, arms in pairs.items() if all(arm in summary for arm in arms)}
    return {cell: values for cell, values in gaps.items() if values}  # not where they stopped on different seeds


def map_table(config, summary, name=RUN, interval=False):
    """A row per stage length, a column per classifier rate: the mean difference; = where it is surely within the
    margin, * where it is not but surely not 0, all cells asked together; in brackets where stage 1 alone reaches the
    threshold."""
    cells = differences(config, summary, name)
    lengths, multiples = (list(dict.fromkeys(values)) for values in zip(*config.cells, strict=True))
    rows = [["n"] + [f"{multiple:g}x" for multiple in multiples]]
    for length in lengths:
        rows.append([str(length)])
        for cell in ((length, multiple) for multiple in multiples):
            if cell not in cells:
                rows[-1].append("stopped")
                continue
            said = judge(cells[cell], looks=len(config.cells))
            text = over_seeds(cells[cell], "+.3f") if interval else f"{statistics.fmean(cells[cell]):+.3f}"
            text += {"equal": "=", "undecided": ""}.get(said, "*")
            rows[-1].append(f"({text})" if finished_in_stage_1(config, summary, cell) else text)
    return rows


def counts(config, summary):
    """How many cells in which stage 1 leaves something to do say what of the order, all asked together."""
    cells = differences(config, summary)
    open_cells = [cell for cell in cells if not finished_in_stage_1(config, summary, cell)]
    said = [judge(cells[cell], looks=len(config.cells)) for cell in open_cells]
    return {name: said.count(name) for name in ("more", "less", "equal", "undecided")}


CONSTANT = "two constant rates"


def tuned_arms(config):
    """The ways to spend two learning rates, each with its choices: cf-rl, its control, two constant rates, and one."""
    constant = [arm_at(CONTROL, (config.rl_steps, multiple)) for multiple in config.grid("rate_multiples", float)]
    cells = {arm: [arm_at(arm, cell) for cell in config.cells] for arm in (CF_RL, CONTROL)}
    return cells | {CONSTANT: constant, "rl": ["rl"]}


def tuned(config, summary):
    """{way: the arm that did best on a map}, and the control of cf-rl's own cell. For other seeds: on these it is the
    best by luck as well."""
    scores = {arm: statistics.fmean(summary[arm][RUN]) for arm in summary}
    best = {
        way: max((arm for arm in arms if arm in scores), key=scores.get) for way, arms in tuned_arms(config).items()
    }
    return best | {OWN: best[CF_RL].replace(CF_RL, CONTROL)}


OWN = "cf-rl's own control"
PAIRS = [(way, "rl") for way in (CF_RL, CONTROL, CONSTANT)] + [(CF_RL, base) for base in (OWN, CONTROL, CONSTANT)]


def tuned_gaps(best, again):
    """{(way, base): one tuned way minus another, per seed}, from a summary of seeds that chose neither."""
    return {(way, base): paired(again, best[way], best[base]) for way, base in PAIRS}


def tuned_table(best, again):
    """Each way at its best cell, minus the others, with what that allows to say, all asked together."""
    gaps, bases = tuned_gaps(best, again), dict.fromkeys(base for _, base in PAIRS)
    rows = [["tuned", "arm", "accuracy over the run", *(f"minus {base}" for base in bases)]]
    for way, arm in best.items():
        rows.append([way, f"`{arm}`", over_seeds(again[arm][RUN], ".3f")])
        for pair in ((way, base) for base in bases):
            said = f"{over_seeds(gaps[pair], '+.3f')}: {judge(gaps[pair], looks=len(gaps))}" if pair in gaps else ""
            rows[-1].append(said)
    return rows


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


def accounting_table(config, summary, cells):
    """cf-rl minus plain RL at some cells, at equal budgets of four kinds."""
    rows = [["cf-rl at", *(f"at equal {of}" if of != ACCOUNTS[0] else of for of in ACCOUNTS)]]
    for cell in cells:
        gaps = [at_equal(summary, arm_at(CF_RL, cell), "rl", cell[0], of) for of in ACCOUNTS]
        said = [f"{over_seeds(gap, '+.3f')}: {judge(gap, looks=len(ACCOUNTS) * len(cells))}" for gap in gaps]
        rows.append([f"n = {cell[0]}, {cell[1]:g}x", *said])
    return rows


# ---------------------------------------------------------------------------------------------- what theory predicts


def lost_per_update(config, summary):
    """At plain RL's own rate all that freezing does, to first order, is to hold the body back for n updates. If
    accuracy rises by b per update of the body, the mean over T updates loses b n (1 - n / 2T). {n: b, per seed}."""
    T, cells = config.rl_steps, differences(config, summary)
    return {n: [-gap / (n * (1 - n / (2 * T))) for gap in cells[n, m]] for n, m in cells if m == 1}


def lost_table(config, summary):
    lost = lost_per_update(config, summary)
    rows = [
        ["n", *map(str, lost)],
        ["lost per update that the body rests", *(over_seeds(b, ".4f") for b in lost.values())],
    ]
    return rows


def moved(policy, batch, advantages, rates, turns):
    """A copy of `policy` after some updates by Adam along (E3) on one batch. `turns` are (which parts, how often)."""
    policy = copy.deepcopy(policy)
    for parts, updates in turns:
        groups = [{"params": getattr(policy, part).parameters(), "lr": rates[part]} for part in parts]
        optimizer = torch.optim.Adam(groups)
        for _ in range(updates):
            policy.zero_grad()
            logp = sequence_logp(policy, batch.tokens)
            policy_gradient_loss(logp, advantages, batch.mask[:, 1:]).backward()
            optimizer.step()
    return policy


def order_effect(policy, batch, advantages, rates, updates):
    """How much it matters whether W moves first and the body then, or both at once: the difference of the logits at the
    batch's states, relative to how far they move. The order is of second order in the step, so this is of first."""
    turns = {"both": [(("classifier", "body"), updates)], "in turn": [(("classifier",), updates), (("body",), updates)]}
    with torch.no_grad():
        start = policy(batch.tokens)[batch.state_mask]
    ends = [moved(policy, batch, advantages, rates, turn) for turn in turns.values()]
    with torch.no_grad():
        both, in_turn = (each(batch.tokens)[batch.state_mask] for each in ends)
    return ((in_turn - both).norm() / (both - start).norm()).item()


SCALES = (1, 1 / 2, 1 / 4, 1 / 8)  # of all rates


def order_effects(config, out, updates=(1, 8), seeds=3):
    """{f"{n}, {multiple:g}x": [[order_effect per scale of the rates], per seed]} from a run's starting policies."""
    effects = {}
    for seed in range(config.seed, config.seed + seeds):
        task, policy = load_policy(config, out, "sft", seed)
        pairs = task.train_pairs[:: len(task.train_pairs) // 8][:8].tolist()
        batch = rollout(policy, task, [task.prompt(a, b) for a, b in pairs], config.samples, generator(seed, "order"))
        advantages = group_advantages(batch.rewards).flatten()
        for n in updates:
            for multiple in config.grid("rate_multiples", float):
                rates = [{"classifier": scale * multiple * config.lr, "body": scale * config.lr} for scale in SCALES]
                row = [order_effect(policy, batch, advantages, rate, n) for rate in rates]
                effects.setdefault(f"{n}, {multiple:g}x", []).append(row)
    return effects


def effects_table(effects):
    """The same as a table: at the training's rates, and at a half, a quarter and an eighth of them."""
    rows = [["updates, rate of W", *(f"rates × {scale:g}" for scale in SCALES)]]
    for name, seeds in effects.items():
        rows.append([name, *(f"{statistics.fmean(values):.1%}" for values in zip(*seeds, strict=True))])
    return rows


# -------------------------------------------------------------------------------------------------- what a run prints


def print_map(config, summary):
    """The map as a run prints it."""
    heading = (
        "Mean held-out accuracy over the run, cf-rl minus its control, paired by seed, for each length n of stage 1 "
        "and each classifier rate in it, in multiples of --lr. = surely within the margin, else * surely not 0, all "
        "cells asked together; in brackets where stage 1 alone reaches the threshold, which says nothing of the order."
    )
    print("\n" + filled(heading))
    print(*lines_of(map_table(config, summary)), sep="\n")
