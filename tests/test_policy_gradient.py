"""The policy gradient, checked against what it estimates: on tiny spaces every response and every group is listed."""

import copy
import itertools

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from strategies import batches, led_logits, logits, numbers, policies, vectors
from tiny import ROUNDING, every_response, gradients, loss_of

from minicfrl import centred_log_ratio, classifier_gradient, group_advantages, policy_gradient_loss, sequence_logp
from model import token_logp
from ntk import entropy_change

EXACT = 1e-10  # sums over some hundred outcomes in float64


# ------------------------------------------------------------------------------------------- the enumeration oracle


tokens, masks = every_response()
policies_of_three = policies(T=3, V=3)
seven_rewards = vectors(len(tokens), st.sampled_from((0.0, 1.0)) | numbers)


def listed(policy):
    """The log-probabilities (7, 2) of the 7 responses of up to 2 of 3 tokens, and their mask."""
    return sequence_logp(policy.model, tokens), masks[:, 1:]


def every_group(S):
    """All groups of S of the 7 responses, (7^S, S)."""
    return torch.tensor(list(itertools.product(range(len(tokens)), repeat=S)))


def expected_gradient(policy, advantages):
    """E over all groups of S responses of the gradient of policy_gradient_loss x its token count (the sum form), from
    the groups' advantages (7^S, S). The loss is linear in them, so each group's are weighted by its probability."""
    (logp, mask), S = listed(policy), advantages.size(1)
    groups = every_group(S)
    probability = (logp * mask).sum(dim=1).exp().detach()[groups].prod(dim=1, keepdim=True)
    rows = groups.flatten()
    return -gradients(
        policy.model, policy_gradient_loss(logp[rows], (probability * advantages).flatten(), mask[rows], count=S)
    )


def exact_gradient(policy, value):
    """Autograd of sum over responses of pi(y) value(y), with the value held fixed."""
    logp, mask = listed(policy)
    return gradients(policy.model, ((logp * mask).sum(dim=1).exp() * value).sum())


@given(policy=policies_of_three)
def test_the_listed_responses_are_all_there_are(policy):
    """Their probabilities sum to 1 under any policy."""
    logp, mask = listed(policy)
    assert len(logp) == 7 and abs((logp * mask).sum(dim=1).exp().sum().item() - 1) < ROUNDING


@given(policy=policies_of_three, rewards=seven_rewards, kind=st.sampled_from(["none", "rloo", "mean"]))
@pytest.mark.parametrize("S", [2, 3])
def test_the_expected_estimate_is_the_gradient_of_the_expected_reward(policy, rewards, kind, S):
    """No baseline and leave-one-out are unbiased; a mean that includes the sample gives (S-1)/S of it."""
    estimate = expected_gradient(policy, group_advantages(rewards[every_group(S)], kind))
    exact = exact_gradient(policy, rewards) * ((S - 1) / S if kind == "mean" else 1.0)
    torch.testing.assert_close(estimate, exact, rtol=0, atol=EXACT)


@given(policy=policies_of_three, extra=vectors(len(tokens), st.floats(0.1, 0.9)))
def test_std_turns_the_expected_gradient_where_all_rewards_are_different(policy, extra):
    """The cosine is below 1. (For rewards of two values it is 1: the expected advantage of a response depends on its
    own reward alone, so it is an affine function of that.)"""
    rewards = torch.arange(7.0) ** 2 + extra
    estimate = expected_gradient(policy, group_advantages(rewards[every_group(3)], "std"))
    assert torch.cosine_similarity(estimate, exact_gradient(policy, rewards), dim=0) < 1 - 1e-7


@given(policy=policies_of_three, other=policies_of_three, rewards=seven_rewards, strength=st.sampled_from([0.1, 2.0]))
def test_the_kl_penalty_descends_the_exact_kl(policy, other, rewards, strength):
    """(E6): grad KL(pi || ref) = E[(log pi - log ref) grad log pi], the other term being E[grad log pi] =
    0. Autograd of the exact E[r] - lambda KL is the oracle; the group mean makes it (S-1)/S of that."""
    (logp, mask), reference, S = listed(policy), listed(other)[0].detach(), 2
    rows = every_group(S).flatten()
    log_ratio = centred_log_ratio(logp[rows].detach(), reference[rows], mask[rows], S)
    advantages = group_advantages(rewards[every_group(S)], "mean") - strength * log_ratio
    sequence, sequence_reference = (logp * mask).sum(dim=1), (reference * mask).sum(dim=1)
    kl = (sequence.exp() * (sequence - sequence_reference)).sum()
    exact = gradients(policy.model, (sequence.exp() * rewards).sum() - strength * kl)
    estimate = expected_gradient(policy, advantages)
    torch.testing.assert_close(estimate, (S - 1) / S * exact, rtol=0, atol=EXACT)


