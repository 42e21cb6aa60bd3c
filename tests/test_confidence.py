"""When does a step raise confidence? What is true, with its proof, and what is not, with its counter-example.

One sampled token y with advantage A, at a state with policy pi_i, moves the logits of a state x with policy pi by c g
through the representation component, where g = e_y - pi_i and c = eta A <phi(x), phi_i>. S_a = pi_a (log pi_a + H).
"""

import itertools
import math

import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st
from tiny import ROUNDING, generator, random_batch, seeds, states, tiny_gpt

from minicfrl import classifier_gradient, entropy, group_advantages
from ntk import confidence_change, empirical_ntk, entropy_change


@st.composite
def logits_and_token(draw, most_tokens=6, states=1):
    """Logits within +-5 of one or more states over one vocabulary, (V,) each, and a token."""
    V = draw(st.integers(2, most_tokens))
    numbers = st.lists(st.floats(-5, 5, width=32, allow_subnormal=False), min_size=V, max_size=V)
    return *(torch.tensor(draw(numbers)) for _ in range(states)), draw(st.integers(0, V - 1))


steps = st.floats(1e-3, 10)


def sgd_push(logits, y, phi, advantages=(1.0,), at=None):
    """What one step of SGD of size 1 along (E4), times its N, adds to the logits at features `at` (those of the sample
    by default): one-token samples `y` of states with these logits (n, V) and features (n, d)."""
    actions, weights = torch.tensor(y)[:, None], torch.tensor(advantages)
    gradient = classifier_gradient(phi[:, None], logits[:, None], actions, weights, torch.ones_like(actions).bool(), 1)
    W = torch.zeros_like(gradient, requires_grad=True)
    W.grad = gradient
    torch.optim.SGD([W], lr=1.0).step()
    return W.detach() @ (phi[0] if at is None else at)


def residual(logits, y):
    """g = e_y - pi, as a real step on W makes it, where the features' inner product is 1."""
    return sgd_push(logits[None], [y], torch.tensor([[0.6, 0.8]]))


def policy(*probabilities):
    return torch.tensor(probabilities).log()


def d_entropy(logits, dlogits):
    return entropy_change(logits[None], dlogits[None]).item()


def d_confidence(logits, dlogits):
    return confidence_change(logits[None], dlogits[None]).item()


def top_two(logits):
    """The likeliest token, and its lead in logits over the next."""
    values, tokens = logits.topk(2)
    return tokens[0].item(), (values[0] - values[1]).item()


def expected(logits, value):
    """The mean of value(y) over y ~ softmax(logits), by listing every y."""
    return sum(p * value(y) for y, p in enumerate(logits.softmax(dim=0).tolist()))


# ------------------------------------------------------------------------------------- first-order changes (E9)


@given(state=logits_and_token(), seed=seeds)
def test_the_predicted_changes_are_finite_differences_of_entropy_and_top_1_probability(state, seed):
    """Central differences with step 1e-4, whose error is of order 1e-8."""
    logits, _ = state
    dlogits = torch.randn(len(logits), generator=generator(seed))
    m, lead = top_two(logits)
    assume(lead > 1e-2)  # at a tie the maximum has no derivative
    ahead, behind = logits + 1e-4 * dlogits, logits - 1e-4 * dlogits
    assert d_entropy(logits, dlogits) == pytest.approx(
        (entropy(ahead) - entropy(behind)).item() / 2e-4, abs=1e-6, rel=1e-6
    )
    top = (ahead.softmax(dim=0)[m] - behind.softmax(dim=0)[m]).item() / 2e-4
    assert d_confidence(logits, dlogits) == pytest.approx(top, abs=1e-6, rel=1e-6)


@given(state=logits_and_token(), c=steps)
def test_one_sample_at_its_own_state_changes_entropy_and_top_1_probability_by_these_formulas(state, c):
    """dH = -c (S_y - E S) and d pi_m = c pi_m (1{y=m} - pi_m - pi_y + |pi|^2): (E9) with df = c (e_y - pi)."""
    logits, y = state
    pi = logits.softmax(dim=0)
    m = pi.argmax().item()
    S = pi * (pi.log() + entropy(logits))
    g = c * residual(logits, y)
    assert d_entropy(logits, g) == pytest.approx(-c * (S[y] - pi @ S).item(), rel=1e-9, abs=1e-12)
    bracket = float(y == m) - pi[m] - pi[y] + pi @ pi
    assert d_confidence(logits, g) == pytest.approx(c * (pi[m] * bracket).item(), rel=1e-9, abs=1e-12)


