"""The policy gradient, checked against what it estimates: on tiny spaces every response and every group is listed."""

import itertools

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tiny import ROUNDING, every_response, generator, gradients, random_batch, seeds, tiny_gpt

from minicfrl import (
    centred_log_ratio,
    classifier_gradient,
    entropy,
    group_advantages,
    policy_gradient_loss,
    sequence_logp,
    token_logp,
)

EXACT = 1e-10  # sums over some hundred outcomes in float64


# ------------------------------------------------------------------------------------------- the enumeration oracle


def listed_policy(seed):
    """A policy with 3 tokens, its 7 responses of up to 2, their log-probabilities (7, 2) and random rewards (7,)."""
    model = tiny_gpt(seed, vocab_size=3, block_size=3, n_layer=1, n_head=1, n_embd=4)
    tokens, mask = every_response()
    logp = sequence_logp(model, tokens)
    rewards = torch.randint(-2, 3, (len(tokens),), generator=generator(seed)).double()
    return model, logp, mask[:, 1:], rewards


def expected_gradient(model, logp, mask, advantages_of_group, S):
    """E over all groups of S responses of the gradient of policy_gradient_loss x its token count (the sum form)."""
    probability = (logp * mask).sum(dim=1).exp().detach()  # (7,)
    total = 0.0
    for group in itertools.product(range(len(logp)), repeat=S):
        group = torch.tensor(group)
        loss = policy_gradient_loss(logp[group], advantages_of_group(group), mask[group]) * mask[group].sum()
        total = total + probability[group].prod() * loss / S
    return -gradients(model, total)


def exact_gradient(model, logp, mask, value):
    """Autograd of sum over responses of pi(y) value(y), with the value held fixed."""
    return gradients(model, ((logp * mask).sum(dim=1).exp() * value).sum())


def test_the_listed_responses_are_all_there_are():
    """Their probabilities sum to 1 under any policy."""
    _, logp, mask, _ = listed_policy(0)
    assert len(logp) == 7 and abs((logp * mask).sum(dim=1).exp().sum().item() - 1) < ROUNDING


@given(seed=seeds, kind=st.sampled_from(["none", "rloo", "mean"]), S=st.integers(2, 3))
def test_the_expected_estimate_is_the_gradient_of_the_expected_reward(seed, kind, S):
    """No baseline and leave-one-out are unbiased; a mean that includes the sample gives (S-1)/S of it."""
    model, logp, mask, rewards = listed_policy(seed)
    estimate = expected_gradient(model, logp, mask, lambda g: group_advantages(rewards[g][None], kind)[0], S)
    scale = (S - 1) / S if kind == "mean" else 1.0
    exact = scale * exact_gradient(model, logp, mask, rewards)
    torch.testing.assert_close(estimate, exact, rtol=0, atol=EXACT)


@given(seed=seeds)
def test_std_normalisation_changes_the_direction_of_the_expected_gradient(seed):
    """Dividing by a std of the sample is no constant factor. For generic rewards the cosine is below 1."""
    model, logp, mask, rewards = listed_policy(seed)
    rewards = rewards + torch.rand(7, generator=generator(seed))
    estimate = expected_gradient(model, logp, mask, lambda g: group_advantages(rewards[g][None], "std")[0], 3)
    exact = exact_gradient(model, logp, mask, rewards)
    assert torch.cosine_similarity(estimate, exact, dim=0) < 1 - 1e-7


@given(seed=seeds, strength=st.sampled_from([0.1, 0.5, 2.0]))
def test_the_kl_penalty_descends_the_exact_kl(seed, strength):
    """(E6): grad KL(pi || ref) = E[(log pi - log ref) grad log pi], the other term being E[grad log pi] =
    0. Autograd of the exact E[r] - lambda KL is the oracle; the group mean makes it (S-1)/S of that."""
    model, logp, mask, rewards = listed_policy(seed)
    reference = listed_policy(seed + 1)[1].detach()
    S = 2

    def advantages(group):
        log_ratio = centred_log_ratio(logp[group].detach(), reference[group], mask[group], S)
        return (group_advantages(rewards[group][None], "mean") - strength * log_ratio)[0]

    sequence, sequence_reference = (logp * mask).sum(dim=1), (reference * mask).sum(dim=1)
    kl = (sequence.exp() * (sequence - sequence_reference)).sum()
    exact = gradients(model, (sequence.exp() * rewards).sum() - strength * kl)
    estimate = expected_gradient(model, logp, mask, advantages, S)
    torch.testing.assert_close(estimate, (S - 1) / S * exact, rtol=0, atol=EXACT)


