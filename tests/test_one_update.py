"""One update through the kernel: what it predicts is what backward() and an optimiser then do, to first order."""

import copy

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tiny import generator, random_batch, seeds, states, tiny_gpt

from minicfrl import classifier_gradient, policy_gradient_loss, sequence_logp
from model import entropy
from ntk import confidence_change, empirical_ntk, entropy_change, logit_change

IDENTITY = 1e-9  # two exact formulas for one number, relative to the largest: rounding in sums of thousands of products
FIRST_ORDER = 0.3  # halving a step divides its second-order error by 4, up to what the third order adds


def loss_of(model, tokens, mask, advantages):
    return policy_gradient_loss(sequence_logp(model, tokens), advantages, mask[:, 1:])  # (E3)


def sgd_step(model, parameters, batch, eta):
    """A copy of the model after one ordinary step on some of its parameters, chosen by name."""
    model = copy.deepcopy(model)
    chosen = [parameter for name, parameter in model.named_parameters() if name.startswith(parameters)]
    optimizer = torch.optim.SGD(chosen, lr=eta)
    loss_of(model, *batch).backward()
    optimizer.step()
    return model


def change(before, after):
    """What an update did to the parameters: all that logit_change wants to know of it."""
    old = dict(before.named_parameters())
    return {name: (new - old[name]).detach() for name, new in after.named_parameters()}


def moved(model, update, fraction=1.0, part=""):
    """A copy of the model after a fraction of an update, or of that part of it whose names begin so."""
    model = copy.deepcopy(model)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter += fraction * update[name] * name.startswith(part)
    return model


def logits_at(model, tokens, mask):
    return model(tokens)[mask].detach()


def weighted_residuals(model, tokens, mask, advantages):
    """A_i (e_y - pi) of every response token over their number, (M, V), and the mask (B, T) of the states behind."""
    state_mask = torch.cat((mask[:, 1:], torch.zeros_like(mask[:, :1])), dim=1)
    residuals = -model(tokens)[state_mask].softmax(dim=1).detach()  # (M, V)
    residuals[torch.arange(len(residuals)), tokens[mask]] += 1
    return advantages.repeat_interleave(mask.sum(dim=1))[:, None] * residuals / mask.sum(), state_mask


def assert_first_order(error):
    """error(1/2) is a quarter of error(1), unless both are rounding."""
    whole, half = error(1.0), error(0.5)
    assert whole < 1e-12 or abs(whole / half - 4) < FIRST_ORDER


# ------------------------------------------------------------------------------------------------- the one-step formula


@given(seed=seeds, n_layer=st.integers(1, 2), n_head=st.sampled_from([1, 2]))
def test_the_kernel_predicts_an_sgd_step_at_any_state_up_to_second_order(seed, n_layer, n_head):
    """(E7): df(x) = eta sum_i A_i K(x, x_i) g_i + O(eta^2). The step never sees ntk.py, and ntk.py never sees the step.

    Taylor's theorem: f is twice differentiable in the parameters, the step is -eta times a gradient, and that gradient
    is a sum of A_i J_i^T g_i.
    """
    model, *batch = random_batch(seed, model=tiny_gpt(seed, n_layer=n_layer, n_head=n_head))
    probe = states(model, 2, 6, seed + 1)
    weights, state_mask = weighted_residuals(model, *batch)
    kernel = empirical_ntk(model, *probe, batch[0], state_mask)
    predicted = torch.einsum("nvmw,mw->nv", kernel.full(), weights)  # per unit of eta
    start, eta = logits_at(model, *probe), 1e-3 / predicted.abs().max().clamp(min=1).item()

    def error(fraction):
        after = sgd_step(model, "", batch, fraction * eta)
        return (logits_at(after, *probe) - start - fraction * eta * predicted).norm().item()

    assert_first_order(error)


@given(seed=seeds, vocab_size=st.sampled_from([3, 8, 11]), n_layer=st.integers(1, 2))
def test_for_an_sgd_step_the_two_parts_of_any_update_are_those_of_the_kernel(seed, vocab_size, n_layer):
    """(E8) = (E7), part by part: -eta dL/dW phi = eta sum A_i R g_i, and likewise for the body. Prompt and padding
    tokens have no term in the sum, and need none."""
    model, *batch = random_batch(seed, model=tiny_gpt(seed, vocab_size, n_layer=n_layer))
    probe = states(model, 2, 6, seed + 1)
    weights, state_mask = weighted_residuals(model, *batch)
    kernel = empirical_ntk(model, *probe, batch[0], state_mask)
    loss_of(model, *batch).backward()
    parts = logit_change(model, *probe, {name: -parameter.grad for name, parameter in model.named_parameters()})
    expected = kernel.representation @ weights, torch.einsum("nvmw,mw->nv", kernel.gradient, weights)
    for part, sum_over_states in zip(parts, expected, strict=True):
        tolerance = IDENTITY * sum_over_states.abs().max().item()
        torch.testing.assert_close(part, sum_over_states, rtol=0, atol=tolerance)