@given(state=logits_and_token(), seed=seeds, shift=st.floats(-100, 100))
def test_log_probabilities_change_by_df_minus_its_mean_so_a_common_shift_does_nothing(state, seed, shift):
    """d log pi = (I - 1 pi^T) df, hence E_pi[d log pi] = 0: probability only moves from token to token."""
    logits, _ = state
    dlogits = torch.randn(len(logits), generator=generator(seed))
    pi = logits.softmax(dim=0)
    _, dlogp = torch.func.jvp(lambda f: f.log_softmax(dim=0), (logits,), (dlogits,))
    assert (pi @ dlogp).abs() < ROUNDING
    torch.testing.assert_close(dlogp, dlogits - pi @ dlogits, rtol=ROUNDING, atol=ROUNDING)
    rounding = ROUNDING * (1 + abs(shift))
    assert d_entropy(logits, dlogits + shift) == pytest.approx(d_entropy(logits, dlogits), abs=rounding)
    assert d_confidence(logits, dlogits + shift) == pytest.approx(d_confidence(logits, dlogits), abs=rounding)


# ---------------------------------------------------------------------------- what the representation component does


@given(state=logits_and_token(), c=steps)
def test_a_positive_inner_product_pushes_the_sampled_token_most(state, c):
    """The corrected form of the paper's argmax proposition, c > 0: g_y = 1 - pi_i(y) > 0 > -pi_i(j) = g_j."""
    logits, y = state
    push = c * residual(logits, y)
    assert push.argmax() == y and (push == push.max()).sum() == 1


@given(state=logits_and_token(), c=steps)
def test_a_negative_inner_product_pushes_the_sampled_token_least_and_the_likeliest_other_most(state, c):
    """c < 0: of the others, -c pi_i(j) is largest where pi_i is. What was likely gains from what it is not about."""
    logits, y = state
    push, pi = -c * residual(logits, y), logits.softmax(dim=0)
    assert push.argmin() == y and (push == push.min()).sum() == 1
    pi[y] = -1
    assert push[pi.argmax()] == push.max()


@given(state=logits_and_token())
def test_at_inner_product_zero_all_tokens_tie(state):
    """Why "nonnegative" is not enough for the proposition: c = 0 prefers nothing."""
    logits, y = state
    assert torch.equal(0.0 * residual(logits, y), torch.zeros(len(logits)))


@given(state=logits_and_token(states=2), c=steps)
def test_a_positive_inner_product_raises_the_sampled_token_at_every_state_and_at_any_step(state, c):
    """The strongest true form of "limited variability": adding c g lowers the odds of every j against y, as
    g_y - g_j = 1 - pi_i(y) + pi_i(j) > 0, whatever pi(x) is. To first order log pi(y) rises by at least
    c (1 - pi_i(y)) (1 - pi(y)).
    """
    own, other, y = state
    pi_i, pi = own.softmax(dim=0), other.softmax(dim=0)
    g = c * residual(own, y)
    assert (other + g).log_softmax(dim=0)[y] > other.log_softmax(dim=0)[y]
    rate = (g[y] - pi @ g).item()
    assert rate >= c * ((1 - pi_i[y]) * (1 - pi[y])).item() - ROUNDING


@given(state=logits_and_token(states=3), seed=seeds)
def test_when_all_samples_push_with_positive_weight_a_sampled_token_is_pushed_most(state, seed):
    """An unsampled token gets -sum c_i pi_i < 0, while the pushes add up to 0: the largest is not its."""
    *own, _ = state
    draw = generator(seed)
    sampled = torch.randint(len(own[0]), (len(own),), generator=draw).tolist()
    weights = (torch.rand(len(own), generator=draw) + 1e-3).tolist()
    phi = torch.rand(len(own), 4, generator=draw)  # all inner products positive
    push = sgd_push(torch.stack(own), sampled, phi, weights, at=torch.rand(4, generator=draw))
    assert push.argmax().item() in sampled


