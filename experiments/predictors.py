"""What does one update do to the right responses, and does R alone say it? Asked of SmolLM2, group by group.

    python -m experiments.predictors OUT.json      # needs the extra `real` and the model; about ten minutes

The protocol is that of Deng et al. (arXiv 2505.18830): groups with right and wrong responses; one update on a group;
the change of log pi of its right responses; the parameters put back. A predictor sees the policy before the update
only. Which one ranks the groups as the update does?

Also here: how much of the first effect of an update is R's, and who teaches whom in one group, by ntk.influence.
"""

import json
from pathlib import Path

import torch
from tqdm import tqdm

from experiments import cli
from experiments.arms import train_as
from experiments.real_model import RealConfig, load
from experiments.runs import write_text
from minicfrl import group_advantages, rollout, sequence_logp
from model import check
from ntk import influence
from train_toy import stream

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
    each optimiser on (E3), to first order and per unit of its rate; under "measured", what it was.

    The parameters are put back. The change is <gradient of what is asked, step>: R's part is that of W, G's that of the
    body (E10, summed). Under "hidden states" is the same sum without the residuals, sum_ij A_i <phi_j, phi_i> / N.
    """
    logp, row, N = log_pi(model, batch), {}, int(batch.mask.sum())
    asked, ascended = gradients(model, logp[right].mean()), gradients(model, (advantages * logp).sum() / N)
    before, parameters = logp[right].mean().item(), sum(parts_of(model), [])
    start = [p.detach().clone() for p in parameters]
    with torch.no_grad():
        phi = model.features(batch.tokens)[batch.state_mask]  # (N, d)
        of = batch.state_mask.nonzero()[:, 0]  # (N,)
        hidden = ((right[of] / right.sum()) @ (phi @ phi.T) @ advantages[of]).item() / N
    for kind, rate in rates.items():
        R, G = (inner(a, map(DIRECTIONS[kind], b)) for a, b in zip(asked, ascended, strict=True))
        row |= {(kind, "R alone"): R, (kind, "R + G"): R + G, (kind, "hidden states"): hidden}
        optimizer = {"sgd": torch.optim.SGD, "adam": torch.optim.Adam}[kind](parameters, lr=rate)
        for p, gradient in zip(parameters, sum(ascended, []), strict=True):
            p.grad = -gradient
        optimizer.step()
        with torch.no_grad():
            row[kind, "measured"] = (log_pi(model, batch)[right].mean().item() - before) / rate
            for p, value in zip(parameters, start, strict=True):
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
    check(advantages.any(), "no response of the batch has an advantage")
    parts, shares = gradients(model, (advantages * log_pi(model, batch)).sum()), {}
    for kind, direction in DIRECTIONS.items():
        R, G = (inner(part, map(direction, part)) for part in parts)
        shares[kind] = R / (R + G)
    return shares


def batch_of(model, task, config, draws):
    """A batch as RL draws it, and its advantages (R,)."""
    pairs = task.train_pairs[torch.randint(len(task.train_pairs), (config.prompts,), generator=draws)].tolist()
    batch = rollout(model, task, [task.prompt(a, b) for a, b in pairs], config.samples, draws)
    return batch, group_advantages(batch.rewards).flatten()


def shares_over(policies, task, config, draws):
    """{optimiser: [R's share in a batch of RL of each policy]}; draws has a stream of random numbers for each."""
    pairs = zip(policies, draws, strict=True)
    rows = [shares_of_R(model, *batch_of(model, task, config, stream)) for model, stream in pairs]
    return {kind: [row[kind] for row in rows] for kind in RATES}


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


def found(config, model, task):
    """All that is asked here, as plain lists: one group, all groups, R's shares at the start and after plain RL."""
    draws, rows = stream(0, "predictors"), []
    for batch, advantages, right in tqdm(mixed_groups(model, task, draws), total=GROUPS, disable=None):
        if not rows:
            group = taught(model, task, batch, advantages)
        rows.append(ask(model, batch, advantages, right, RATES))
        if len(rows) == GROUPS:
            break
    check(len(rows) == GROUPS, f"only {len(rows)} groups have right and wrong responses, not {GROUPS}")
    batches = [model] * BATCHES, task, config, [draws] * BATCHES
    shares = {"start": shares_over(*batches)}
    for _ in tqdm(train_as("rl", config, 0, task, model), total=config.rl_steps, disable=None):
        pass
    shares["end"] = shares_over(*batches)
    return {"group": group, "groups": {", ".join(of): [row[of] for row in rows] for of in rows[0]}, "shares": shares}


def main(argv=None):
    """The command line: a file to write, as --help says. Bad arguments end in one sentence, with exit code 2."""
    parser = cli.Parser("predictors", description=__doc__, formatter_class=cli.Help)
    parser.add_argument("out", type=Path, metavar="OUT.json", help="the file to write; it is whole or not there")
    out, config = parser.parse_args(argv).out, RealConfig()
    torch.set_num_threads(1)
    try:
        check(out.parent.is_dir(), f"{out.parent} is no folder to write {out.name} in")
        model, task = load(config)
    except ValueError as error:
        parser.error(str(error))
    write_text(out, json.dumps({"made_of": config.made_of()} | found(config, model, task)) + "\n")


if __name__ == "__main__":
    main()
