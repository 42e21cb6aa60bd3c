"""The second paper's theory (Chen et al., arXiv 2506.04695): RL as selection among patterns, on the patterns alone.

K patterns with logits theta, shares pi = softmax theta, and fixed values p (success rates, or certainties) that the
expected gradient raises: theta'_r = pi_r (p_r - ACC), ACC = sum_r pi_r p_r. `flow` in experiments/report.py follows it.
"""

import itertools
import math
import statistics

import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st
from tiny import ROUNDING, TinyTask, every_response, generator, gradients, seeds, tiny_gpt

from experiments.measures import examine, make_probe, pattern_rates, selection
from experiments.report import flow, flow_slope
from experiments.variations import coin_flips, kl_divergence, log_probability, self_certainty
from minicfrl import Addition, Rollout, rollout, sequence_logp

EXACT = 1e-10  # sums over some dozen responses in float64


def simplex(seed, K):
    """K shares, none of them tiny, and K values in (0, 1)."""
    draw = generator(seed)
    return torch.randn(K, generator=draw).softmax(dim=0), torch.rand(K, generator=draw)


# ------------------------------------------------------------------------------------------------------- the exact flow


@given(seed=seeds, K=st.integers(2, 6))
def test_the_flow_climbs_the_gradient_of_the_accuracy_and_conserves_the_sum_of_logits(seed, K):
    """d ACC / d theta_r = pi_r (p_r - ACC), whose sum is ACC - ACC = 0. Autograd is the oracle."""
    shares, p = simplex(seed, K)
    theta = shares.log().requires_grad_()
    (gradient,) = torch.autograd.grad((theta.softmax(dim=0) * p).sum(), theta)
    torch.testing.assert_close(flow_slope(shares, p), gradient, rtol=0, atol=ROUNDING)
    assert abs(flow_slope(shares, p).sum()) < ROUNDING


@given(seed=seeds, K=st.integers(2, 6))
def test_the_accuracy_never_falls_along_the_flow(seed, K):
    """ACC' = sum_r pi_r^2 (p_r - ACC)^2, the squared norm of the slope. Here along 300 steps of 0.1."""
    shares, p = simplex(seed, K)
    accuracy = torch.stack([(pi * p).sum() for pi in flow(shares, p, steps=300)])
    assert (accuracy.diff() >= -ROUNDING).all()


def share_slope(shares, p, r):
    """pi_r' = pi_r (theta_r' - sum_s pi_s theta_s'), the chain rule through the softmax."""
    slope = flow_slope(shares, p)
    return shares[r] * (slope[r] - (shares * slope).sum())


@given(seed=seeds, K=st.integers(2, 6))
def test_regime_1_the_best_share_rises_at_least_as_fast_as_the_bound(seed, K):
    """If ACC beats every other pattern: pi*' >= pi*^2 eps^2 Delta, with eps = 1 - pi*, Delta = p* - the second best.

    The others' terms in pi*' are then >= 0, which leaves pi*^2 (1 - pi*) (p* - ACC), and p* - ACC >= eps Delta. It
    stays true along the flow, since ACC rises: so pi* is monotone, and d(1/eps)/dt >= pi*_0^2 Delta bounds the time to
    eps by (1/eps - 1/eps_0) / (pi*_0^2 Delta), the O(1/eps) of the paper.
    """
    shares, p = simplex(seed, K)
    best = int(p.argmax())
    shares = 0.5 * shares
    shares[best] += 0.5
    second = p[torch.arange(K) != best].max()
    assume((shares * p).sum() > second)
    eps, Delta = 1 - shares[best], p[best] - second
    assert share_slope(shares, p, best) >= shares[best] ** 2 * eps**2 * Delta - ROUNDING


def test_regime_1_takes_no_longer_than_the_bound():
    """An example integrated: from pi* = .5 to .95 and .99. 2% for the steps of 0.1."""
    shares, p = torch.tensor([0.5, 0.3, 0.2]), torch.tensor([0.9, 0.3, 0.2])
    path = [pi[0].item() for pi in flow(shares, p, steps=4000)]
    assert path == sorted(path)
    for eps in (0.05, 0.01):
        time = 0.1 * next(step for step, share in enumerate(path) if share >= 1 - eps)
        bound = (1 / eps - 2) / (0.25 * 0.6)
        assert 0.1 * bound < time <= 1.02 * bound  # so it is no idle bound either


