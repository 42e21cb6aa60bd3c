"""When does a step raise confidence? What is true, with its proof, and what is not, with its counter-example.

One sampled token y with advantage A, at a state with policy pi_i, moves the logits of a state x with policy pi by c g
through the representation component, where g = e_y - pi_i and c = eta A <phi(x), phi_i>. H is the entropy of pi, and
S_a stands for pi_a (log pi_a + H); the S_a add up to 0.

In real numbers every strict inequality here is strict everywhere. In float64 it is strict for logits within +-5, and
where the likeliest token leads by at most 5. Near certainty 1 - pi(y) rounds to 0: there, at +-40, the same holds but
for rounding, as one test says."""

import itertools
import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from strategies import Policy, batches, led_logits, logits, logits_and_token, steps, vectors
from tiny import ROUNDING

from minicfrl import classifier_gradient, entropy, group_advantages
from ntk import confidence_change, empirical_ntk, entropy_change


def sgd_push(logits, y, phi, advantages=(1.0,), at=None):
    """What one step of SGD of size 1 along (E4), times its N, adds to the logits at features `at` (those of the sample
    by default): one-token samples `y` of states with these logits (n, V) and features (n, d)."""
    actions, weights = torch.tensor(y)[:, None], torch.tensor(advantages)
    gradient = classifier_gradient(phi[:, None], logits[:, None], actions, weights, torch.ones_like(actions).bool(), 1)
    W = torch.zeros_like(gradient, requires_grad=True)
    W.grad = gradient
    torch.optim.SGD([W], lr=1.0).step()
    return W.detach() @ (phi[0] if at is None else at)


def push(logits, y, c=1.0):
    """c g, where g = e_y - pi, as a real step on W makes it at features whose inner product with the sample's is c."""
    return sgd_push(logits[None], [y], torch.tensor([[1.0, 0.0]]), at=torch.tensor([c, 3.0]))


def policy(*probabilities):
    return torch.tensor(probabilities).log()


def d_entropy(logits, dlogits):
    return entropy_change(logits[None], dlogits[None]).item()


def d_confidence(logits, dlogits):
    return confidence_change(logits[None], dlogits[None]).item()


def expected(logits, value):
    """The mean of value(y) over y ~ softmax(logits), by listing every y."""
    return sum(p * value(y) for y, p in enumerate(logits.softmax(dim=0).tolist()))


# ------------------------------------------------------------------------------------- first-order changes (E9)


@given(drawn=led_logits(), data=st.data())
def test_the_predicted_changes_are_finite_differences_of_entropy_and_top_1_probability(drawn, data):
    """Central differences with step 1e-4, whose error is of order 1e-7 for changes up to 4. The lead is larger than
    what they move, because at a tie the maximum has no derivative."""
    logits, m, _ = drawn
    dlogits = data.draw(vectors(len(logits)))
    ahead, behind = logits + 1e-4 * dlogits, logits - 1e-4 * dlogits
    slope = (entropy(ahead) - entropy(behind)).item() / 2e-4
    assert d_entropy(logits, dlogits) == pytest.approx(slope, abs=1e-6, rel=1e-6)
    top = (ahead.softmax(dim=0)[m] - behind.softmax(dim=0)[m]).item() / 2e-4
    assert d_confidence(logits, dlogits) == pytest.approx(top, abs=1e-6, rel=1e-6)


@given(drawn=logits_and_token(bound=40.0), c=steps)
def test_one_sample_at_its_own_state_changes_entropy_and_top_1_probability_by_these_formulas(drawn, c):
    """dH = -c (S_y - E S) and d pi_m = c pi_m (1{y=m} - pi_m - pi_y + |pi|^2): (E9) with df = c (e_y - pi)."""
    logits, y = drawn
    pi = logits.softmax(dim=0)
    m = pi.argmax().item()
    S = pi * (pi.log() + entropy(logits))
    assert d_entropy(logits, push(logits, y, c)) == pytest.approx(-c * (S[y] - pi @ S).item(), rel=1e-9, abs=1e-12)
    bracket = float(y == m) - pi[m] - pi[y] + pi @ pi
    assert d_confidence(logits, push(logits, y, c)) == pytest.approx(c * (pi[m] * bracket).item(), rel=1e-9, abs=1e-12)