@given(seed=seeds)
def test_if_all_features_are_equal_a_centred_batch_shifts_all_logits_alike_by_the_advantages_sum(seed):
    """The limit that does occur: equal features make one policy pi everywhere, and a group baseline makes sum A = 0, so
    sum_i A_i (e_{y_i} - pi) = sum_i A_i e_{y_i}. Every state's logits move by that times |phi|^2: RL is then a bandit
    without context, whatever the policy is, and the token whose advantages have the largest sum is pushed most."""
    model, tokens, mask, _ = random_batch(seed)
    with torch.no_grad():
        model.body.norm.weight.zero_()
    advantages = group_advantages(torch.rand(1, len(tokens), generator=generator(seed)), "mean")[0]
    mask = mask & (mask.cumsum(dim=1) == 1)  # one token of each response: else longer ones weigh more
    before = model(tokens).detach()
    logits, phi = before[:, :-1], model.features(tokens).detach()
    W = model.classifier.weight
    W.grad = classifier_gradient(phi[:, :-1], logits, tokens[:, 1:], advantages, mask[:, 1:])
    torch.optim.SGD([W], lr=1.0).step()
    sums = torch.zeros(model.config.vocab_size).index_add(0, tokens[mask], advantages)
    change = (model(tokens) - before).detach()
    torch.testing.assert_close(change, (sums * (phi[0, 0] @ phi[0, 0]) / mask.sum()).expand_as(change))


def test_with_a_negative_advantage_a_token_nobody_sampled_can_be_pushed_most():
    """Two of three tokens are punished at one state: all that they lose goes to the third."""
    logits = policy(0.4, 0.4, 0.2)
    push = -residual(logits, 0) - residual(logits, 1)
    assert push.argmax() == 2


def test_through_the_gradient_component_another_token_can_be_pushed_most():
    """No argmax claim for R + G: a row of W that points along y's row and is longer gets the larger push. Here in a
    GPT: W_1 = 3 W_0, other rows 0, y = 0 gives G g = (1, 3, 0, ...) (g_0 + 3 g_1) |J^T W_0|^2."""
    model = tiny_gpt(0)
    tokens, mask = states(model, 1, 4, 0)
    mask[:, :-1] = False
    with torch.no_grad():
        row = -model.features(tokens)[mask][0]  # so that token 1 is unlikely
        model.classifier.weight.copy_(torch.stack((row, 3 * row, *torch.zeros(3, len(row)))))
    logits = model(tokens)[mask][0].detach()
    kernel = empirical_ntk(model, tokens, mask)
    g = residual(logits, 0)
    assert (kernel.gradient[0, :, 0] @ g).argmax() == 1
    assert (kernel.representation[0, 0] * g).argmax() == 0


# ----------------------------------------------------------------------------------- what one sample does to confidence


@given(state=logits_and_token(states=2), c=steps)
def test_a_sample_of_the_likeliest_token_lowers_entropy_at_every_state_where_it_is_likeliest(state, c):
    """c > 0, y = argmax pi(x), any pi_i. dH = c (sum_j pi_i(j) S_j - S_y), and S_y is the maximum of S: where
    log pi_a + H < 0 S is negative, and elsewhere it is a product of two factors that grow with pi_a. At any step size:
    y stays likeliest all along the way, and the proof never uses pi_i."""
    own, logits, _ = state
    assume(logits.max() - logits.min() > 1e-2)  # at the uniform policy entropy has its maximum, and dH = 0
    y = logits.argmax().item()
    g = residual(own, y)
    assert d_entropy(logits, c * g) < 0
    assert entropy(logits + c * g) < entropy(logits)
    assert d_confidence(logits, c * residual(logits, y)) > 0  # at its own state top-1 rises too


@given(state=logits_and_token(), c=steps)
def test_a_sample_of_any_other_token_lowers_the_old_top_1_probability_at_any_step(state, c):
    """At the sample's own state, y != m: adding c g lowers the odds of m against y, and raises them against no token,
    as g_m - g_j = pi_j - pi_m <= 0. So there, to first order, top-1 rises if and only if the sampled token is the
    likeliest; a large step can make y the likeliest, and surer than m was."""
    logits, y = state
    m, lead = top_two(logits)
    assume(m != y and lead > 1e-9)  # else rounding makes them equal
    g = residual(logits, y)
    assert d_confidence(logits, c * g) < 0
    assert (logits + c * g).log_softmax(dim=0)[m] < logits.log_softmax(dim=0)[m]