def test_regime_2_the_best_share_can_fall_before_it_wins():
    """A counter-example to monotony while ACC rises: a mediocre pattern that also beats the average comes first. The
    turning point, .0103, is the same with steps ten and a hundred times smaller."""
    shares, p = torch.tensor([0.02, 0.60, 0.38]), torch.tensor([0.9, 0.5, 0.05])
    path = torch.stack(list(flow(shares, p, steps=4000)))[:, 0]
    assert path.min() == pytest.approx(0.0103, abs=1e-4) and path[-1] > 0.9


@given(seed=seeds, K=st.integers(2, 6))
def test_the_natural_gradient_has_no_entanglement(seed, K):
    """It moves theta by F^+ grad, F = diag pi - pi pi^T. As F p = grad, that is p up to a shift that the softmax does
    not see: log(pi*/pi_r) grows by p* - p_r, whatever the shares. The factor pi_r of the softmax gradient is what
    slows the best pattern down."""
    shares, p = simplex(seed, K)
    fisher = shares.diag() - torch.outer(shares, shares)
    natural = torch.linalg.pinv(fisher, rtol=1e-12) @ flow_slope(shares, p)
    best = p.argmax()
    torch.testing.assert_close(natural[best] - natural, p[best] - p, rtol=0, atol=1e-9)  # a pseudo-inverse's rounding


@given(seed=seeds, K=st.integers(2, 6), beta=st.sampled_from([0.1, 1.0, 10.0]))
def test_with_a_kl_penalty_the_best_policy_tilts_the_reference(seed, K, beta):
    """pi_ref exp(p / beta) / Z maximises E[p] - beta KL(pi || pi_ref): the value falls short of the maximum by
    beta KL(pi || optimum), for any pi."""
    reference, p = simplex(seed, K)
    shares, _ = simplex(seed + 1, K)
    optimum = (reference.log() + p / beta).log_softmax(dim=0)

    def value(logits):
        return (logits.softmax(dim=0) * p).sum() - beta * kl_divergence(logits, reference.log())

    gap = value(optimum) - value(shares.log())
    assert gap.item() == pytest.approx(beta * kl_divergence(shares.log(), optimum).item(), abs=beta * EXACT)


def course_of_feedback(shares, certainty, p):
    """The accuracy along the flow that climbs the certainty."""
    return torch.stack([(pi * p).sum() for pi in flow(shares, certainty, steps=3000, dt=1.0)])


def test_internal_feedback_can_rise_and_end_below_its_start_by_a_confident_wrong_pattern():
    """Garbled, step by step, and confidently wrong. Certainty first trades garbled for step by step, then all for the
    wrong one, as the surest pattern takes all in the end. Without the third pattern accuracy only rises."""
    shares = torch.tensor([0.55, 0.40, 0.05])
    certainty, p = torch.tensor([0.2, 1.0, 1.6]), torch.tensor([0.1, 0.8, 0.2])
    accuracy = course_of_feedback(shares, certainty, p)
    assert accuracy[0] < 0.4 and accuracy.max() > 0.7 and accuracy[-1] < 0.25
    assert (course_of_feedback(shares[:2] / shares[:2].sum(), certainty[:2], p[:2]).diff() >= 0).all()


def test_internal_feedback_can_fall_for_a_while_though_the_surest_pattern_is_the_best():
    """A counter-example to "only by a confident wrong pattern": here the entanglement of regime 2 does it."""
    shares, certainty = torch.tensor([0.05, 0.15, 0.80]), torch.tensor([1.0, 0.95, 0.2])
    accuracy = course_of_feedback(shares, certainty, torch.tensor([1.0, 0.1, 0.0]))
    falls = accuracy.cummax(dim=0).values - accuracy
    assert falls.max() > 0.02 and accuracy[-1] > 0.95


@given(p=st.lists(st.floats(0.01, 0.99), min_size=2, max_size=8))
def test_with_two_answers_the_surest_pattern_is_the_best_or_the_worst(p):
    """KL(U || (p, 1 - p)) = -log(4 p (1 - p)) / 2 is even around 1/2 and grows with |p - 1/2|."""
    p = torch.tensor(p)
    certainty = kl_divergence(torch.zeros(len(p), 2), torch.stack((p, 1 - p), dim=1).log())
    torch.testing.assert_close(certainty, -(4 * p * (1 - p)).log() / 2, rtol=0, atol=ROUNDING)
    surest = p[certainty.argmax()]
    assert min(abs(surest - p.min()), abs(surest - p.max())) < ROUNDING