@given(logits=logits(bound=40.0), data=st.data(), shift=st.floats(-100, 100))
def test_a_common_shift_of_the_logits_or_of_their_change_does_nothing(logits, data, shift):
    """d log pi = (I - 1 pi^T) df, and (I - 1 pi^T) 1 = 0: a common shift leaves pi and its change as they are."""
    dlogits, rounding = data.draw(vectors(len(logits))), ROUNDING * (1 + abs(shift))
    for change in (d_entropy, d_confidence):
        assert change(logits, dlogits + shift) == pytest.approx(change(logits, dlogits), abs=rounding)
        assert change(logits + shift, dlogits) == pytest.approx(change(logits, dlogits), abs=rounding)


@given(logits=logits(bound=40.0), data=st.data())
def test_a_token_s_number_does_not_matter(logits, data):
    """Entropy and its change are sums over the vocabulary, which has no order. (So is the top-1 probability's, but for
    a tie, where the first of the likeliest tokens is taken.)"""
    dlogits, order = data.draw(vectors(len(logits))), data.draw(st.permutations(range(len(logits))))
    assert d_entropy(logits[order], dlogits[order]) == pytest.approx(d_entropy(logits, dlogits), abs=ROUNDING)


# ---------------------------------------------------------------------------- what the representation component does


@given(drawn=logits_and_token(bound=40.0), c=steps)
def test_a_positive_inner_product_pushes_the_sampled_token_most(drawn, c):
    """The corrected form of the paper's argmax proposition, c > 0: g_y = 1 - pi_i(y) >= 0 > -pi_i(j) = g_j."""
    logits, y = drawn
    pushed = push(logits, y, c)
    assert pushed.argmax() == y and (pushed == pushed.max()).sum() == 1


@given(drawn=logits_and_token(bound=40.0), c=steps)
def test_a_negative_inner_product_pushes_the_sampled_token_least_and_the_likeliest_other_most(drawn, c):
    """c < 0: of the others, -c pi_i(j) is largest where pi_i is. So such a sample helps the likely tokens that were not
    sampled. At c = 0 nothing moves, so that all tie: "nonnegative" is not enough for the proposition."""
    logits, y = drawn
    pushed, pi = push(logits, y, -c), logits.softmax(dim=0)
    assert pushed.argmin() == y and (pushed == pushed.min()).sum() == 1
    pi[y] = -1
    assert pushed[pi.argmax()] == pushed.max()
    assert not push(logits, y, 0.0).any()


@given(drawn=logits_and_token(states=2), c=steps)
def test_a_positive_inner_product_raises_the_sampled_token_at_every_state_and_at_any_step(drawn, c):
    """The strongest true form of "limited variability": adding c g lowers the odds of every j against y, as
    g_y - g_j = 1 - pi_i(y) + pi_i(j) > 0, whatever pi(x) is. To first order log pi(y) rises by at least
    c (1 - pi_i(y)) (1 - pi(y))."""
    (own, other), y = drawn
    pi_i, pi = own.softmax(dim=0), other.softmax(dim=0)
    cg = push(own, y, c)
    assert (other + cg).log_softmax(dim=0)[y] > other.log_softmax(dim=0)[y]
    assert cg[y] - pi @ cg >= c * (1 - pi_i[y]) * (1 - pi[y]) - ROUNDING


