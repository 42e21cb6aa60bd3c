"""The second paper's theory (Chen et al., arXiv 2506.04695): RL as selection among patterns, on the patterns alone.

K patterns with logits theta, shares pi = softmax theta, and fixed values p (success rates, or certainties) that the
expected gradient raises: theta'_r = pi_r (p_r - ACC), ACC = sum_r pi_r p_r.
"""

import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st
from tiny import ROUNDING, generator, seeds

Ks = st.integers(2, 6)


def slope(shares, p):
    """theta' at some shares, (K,) twice."""
    return shares * (p - (shares * p).sum())


def flow(shares, p, steps, dt=0.1):
    """The shares (steps + 1, K) along the flow, by small steps."""
    path = [shares]
    for _ in range(steps):
        path.append((path[-1].log() + dt * slope(path[-1], p)).softmax(dim=0))
    return torch.stack(path)


def simplex(seed, K):
    """K shares, none of them tiny, and K values in (0, 1)."""
    draw = generator(seed)
    return torch.randn(K, generator=draw).softmax(dim=0), torch.rand(K, generator=draw)


@given(seed=seeds, K=Ks)
def test_the_flow_climbs_the_gradient_of_the_accuracy_and_conserves_the_sum_of_logits(seed, K):
    """d ACC / d theta_r = pi_r (p_r - ACC), whose sum is ACC - ACC = 0. Autograd is the oracle."""
    shares, p = simplex(seed, K)
    theta = shares.log().requires_grad_()
    (gradient,) = torch.autograd.grad((theta.softmax(dim=0) * p).sum(), theta)
    torch.testing.assert_close(slope(shares, p), gradient, rtol=0, atol=ROUNDING)
    assert abs(slope(shares, p).sum()) < ROUNDING


@given(seed=seeds, K=Ks)
def test_the_accuracy_never_falls_along_the_flow(seed, K):
    """ACC' = sum_r pi_r^2 (p_r - ACC)^2, the squared norm of the slope. Here along 300 steps of 0.1."""
    shares, p = simplex(seed, K)
    assert ((flow(shares, p, steps=300) @ p).diff() >= -ROUNDING).all()


@given(seed=seeds, K=Ks)
def test_regime_1_the_best_share_rises_at_least_as_fast_as_the_bound(seed, K):
    """If ACC beats every other pattern: pi*' >= pi*^2 eps^2 Delta, with eps = 1 - pi*, Delta = p* - the second best.

    By the chain rule pi*' = pi* (theta*' - sum_s pi_s theta_s'). The others' terms are >= 0, which leaves pi*^2 (1 -
    pi*) (p* - ACC), and p* - ACC >= eps Delta. It stays true along the flow, because ACC rises: so pi* is monotone, and
    d(1/eps)/dt >= pi*_0^2 Delta bounds the time to eps by (1/eps - 1/eps_0) / (pi*_0^2 Delta), the paper's O(1/eps).
    """
    shares, p = simplex(seed, K)
    best = int(p.argmax())
    shares = 0.5 * shares
    shares[best] += 0.5
    second = p[torch.arange(K) != best].max()
    assume((shares * p).sum() > second)
    theta, eps = slope(shares, p), 1 - shares[best]
    rise = shares[best] * (theta[best] - (shares * theta).sum())
    assert rise >= shares[best] ** 2 * eps**2 * (p[best] - second) - ROUNDING


def test_regime_2_the_best_share_can_fall_before_it_wins():
    """A counter-example to monotony while ACC rises: a mediocre pattern that also beats the average comes first. The
    turning point, .0103, is the same with steps ten and a hundred times smaller."""
    path = flow(torch.tensor([0.02, 0.60, 0.38]), torch.tensor([0.9, 0.5, 0.05]), steps=4000)[:, 0]
    assert path.min() == pytest.approx(0.0103, abs=1e-4) and path[-1] > 0.9


@given(seed=seeds, K=Ks)
def test_the_natural_gradient_has_no_entanglement(seed, K):
    """It moves theta by F^+ grad, F = diag pi - pi pi^T. As F p = grad, that is p up to a shift that the softmax does
    not see: log(pi*/pi_r) grows by p* - p_r, whatever the shares. The factor pi_r of the softmax gradient is what
    slows the best pattern down."""
    shares, p = simplex(seed, K)
    fisher = shares.diag() - torch.outer(shares, shares)
    natural = torch.linalg.pinv(fisher, rtol=1e-12) @ slope(shares, p)
    best = p.argmax()
    torch.testing.assert_close(natural[best] - natural, p[best] - p, rtol=0, atol=1e-9)  # a pseudo-inverse's rounding


def test_internal_feedback_can_rise_and_end_below_its_start_by_a_confident_wrong_pattern():
    """Garbled, step by step, and confidently wrong. Certainty first trades garbled for step by step, then all for the
    wrong one, because the surest pattern takes all in the end. Without the third pattern accuracy only rises."""
    shares = torch.tensor([0.55, 0.40, 0.05])
    certainty, p = torch.tensor([0.2, 1.0, 1.6]), torch.tensor([0.1, 0.8, 0.2])
    accuracy = flow(shares, certainty, steps=3000, dt=1.0) @ p
    assert accuracy[0] < 0.4 and accuracy.max() > 0.7 and accuracy[-1] < 0.25
    assert ((flow(shares[:2] / shares[:2].sum(), certainty[:2], 3000, 1.0) @ p[:2]).diff() >= 0).all()
