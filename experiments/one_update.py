"""One update, looked at closely: one prompt, four responses, one plain gradient step, and what theory said it would do.

`closely` makes the numbers of one_update.md and of its picture from the starting policy of a run.
"""

import copy
import functools

import torch

from experiments.toy import policy
from minicfrl import Addition, group_advantages, policy_gradient_loss, rollout, sequence_logp
from model import residuals
from ntk import influence, logit_change
from train_toy import stream

SAMPLES, LR = 4, 0.02


def telling_group(model, task, draws):
    """A training prompt and four responses: of 64, among those with most patterns the first nearest half right."""
    pairs = task.train_pairs[torch.randint(len(task.train_pairs), (64,), generator=draws)].tolist()
    groups = [(p, rollout(model, task, [p], SAMPLES, draws)) for p in (task.prompt(a, b) for a, b in pairs)]
    return max(groups, key=lambda g: (len({r[:1] for r in g[1].responses}), -abs(g[1].rewards.mean() - 0.5)))


def stepped(model, gradients, optimizer):
    """A copy of the policy after one step of a fresh optimiser; and by how much that moved it, {name: change}."""
    after = copy.deepcopy(model)
    for parameter, gradient in zip(after.parameters(), gradients, strict=True):
        parameter.grad = gradient
    optimizer(after.parameters()).step()
    pairs = zip(model.named_parameters(), after.parameters(), strict=True)
    return after, {name: (new - old).detach() for (name, old), new in pairs}


def foretold(model, tokens, state, after, update, patterns):
    """The change of the patterns' probabilities at one state, to first order, by R and by G; and what it came to."""
    before, now = (policy(tokens)[state].detach().softmax(dim=1)[0] for policy in (model, after))  # (V,) twice
    parts = [part[0] for part in logit_change(model, tokens, state, update)]  # R's and G's, (V,) each
    by_R, by_G = ((before * (part - before @ part))[patterns].tolist() for part in parts)
    return {"by_R": by_R, "by_G": by_G, "after": (now - before)[patterns].tolist()}


# A plain step, and Adam's first at the rate of the runs.
STEPS = {"": functools.partial(torch.optim.SGD, lr=LR), "adam_": functools.partial(torch.optim.Adam, lr=4e-4)}


def closely(task, model, draws):
    """{name: numbers} as plain lists: everything that one_update.md and its picture show of one step on (E3), on all
    parameters, for the four responses."""
    prompt, batch = telling_group(model, task, draws)
    advantages, patterns = group_advantages(batch.rewards)[0], task.encode(task.patterns)  # (S,)
    tokens, states, count = batch.tokens, batch.state_mask, int(batch.mask.sum())
    shared = torch.zeros_like(states)
    shared[0, len(prompt) - 1] = True  # the end of the prompt: one state for all four, where the pattern is chosen
    loss = policy_gradient_loss(sequence_logp(model, tokens), advantages, batch.mask[:, 1:])
    gradients = torch.autograd.grad(loss, list(model.parameters()))
    logits = model(tokens)[shared].detach()  # (1, V)
    g = residuals(logits.expand(SAMPLES, -1), tokens[:, len(prompt)])  # (S, V)
    numbers = {
        "prompt": prompt,
        "responses": list(batch.responses),
        "rewards": batch.rewards[0].tolist(),
        "advantages": advantages.tolist(),
        "tokens": count,
        "residuals": g[:, patterns].tolist(),
        "pushes": (advantages @ g)[patterns].tolist(),
        "probabilities": logits.softmax(dim=1)[0, patterns].tolist(),
        # A token is a character, and the end token a dot.
        "labels": [[*text, "."][:n] for text, n in zip(batch.responses, batch.mask.sum(dim=1).tolist(), strict=True)],
        "influence": [(LR / count * part).tolist() for part in influence(model, tokens, states, advantages)],
    }
    for step, optimizer in STEPS.items():
        told = foretold(model, tokens, shared, *stepped(model, gradients, optimizer), patterns)
        numbers |= {f"{step}{name}": values for name, values in told.items()}
    return numbers


def of_run(x, out):
    """One update of the first seed's start."""
    task, start = policy(x, (out / f"sft-seed{x.seeds[0]}.pt").read_bytes())
    return closely(task, start, stream(x.seeds[0], "one update"))


# ------------------------------------------------------------------------------------------------ the page's tables


def group_rows(update):
    """The four responses: reward, advantage (E2), and e_y - pi at the three patterns, at the end of the prompt."""
    yield ["response", "reward", "advantage", *(f"e_y − π at {pattern}" for pattern in Addition.patterns)]
    columns = ("responses", "rewards", "advantages", "residuals")
    for response, reward, advantage, residual in zip(*(update[name] for name in columns), strict=True):
        yield [f"`{response}`", f"{reward:.0f}", f"{advantage:+.2f}", *(f"{g:+.3f}" for g in residual)]
    yield ["Σ A (e_y − π)", "", "", *(f"{push:+.3f}" for push in update["pushes"])]


def prediction_rows(update, step):
    """What (E7), or for Adam (E8), said of the patterns' probabilities, and what happened."""
    yield ["pattern", "before", "through W (R)", "through the body (G)", "together", "what happened"]
    for i, pattern in enumerate(Addition.patterns):
        by_R, by_G, after = (update[f"{step}{name}"][i] for name in ("by_R", "by_G", "after"))
        changes = (f"{change:+.4f}" for change in (by_R, by_G, by_R + by_G, after))
        yield [pattern, f"{update['probabilities'][i]:.4f}", *changes]


def tables(update):
    """{name of a report mark: rows}."""
    steps = {"prediction": prediction_rows(update, ""), "adam": prediction_rows(update, "adam_")}
    return steps | {"group": group_rows(update)}