@given(own=logits(states=3, bound=40.0), data=st.data())
def test_when_all_samples_push_with_positive_weight_a_sampled_token_is_pushed_most(own, data):
    """An unsampled token gets -sum c_i pi_i < 0, while the pushes add up to 0: so the largest push is not on an
    unsampled token."""
    sampled = data.draw(st.lists(st.integers(0, own.size(1) - 1), min_size=3, max_size=3))
    positive = st.floats(1e-3, 4)
    weights, phi, at = (data.draw(vectors(n, positive)) for n in (3, 12, 4))  # all inner products are positive
    pushed = sgd_push(own, sampled, phi.view(3, 4), weights.tolist(), at)
    assert pushed.argmax().item() in sampled


@given(own=logits(states=2), c=steps)
def test_a_centred_group_pushes_with_positive_weights_where_an_inner_product_is_negative(own, c):
    """Advantages (1, -1) and inner products (c, -c) make both weights c, as advantages (1, 1) and (c, c) would. With
    inner products that are all positive a centred group has a negative weight, or none at all."""
    y, at = [0, own.size(1) - 1], torch.tensor([c])
    pushed = sgd_push(own, y, torch.tensor([[1.0], [-1.0]]), (1.0, -1.0), at)
    assert torch.equal(pushed, sgd_push(own, y, torch.tensor([[1.0], [1.0]]), (1.0, 1.0), at))
    assert pushed.argmax().item() in y


@given(batch=batches())
def test_if_all_features_are_equal_a_centred_batch_moves_all_states_alike_by_tokens_advantages(batch):
    """The limit that does occur: equal features make one policy pi everywhere, and a group baseline makes sum A = 0, so
    sum_i A_i (e_{y_i} - pi) = sum_i A_i e_{y_i}. Every state's logits move by that times |phi|^2 / N (phi is the final
    norm's bias): RL is then a bandit without context, whatever the policy is, and the token whose advantages have the
    largest sum is pushed most."""
    model, tokens = batch.model, batch.tokens
    with torch.no_grad():
        model.body.norm.weight.zero_()
    advantages = group_advantages(batch.A[None], "mean")[0]
    mask = batch.mask & (batch.mask.cumsum(dim=1) == 1)  # one token of each response: else longer ones weigh more
    before = model(tokens).detach()
    phi, W = model.features(tokens).detach(), model.classifier.weight
    W.grad = classifier_gradient(phi[:, :-1], before[:, :-1], tokens[:, 1:], advantages, mask[:, 1:])
    torch.optim.SGD([W], lr=1.0).step()
    sums = torch.zeros(model.config.vocab_size).index_add(0, tokens[mask], advantages)
    change = (model(tokens) - before).detach()
    torch.testing.assert_close(change, (sums * (phi[0, 0] @ phi[0, 0]) / mask.sum()).expand_as(change))


def test_with_a_negative_advantage_a_token_nobody_sampled_can_be_pushed_most():
    """Two of three tokens are punished at one state: all that they lose goes to the third."""
    logits = policy(0.4, 0.4, 0.2)
    assert (push(logits, 0, -1.0) + push(logits, 1, -1.0)).argmax() == 2


def test_through_the_gradient_component_another_token_can_be_pushed_most():
    """No argmax claim for R + G: a row of W that points along y's row and is longer gets the larger push. Here in a
    GPT: W_1 = 3 W_0, other rows 0, y = 0 gives G g = (1, 3, 0, ...) (g_0 + 3 g_1) |J^T W_0|^2."""
    model, tokens = Policy(V=5).model, torch.tensor([[0, 1, 2]])
    mask = torch.tensor([[False, False, True]])
    with torch.no_grad():
        row = -model.features(tokens)[mask][0]  # so that token 1 is unlikely
        model.classifier.weight.copy_(torch.stack((row, 3 * row, *torch.zeros(3, len(row)))))
    g = push(model(tokens)[mask][0].detach(), 0)
    kernel = empirical_ntk(model, tokens, mask)
    assert (kernel.gradient[0, :, 0] @ g).argmax() == 1
    assert (kernel.representation[0, 0] * g).argmax() == 0


