"""Will a faster last layer help here? A number that is measured at the start, its rivals, and what came of the start.

    python -m experiments foretell --out DIR      of many starts of the toy, and of SmolLM2; into data/foretell.csv

The protocol stands in rules.md. It was committed before any of this was measured. foretell.md says what came out.
"""

from dataclasses import replace

import torch

from experiments import measures, real_model, runs, scores, toy
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
    mu_i^2 / sum_i var_i, in multiples of the body's (snr). From 5, 10 and 20 batches. A sum below 0 counts as 0. The
    last of_W parameters are W's."""
    row, parts = {}, (slice(-of_W), slice(-of_W, None))
    for B, (signal, square, size) in zip(BATCHES, moments(gradients), strict=True):
        columns = (signal / square.sqrt().clamp_min(1e-30), size, signal, square - signal)  # (D,) each  (E12)
        body, W = ([max(0.0, x[some].sum(dtype=torch.float64).item()) for x in columns] for some in parts)
        row |= {f"{name}{B}": W[i] / (W[i] + body[i] or 1) for i, name in enumerate(("rho", "plain"))}
        row[f"snr{B}"] = W[2] * body[3] / (W[3] * body[2] or 1e-30)
    return row


def known(model, task, rl, generator):
    """What 20 batches say of a policy, before any update: shares; accuracy on the batches' prompts; and how much of the
    rewards' variance is between first tokens. (At rate 0 train_rl leaves a batch's gradient, and the policy too.)"""
    seen = []

    def note(batch, _):
        seen.append((batch.tokens[batch.mask][measures.first_states(batch.mask)], batch.rewards.flatten()))
        return batch.rewards

    rl = RLConfig((Stage(max(BATCHES), lr=0.0),), reward=note, optimizer="sgd", **rl)
    grads = (torch.cat([p.grad.flatten() for p in model.parameters()]) for _ in train_rl(model, task, rl, generator))
    row = shares(grads, model.classifier.weight.numel())
    first, rewards = (torch.cat(each) for each in zip(*seen, strict=True))  # (B,) of all batches
    kinds, kind = first.unique(return_inverse=True)
    between = torch.stack([rewards[first == token].mean() for token in kinds])[kind].var(correction=0)
    return row | {"right": rewards.mean().item(), "by_first": (between / (rewards.var(correction=0) + 1e-30)).item()}


def outcome(judged, plain, fast, seed):
    """What came of a start on a seed: updates of plain RL and of W fast to half of plain RL's rise, all where it does
    not rise; accuracy at the end; and how far W fast is ahead after five updates."""
    plain, fast, looks = judged.curve(plain, seed), judged.curve(fast, seed), judged.x.looks
    aim, at_five = (plain[0] + plain[-1]) / 2 if plain[-1] > plain[0] else 2, looks.index(5)  # 2: no accuracy is that
    row = {"ahead": fast[at_five] - plain[at_five], "plain_end": plain[-1], "fast_end": fast[-1]}
    return row | {"plain": scores.crossing(looks, plain, aim), "fast": scores.crossing(looks, fast, aim)}


def came(x, out, workers):
    """A row for each seed of a start: what is known, and what came of it at plain RL's best rate, which is the one with
    the highest accuracy over the run on other seeds."""

    def ran(folder, seeds, *arms):
        y = replace(x, arms=[*arms], seeds=seeds)
        runs.run(y, folder, toy.rows_of, workers)
        return scores.Runs(y, scores.collected(y, folder))

    tuning = ran(out / "rates", CHOOSE, *(tried("rl", lr) for lr in RATES))
    best = max(tuning.x.arms, key=lambda arm: sum(tuning.values(arm.name, "run"))).lr
    judged = ran(out / "judged", JUDGE, tried("rl", best), tried("fast-classifier", best, 20))
    for seed in JUDGE:
        task, model = toy.policy(x, (out / "judged" / f"sft-seed{seed}.pt").read_bytes())
        row = {"arm": x.name, "seed": seed} | known(model, task, x.rl, stream(seed, "foretell"))
        yield row | {"rate": best} | outcome(judged, *(arm.name for arm in judged.x.arms), seed)


def main(out, workers):
    """ValueError or OSError as of runs.run, and, before any work, for a package that is missing."""
    x = real_model.EXPERIMENTS["real-best"]
    (lm, task), judged = real_model.load(x), scores.load(x)
    rows = [row for start in STARTS.values() for row in came(start, out / start.name, workers)]
    for seed in x.seeds[: len(JUDGE)]:  # of SmolLM2, whose runs are in data/
        row = known(real_model.CausalLM(lm, task), task, x.rl, stream(seed, "foretell"))
        row |= {"rate": x.lr} | outcome(judged, "rl", "fast-classifier", seed)
        rows.append({"arm": "SmolLM2", "seed": seed} | row)
    runs.write_whole(scores.DATA / "foretell.csv", runs.as_csv(rows, 4))