@given(groups=st.integers(1, 3), samples=st.integers(1, 4), data=st.data())
def test_the_log_ratio_of_a_response_is_compared_with_its_own_group(groups, samples, data):
    """(E6) by loops: the response's tokens alone count, row p*S + g is sample g of prompt p."""
    P, S, n = groups, samples, groups * samples * 2
    logp, reference = (data.draw(vectors(n, st.floats(-40, 0))).view(-1, 2) for _ in range(2))
    mask = data.draw(vectors(n, st.booleans())).view(-1, 2)
    ratios = [
        sum((x - y).item() for x, y, m in zip(*row, strict=True) if m)
        for row in zip(logp, reference, mask, strict=True)
    ]
    expected = [[ratios[p * S + g] - sum(ratios[p * S : p * S + S]) / S for g in range(S)] for p in range(P)]
    actual = centred_log_ratio(logp, reference, mask, S)
    torch.testing.assert_close(actual, torch.tensor(expected), rtol=0, atol=100 * ROUNDING)


@given(batch=batches(), reward=numbers, kind=st.sampled_from(["mean", "std", "rloo"]))
def test_a_group_of_equal_rewards_has_no_gradient(batch, reward, kind):
    """Its advantages are exactly 0, and so is every product with them."""
    advantages = group_advantages(torch.full((1, len(batch.A)), reward), kind).flatten()
    assert (gradients(batch.model, loss_of(batch.model, batch.tokens, batch.mask, advantages)) == 0).all()


@given(logits=logits(bound=40.0), data=st.data())
def test_unsampled_tokens_get_no_gradient_at_a_state_the_group_shares(logits, data):
    """d L / d logits = sum_i A_i (e_{y_i} - pi) at a shared state, and sum_i A_i = 0: -sum of a token's advantages is
    left, over N."""
    drawn = data.draw(st.lists(st.tuples(st.integers(0, len(logits) - 1), numbers), min_size=2, max_size=5))
    actions, A = torch.tensor([y for y, _ in drawn]), group_advantages(torch.tensor([[r for _, r in drawn]]), "mean")[0]
    shared, ones = logits.clone().requires_grad_(), torch.ones(len(A), 1, dtype=torch.bool)
    loss = policy_gradient_loss(token_logp(shared.expand(len(A), 1, -1), actions[:, None]), A, ones)
    expected = torch.zeros_like(logits).index_add(0, actions, -A / len(A))
    torch.testing.assert_close(torch.autograd.grad(loss, shared)[0], expected, rtol=0, atol=10 * ROUNDING)


@given(batch=batches(rows=(2, 6)))
def test_a_token_that_the_whole_group_shares_gets_no_gradient_under_one_token_count(batch):
    """With one weight for all tokens the log-probability of the shared first token gets sum_i A_i = 0. (With 1/|o_i|
    weights it would get sum_i A_i/|o_i|, which is 0 only if the lengths happen to balance.)"""
    advantages, mask = group_advantages(batch.A[None], "mean")[0], batch.mask[:, batch.prompt :]
    logp = torch.zeros(mask.shape, requires_grad=True)
    (gradient,) = torch.autograd.grad(policy_gradient_loss(logp, advantages, mask), logp)
    assert abs(gradient[:, 0].sum()) < ROUNDING


# ---------------------------------------------------------------------------------------- the same batch, written twice


def assert_same(gradient, expected):
    torch.testing.assert_close(gradient, expected, rtol=0, atol=ROUNDING * max(100, expected.abs().max().item() * 100))


def gradient_of(batch, tokens=None, mask=None, A=None, count=None, model=None):
    """That of (E3), of a batch or of another that says the same."""
    given = (new if new is not None else old for new, old in zip((tokens, mask, A), batch.parts, strict=True))
    model = model or batch.model
    return gradients(model, loss_of(model, *given, count))