# ----------------------------------------------------------------------------------- what one sample does to confidence


@given(drawn=led_logits(), data=st.data(), c=steps)
def test_a_sample_of_the_likeliest_token_lowers_entropy_at_every_state_where_it_is_likeliest(drawn, data, c):
    """c > 0, y = argmax pi(x), any pi_i. dH = c (sum_j pi_i(j) S_j - S_y), and S_y is the maximum of S: where
    log pi_a + H < 0 S is negative, and elsewhere it is a product of two factors that grow with pi_a. It holds at
    any step size, as y stays the likeliest on the whole way, and for any pi_i. Top-1 is pi(y) there, which rises."""
    at, y, _ = drawn
    cg = push(data.draw(logits(V=(len(at), len(at)))), y, c)
    assert d_entropy(at, cg) < 0
    assert entropy(at + cg) < entropy(at)
    assert d_confidence(at, cg) > 0


@given(drawn=led_logits(), c=steps)
def test_a_sample_of_any_other_token_lowers_the_old_top_1_probability_at_any_step(drawn, c):
    """At the sample's own state, y != m: adding c g lowers the odds of m against y, and raises them against no token,
    as g_m - g_j = pi_j - pi_m <= 0. So there, to first order, top-1 rises if and only if the sampled token is the
    likeliest; a large step can make y the likeliest, and surer than m was."""
    logits, m, y = drawn
    cg = push(logits, y, c)
    assert d_confidence(logits, cg) < 0
    assert (logits + cg).log_softmax(dim=0)[m] < logits.log_softmax(dim=0)[m]


@given(drawn=led_logits(bound=40.0, least=2.0**-30), c=steps)
def test_near_certainty_and_near_ties_a_sample_s_own_state_obeys_but_for_eps(drawn, c):
    """The logits reach from -40 to 80, and a lead can be 1e-9. c g is exact to an eps. To move the logits by an eps
    moves the logarithm of a probability by at most two, and an entropy by at most E|log pi + H| <= 2 H <= 2 log V."""
    logits, m, y = drawn
    for token in (m, y):
        cg = push(logits, token, c)
        assert (logits + cg).log_softmax(dim=0)[token] >= logits.log_softmax(dim=0)[token] - ROUNDING
    assert d_entropy(logits, push(logits, m, c)) <= ROUNDING
    assert entropy(logits + push(logits, m, c)) <= entropy(logits) + ROUNDING
    assert d_confidence(logits, push(logits, m, c)) >= -ROUNDING
    assert (logits + cg).log_softmax(dim=0)[m] <= logits.log_softmax(dim=0)[m] + ROUNDING


def test_entropy_can_rise_though_every_advantage_and_every_inner_product_is_positive():
    """pi = (.9, .1), the second token sampled, c = .2: from .325 to .400 nats. Positive inner products alone do not
    make a policy confident."""
    logits = policy(0.9, 0.1)
    assert entropy(logits).item() == pytest.approx(0.325, abs=1e-3)
    assert entropy(logits + push(logits, 1, 0.2)).item() == pytest.approx(0.400, abs=1e-3)


@given(logits=logits(bound=40.0), data=st.data())
def test_under_a_constant_reward_the_mean_first_order_change_of_confidence_is_zero(logits, data):
    """E_{y~pi}[e_y - pi] = 0, through the representation component and through any other kernel. So the rise of
    confidence needs something else: advantages that prefer the likely, the optimiser, clipping, sampling noise."""
    V = len(logits)
    for kernel in (torch.eye(V), data.draw(vectors(V * V)).view(V, V)):
        for d in (d_entropy, d_confidence):
            assert abs(expected(logits, lambda y, d=d, K=kernel: d(logits, K @ push(logits, y)))) < V * ROUNDING


# -------------------------------------------------------------------------------- what makes confidence rise on average