# ------------------------------------------------------------------------------------ internal rewards, real policies


def all_responses(seed, length):
    """A tiny policy, and every response of up to `length` tokens to one prompt as one Rollout (1, K)."""
    model = tiny_gpt(seed, vocab_size=3, block_size=3, n_layer=1, n_head=1, n_embd=4)
    tokens, mask = every_response(length=length)
    logits = model(tokens).detach()[:, :-1]
    return model, Rollout(tokens, mask, logits, torch.zeros(1, len(tokens)), ("",) * len(tokens))


def expected_policy_gradient(model, batch, rewards):
    """sum_y pi(y) r(y) grad log pi(y), the rewards held fixed."""
    logp = (sequence_logp(model, batch.tokens) * batch.mask[:, 1:]).sum(dim=1)  # (K,)
    return gradients(model, (logp.detach().exp() * rewards.flatten() * logp).sum())


@given(seed=seeds)
def test_the_log_probability_reward_is_exactly_minus_the_entropy_gradient(seed):
    """Over all responses, of autograd's gradient of their exact entropy H = -sum_y pi(y) log pi(y)."""
    model, batch = all_responses(seed, length=2)
    logp = (sequence_logp(model, batch.tokens) * batch.mask[:, 1:]).sum(dim=1)
    minus_entropy = (logp.exp() * logp).sum()
    estimate = expected_policy_gradient(model, batch, log_probability(batch))
    torch.testing.assert_close(estimate, gradients(model, minus_entropy), rtol=0, atol=EXACT)


@given(seed=seeds)
def test_self_certainty_does_not_move_its_own_state(seed):
    """The reward of a single state is the same for every token drawn there, and a constant has no policy gradient: it
    acts by steering to states that are certain later. With two tokens there is such a later state."""
    for length in (1, 2):
        model, batch = all_responses(seed, length)
        gradient = expected_policy_gradient(model, batch, self_certainty(batch))
        assert (gradient.abs().max() < EXACT) == (length == 1)


@given(seed=seeds)
def test_self_certainty_is_the_mean_divergence_of_the_uniform_distribution_from_the_policy(seed):
    """Response by response and state by state, by torch.distributions."""
    task = TinyTask()
    batch = rollout(tiny_gpt(seed, task.vocab_size, task.block_size), task, ["0", "1"], 3, generator(seed))
    uniform = torch.distributions.Categorical(logits=torch.zeros(task.vocab_size))
    expected = []
    for logits, mask in zip(batch.logits, batch.mask[:, 1:], strict=True):
        states = [torch.distributions.Categorical(logits=state) for state in logits[mask]]
        expected.append(sum(torch.distributions.kl_divergence(uniform, state) for state in states) / len(states))
    rewards = self_certainty(batch)
    torch.testing.assert_close(rewards, torch.stack(expected).view(2, 3), rtol=0, atol=ROUNDING)


def test_coin_flips_are_fair_whatever_the_response_and_a_seed_repeats_them():
    """10,000 flips: within 5 standard errors of 1/2."""
    empty = torch.zeros(1, 1)
    for truth in (torch.zeros(100, 100), torch.ones(100, 100)):
        batch = Rollout(empty, empty, empty, truth, ())
        flips = coin_flips(batch, generator(0))
        assert flips.unique().tolist() == [0, 1] and abs(flips.mean() - 0.5) < 5 * 0.5 / 10_000**0.5
        assert (flips == coin_flips(batch, generator(0))).all()


# ------------------------------------------------------------------------------------------- what a change is due to


@given(seed=seeds, B=st.integers(1, 4), K=st.integers(1, 4))
def test_the_change_of_accuracy_is_split_without_a_rest(seed, B, K):
    """(E11), the product rule for finite differences; and what does not change is not the cause."""
    draws = torch.rand(4, B, K, generator=generator(seed))
    before, after = (draws[0], draws[1]), (draws[2], draws[3])
    total = (draws[2] * draws[3] - draws[0] * draws[1]).sum(dim=1).mean().item()
    split = selection(before, after)
    assert split["gain_by_shares"] + split["gain_by_success"] == pytest.approx(total)
    assert selection(before, (draws[0], draws[3]))["gain_by_shares"] == 0
    assert selection(before, (draws[2], draws[1]))["gain_by_success"] == 0