def test_with_a_tied_classifier_the_split_is_wrong():
    """Why `empirical_ntk` refuses it: a step of the shared matrix moves the logits through W and through the body, and
    the untied twin leaves out what each of the two gradients does in the other's place. More than 1% of the change."""
    for seed in range(5):
        twin, *batch = random_batch(seed)
        tied = copy.deepcopy(twin)
        tied.classifier.weight = tied.body.token_embedding.weight
        with torch.no_grad():
            twin.classifier.weight.copy_(twin.body.token_embedding.weight)
        probe = states(twin, 2, 6, seed + 1)
        loss_of(twin, *batch).backward()
        split = sum(logit_change(twin, *probe, {name: -p.grad for name, p in twin.named_parameters()}))
        measured = (logits_at(sgd_step(tied, "", batch, 1e-6), *probe) - logits_at(tied, *probe)) / 1e-6
        assert (split - measured).norm() > 0.01 * measured.norm()


# --------------------------------------------------------------------------------------------------------- any update


@given(seed=seeds, vocab_size=st.sampled_from([3, 8, 11]))
def test_each_part_of_an_arbitrary_update_is_a_finite_difference(seed, vocab_size):
    """Central differences along the update of W alone, exact as logits are linear in W, and of the body alone."""
    model = tiny_gpt(seed, vocab_size)
    probe = states(model, 2, 6, seed)
    update = {name: torch.randn(p.shape, generator=generator(seed)) for name, p in model.named_parameters()}
    parts = logit_change(model, *probe, update)
    for part, moves in zip(parts, ("classifier", "body"), strict=True):
        sides = [logits_at(moved(model, update, step, moves), *probe) for step in (1e-5, -1e-5)]
        difference = (sides[0] - sides[1]) / 2e-5
        # A LayerNorm of small variance is sharply curved, which costs the difference digits.
        torch.testing.assert_close(part, difference, rtol=1e-4, atol=1e-4 * part.abs().max().item())


def test_what_an_update_leaves_out_does_not_move():
    model = tiny_gpt(0)
    probe = states(model, 2, 6, 0)
    update = {name: torch.ones_like(p) for name, p in model.named_parameters()}
    W = {"classifier.weight": update.pop("classifier.weight")}
    (only_W, nothing), (nothing_2, only_body) = logit_change(model, *probe, W), logit_change(model, *probe, update)
    assert torch.equal(nothing, torch.zeros_like(nothing)) and torch.equal(nothing, nothing_2)
    both = logit_change(model, *probe, W | update)
    assert torch.equal(both[0], only_W) and torch.equal(both[1], only_body)


@given(seed=seeds)
def test_an_adamw_step_with_clipping_is_predicted_up_to_second_order(seed):
    """(E8) and (E9) hold for whatever the optimiser did: here Adam, weight decay and clipping at once."""
    model, *batch = random_batch(seed)
    probe = states(model, 2, 6, seed + 1)
    after = copy.deepcopy(model)
    loss_of(after, *batch).backward()
    torch.nn.utils.clip_grad_norm_(after.parameters(), 0.1)
    torch.optim.AdamW(after.parameters(), lr=1e-5, weight_decay=0.5).step()
    update = change(model, after)
    dlogits, logits = sum(logit_change(model, *probe, update)), logits_at(model, *probe)

    def logits_after(fraction):
        return logits_at(moved(model, update, fraction), *probe)

    assert_first_order(lambda fraction: (logits_after(fraction) - logits - fraction * dlogits).norm().item())
    predicted = entropy_change(logits, dlogits)
    assert_first_order(
        lambda fraction: (entropy(logits_after(fraction)) - entropy(logits) - fraction * predicted).norm().item()
    )


@pytest.mark.parametrize(
    "update, message",
    [
        ({"body.bloks.0": torch.zeros(1)}, "update names 'body.bloks.0', which is no parameter"),
        ({"norm.weight": torch.zeros(8)}, "update names 'norm.weight'"),
        ({"classifier.weight": torch.zeros(8, 5)}, r"update of classifier.weight must be \(5, 8\) .*not \(8, 5\)"),
        ({"body.norm.bias": torch.zeros(8, dtype=torch.float32)}, "float64, not .* torch.float32"),
    ],
)
def test_an_update_that_is_not_the_model_s_is_refused(update, message):
    model = tiny_gpt(0)
    with pytest.raises(ValueError, match=message):
        logit_change(model, *states(model, 2, 4, 0), update)