def expected_steps(logits, advantages):
    """df of the expected policy gradient at one state: vanilla, pi (A - E A), and natural, A."""
    pi = logits.softmax(dim=0)
    return pi * (advantages - pi @ advantages), advantages


@given(logits=logits(bound=40.0), data=st.data())
def test_advantages_that_grow_with_probability_never_raise_mean_entropy(logits, data):
    """Natural: dH = -Cov(log pi, A) <= 0 by Chebyshev's sum inequality. Vanilla: A is a constant plus nonnegative
    multiples of indicators of top sets C, and for one of them -dH = P (1-P) (E[S|C] - E[S|not C]), P = pi(C). If some a
    in C has log pi_a + H < 0, then this holds for every token outside C: S < 0 there, and E S = Cov(pi, log pi) >= 0,
    so that E[S|C] >= 0. If none has, S grows with pi on C and is smaller outside."""
    values, rank = logits.unique(return_inverse=True)  # ties in pi are ties in A
    growth = data.draw(vectors(len(values), st.sampled_from((0.0, 1.0)) | st.floats(0, 4)))
    for df in expected_steps(logits, growth.cumsum(dim=0)[rank]):
        assert d_entropy(logits, df) <= 10 * ROUNDING


@given(logits=logits(bound=40.0), data=st.data())
def test_if_the_likeliest_token_is_also_the_best_its_probability_does_not_fall_on_average(logits, data):
    """Vanilla: sum_a pi_a [pi_a (A_a - E A)] <= max_a pi_a (A_a - E A) = pi_m (A_m - E A), which is m's own push.
    Natural: E A <= A_m."""
    advantages = data.draw(vectors(len(logits)))
    advantages[logits.argmax()] = advantages.max()
    for df in expected_steps(logits, advantages):
        assert d_confidence(logits, df) >= -ROUNDING


def test_rewarding_only_the_least_likely_token_raises_entropy():
    """The counter-example to "advantages always sharpen": they must not fall with probability."""
    logits = policy(0.6, 0.3, 0.1)
    for df in expected_steps(logits, torch.tensor([0.0, 0.0, 1.0])):
        assert d_entropy(logits, df) > 0


@pytest.mark.parametrize("p, sign", [(0.6, -1), (0.95, 1)])
def test_one_step_of_pure_sampling_noise_lowers_mean_entropy_at_0_6_and_raises_it_at_0_95(p, sign):
    """Two tokens, 8 samples, every advantage 1, c = .05, all outcomes listed. The first order is 0; the second, half of
    H'' times the variance, changes sign where z tanh(z/2) = 1, z = log(p / (1-p)). That is one step: repeated, noise
    still ends in collapse, since z wanders until p (1-p), which scales its steps, is nearly 0."""
    logits = policy(p, 1 - p)
    mean = 0.0
    for k in range(9):
        after = logits + push(logits, 0, 0.05 * k) + push(logits, 1, 0.05 * (8 - k))
        mean += math.comb(8, k) * p**k * (1 - p) ** (8 - k) * entropy(after).item()
    assert sign * (mean - entropy(logits).item()) > 1e-6
    root = math.log(0.824 / 0.176)
    assert root * math.tanh(root / 2) == pytest.approx(1, abs=1e-3)


# -------------------------------------------------------------------------------------------------- what optimisers add


def step_of(optimizer_class, logits, y, phi, state=None, **settings):
    """What a first step of an optimiser on one sample adds to the logits at its features phi; or one from a `state`."""
    W = torch.zeros(len(logits), len(phi), requires_grad=True)
    optimizer = optimizer_class([W], **settings)
    if state:
        optimizer.state[W] = state
    one = torch.ones(1, 1, dtype=torch.bool)
    W.grad = classifier_gradient(phi[None, None], logits[None, None], torch.tensor([[y]]), torch.ones(1), one)
    optimizer.step()
    return W.detach() @ phi