@given(seed=seeds)
def test_the_kl_penalty_is_zero_at_the_reference(seed):
    """log pi - log pi = 0, bit for bit."""
    model, tokens, mask, _ = random_batch(seed)
    logp = sequence_logp(model, tokens).detach()
    assert (centred_log_ratio(logp, logp, mask[:, 1:], 2) == 0).all()


@given(seed=seeds, P=st.integers(1, 4), S=st.integers(1, 4))
def test_the_log_ratio_of_a_response_is_compared_with_its_own_group(seed, P, S):
    """(E6) by loops: the response's tokens alone count, row p*S + g is sample g of prompt p."""
    draw = generator(seed)
    logp, reference = torch.randn(2, P * S, 3, generator=draw)
    mask = torch.rand(P * S, 3, generator=draw) < 0.7
    ratios = [
        sum((x - y).item() for x, y, m in zip(*row, strict=True) if m)
        for row in zip(logp, reference, mask, strict=True)
    ]
    expected = [[ratios[p * S + g] - sum(ratios[p * S : p * S + S]) / S for g in range(S)] for p in range(P)]
    actual = centred_log_ratio(logp, reference, mask, S)
    torch.testing.assert_close(actual, torch.tensor(expected), rtol=0, atol=10 * ROUNDING)


@given(seed=seeds, kind=st.sampled_from(["mean", "std"]))
def test_a_group_of_equal_rewards_has_no_gradient(seed, kind):
    """Its advantages are exactly 0, and so is every product with them."""
    model, tokens, mask, _ = random_batch(seed)
    advantages = group_advantages(torch.full((1, 4), 0.1), kind).flatten()
    loss = policy_gradient_loss(sequence_logp(model, tokens), advantages, mask[:, 1:])
    assert (gradients(model, loss) == 0).all()


@given(seed=seeds, shared=st.integers(1, 3))
def test_unsampled_tokens_get_no_gradient_at_a_state_the_group_shares(seed, shared):
    """d L / d logits = sum_i A_i (e_{y_i} - pi) at a shared state, and sum_i A_i = 0."""
    logits = torch.randn(5, generator=generator(seed), requires_grad=True)
    actions = torch.tensor([0, 1, shared, 0])
    rewards = torch.tensor([[1.0, 0.0, 0.0, 1.0]])
    logp = token_logp(logits.expand(4, 1, 5), actions[:, None])
    loss = policy_gradient_loss(logp, group_advantages(rewards, "mean")[0], torch.ones(4, 1, dtype=torch.bool))
    (gradient,) = torch.autograd.grad(loss, logits)
    unsampled = [token for token in range(5) if token not in actions]
    assert gradient[unsampled].abs().max() < ROUNDING
    assert gradient[0] < 0  # ... while the rewarded token's logit rises


@given(seed=seeds, lengths=st.lists(st.integers(1, 5), min_size=4, max_size=4))
def test_a_token_that_the_whole_group_shares_gets_no_gradient_under_one_token_count(seed, lengths):
    """With one weight for all tokens the shared first token gets sum_i A_i = 0. With 1/|o_i| weights it gets
    sum_i A_i/|o_i|, which is not 0 unless the lengths happen to balance."""
    L, advantages = 5, group_advantages(torch.tensor([[1.0, 0.0, 0.0, 0.0]]), "mean")[0]
    logp = torch.randn(4, L, generator=generator(seed), requires_grad=True)
    mask = torch.arange(L) < torch.tensor(lengths)[:, None]
    (gradient,) = torch.autograd.grad(policy_gradient_loss(logp, advantages, mask), logp)
    assert abs(gradient[:, 0].sum().item()) < ROUNDING
    per_sequence = (advantages / torch.tensor(lengths)).sum()
    weights = (mask / mask.sum(dim=1, keepdim=True))[:, 0]  # of each row's first token under 1/|o_i|
    assert abs((advantages * weights).sum() - per_sequence) < ROUNDING
    assert (abs(per_sequence) < ROUNDING) == (abs(3 / lengths[0] - sum(1 / n for n in lengths[1:])) < ROUNDING)


# ---------------------------------------------------------------------------------------------------- masks and batches


