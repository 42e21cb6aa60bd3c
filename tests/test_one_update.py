"""One update through the kernel: what it predicts is what backward() and an optimiser then do, to first order."""

import copy

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from profiles import dear
from strategies import Batch, Policy, batches, led_logits, policies_and_states, vectors
from tiny import assert_second_order, generator, loss_of, sgd_step

from minicfrl import classifier_gradient, sequence_logp
from model import entropy
from ntk import confidence_change, empirical_ntk, entropy_change, exact_split, influence, logit_change

IDENTITY = 1e-9  # two exact formulas for one number, relative to the largest: rounding in sums of thousands of products


def assert_equal(actual, expected, tolerance=IDENTITY):
    torch.testing.assert_close(actual, expected, rtol=0, atol=tolerance * max(1e-3, expected.abs().max().item()))


def probe_of(batch):
    """All positions of a batch's first row, prompt and padding as well: what is said holds at any state."""
    return batch.tokens[:1], torch.ones_like(batch.mask[:1])


def logits_at(model, tokens, mask):
    return model(tokens)[mask].detach()


def weighted_residuals(batch):
    """A_i (e_y - pi) of every response token over their number, (M, V): written out, not by model.residuals."""
    g = -batch.model(batch.tokens)[batch.states].softmax(dim=1).detach()
    g[torch.arange(len(g)), batch.tokens[batch.mask]] += 1
    return batch.A.repeat_interleave(batch.mask.sum(dim=1))[:, None] * g / batch.mask.sum()


def gradient_step(batch):
    """The update by -dL: {name: change}."""
    model = copy.deepcopy(batch.model)
    loss_of(model, *batch.parts).backward()
    return {name: -p.grad for name, p in model.named_parameters()}


def adamw_step(batch):
    """What AdamW with weight decay and clipping does to the parameters in its first step."""
    model = copy.deepcopy(batch.model)
    loss_of(model, *batch.parts).backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), 0.1)
    torch.optim.AdamW(model.parameters(), lr=1e-2, weight_decay=0.5).step()
    old = dict(batch.model.named_parameters())
    return {name: (new - old[name]).detach() for name, new in model.named_parameters()}


def random_step(batch):
    """No optimiser's update."""
    draw = generator(batch.policy.seed)
    return {name: torch.randn(p.shape, generator=draw) for name, p in batch.model.named_parameters()}


def moved(model, update, size, part=""):
    """A copy of the model after `size` times an update, or that part of it whose names begin so."""
    model = copy.deepcopy(model)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter += size * update[name] * name.startswith(part)
    return model


def small(update):
    """A factor that makes the update 3e-4 long: its square is far above rounding, its third order far below."""
    return 3e-4 / max(1e-3, sum(change.square().sum().item() for change in update.values()) ** 0.5)


# ------------------------------------------------------------------------------------------------- the one-step formula


@given(batch=batches(rows=(1, 4)))
def test_for_a_gradient_step_the_parts_of_logit_change_are_those_of_the_kernel(batch):
    """(E8) = (E7), part by part: -eta dL/dW phi = eta sum A_i R g_i, and likewise for the body. Prompt and padding
    tokens have no term in the sum, and need none."""
    weights = weighted_residuals(batch)
    kernel = empirical_ntk(batch.model, *probe_of(batch), batch.tokens, batch.states)
    through_W, through_body = logit_change(batch.model, *probe_of(batch), gradient_step(batch))
    assert_equal(through_W, kernel.representation @ weights)
    assert_equal(through_body, torch.einsum("nvmw,mw->nv", kernel.gradient, weights))


def by_the_kernel(batch):
    """(E7), per unit of eta, and what it is about."""
    kernel = empirical_ntk(batch.model, *probe_of(batch), batch.tokens, batch.states)
    predicted = torch.einsum("nvmw,mw->nv", kernel.full(), weighted_residuals(batch))
    return predicted, lambda model: logits_at(model, *probe_of(batch))


def by_influence(batch):
    """The column sums of (E10), per unit of eta: what is done to the log-probability of every sampled token."""
    R, G = influence(batch.model, batch.tokens, batch.states, batch.A)
    predicted = (R + G).sum(dim=0) / batch.mask.sum()
    return predicted, lambda model: sequence_logp(model, batch.tokens)[batch.mask[:, 1:]].detach()