features = vectors(3, st.builds(lambda size, sign: size * sign, st.floats(0.5, 2), st.sampled_from((1.0, -1.0))))


@given(drawn=led_logits(), phi=features)
def test_adam_s_first_step_lowers_entropy_on_average_even_under_a_constant_reward(drawn, phi):
    """One sample, no baseline. It is a sign step: dW = lr sign(g) sign(phi)^T, so df = lr |phi|_1 (2 e_y - 1), and, as
    the S_a add up to 0, the mean over y ~ pi of dH is -2 lr |phi|_1 E_pi S < 0 unless pi is uniform, as E_pi S =
    Cov(pi, log pi). SGD's mean is 0, and a group baseline takes the whole step away."""
    logits, _, _ = drawn

    def mean_change(optimizer_class):
        return expected(logits, lambda y: d_entropy(logits, step_of(optimizer_class, logits, y, phi, lr=1e-3)))

    assert abs(mean_change(torch.optim.SGD)) < ROUNDING
    pi = logits.softmax(dim=0)
    E_S = (pi * pi * (pi.log() + entropy(logits))).sum().item()
    # Adam divides by |gradient| + 1e-8: the sign, but for gradients that are as small, of very unlikely tokens.
    assert mean_change(torch.optim.Adam) == pytest.approx(-2e-3 * phi.abs().sum().item() * E_S, rel=0.05)


@given(drawn=led_logits(V=(2, 3)), s=st.floats(0.05, 0.45))
def test_a_sign_step_on_random_rewards_lowers_entropy_if_they_are_rare_and_raises_it_as_much_if_frequent(drawn, s):
    """Groups of 4, rewards 1 with chance s whatever the token, all outcomes listed. Swapping 0 and 1 flips every
    centred advantage, hence the step: E dH(1-s) = -E dH(s), and 0 at s = 1/2. The push is formed as sum_i A_i e_{y_i},
    as the pi terms cancel: a rounding error in place of an exact 0 would become a full step. Entropy falls for rare
    rewards in every case drawn; that part is observed, not proved."""
    logits, _, _ = drawn
    V = len(logits)
    groups = torch.tensor(list(itertools.product(range(V), repeat=4)))  # (V^4, 4)
    rewards = torch.tensor(list(itertools.product([0.0, 1.0], repeat=4)))  # (16, 4)
    pushes = torch.einsum("ri,kiv->rkv", group_advantages(rewards, "mean"), torch.eye(V)[groups]).sign()
    changes = entropy_change(logits.expand(pushes[..., 0].numel(), V), pushes.flatten(0, 1)).view(pushes.shape[:2])
    by_rewards = changes @ logits.log_softmax(dim=0)[groups].sum(dim=1).exp()  # (16,), the mean over the groups

    def mean_change(s):
        return (s ** rewards.sum(dim=1) * (1 - s) ** (4 - rewards.sum(dim=1)) @ by_rewards).item()

    assert mean_change(1 - s) == pytest.approx(-mean_change(s), abs=ROUNDING)
    assert abs(mean_change(0.5)) < ROUNDING
    assert mean_change(s) < 0


@given(logits=logits(), phi=features, data=st.data())
def test_once_second_moments_are_settled_the_mean_change_is_zero_again(logits, phi, data):
    """Adam whose second moments no longer move divides by constants: dW = D o (g phi^T), linear in g, and E g = 0. Its
    beta2 is 1 - 1e-12 here, the moments are of order 1, and so many updates are done that it corrects for no start."""
    moments = data.draw(vectors(len(logits) * 3, st.floats(0.1, 1))).view(-1, 3)

    def change(y):
        state = {"step": torch.tensor(1e15), "exp_avg": torch.zeros_like(moments), "exp_avg_sq": moments.clone()}
        return step_of(torch.optim.Adam, logits, y, phi, state, lr=1.0, betas=(0.0, 1 - 1e-12))

    assert expected(logits, change).abs().max() < 1e-9
