"""What an arm or a flag can change in RL: other judges in the verifier's place, other ways to descend."""

import functools

import torch
from torch.nn.utils import clip_grad_norm_, get_total_norm

from minicfrl import Addition, RLConfig, group_advantages, rollout, sequence_logp

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
        for group in self.param_groups:
            for p in group["params"]:
                self.state[p] = vars(p).setdefault("adam", {})


class ClippedAdam(torch.optim.Adam):
    """Adam on gradients of norm 1 at most, that of all parameters together."""

    def step(self):
        clip_grad_norm_([p for group in self.param_groups for p in group["params"]], 1.0)
        super().step()


# What an RLConfig can have as its optimizer, by the names that the flag has.
OPTIMIZERS = {
    "adam": "adam",
    "sgd": "sgd",
    "adam-kept": KeptAdam,
    "adam-clipped": ClippedAdam,
    "adam-beta2": functools.partial(torch.optim.Adam, betas=(0.9, 0.95)),
    "adamw": functools.partial(torch.optim.AdamW, weight_decay=0.1),
}


def train_twice(model, task, config, draws, clip=0.2):
    """As minicfrl.train_rl, without its KL penalty, but each batch is learnt from twice, by PPO's clipped ratio
    (Schulman et al., arXiv 1707.06347). The first time the ratio is 1 and this is (E3); the second time what has moved
    by more than `clip` has moved enough."""
    make = {"adam": torch.optim.Adam, "sgd": torch.optim.SGD}.get(config.optimizer, config.optimizer)
    step, W = 0, model.classifier.weight
    for number, stage in enumerate(config.stages, start=1):
        lr_of_W = stage.lr if stage.classifier_lr is None else stage.classifier_lr
        begins = "" if stage.trains == "all" else f"{stage.trains}."
        named = [p for name, p in model.named_parameters() if f"{name}.".startswith(begins)]
        optimizer = make([{"params": [p], "lr": lr_of_W if p is W else stage.lr} for p in named])
        for _ in range(stage.steps):
            step += 1
            pairs = task.train_pairs[torch.randint(len(task.train_pairs), (config.prompts,), generator=draws)]
            batch = rollout(model, task, [task.prompt(a, b) for a, b in pairs.tolist()], config.samples, draws)
            A, mask = group_advantages(config.reward(batch, draws), config.baseline).view(-1, 1), batch.mask[:, 1:]
            norms = []
            for _ in range(2):
                model.zero_grad()
                ratio = (sequence_logp(model, batch.tokens) - batch.logp).exp()  # (B, T-1)
                surrogate = torch.minimum(ratio * A, ratio.clamp(1 - clip, 1 + clip) * A)
                (-surrogate[mask].sum() / mask.sum()).backward(inputs=named)
                norms.append(get_total_norm([p.grad for p in named if p.grad is not None]).item())
                optimizer.step()
            seen = {"reward": batch.rewards.mean().item(), "tokens": int(mask.sum())}
            yield {"step": step, "stage": number, "gradient_norm": norms[0], **seen}