@given(seed=seeds)
def test_the_loss_does_not_depend_on_padding(seed):
    """Rewriting every token after a response's end, or appending more, leaves loss and gradient as they are: causal
    attention keeps padding out of earlier states, the mask keeps it out of the sum."""
    model, tokens, mask, advantages = random_batch(seed, length=3)
    seen = mask | (torch.arange(5) < 2)
    rewritten = torch.where(seen, tokens, (tokens + 1) % 5)
    longer = torch.cat((rewritten, tokens[:, :1]), dim=1), torch.cat((mask, torch.zeros(4, 1, dtype=torch.bool)), dim=1)
    results = []
    for some_tokens, some_mask in ((tokens, mask), (rewritten, mask), longer):
        loss = policy_gradient_loss(sequence_logp(model, some_tokens), advantages, some_mask[:, 1:])
        results.append(torch.cat((loss.detach()[None], gradients(model, loss))))
    torch.testing.assert_close(results[0], results[1], rtol=0, atol=100 * ROUNDING)
    torch.testing.assert_close(results[0], results[2], rtol=0, atol=100 * ROUNDING)


def test_a_masked_token_of_probability_zero_does_no_harm():
    """0 x -inf would be NaN: masked log-probabilities are replaced, not multiplied."""
    logp = torch.tensor([[-1.0, -torch.inf]])
    loss = policy_gradient_loss(logp, torch.tensor([2.0]), torch.tensor([[True, False]]))
    assert loss == 2.0


@given(seed=seeds, cuts=st.sets(st.integers(1, 5)))
def test_the_gradient_does_not_depend_on_the_micro_batch_split(seed, cuts):
    """The parts share one token count, so their gradients add up; a mean of the parts' own means would not."""
    model, tokens, mask, advantages = random_batch(seed, rows=6)
    count = int(mask.sum())
    whole = gradients(model, policy_gradient_loss(sequence_logp(model, tokens), advantages, mask[:, 1:]))
    edges = [0, *sorted(cuts), 6]
    parts = 0.0
    for a, b in itertools.pairwise(edges):
        logp = sequence_logp(model, tokens[a:b])
        parts = parts + gradients(model, policy_gradient_loss(logp, advantages[a:b], mask[a:b, 1:], count))
    torch.testing.assert_close(parts, whole, rtol=0, atol=100 * ROUNDING)


@given(seed=seeds)
def test_on_the_first_inner_step_the_clipped_ppo_gradient_is_the_policy_gradient(seed):
    """The ratio pi/pi_old is exactly 1, strictly inside the clip range, and its gradient is grad log pi."""
    model, tokens, mask, advantages = random_batch(seed)
    logp, weights = sequence_logp(model, tokens), advantages[:, None] * mask[:, 1:]
    ratio = (logp - logp.detach()).exp()
    ppo = -torch.minimum(ratio * weights, ratio.clamp(0.8, 1.2) * weights).sum() / mask.sum()
    plain = policy_gradient_loss(logp, advantages, mask[:, 1:])
    torch.testing.assert_close(gradients(model, ppo), gradients(model, plain), rtol=0, atol=ROUNDING)


# ------------------------------------------------------------------------------------------------------ the hand-made W


@given(seed=seeds)
def test_the_classifier_gradient_by_hand_is_autograd_s(seed):
    """(E4) against autograd of (E3), which shares no code with it."""
    model, tokens, mask, advantages = random_batch(seed)
    loss = policy_gradient_loss(sequence_logp(model, tokens), advantages, mask[:, 1:])
    (autograd,) = torch.autograd.grad(loss, model.classifier.weight)
    features = model.features(tokens)[:, :-1]
    by_hand = classifier_gradient(features, model.classifier(features), tokens[:, 1:], advantages, mask[:, 1:])
    torch.testing.assert_close(by_hand, autograd, rtol=0, atol=10 * ROUNDING)


@given(seed=seeds)
def test_the_classifier_gradient_by_hand_agrees_with_finite_differences(seed):
    """Along one random direction, central difference with step 1e-5: truncation and rounding are both near 1e-10."""
    model, tokens, mask, advantages = random_batch(seed)
    features = model.features(tokens)[:, :-1].detach()
    W = model.classifier.weight.detach()
    direction = torch.randn(W.shape, generator=generator(seed))

    def loss(weight):
        return policy_gradient_loss(token_logp(features @ weight.T, tokens[:, 1:]), advantages, mask[:, 1:])

    slope = (loss(W + 1e-5 * direction) - loss(W - 1e-5 * direction)) / 2e-5
    by_hand = classifier_gradient(features, features @ W.T, tokens[:, 1:], advantages, mask[:, 1:])
    torch.testing.assert_close((by_hand * direction).sum(), slope, rtol=1e-7, atol=1e-8)