def test_entropy_can_rise_though_every_advantage_and_every_inner_product_is_positive():
    """pi = (.9, .1), the second token sampled, c = .2: from .325 to .400 nats. Positive inner products alone do not
    make a policy confident."""
    logits = policy(0.9, 0.1)
    after = logits + 0.2 * residual(logits, 1)
    assert entropy(logits).item() == pytest.approx(0.325, abs=1e-3)
    assert entropy(after).item() == pytest.approx(0.400, abs=1e-3)


@given(state=logits_and_token(), seed=seeds)
def test_under_a_constant_reward_the_mean_first_order_change_of_confidence_is_zero(state, seed):
    """E_{y~pi}[e_y - pi] = 0, through the representation component and through any other kernel. So the rise of
    confidence needs something else: advantages that prefer the likely, the optimiser, clipping, sampling noise."""
    logits, _ = state
    V = len(logits)
    for kernel in (torch.eye(V), torch.randn(V, V, generator=generator(seed))):
        for d in (d_entropy, d_confidence):
            assert abs(expected(logits, lambda y, d=d, K=kernel: d(logits, K @ residual(logits, y)))) < V * ROUNDING


# -------------------------------------------------------------------------------- what makes confidence rise on average


def expected_steps(logits, advantages):
    """df of the expected policy gradient at one state: vanilla, pi (A - E A), and natural, A."""
    pi = logits.softmax(dim=0)
    return pi * (advantages - pi @ advantages), advantages


@given(state=logits_and_token(), seed=seeds)
def test_advantages_that_grow_with_probability_lower_entropy_on_average(state, seed):
    """Natural: dH = -Cov(log pi, A) <= 0 by Chebyshev's sum inequality. Vanilla: A is a constant plus multiples of
    indicators of top sets C, and for one of them -dH = P (1-P) (E[S|C] - E[S|not C]), P = pi(C). If some a in C has
    log pi_a + H < 0, then so has all of the rest: S < 0 there, E S >= 0 in all, so E[S|C] >= 0. If none has, S grows
    with pi on C and is smaller outside."""
    logits, _ = state
    advantages = torch.randn(len(logits), generator=generator(seed)).sort().values[logits.argsort().argsort()]
    if (equal := logits[:, None] == logits).any():  # ties in pi must be ties in A
        advantages = (equal * advantages).sum(dim=1) / equal.sum(dim=1)
    for df in expected_steps(logits, advantages):
        assert d_entropy(logits, df) <= ROUNDING


@given(state=logits_and_token(), seed=seeds)
def test_if_the_likeliest_token_is_also_the_best_its_probability_does_not_fall_on_average(state, seed):
    """sum_a pi_a [pi_a (A_a - E A)] <= max_a pi_a (A_a - E A) = pi_m (A_m - E A), which is m's own push."""
    logits, _ = state
    advantages = torch.randn(len(logits), generator=generator(seed))
    advantages[logits.argmax()] = advantages.max()
    for df in expected_steps(logits, advantages):
        assert d_confidence(logits, df) >= -ROUNDING


def test_rewarding_only_the_least_likely_token_raises_entropy():
    logits = policy(0.6, 0.3, 0.1)
    for df in expected_steps(logits, torch.tensor([0.0, 0.0, 1.0])):
        assert d_entropy(logits, df) > 0


@pytest.mark.parametrize("p, sign", [(0.6, -1), (0.95, 1)])
def test_one_step_of_pure_sampling_noise_lowers_mean_entropy_only_below_a_probability_of_0_824(p, sign):
    """Two tokens, 8 samples, every advantage 1, c = .05, all outcomes listed. The first order is 0; the second, half of
    H'' times the variance, changes sign where z tanh(z/2) = 1, z = log(p / (1-p)). That is one step: repeated, noise
    still ends in collapse, since z wanders until p (1-p), which scales its steps, is nearly 0."""
    logits = policy(p, 1 - p)
    mean = sum(
        math.comb(8, k) * p**k * (1 - p) ** (8 - k)
        * entropy(logits + 0.05 * (k * residual(logits, 0) + (8 - k) * residual(logits, 1))).item()
        for k in range(9)
    )  # fmt: skip
    assert sign * (mean - entropy(logits).item()) > 1e-6
    root = math.log(0.824 / 0.176)
    assert root * math.tanh(root / 2) == pytest.approx(1, abs=1e-3)


# -------------------------------------------------------------------------------------------------- what optimisers add


