"""Other judges in the verifier's place, and Adam that is not made anew: what an arm can change in its RLConfig."""

import torch


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


class KeptAdam(torch.optim.Adam):
    """Adam that goes on with what it knew of a parameter, where a stage before trained it."""

    def __init__(self, groups, **settings):
        super().__init__(groups, **settings)
        for group in self.param_groups:
            for p in group["params"]:
                self.state[p] = vars(p).setdefault("adam", {})
