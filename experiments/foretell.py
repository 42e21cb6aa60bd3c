"""Will a faster last layer help here? A number that is measured at the start, its rivals, and what came out.

    python -m experiments foretell --out DIR      first what is known of all starts, into data/; then what came of them

The protocol stands in rules.md. It was committed before all this was measured, and what is known before any run.
"""

from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from multiprocessing import get_context

import torch

from experiments import runs, scores, toy
from experiments.arms import STARTS, tried
from minicfrl import RLConfig, Stage, train_rl
from train_toy import stream

BATCHES, RATES = (5, 10, 20), (4e-4, 6e-4, 8e-4, 1.6e-3)
CHOOSE, JUDGE = range(800, 803), range(803, 806)  # seeds: of the rate, and of all that is told


def moments(gradients):
    """(D,) each, of the first 5, 10 and 20 gradients (D,) of as many batches: mu_i^2, the squared mean; the mean
    square; the mean size. Products of two DIFFERENT batches average to mu_i^2, so that noise adds nothing to it."""
    total = squares = sizes = 0
    for B, g in enumerate(gradients, start=1):
        total, squares, sizes = total + g, squares + g**2, sizes + g.abs()
        if B in BATCHES:
            yield (total**2 - squares) / (B * (B - 1)), squares / B, sizes / B


def shares(gradients, of_W):
    """rho, W's share of sum_i mu_i^2 / rms_i (E12); its share of sum_i |g_i| (plain); and its signal over noise, sum_i
    mu_i^2 / sum_i var_i, in multiples of the body's (snr). From 5, 10 and 20 batches. A sum below 0 counts as 0. of_W
    (D,) says which of the parameters are W's."""
    row = {}
    for B, (signal, square, size) in zip(BATCHES, moments(gradients), strict=True):
        columns = (signal / square.sqrt().clamp_min(1e-30), size, signal, square - signal)  # (D,) each  (E12)
        W, body = ([x[some].double().sum().clamp_min(0).item() for x in columns] for some in (of_W, ~of_W))
        row |= {f"{name}{B}": W[i] / (W[i] + body[i] or 1) for i, name in enumerate(("rho", "plain"))}
        row[f"snr{B}"] = W[2] * body[3] / (W[3] * body[2] or 1e-30)
    return row


def known(model, task, rl, generator):
    """What 20 batches say of a policy, before any update: shares; accuracy on the batches' prompts; and how much of the
    rewards' variance is between first tokens. (At rate 0 train_rl leaves a batch's gradient, and the policy too.)"""
    parameters, seen = [*model.named_parameters()], []
    of_W = torch.cat([torch.full((p.numel(),), name == "classifier.weight") for name, p in parameters])

    def note(batch, _):
        seen.append((batch.tokens[batch.mask & (batch.mask.cumsum(dim=1) == 1)], batch.rewards.flatten()))
        return batch.rewards

    updates = train_rl(model, task, RLConfig((Stage(max(BATCHES), lr=0.0),), reward=note, **rl), generator)
    row = shares((torch.cat([p.grad.flatten() for _, p in parameters]) for _ in updates), of_W)
    first, rewards = (torch.cat(each) for each in zip(*seen, strict=True))  # (B,) of all batches
    kinds, kind = first.unique(return_inverse=True)
    between = torch.stack([rewards[first == token].mean() for token in kinds])[kind].var(correction=0)
    explained = between / rewards.var(correction=0).clamp_min(1e-30)
    return row | {"right": rewards.mean().item(), "by_first": explained.item()}


def at_start(start):
    """A row of what is known of one start: (an experiment, a folder, a seed)."""
    x, out, seed = start
    task, model = toy.policy(
        x, runs.once(out / x.name / "starts" / f"sft-seed{seed}.pt", lambda: toy.new_start(x, seed))
    )
    return {"start": x.name, "seed": seed} | known(model, task, x.rl, stream(seed, "foretell"))


def rows_of(x, out, seed, arm):
    """toy.rows_of, from the starts of which something is known."""
    return toy.rows_of(x, out.parent / "starts", seed, arm)


def came(x, out, workers):
    """What came of a start, for each seed: updates of plain RL at its best rate, and of W fast at that rate, to half of
    plain RL's rise; accuracy at the end; and how far W fast is ahead after five updates. The best rate has the highest
    accuracy over the run, on other seeds."""

    def ran(name, seeds, *arms):
        y = replace(x, arms=[*arms], seeds=seeds)
        runs.run(y, out / x.name / name, rows_of, workers)
        return scores.Runs(y, scores.collected(y, out / x.name / name))

    tuning = ran("rates", CHOOSE, *(tried("rl", lr) for lr in RATES))
    best = max(tuning.x.arms, key=lambda arm: sum(tuning.values(arm.name, "run"))).lr
    judged = ran("judged", JUDGE, tried("rl", best), tried("fast-classifier", best, 20))
    for seed in JUDGE:
        plain, fast = (judged.curve(arm.name, seed) for arm in judged.x.arms)
        row = {"rate": best, "ahead": fast[3] - plain[3], "plain_end": plain[-1], "fast_end": fast[-1]}  # look 3: at 5
        aim = (plain[0] + plain[-1]) / 2 if plain[-1] > plain[0] else 2  # which no accuracy is
        yield row | {"plain": scores.crossing(x.looks, plain, aim), "fast": scores.crossing(x.looks, fast, aim)}


def main(out, workers):
    """ValueError or OSError as of runs.run."""
    starts, file = [(x, out, seed) for x in STARTS.values() for seed in JUDGE], scores.DATA / "foretell.csv"
    with ProcessPoolExecutor(workers, get_context("spawn"), torch.set_num_threads, (1,)) as pool:
        rows = [*pool.map(at_start, starts)]
    runs.write_whole(file, runs.as_csv(rows, 4))
    later = [row for x in STARTS.values() for row in came(x, out, workers)]
    runs.write_whole(file, runs.as_csv([row | more for row, more in zip(rows, later, strict=True)], 4))
