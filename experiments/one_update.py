"""One update, looked at closely: one prompt, four responses, one plain gradient step, and what theory said it would do.

`closely` makes the numbers of one_update.md and of two pictures from the starting policy of a run.
"""

import copy

import torch

from experiments.arms import after_stage_1
from minicfrl import Rollout, classifier_gradient, group_advantages, policy_gradient_loss, rollout, sequence_logp
from model import residuals
from ntk import empirical_ntk, influence, logit_change
from train_toy import stream

SAMPLES, LR, ADAM_LR = 4, 0.02, 4e-4


def telling_group(model, task, draws):
    """Four responses to a training prompt: of 256 prompts the first with most patterns, some right and some wrong."""
    pairs = task.train_pairs[torch.randint(len(task.train_pairs), (256,), generator=draws)].tolist()
    prompts = [task.prompt(a, b) for a, b in pairs]
    batch = rollout(model, task, prompts, SAMPLES, draws)

    def telling(p):
        patterns = {response[:1] for response in batch.responses[p * SAMPLES : (p + 1) * SAMPLES]}
        return len(patterns), 0 < batch.rewards[p].mean() < 1

    p = max(range(len(prompts)), key=telling)
    rows = slice(p * SAMPLES, (p + 1) * SAMPLES)
    T = len(prompts[p]) + int(batch.mask[rows].sum(dim=1).max())
    tokens, mask, logits = batch.tokens[rows, :T], batch.mask[rows, :T], batch.logits[rows, : T - len(prompts[p])]
    return prompts[p], Rollout(tokens, mask, logits, batch.rewards[p : p + 1], batch.responses[rows])


def kernel_blocks(model, tokens, states):
    """How strongly the kernel couples any two of N states: the norms of R's and G's V x V blocks, (N, N) each."""
    kernel = empirical_ntk(model, tokens, states)
    V = kernel.gradient.size(1)
    return kernel.representation.abs() * V**0.5, kernel.gradient.transpose(1, 2).flatten(2).norm(dim=2)


def moved(model, update):
    """A copy of the policy, each parameter moved by what the update has for its name, if anything."""
    after = copy.deepcopy(model)
    with torch.no_grad():
        for name, parameter in after.named_parameters():
            parameter += update.get(name, 0.0)
    return after


def adam_update(gradients):
    """The first step of a fresh Adam at the rate of the runs: where it takes parameters that are 0."""
    parameters = {name: torch.zeros_like(gradient) for name, gradient in gradients.items()}
    for name, parameter in parameters.items():
        parameter.grad = gradients[name]
    torch.optim.Adam(parameters.values(), ADAM_LR).step()
    return parameters


def closely(config, seed, task, model):
    """{name: numbers} as plain lists: everything that one_update.md and the pictures of one update show.

    The update is one step of SGD on (E3), of size LR, for the four responses: on all parameters, and on W alone. Also
    Adam's first step, on all parameters.
    """
    prompt, batch = telling_group(model, task, stream(seed, "one update"))
    advantages = group_advantages(batch.rewards)[0]  # (G,)
    tokens, mask, states = batch.tokens, batch.mask, batch.state_mask
    count, end = int(mask.sum()), len(prompt) - 1
    shared = torch.zeros_like(states)
    shared[0, end] = True  # the end of the prompt: one state for all four, where the pattern is chosen
    patterns = task.encode(task.patterns)

    loss = policy_gradient_loss(sequence_logp(model, tokens), advantages, mask[:, 1:])
    parts = torch.autograd.grad(loss, list(model.parameters()))
    gradients = {name: g for (name, _), g in zip(model.named_parameters(), parts, strict=True)}
    with torch.no_grad():
        features = model.features(tokens)  # (G, T, d)
        by_hand = classifier_gradient(
            features[:, :-1], model.classifier(features)[:, :-1], tokens[:, 1:], advantages, mask[:, 1:]
        )  # (V, d)  (E4)

    logits = model(tokens)[shared].detach()  # (1, V)
    g = residuals(logits.expand(SAMPLES, -1), tokens[:, end + 1])  # (G, V)
    sgd, adam = {name: -LR * gradient for name, gradient in gradients.items()}, adam_update(gradients)
    by_R, by_G = logit_change(model, tokens, shared, sgd)  # (1, V) each
    adam_by_R, adam_by_G = logit_change(model, tokens, shared, adam)
    probabilities = logits.softmax(dim=1)[0]

    def change(dlogits):  # of probabilities, to first order
        return (probabilities * (dlogits[0] - probabilities @ dlogits[0]))[patterns].tolist()

    def measured(policy):
        return (policy(tokens)[shared].softmax(dim=1)[0] - probabilities)[patterns].tolist()

    teaching = influence(model, tokens, states, advantages)  # (N, N) twice
    different = [batch.responses.index(response) for response in dict.fromkeys(batch.responses)][:3]
    some = torch.zeros_like(states)
    some[different] = states[different]
    policies = model, after_stage_1(config, seed, task, model)
    with torch.no_grad():
        updates = sgd, {"classifier.weight": -LR * by_hand}, adam
        happened = [measured(moved(model, update)) for update in updates]
    return {
        "prompt": prompt,
        "responses": list(batch.responses),
        "rewards": batch.rewards[0].tolist(),
        "advantages": advantages.tolist(),
        "tokens": count,
        "residuals": g[:, patterns].tolist(),
        "pushes": (advantages @ g)[patterns].tolist(),
        "feature_norm": features[0, end].norm().item(),
        "rows_by_hand": by_hand[patterns].norm(dim=1).tolist(),
        "rows_by_autograd": gradients["classifier.weight"][patterns].norm(dim=1).tolist(),
        "probabilities": probabilities[patterns].tolist(),
        "by_R": change(by_R),
        "by_G": change(by_G),
        "after": happened[0],
        "after_W": happened[1],
        "adam_by_R": change(adam_by_R),
        "adam_by_G": change(adam_by_G),
        "adam_after": happened[2],
        "labels": [labels(task, row, marks) for row, marks in zip(tokens, mask, strict=True)],
        "influence": [(LR / count * part).tolist() for part in teaching],
        "kernel_rows": different,
        "kernels": [[block.tolist() for block in kernel_blocks(policy, tokens, some)] for policy in policies],
    }


def labels(task, row, mask):
    """The response tokens of a row as text, `.` for the end token."""
    return ["." if token == task.end_token else task.decode([token]) for token in row[mask].tolist()]