@pytest.mark.parametrize("prediction", [by_the_kernel, by_influence])
@dear
@given(batch=batches(rows=(1, 3)))
def test_what_the_kernel_predicts_a_real_sgd_step_does_up_to_second_order(prediction, batch):
    """(E7): df(x) = eta sum_i A_i K(x, x_i) g_i + O(eta^2). The step is backward()'s, so a parameter that the kernel
    left out would show: the step never sees ntk.py, and ntk.py never sees the step.

    Taylor's theorem: f is twice differentiable in the parameters, the step is -eta times a gradient, and that gradient
    is a sum of A_i J_i^T g_i. An influence is the same after another derivative, that of log pi."""
    predicted, look = prediction(batch)
    start, eta = look(batch.model), small(gradient_step(batch))

    def error(fraction):
        after = sgd_step(batch.model, "", batch.parts, fraction * eta)
        return (look(after) - start - fraction * eta * predicted).norm().item()

    assert_second_order(error)


@pytest.mark.parametrize("step", [gradient_step, adamw_step, random_step])
@dear
@given(batch=batches(rows=(1, 3)))
def test_what_an_update_does_to_logits_and_entropy_is_predicted_up_to_second_order(step, batch):
    """(E8) and (E9) hold for whatever the optimiser did. W's part is exact, because f is linear in W; the body's part
    differs from that of the exact split in its second order."""
    probe, update = probe_of(batch), step(batch)
    through_W, through_body = logit_change(batch.model, *probe, update)
    logits, eta = logits_at(batch.model, *probe), small(update)
    dH = entropy_change(logits, through_W + through_body)

    def errors(fraction):
        after = moved(batch.model, update, fraction * eta)
        phi, phi_after = (model.features(probe[0])[probe[1]].detach() for model in (batch.model, after))
        by_W, by_body, cross = exact_split(phi, batch.model.classifier.weight, phi_after, after.classifier.weight)
        torch.testing.assert_close(by_W, fraction * eta * through_W, rtol=0, atol=1e-12)
        change = entropy(logits + by_W + by_body + cross) - entropy(logits)
        return (by_body - fraction * eta * through_body).norm().item(), (change - fraction * eta * dH).norm().item()

    for which in (0, 1):
        assert_second_order(lambda fraction, which=which: errors(fraction)[which])


@given(drawn=policies_and_states())
def test_what_an_update_leaves_out_does_not_move(drawn):
    policy, *probe = drawn
    update = {name: torch.ones_like(p) for name, p in policy.model.named_parameters()}
    both = logit_change(policy.model, *probe, update)
    W = {"classifier.weight": update.pop("classifier.weight")}
    (only_W, nothing), (nothing_2, only_body) = (logit_change(policy.model, *probe, part) for part in (W, update))
    assert torch.equal(nothing, torch.zeros_like(nothing)) and torch.equal(nothing, nothing_2)
    assert torch.equal(both[0], only_W) and torch.equal(both[1], only_body)


@pytest.mark.parametrize("seed", range(5))
def test_with_a_tied_classifier_the_split_is_wrong_and_with_its_untied_twin_right(seed):
    """Why a tied one is refused: a step of the shared matrix moves the logits through W and through the body, and what
    each of the two gradients does in the other's place is in neither part. That is more than 1% of the change; of the
    twin, which has the same weights and is the same function, the split misses less than 0.01%."""
    tied = Batch(Policy(V=5, tied=True, seed=seed), 2, ((0, 1), (2, 3, 1)), (1.0, -0.5))
    twin = copy.deepcopy(tied.model)
    twin.classifier.weight = torch.nn.Parameter(tied.model.classifier.weight.detach().clone())
    loss_of(twin, *tied.parts).backward()
    split = sum(logit_change(twin, *probe_of(tied), {name: -p.grad for name, p in twin.named_parameters()}))
    before = logits_at(twin, *probe_of(tied))
    for model, wrong in ((tied.model, True), (twin, False)):
        model.zero_grad()
        after = logits_at(sgd_step(model, "", tied.parts, 1e-6), *probe_of(tied))
        miss = ((after - before) / 1e-6 - split).norm() / split.norm()
        assert miss > 1e-2 if wrong else miss < 1e-4


@pytest.mark.parametrize(
    "update, message",
    [
        ({"body.bloks.0": torch.zeros(1)}, "update names 'body.bloks.0', which is no parameter"),
        ({"norm.weight": torch.zeros(4)}, "update names 'norm.weight'"),
        ({"classifier.weight": torch.zeros(4, 5)}, r"update of classifier.weight must be \(5, 4\) .*not \(4, 5\)"),
        ({"body.norm.bias": torch.zeros(4, dtype=torch.float32)}, "float64, not .* torch.float32"),
    ],
)
def test_an_update_that_is_not_the_model_s_is_refused(update, message):
    tokens = torch.zeros(2, 4, dtype=torch.long)
    with pytest.raises(ValueError, match=message):
        logit_change(Policy(V=5).model, tokens, tokens == 0, update)


