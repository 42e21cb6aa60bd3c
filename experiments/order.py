"""Does it matter what comes first? Maps over the length of stage 1 and W's rate, and budgets counted in four ways.

In every cell cf-rl stands beside three arms with the same rates: its control, which freezes nothing; and, with its own
budgets for W and body to the update, classifier-last, in the other order, and spread, which has no order.
"""

import copy
import statistics

import numpy as np
import torch

from experiments.arms import MAPPED, generator
from experiments.runs import filled, load_policy
from experiments.speed import END, OVER_THE_RUN
from experiments.tables import RUN, lines_of, over_seeds
from experiments.verdicts import judge
from minicfrl import group_advantages, policy_gradient_loss, rollout, sequence_logp

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


def again(config, best):
    """The arms to run again on fresh seeds: each way's best, and what has the same cell as the best cf-rl."""
    cell = best[CF_RL].removeprefix(CF_RL)
    return list(dict.fromkeys(["rl", *best.values(), *(f"{base}{cell}" for base in BASES)]))


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


# ---------------------------------------------------------------------------------------------- what theory predicts


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
        "Held-out accuracy, cf-rl minus its control, classifier-last and spread, paired by seed, for each length n of "
        "stage 1 and each rate of W in it, in multiples of --lr; all questions asked together; in brackets where stage "
        "1 alone reaches the threshold, which says nothing of the order."
    )
    print("\n" + filled(heading))
    for yardstick in (OVER_THE_RUN, END):
        print("\n" + yardstick.heading)
        print(*lines_of(map_table(config, summary, yardstick)), sep="\n")
