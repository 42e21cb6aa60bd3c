"""What does one update do to the right responses, and does R alone say it? Asked of SmolLM2, group by group.

    python -m experiments.predictors OUT.json [--quick]      # needs the extra `real` and the model; about ten minutes

The protocol is that of Deng et al. (arXiv 2505.18830): groups with right and wrong responses; one update on a group;
the change of log pi of its right responses; the parameters put back. A predictor sees the policy before the update
only. Which one ranks the groups as the update does?

Also here: how much of the first effect of an update is R's, and who teaches whom in one group, by ntk.influence.
"""

import json
import sys
from pathlib import Path

import torch

from experiments.arms import generator, train_as
from experiments.real_model import QUICK, RealConfig, load
from experiments.runs import write_text
from minicfrl import OPTIMIZERS, Stage, _optimizer, group_advantages, rollout, sequence_logp
from model import check
from ntk import influence

GROUPS, SAMPLES, BATCHES = 40, 8, 5
RATES = {"adam": 5e-6, "sgd": 1e-4}  # Adam's is that of the runs; SGD's moves log pi about as far
DIRECTIONS = {"adam": torch.sign, "sgd": lambda gradient: gradient}  # of the first step, given the gradient


def log_pi(model, batch):
    """(R,): log pi of each response, in nats."""
    return sequence_logp(model, batch.tokens).masked_fill(~batch.mask[:, 1:], 0.0).sum(dim=1)


def parts_of(model):
    """The parameters that train: [W], and those of the body."""
    return [model.classifier.weight], [p for p in model.body.parameters() if p.requires_grad]


def gradients(model, value):
    """Those of a number in both parts; the graph is kept."""
    (W,), body = parts_of(model)
    of_W, *of_body = torch.autograd.grad(value, [W, *body], retain_graph=True, materialize_grads=True)
    return [of_W], of_body


def inner(left, right):
    return sum((a * b).sum().item() for a, b in zip(left, right, strict=True))


def ask(model, batch, advantages, right, rates):
    """{(optimiser, predictor): number}: what is said of the mean change of log pi of the right responses in one step of
    each optimiser on sum_i A_i log pi_i, to first order and per unit of its rate; under "measured", what it was.

    The parameters are put back. The change is <gradient of what is asked, step>: R's part is that of W, G's that of the
    body (E10, summed). Under "hidden states" is the same sum without the residuals, sum_ij A_i <phi_j, phi_i>.
    """
    logp, parts, row = log_pi(model, batch), parts_of(model), {}
    asked, ascended = gradients(model, logp[right].mean()), gradients(model, (advantages * logp).sum())
    before, start = logp[right].mean().item(), [[p.detach().clone() for p in part] for part in parts]
    with torch.no_grad():
        phi = model.features(batch.tokens)[batch.state_mask]  # (N, d)
        of = batch.state_mask.nonzero()[:, 0]  # (N,)
        hidden = ((right[of] / right.sum()) @ (phi @ phi.T) @ advantages[of]).item()
    for kind, rate in rates.items():
        R, G = (inner(a, map(DIRECTIONS[kind], b)) for a, b in zip(asked, ascended, strict=True))
        row |= {(kind, "R alone"): R, (kind, "R + G"): R + G, (kind, "hidden states"): hidden}
        optimizer = _optimizer(model, Stage(1, lr=rate), kind)
        for part, ascent in zip(parts, ascended, strict=True):
            for p, gradient in zip(part, ascent, strict=True):
                p.grad = -gradient
        optimizer.step()
        with torch.no_grad():
            row[kind, "measured"] = (log_pi(model, batch)[right].mean().item() - before) / rate
            for part, old in zip(parts, start, strict=True):
                for p, value in zip(part, old, strict=True):
                    p.copy_(value)
    model.zero_grad()
    return row


def mixed_groups(model, task, draws):
    """Groups of which some responses are right and some wrong: batch, advantages (R,), right (R,)."""
    for a, b in task.train_pairs.tolist():
        batch = rollout(model, task, [task.prompt(a, b)], SAMPLES, draws)
        right = batch.rewards[0] > 0
        if right.any() and not right.all():
            yield batch, group_advantages(batch.rewards)[0], right


def shares_of_R(model, batch, advantages):
    """{optimiser: R's share} of the first effect of its step on what it ascends, <gradient, step>: for SGD this is
    |gradient|^2; for Adam's first step, which moves all parameters alike, the sum of |gradient|."""
    parts, shares = gradients(model, (advantages * log_pi(model, batch)).sum()), {}
    for kind, direction in DIRECTIONS.items():
        R, G = (inner(part, map(direction, part)) for part in parts)
        shares[kind] = R / (R + G)
    return shares


def shares_over_batches(model, task, config, draws):
    """{optimiser: [R's share in each of some batches of RL]}."""
    rows = []
    for _ in range(BATCHES):
        pairs = task.train_pairs[torch.randint(len(task.train_pairs), (config.prompts,), generator=draws)].tolist()
        batch = rollout(model, task, [task.prompt(a, b) for a, b in pairs], config.samples, draws)
        rows.append(shares_of_R(model, batch, group_advantages(batch.rewards).flatten()))
    return {kind: [row[kind] for row in rows] for kind in OPTIMIZERS}


def taught(model, task, batch, advantages):
    """Who teaches whom in a group: the tokens, and R's and G's part (N, N)."""
    R, G = influence(model.plain(), batch.tokens, batch.state_mask, advantages)
    row, t = batch.state_mask.nonzero(as_tuple=True)
    tokens = [task.decode([token]) for token in batch.tokens[row, t + 1].tolist()]
    return {"tokens": tokens, "rows": row.tolist(), "advantages": advantages.tolist(), "R": R.tolist(), "G": G.tolist()}


def rank_correlation(x, y):
    """Spearman's, of two lists without ties."""
    ranks = torch.stack([torch.tensor(values).argsort().argsort().double() for values in (x, y)])
    return torch.corrcoef(ranks)[0, 1].item()


def overlap(x, y, top=10):
    """How many of the `top` that are least by x are among those by y: the groups that an update helps least."""
    least = [set(torch.tensor(values).argsort()[:top].tolist()) for values in (x, y)]
    return len(least[0] & least[1])


def main(out, *flags):
    torch.set_num_threads(1)
    config = RealConfig(**QUICK if "--quick" in flags else {})
    model, task = load(config)
    draws, record = generator(0, "predictors"), {"made_of": config.made_of()}
    groups = mixed_groups(model, task, draws)
    first = next(groups)
    record["group"] = taught(model, task, *first[:2])
    rows = [ask(model, *first, RATES)]
    rows += [ask(model, *group, RATES) for _, group in zip(range(GROUPS - 1), groups, strict=False)]
    check(len(rows) == GROUPS, f"only {len(rows)} groups are mixed, not {GROUPS}")
    record["groups"] = {", ".join(of): [row[of] for row in rows] for of in rows[0]}
    record["shares"] = {"start": shares_over_batches(model, task, config, draws)}
    for _ in train_as("rl", config, 0, task, model):
        pass
    record["shares"]["end"] = shares_over_batches(model, task, config, draws)
    write_text(Path(out), json.dumps(record) + "\n")


if __name__ == "__main__":
    main(*sys.argv[1:])
