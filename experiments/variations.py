"""What an arm or a flag can change in RL: other judges in the verifier's place, other ways to descend."""

import functools

import torch

import minicfrl
from minicfrl import Addition, RLConfig, rollout

# ---------------------------------------------------------------------------- other judges in the verifier's place


def kl_divergence(logits, reference):
    """KL(softmax(logits) || softmax(reference)) in nats: (..., V) twice -> (...)."""
    logp = logits.log_softmax(dim=-1)
    return (logp.exp() * (logp - reference.log_softmax(dim=-1))).sum(dim=-1)


def coin_flips(batch, generator):
    """0 or 1, whatever the response: what does RL do without anything to learn?"""
    return torch.randint(2, batch.rewards.shape, generator=generator).to(batch.rewards.dtype)


def self_certainty(batch, generator=None):
    """KL(uniform || pi) in nats, averaged over the response's states (Zhao et al., arXiv 2505.19590)."""
    mask = batch.mask[:, -batch.logits.size(1) :]
    certainty = kl_divergence(torch.zeros_like(batch.logits), batch.logits)  # (R, L)
    return (certainty.masked_fill(~mask, 0.0).sum(dim=1) / mask.sum(dim=1)).view_as(batch.rewards)


def log_probability(batch, generator=None):
    """log pi(response) in nats. Its policy gradient (no std) is exactly minus that of the responses' entropy:
    grad H = -E[log pi grad log pi] - E[grad log pi], and the last term is 0. Our derivation."""
    return batch.logp.masked_fill(~batch.mask[:, 1:], 0.0).sum(dim=1).view_as(batch.rewards)


def graded(batch, generator):
    """The share of the answer's digits that are right, and Gaussian noise of .1: a grade such as a reward model's."""
    length = int(batch.mask[0].int().argmax())  # of the prompts
    task, grades = Addition((length - 2) // 2), []
    for prompt, response in zip(batch.tokens[:, :length].tolist(), batch.responses, strict=True):
        right = f"{sum(task.operands(task.decode(prompt))):0{task.digits + 1}d}"
        answer = task.answer(response) or ""
        grades.append(sum(x == y for x, y in zip(answer, right, strict=False)) / max(len(answer), len(right)))
    noise = torch.randn(batch.rewards.shape, generator=generator)
    return torch.tensor(grades, dtype=batch.rewards.dtype).view_as(batch.rewards) + 0.1 * noise


JUDGES = {"verifier": RLConfig.reward, "coin-flips": coin_flips, "graded": graded}


# ------------------------------------------------------------------------------------------------ other ways to descend


class KeptAdam(torch.optim.Adam):
    """Adam that goes on with what it knew of a parameter, where a stage before trained it."""

    def __init__(self, groups, **settings):
        super().__init__(groups, **settings)
        for p in minicfrl._parameters(self):
            self.state[p] = vars(p).setdefault("adam", {})


class ClippedAdam(torch.optim.Adam):
    """Adam on gradients of norm 1 at most, that of all parameters together."""

    def step(self):
        torch.nn.utils.clip_grad_norm_(minicfrl._parameters(self), 1.0)
        super().step()


minicfrl.OPTIMIZERS.update(
    {
        "adam-kept": KeptAdam,
        "adam-clipped": ClippedAdam,
        "adam-beta2": functools.partial(torch.optim.Adam, betas=(0.9, 0.95)),
        "adamw": functools.partial(torch.optim.AdamW, weight_decay=0.1),
    }
)


def train_twice(model, task, config, draws, clip=0.2):
    """As minicfrl.train_rl, without its KL penalty, but each batch is learnt from twice, the second time by PPO's
    clipped ratio (Schulman et al., arXiv 1707.06347): what has moved by more than `clip` has moved enough."""
    step = 0
    for number, stage in enumerate(config.stages, start=1):
        optimizer = minicfrl._optimizer(model, stage, config.optimizer)
        for _ in range(stage.steps):
            step += 1
            pairs = task.train_pairs[torch.randint(len(task.train_pairs), (config.prompts,), generator=draws)]
            batch = rollout(model, task, [task.prompt(a, b) for a, b in pairs.tolist()], config.samples, draws)
            advantages = minicfrl.group_advantages(config.reward(batch, draws), config.baseline).flatten()
            minicfrl._backward(model, batch, advantages, stage, minicfrl._parameters(optimizer))  # where the ratio is 1
            norm = minicfrl._descend(optimizer)
            model.zero_grad()
            mask, A = batch.mask[:, 1:], advantages[:, None]
            ratio = (minicfrl.sequence_logp(model, batch.tokens) - batch.logp).exp()  # (R, L)
            surrogate = torch.minimum(ratio * A, ratio.clamp(1 - clip, 1 + clip) * A)
            (-surrogate[mask].sum() / mask.sum()).backward(inputs=minicfrl._parameters(optimizer))
            minicfrl._descend(optimizer)
            seen = {"reward": batch.rewards.mean().item(), "tokens": int(batch.mask.sum())}
            yield {"step": step, "stage": number, "gradient_norm": norm, **seen}