def test_changes_of_logits_must_have_the_logits_shape():
    for function in (entropy_change, confidence_change):
        for logits, dlogits in ((torch.zeros(2, 3), torch.zeros(3)), (torch.zeros(3), torch.zeros(3))):
            with pytest.raises(ValueError, match=r"must both be \(N, V\), not"):
                function(logits, dlogits)


# ---------------------------------------------------------------------------------------------------- classifier first


@given(batch=batches(), eta=st.sampled_from([1e-3, 1.0, 100.0]))
def test_an_sgd_step_on_the_classifier_is_the_representation_component_exactly_at_any_size(batch, eta):
    """Logits are linear in W: df = dW phi = eta sum A_i <phi, phi_i> g_i, without remainder. Stage 1 feels R alone. The
    difference of logits of order 1 is off by their rounding, which a small step does not shrink."""
    kernel = empirical_ntk(batch.model, *probe_of(batch), batch.tokens, batch.states)
    after = sgd_step(batch.model, "classifier", batch.parts, eta)
    measured = logits_at(after, *probe_of(batch)) - logits_at(batch.model, *probe_of(batch))
    expected = eta * kernel.representation @ weighted_residuals(batch)
    torch.testing.assert_close(measured, expected, rtol=1e-10, atol=1e-12 * max(1, eta))


@given(batch=batches(), eta=st.sampled_from([0.1, 10.0]), data=st.data())
def test_a_step_on_the_classifier_adds_rewarded_features_to_what_the_body_is_told(batch, eta, data):
    """The body learns from W^T g. W1 = W0 + eta sum A_i g_i phi_i^T, so W1^T g = W0^T g + eta sum A_i phi_i (g_i . g):
    stage 1 turns later feature gradients towards the features of what was rewarded, for residuals alike."""
    g, W = data.draw(vectors(batch.policy.V)), batch.model.classifier.weight
    after = sgd_step(batch.model, "classifier", batch.parts, eta).classifier.weight
    phi = batch.model.features(batch.tokens)[batch.states].detach()  # (M, d)
    expected = g @ W + eta * (weighted_residuals(batch) @ g) @ phi
    torch.testing.assert_close(g @ after, expected, rtol=1e-10, atol=1e-10)


@given(batch=batches(rows=(1, 3)))
def test_classifier_then_body_is_the_joint_step_to_first_order(batch):
    """Moving W first changes the body's gradient by O(eta), hence its step by O(eta^2). So the order of the stages
    cannot matter within one small update: what it is worth comes from many steps, the optimiser, or noise. W moves by
    (E4), the joint step by backward(): any other move of W would differ from it to first order."""
    model, size = batch.model, small(gradient_step(batch))
    phi = model.features(batch.tokens).detach()[:, :-1]
    dW = classifier_gradient(phi, model.classifier(phi), batch.tokens[:, 1:], batch.A, batch.mask[:, 1:]).detach()

    def error(fraction):
        first = copy.deepcopy(model)
        first.classifier.weight.data -= fraction * size * dW
        in_turn = sgd_step(first, "body", batch.parts, fraction * size)
        joint = sgd_step(model, "", batch.parts, fraction * size)
        return (logits_at(joint, *probe_of(batch)) - logits_at(in_turn, *probe_of(batch))).norm().item()

    assert_second_order(error)


@given(drawn=led_logits(), data=st.data())
def test_stage_1_moves_the_classifier_s_norm_by_the_covariance_of_log_probability_and_advantage(drawn, data):
    """d|W|^2 = 2 <W, dW> = 2 eta sum_i A_i g_i . f_i, and over y ~ pi that is 2 eta Cov(log pi, A): rewarding what is
    likely lengthens W, rewarding the unlikely shortens it. So a longer W is no necessity of RL. Here phi = 1 at one
    state, so that W is its logits, and all V actions are weighted by their probability."""
    logits, _, _ = drawn
    V, logp = len(logits), logits.log_softmax(dim=0)
    one, phi, pi = torch.ones(V, 1, dtype=torch.bool), torch.ones(V, 1, 1), logp.exp()

    def change_of_squared_norm(advantages):
        actions = torch.arange(V)[:, None]
        gradient = classifier_gradient(phi, logits.expand(V, 1, V), actions, pi * advantages, one, count=1)
        return -2 * (logits @ gradient[:, 0]).item()

    advantages = data.draw(vectors(V))
    covariance = (pi * (logp - pi @ logp) * advantages).sum().item()
    assert change_of_squared_norm(advantages) == pytest.approx(2 * covariance, rel=1e-10, abs=1e-10)
    assert change_of_squared_norm(-logp) < 0