@given(batch=batches(), data=st.data())
def test_padding_leaves_the_gradient_alone(batch, data):
    """Rewriting every token after a response's end, or appending more, leaves the gradient as it is: causal attention
    keeps padding out of earlier states, the mask keeps it out of the sum."""
    tokens, mask = batch.tokens, batch.mask
    seen = mask | (torch.arange(tokens.size(1)) < batch.prompt)
    other = data.draw(vectors(tokens.numel(), st.integers(0, batch.policy.V - 1))).view_as(tokens)
    rewritten = torch.where(seen, tokens, other)
    assert_same(gradient_of(batch, rewritten), gradient_of(batch))
    if tokens.size(1) < batch.policy.T:
        assert_same(
            gradient_of(batch, *(torch.nn.functional.pad(x, (0, 1)) for x in (tokens, mask))), gradient_of(batch)
        )


@given(batch=batches(), data=st.data())
def test_a_policy_that_returns_the_last_logits_alone_scores_their_tokens_as_one_that_returns_all(batch, data):
    """And no others."""
    whole, first = sequence_logp(batch.model, batch.tokens), data.draw(st.integers(0, batch.prompt - 1))
    batch.model.forward = lambda tokens: type(batch.model).forward(batch.model, tokens)[:, first:]
    last = sequence_logp(batch.model, batch.tokens)
    assert torch.equal(last[:, first:], whole[:, first:]) and not last[:, :first].any()


@given(batch=batches(), data=st.data())
def test_the_batch_twice_or_in_another_order_has_the_same_gradient(batch, data):
    """N doubles as the sum does, and a sum has no order. (A mean over responses would do as well: the cuts below tell
    the two apart.)"""
    order = data.draw(st.permutations(range(len(batch.A))))
    assert_same(gradient_of(batch, *(x[order] for x in batch.parts)), gradient_of(batch))
    assert_same(gradient_of(batch, *(torch.cat((x, x)) for x in batch.parts)), gradient_of(batch))


@given(batch=batches(rows=(2, 6)), data=st.data())
def test_the_gradient_does_not_depend_on_the_micro_batch_split(batch, data):
    """The parts share one token count, so their gradients add up; a mean of the parts' own means would not."""
    cuts = data.draw(st.sets(st.integers(1, len(batch.A) - 1)))
    edges, count = [0, *sorted(cuts), len(batch.A)], int(batch.mask.sum())
    parts = [gradient_of(batch, *(x[a:b] for x in batch.parts), count) for a, b in itertools.pairwise(edges)]
    assert_same(sum(parts), gradient_of(batch))


@given(batch=batches(), data=st.data())
def test_a_token_s_number_does_not_matter(batch, data):
    """With the vocabulary relabelled, the embedding's and W's rows move along, and so do their gradients."""
    order = torch.tensor(data.draw(st.permutations(range(batch.policy.V))))  # a new number's old one
    model, W = copy.deepcopy(batch.model), batch.model.classifier.weight
    with torch.no_grad():
        for weight in (model.classifier.weight, model.body.token_embedding.weight):
            weight.copy_(weight[order])
    renamed, plain = gradient_of(batch, order.argsort()[batch.tokens], model=model), gradient_of(batch)
    size = W.numel()  # those of W are the last, those of the embedding the first
    for part in (slice(0, size), slice(-size, None)):
        assert_same(renamed[part].view_as(W), plain[part].view_as(W)[order])
    assert_same(renamed[size:-size], plain[size:-size])


def test_a_masked_token_of_probability_zero_does_no_harm():
    """0 x -inf would be NaN: masked log-probabilities are replaced, not multiplied."""
    logp = torch.tensor([[-1.0, -torch.inf]])
    assert policy_gradient_loss(logp, torch.tensor([2.0]), torch.tensor([[True, False]])) == 2.0


@given(batch=batches())
def test_on_the_first_inner_step_the_clipped_ppo_gradient_is_the_policy_gradient(batch):
    """The ratio pi/pi_old is exactly 1, strictly inside the clip range, and its gradient is grad log pi."""
    logp, weights = sequence_logp(batch.model, batch.tokens), batch.A[:, None] * batch.mask[:, 1:]
    ratio = (logp - logp.detach()).exp()
    ppo = -torch.minimum(ratio * weights, ratio.clamp(0.8, 1.2) * weights).sum() / batch.mask.sum()
    assert_same(gradient_of(batch), gradients(batch.model, ppo))


# ------------------------------------------------------------------------------------------------------ the hand-made W


