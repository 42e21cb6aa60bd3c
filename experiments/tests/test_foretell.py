"""What foretells: an estimate that is unbiased, listed batch by batch, and what came of it, by hand."""

import itertools
import math
from types import SimpleNamespace

import pytest
import torch
from tiny import generator, tiny_gpt
from tiny_runs import tiny

from experiments import foretell
from minicfrl import Addition, group_advantages

OF_W = torch.arange(6) < 4


def batches():
    """(probability, gradient) of every batch of a policy with two tokens, W (2, 2) and phi (2,), which is all the body.
    A batch is two samples of one prompt, of which the first token is right."""
    W, phi = torch.tensor([[0.5, -0.2], [0.1, 0.4]]), torch.tensor([1.0, 0.3])
    p = (W @ phi).softmax(dim=0)
    for pair in itertools.product((0, 1), repeat=2):
        A = group_advantages(torch.tensor([[float(y == 0) for y in pair]]), "mean")[0]
        e = torch.eye(2)[list(pair)] - p  # (2, 2): a row for each sample
        of_W, of_phi = torch.einsum("s,sv,d->vd", A, e, phi), torch.einsum("s,sv,vd->d", A, e, W)
        yield p[list(pair)].prod().item(), torch.cat((of_W.flatten(), of_phi))


def test_the_squared_mean_gradient_is_unbiased():
    """Over all sequences of five batches. The square of their mean is not: noise adds to it."""
    mean = sum(p * g for p, g in batches())
    estimate, square = torch.zeros(6), torch.zeros(6)
    for sequence in itertools.product([*batches()], repeat=5):
        weight, gradients = math.prod(p for p, _ in sequence), [g for _, g in sequence]
        estimate += weight * next(foretell.moments(gradients))[0]
        square += weight * torch.stack(gradients).mean(dim=0) ** 2
    torch.testing.assert_close(estimate, mean**2, atol=1e-12, rtol=0)
    assert (square > mean**2).all()


def test_rewards_on_another_scale_foretell_the_same():
    """All shares are ratios. Adam's step does not see the scale either."""
    gradients = [g + 1 for g in torch.randn(20, 6, generator=generator(0))]
    assert foretell.shares([7 * g for g in gradients], OF_W) == pytest.approx(foretell.shares(gradients, OF_W))


def test_without_noise_rho_is_the_share_of_the_absolute_gradient():
    """mu^2 / rms is |mu| then. A body whose gradient averages to 0 has no part in rho, but has in the plain share."""
    still = foretell.shares([torch.tensor([1.0, 1, 1, 1, -2, 2])] * 20, OF_W)
    assert still["rho20"] == pytest.approx(0.5) == pytest.approx(still["plain20"])
    noisy = foretell.shares([torch.tensor([1.0, 1, 1, 1, s, -s]) for s in (2, -2) * 10], OF_W)
    assert noisy["rho20"] == 1 and noisy["plain20"] == pytest.approx(0.5)


def test_a_look_before_training_leaves_the_policy_as_it_was():
    """To the bit, and tells how often it is right: hardly ever."""
    model, task = tiny_gpt(0, Addition().vocab_size, Addition().block_size), Addition()
    before = [p.clone() for p in model.parameters()]
    row = foretell.known(model, task, dict(prompts=4, samples=4), generator(0))
    assert all(map(torch.equal, before, model.parameters())) and 0 <= row["right"] < 0.1


@pytest.mark.parametrize(
    "rewards, share", [([1, 1, 0, 0], 1), ([1, 0, 1, 0], 0), ([1, 1, 1, 0], 1 / 3), ([0, 0, 0, 0], 0)]
)
def test_what_the_first_token_decides_is_its_share_of_the_variance(rewards, share, monkeypatch):
    """Tokens 1 and 2 begin two responses each: the variance of their means, over that of all."""
    tokens, mask = torch.tensor([[9, 1, 5], [9, 1, 6], [9, 2, 5], [9, 2, 6]]), torch.tensor([[False, True, True]] * 4)
    batch = SimpleNamespace(tokens=tokens, mask=mask, rewards=torch.tensor(rewards).double().view(2, 2))

    def updates(model, task, config, generator):
        for _ in range(20):
            config.reward(batch, generator)
            model.weight.grad = torch.ones_like(model.weight)
            yield {}

    monkeypatch.setattr(foretell, "train_rl", updates)
    row = foretell.known(torch.nn.Linear(2, 2, bias=False), None, {}, None)
    assert (row["right"], row["by_first"]) == pytest.approx((sum(rewards) / 4, share))


def course(x, out, seed, arm):
    """Accuracy rises by a fiftieth an update at the best rate of everything, by less at others, and twice as fast with
    W fast; with seed 805 not at all."""
    rise = {"rl-0.0008": 0.02, "fast-classifier-0.0008x20": 0.04}.get(arm.name, 0.01) * (seed != 805)
    looks = x.looks[:1] if arm.name == "sft" else x.looks[1:]
    return [{"step": step, "accuracy": 0.1 + rise * step} for step in looks]


def test_the_outcome_is_the_time_to_half_of_plain_rl_s_rise_at_its_best_rate(tmp_path, monkeypatch):
    """Ten of twenty updates against five. Where plain RL does not rise both count with all."""
    monkeypatch.setattr(foretell, "rows_of", course)
    x = tiny("rl", rl_steps=20, n=5, curves=("accuracy",))
    rows = [*foretell.came(x, tmp_path, 1)]
    assert [(row["rate"], row["plain"], row["fast"]) for row in rows] == [(8e-4, 10, 5)] * 2 + [(8e-4, 20, 20)]
    assert rows[0]["ahead"] == pytest.approx(0.1) and rows[0]["fast_end"] == pytest.approx(0.9)