@given(seed=seeds, states=st.integers(1, 8), vocab_size=st.integers(2, 6), d=st.integers(1, 6))
def test_an_sgd_step_on_the_classifier_has_low_rank_and_keeps_column_sums(seed, states, vocab_size, d):
    """dW = sum_i A_i g_i phi_i^T has rank <= min(N, V-1, d), and 1^T dW = 0, since 1^T g_i = 1 - 1 = 0."""
    draw = generator(seed)
    features, logits = torch.randn(1, states, d, generator=draw), torch.randn(1, states, vocab_size, generator=draw)
    actions = torch.randint(vocab_size, (1, states), generator=draw)
    mask = torch.ones(1, states, dtype=torch.bool)
    dW = -0.1 * classifier_gradient(features, logits, actions, torch.ones(1), mask)
    assert torch.linalg.matrix_rank(dW, atol=1e-10) <= min(states, vocab_size - 1, d)
    assert dW.sum(dim=0).abs().max() < ROUNDING


def test_an_adam_step_on_the_classifier_does_not_keep_column_sums():
    """The counter-example: Adam's first step is the sign of the gradient, (1, -1, -1) for V = 3: sum -1."""
    W = torch.nn.Parameter(torch.zeros(3, 1))
    ones = torch.ones(1, 1, dtype=torch.bool)
    W.grad = classifier_gradient(torch.ones(1, 1, 1), torch.zeros(1, 1, 3), torch.tensor([[0]]), torch.ones(1), ones)
    torch.optim.Adam([W], lr=0.1).step()
    assert abs(W.sum().item() + 0.1) < 1e-6  # 1e-6: Adam's epsilon beside gradients of order 1


# ----------------------------------------------------------------------------------------- sampler and trainer disagree


@given(seed=seeds, tau=st.sampled_from([0.3, 0.7, 0.95]))
def test_sampling_below_temperature_1_alone_lowers_the_expected_entropy(seed, tau):
    """Under a CONSTANT reward the expected step is df = q - pi, q the sampling distribution. At q = pi it is 0; at q =
    pi_tau it sharpens: the first-order change of entropy, by autograd, is negative (found numerically, not proved)."""
    logits = torch.randn(5, generator=generator(seed), requires_grad=True)
    logp, one = logits.log_softmax(dim=-1), torch.ones(1, 1, dtype=torch.bool)

    def expected_entropy_change(q):
        loss = sum(q[y] * policy_gradient_loss(logp[y].view(1, 1), torch.ones(1), one) for y in range(5))
        (gradient,) = torch.autograd.grad(loss, logits, retain_graph=True)
        (slope,) = torch.autograd.grad(entropy(logits), logits)
        return -(slope * gradient).sum().item()

    assert expected_entropy_change((logits.detach() / tau).softmax(dim=-1)) < 0
    assert abs(expected_entropy_change(logits.detach().softmax(dim=-1))) < ROUNDING


# -------------------------------------------------------------------------------------------------------- bad arguments


def test_shapes_that_disagree_and_empty_masks_are_refused():
    logp, advantages, mask = torch.zeros(2, 3), torch.ones(2), torch.ones(2, 3, dtype=torch.bool)
    with pytest.raises(ValueError, match=r"mask \(2, 2\) torch.bool does not fit"):
        policy_gradient_loss(logp, advantages, mask[:, :2])
    with pytest.raises(ValueError, match=r"'advantages': \(3,\)"):
        policy_gradient_loss(logp, torch.ones(3), mask)
    with pytest.raises(ValueError, match="mask selects no token"):
        policy_gradient_loss(logp, advantages, ~mask)
    features, logits, actions = torch.zeros(2, 3, 4), torch.zeros(2, 3, 5), torch.zeros(2, 3, dtype=torch.long)
    with pytest.raises(ValueError, match=r"mask \(3,\) torch.bool"):  # would broadcast
        policy_gradient_loss(torch.zeros(3), torch.ones(3), torch.ones(3, dtype=torch.bool))
    with pytest.raises(ValueError, match="torch.int64"):
        policy_gradient_loss(logp, advantages, mask.long())
    with pytest.raises(ValueError, match=r"\(2, 2\)"):
        classifier_gradient(features, logits, actions[:, :2], advantages, mask)
    with pytest.raises(ValueError, match="mask selects no token"):
        classifier_gradient(features, logits, actions, advantages, ~mask)