@given(seed=seeds)
def test_shares_and_success_rates_are_those_of_each_prompt(seed):
    """Success is averaged over 400 forced responses to each prompt: within 5 standard errors, at most 0.125, of the
    exact chance, which here is that of the end token, after the pattern's, coming next."""
    task = TinyTask({"a": 1.0, "b": 1.0})
    model, pairs = tiny_gpt(seed, task.vocab_size, task.block_size), task.heldout_pairs.repeat(400, 1)
    shares, success = (values.view(400, 2, 2) for values in pattern_rates(model, task, pairs, generator(seed)))
    for prompt, (pattern, token) in itertools.product((0, 1), enumerate((2, 3))):
        exact = model(torch.tensor([[prompt, token]])).softmax(dim=-1)[0]
        assert shares[0, prompt, pattern].item() == pytest.approx(exact[0, token].item())
        assert success[:, prompt, pattern].mean().item() == pytest.approx(exact[1, task.end_token].item(), abs=0.125)


@given(seed=seeds)
def test_shares_are_read_at_the_end_of_the_prompt(seed):
    """One prompt at a time, of several tokens."""
    task = Addition(1)
    model, pairs = tiny_gpt(seed, task.vocab_size, task.block_size), task.heldout_pairs[:3]
    shares, _ = pattern_rates(model, task, pairs, generator(seed))
    for row, pair in zip(shares, pairs.tolist(), strict=True):
        probabilities = model(torch.tensor([task.encode(task.prompt(*pair))]))[0, -1].softmax(dim=-1)
        torch.testing.assert_close(row, probabilities[task.encode("dsg")], rtol=0, atol=ROUNDING)


@given(seed=seeds)
def test_the_kl_of_responses_is_the_sum_of_the_kls_at_their_states(seed):
    """The chain rule: KL(pi || ref) over all responses is the expectation of the sum over each response's states."""
    model, batch = all_responses(seed, length=2)
    reference, _ = all_responses(seed + 1, length=2)
    mask, logits = batch.mask[:, 1:], reference(batch.tokens).detach()[:, :-1]
    logp, reference_logp = (
        (sequence_logp(policy, batch.tokens).detach() * mask).sum(dim=1) for policy in (model, reference)
    )
    whole = (logp.exp() * (logp - reference_logp)).sum()
    by_state = (logp.exp() * (kl_divergence(batch.logits, logits) * mask).sum(dim=1)).sum()
    torch.testing.assert_close(by_state, whole, rtol=0, atol=EXACT)


@given(seed=seeds)
def test_an_evaluation_says_where_in_the_response_the_policy_changed(seed):
    """Recomputed state by state by torch.distributions; and before any change there is none."""
    task = TinyTask({"a": 1.0})
    start, model = (tiny_gpt(s, task.vocab_size, task.block_size) for s in (seed, seed + 1))
    probe = make_probe(start, task, task.heldout_pairs, generator(seed))
    row = examine(model, task, task.heldout_pairs, probe, generator(seed), samples=8)
    batch = rollout(model, task, ["0", "1"], 8, generator(seed))
    kls, changed = {True: [], False: []}, {True: [], False: []}
    for tokens, mask in zip(batch.tokens, batch.mask, strict=True):
        for t in mask.nonzero().flatten().tolist():
            old, new = (
                torch.distributions.Categorical(logits=policy(tokens[None])[0, t - 1]) for policy in (start, model)
            )
            kls[t == 1].append(torch.distributions.kl_divergence(new, old).item())
            changed[t == 1].append(float(old.probs.argmax() != new.probs.argmax()))
    assert row["kl"] == pytest.approx((sum(kls[True]) + sum(kls[False])) / 16)
    assert row["kl_first"] == pytest.approx(sum(kls[True]) / 16)
    assert row["changed_first"] == sum(changed[True]) / 16
    later = statistics.fmean(changed[False] or [math.nan])  # of no state if every response ends at once
    assert row["changed_later"] == pytest.approx(later, nan_ok=True)
    still = examine(start, task, task.heldout_pairs, probe, generator(seed), samples=8)
    assert still["kl"] == pytest.approx(0, abs=ROUNDING) and still["changed_first"] == 0 and math.isfinite(still["kl"])