@given(state=logits_and_token(), seed=seeds)
def test_adam_s_first_step_lowers_entropy_on_average_even_under_a_constant_reward(state, seed):
    """One sample, no baseline. It is a sign step: dW = lr sign(g) sign(phi)^T, so df = lr |phi|_1 (2 e_y - 1), and the
    mean over y ~ pi of dH is -2 lr |phi|_1 E_pi S < 0 unless pi is uniform, as E_pi S = Cov(pi, log pi). SGD's mean is
    0, and a group baseline takes the whole step away."""
    logits, _ = state
    assume(logits.max() - logits.min() > 1e-2)
    phi = torch.randn(3, generator=generator(seed))

    def mean_change(optimizer_class):
        def change(y):
            W = torch.zeros(len(logits), 3, requires_grad=True)
            optimizer = optimizer_class([W], lr=1e-3)
            W.grad = -torch.outer(residual(logits, y), phi)
            optimizer.step()
            return d_entropy(logits, W.detach() @ phi)

        return expected(logits, change)

    assert abs(mean_change(torch.optim.SGD)) < ROUNDING
    pi = logits.softmax(dim=0)
    E_S = (pi * pi * (pi.log() + entropy(logits))).sum().item()
    # Adam divides by |gradient| + 1e-8: the sign, but for gradients that are as small, of very unlikely tokens.
    assert mean_change(torch.optim.Adam) == pytest.approx(-2e-3 * phi.abs().sum().item() * E_S, rel=0.05)


@given(state=logits_and_token(most_tokens=3), s=st.floats(0.05, 0.45))
def test_a_sign_step_on_random_rewards_lowers_entropy_if_they_are_rare_and_raises_it_as_much_if_frequent(state, s):
    """Groups of 4, rewards 1 with chance s whatever the token, all outcomes listed. Swapping 0 and 1 flips every
    centred advantage, hence the step: E dH(1-s) = -E dH(s), and 0 at s = 1/2. The push is formed as sum_i A_i e_{y_i},
    as the pi terms cancel: a rounding error in place of an exact 0 would become a full step. Entropy falls for rare
    rewards in every case drawn; that part is observed, not proved."""
    logits, _ = state
    assume(logits.max() - logits.min() > 1e-2)
    V = len(logits)
    groups = torch.tensor(list(itertools.product(range(V), repeat=4)))  # (V^4, 4)
    rewards = torch.tensor(list(itertools.product([0.0, 1.0], repeat=4)))  # (16, 4)
    push = torch.einsum("ri,kiv->rkv", group_advantages(rewards, "mean"), torch.eye(V)[groups]).sign()
    changes = entropy_change(logits.expand(push[..., 0].numel(), V), push.flatten(0, 1)).view(push.shape[:2])
    by_rewards = changes @ logits.log_softmax(dim=0)[groups].sum(dim=1).exp()  # (16,), the mean over the groups

    def mean_change(s):
        return (s ** rewards.sum(dim=1) * (1 - s) ** (4 - rewards.sum(dim=1)) @ by_rewards).item()

    assert mean_change(1 - s) == pytest.approx(-mean_change(s), abs=ROUNDING)
    assert abs(mean_change(0.5)) < ROUNDING
    assert mean_change(s) < 0


@given(state=logits_and_token(), seed=seeds)
def test_once_second_moments_are_settled_the_mean_change_is_zero_again(state, seed):
    """Adam whose second moments no longer move divides by constants: dW = D o (g phi^T), linear in g, and E g = 0. Its
    beta2 is 1 - 1e-12 here, and the moments are of order 1."""
    logits, _ = state
    draw = generator(seed)
    phi, moments = torch.randn(3, generator=draw), torch.rand(len(logits), 3, generator=draw) + 0.1

    def change(y):
        W = torch.zeros(len(logits), 3, requires_grad=True)
        optimizer = torch.optim.Adam([W], lr=1.0, betas=(0.0, 1 - 1e-12))
        done = torch.tensor(1e15)  # updates, so that nothing is left to correct for the start
        optimizer.state[W] = {"step": done, "exp_avg": torch.zeros_like(W), "exp_avg_sq": moments.clone()}
        W.grad = torch.outer(sgd_push(logits[None], [y], torch.ones(1, 1)), phi)
        optimizer.step()
        return W.detach() @ phi

    assert expected(logits, change).abs().max() < 1e-8