def test_changes_of_logits_must_have_the_logits_shape():
    for function in (entropy_change, confidence_change):
        for logits, dlogits in ((torch.zeros(2, 3), torch.zeros(3)), (torch.zeros(3), torch.zeros(3))):
            with pytest.raises(ValueError, match=r"must both be \(N, V\), not"):
                function(logits, dlogits)


# ---------------------------------------------------------------------------------------------------- classifier first


@given(seed=seeds, eta=st.sampled_from([1e-3, 1.0, 100.0]))
def test_an_sgd_step_on_the_classifier_is_the_representation_component_exactly_at_any_size(seed, eta):
    """Logits are linear in W: df = dW phi = eta sum A_i <phi, phi_i> g_i, without remainder. Stage 1 feels R alone."""
    model, *batch = random_batch(seed)
    probe = states(model, 2, 6, seed + 1)
    weights, state_mask = weighted_residuals(model, *batch)
    kernel = empirical_ntk(model, *probe, batch[0], state_mask)
    measured = logits_at(sgd_step(model, "classifier", batch, eta), *probe) - logits_at(model, *probe)
    # The difference of logits of order 1 is off by their rounding, which a small step does not shrink.
    torch.testing.assert_close(measured, eta * kernel.representation @ weights, rtol=1e-10, atol=1e-13 * max(1, eta))


@given(seed=seeds, eta=st.sampled_from([0.1, 10.0]))
def test_a_step_on_the_classifier_adds_rewarded_features_to_what_the_body_is_told(seed, eta):
    """The body learns from W^T g. W1 = W0 + eta sum A_i g_i phi_i^T, so W1^T g = W0^T g + eta sum A_i phi_i (g_i . g):
    stage 1 turns later feature gradients towards the features of what was rewarded, for residuals alike."""
    model, *batch = random_batch(seed)
    weights, state_mask = weighted_residuals(model, *batch)
    after = sgd_step(model, "classifier", batch, eta)
    features = model.features(batch[0])[state_mask].detach()  # (M, d)
    g = torch.randn(model.config.vocab_size, generator=generator(seed))
    expected = g @ model.classifier.weight + eta * (weights @ g) @ features
    torch.testing.assert_close(g @ after.classifier.weight, expected, rtol=1e-10, atol=1e-10)


@given(seed=seeds)
def test_classifier_then_body_is_the_joint_step_to_first_order(seed):
    """Moving W first changes the body's gradient by O(eta), hence its step by O(eta^2). So the order of the stages
    cannot matter within one small update: what it is worth comes from many steps, the optimiser, or noise."""
    model, *batch = random_batch(seed)
    probe = states(model, 2, 6, seed + 1)

    def error(fraction):
        eta = 1e-3 * fraction
        joint = sgd_step(model, "", batch, eta)
        in_turn = sgd_step(sgd_step(model, "classifier", batch, eta), "body", batch, eta)
        return (logits_at(joint, *probe) - logits_at(in_turn, *probe)).norm().item()

    assert_first_order(error)


@given(seed=seeds)
def test_stage_1_moves_the_classifier_s_norm_by_the_covariance_of_log_probability_and_advantage(seed):
    """d|W|^2 = 2 <W, dW> = 2 eta sum_i A_i g_i . f_i, and over y ~ pi that is 2 eta Cov(log pi, A): rewarding what is
    likely lengthens W, rewarding the unlikely shortens it. So a longer W is no necessity of RL."""
    model = tiny_gpt(seed)
    tokens, mask = states(model, 1, 4, seed)
    phi = model.features(tokens)[:, -1:].detach()  # (1, 1, d): one state, all its V actions, weighted by probability
    logp = model.classifier(phi).log_softmax(dim=2).flatten().detach()
    V = len(logp)
    advantages = torch.randn(V, generator=generator(seed))

    def change_of_squared_norm(advantages):
        repeated = phi.expand(V, 1, -1)
        gradient = classifier_gradient(
            repeated, model.classifier(repeated), torch.arange(V)[:, None], logp.exp() * advantages,
            torch.ones(V, 1, dtype=torch.bool), count=1,
        )  # fmt: skip
        return -2 * (model.classifier.weight * gradient).sum().item()

    pi = logp.exp()
    covariance = (pi * (logp - pi @ logp) * advantages).sum().item()
    assert change_of_squared_norm(advantages) == pytest.approx(2 * covariance, rel=1e-10, abs=1e-10)
    assert change_of_squared_norm(-logp) < 0