def by_hand(batch):
    """(E4)"""
    features = batch.model.features(batch.tokens).detach()[:, :-1]
    logits = batch.model.classifier(features).detach()
    return classifier_gradient(features, logits, batch.tokens[:, 1:], batch.A, batch.mask[:, 1:])


@given(batch=batches())
def test_the_classifier_gradient_by_hand_is_autograd_s(batch):
    """(E4) against autograd of (E3), which shares no code with it."""
    (autograd,) = torch.autograd.grad(loss_of(batch.model, *batch.parts), batch.model.classifier.weight)
    assert_same(by_hand(batch), autograd)


@given(batch=batches())
def test_an_sgd_step_on_the_classifier_has_low_rank_and_keeps_column_sums(batch):
    """dW = sum_i A_i g_i phi_i^T has rank <= min(N, V-1, d), where rows without an advantage do not count in N, and
    1^T dW = 0, since 1^T g_i = 1 - 1 = 0."""
    dW, N = by_hand(batch), int((batch.mask & (batch.A != 0)[:, None]).sum())
    assert torch.linalg.matrix_rank(dW, atol=1e-10) <= min(N, batch.policy.V - 1, batch.policy.d)
    assert dW.sum(dim=0).abs().max() < 10 * ROUNDING


def test_an_adam_step_on_the_classifier_does_not_keep_column_sums():
    """The counter-example: Adam's first step is the sign of the gradient, (1, -1, -1) for V = 3: sum -1."""
    W = torch.nn.Parameter(torch.zeros(3, 1))
    ones = torch.ones(1, 1, dtype=torch.bool)
    W.grad = classifier_gradient(torch.ones(1, 1, 1), torch.zeros(1, 1, 3), torch.tensor([[0]]), torch.ones(1), ones)
    torch.optim.Adam([W], lr=0.1).step()
    assert abs(W.sum().item() + 0.1) < 1e-6  # 1e-6: Adam's epsilon beside gradients of order 1


# ----------------------------------------------------------------------------------------- sampler and trainer disagree


@given(drawn=led_logits(), tau=st.sampled_from([0.3, 0.7, 0.95]))
def test_sampling_below_temperature_1_alone_lowers_the_expected_entropy(drawn, tau):
    """Under a CONSTANT reward the expected step along (E4) is df = q - pi, q the sampling distribution. At q = pi it is
    0; at q = pi_tau it sharpens, and above temperature 1 it flattens: the first-order change of entropy is negative, or
    positive (found numerically, not proved)."""
    logits, _, _ = drawn
    V = len(logits)
    every = torch.arange(V)[:, None]

    def expected_entropy_change(tau):
        q, one = (logits / tau).softmax(dim=-1), torch.ones(V, 1, dtype=torch.bool)
        step = -classifier_gradient(torch.ones(V, 1, 1), logits.expand(V, 1, V), every, q, one, count=1)
        return entropy_change(logits[None], step.T).item()

    assert expected_entropy_change(tau) < 0 < expected_entropy_change(1 / tau)
    assert abs(expected_entropy_change(1.0)) < ROUNDING


# -------------------------------------------------------------------------------------------------------- bad arguments


def test_shapes_that_disagree_and_empty_masks_are_refused():
    logp, advantages, mask = torch.zeros(2, 3), torch.ones(2), torch.ones(2, 3, dtype=torch.bool)
    for arguments, message in (
        ((logp, advantages, mask[:, :2]), r"mask \(2, 2\) torch.bool does not fit"),
        ((logp, torch.ones(3), mask), r"'advantages': \(3,\)"),
        ((logp, advantages, ~mask), "mask selects no token"),
        ((logp[0], torch.ones(3), mask[0]), r"mask \(3,\) torch.bool"),  # would broadcast
        ((logp, advantages, mask.long()), "torch.int64"),
    ):
        with pytest.raises(ValueError, match=message):
            policy_gradient_loss(*arguments)
    features, logits, actions = torch.zeros(2, 3, 4), torch.zeros(2, 3, 5), torch.zeros(2, 3, dtype=torch.long)
    with pytest.raises(ValueError, match=r"\(2, 2\)"):
        classifier_gradient(features, logits, actions[:, :2], advantages, mask)
    with pytest.raises(ValueError, match="mask selects no token"):
        classifier_gradient(features, logits, actions, advantages, ~mask)
