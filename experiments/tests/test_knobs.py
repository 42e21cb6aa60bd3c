"""Two knobs, one rate: they leave a policy as it is and change how fast its parts learn, exactly, for many steps."""

import copy

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from profiles import dear
from strategies import policies_and_states
from tiny import ROUNDING, generator, loss_of, random_batch, seeds, tiny_gpt

from experiments.knobs import add_constant, scale, turn
from minicfrl import Addition, rollout
from ntk import empirical_ntk

sizes = st.floats(0.25, 4)
# An optimiser, the power of a knob that is its rate there, and what is trained beside W and the final norm: by Adam,
# which without its epsilon divides by the gradient, a part whose gradient is nowhere 0.
SGD = (torch.optim.SGD, dict(lr=0.05), 2, ("body.token", "body.position", "body.blocks."))
ADAM = (torch.optim.Adam, dict(lr=1e-3, eps=0.0), 1, ("body.blocks.1.mlp.2.",))
BOTH = pytest.mark.parametrize("kind, settings, power, rest", [SGD, ADAM], ids=["SGD", "Adam"])
W, BIAS, NORM = "classifier.weight", "classifier.bias", "body.norm."


def trained(model, batch, kind, settings, rates):
    """The logits of the batch after four steps of (E3) on it. `rates` are {beginning of names: multiple of the rate};
    what they do not name rests."""
    named, lr = [*model.named_parameters()], settings["lr"]
    groups = [{"params": [p for n, p in named if n.startswith(part)], "lr": lr * x} for part, x in rates.items()]
    optimizer = kind(groups, **settings)
    for _ in range(4):
        optimizer.zero_grad()
        loss_of(model, *batch).backward()
        optimizer.step()
    return model(batch[0])


def assert_equal(logits, others):
    torch.testing.assert_close(logits, others, rtol=0, atol=1e3 * ROUNDING)  # after four steps


@dear
@given(policies_and_states(), sizes, st.floats(0, 4))
def test_a_turned_knob_leaves_the_policy_and_changes_R(drawn, a, s):
    """a W (phi / a) = W phi, and <phi / a, phi' / a> is R / a^2. The weights of a constant are 0, so it is in no logit
    and in no backpropagated gradient, but <(phi, s), (phi', s)> = <phi, phi'> + s^2: all features become alike."""
    policy, tokens, mask = drawn
    scaled, alike = (copy.deepcopy(policy.model) for _ in range(2))
    scale(scaled, a)
    add_constant(alike, s)
    for turned in (scaled, alike):
        assert_equal(turned(tokens), policy.model(tokens))
    K, scaled_K, alike_K = (empirical_ntk(each, tokens, mask) for each in (policy.model, scaled, alike))
    torch.testing.assert_close(scaled_K.representation, K.representation / a**2)
    torch.testing.assert_close(alike_K.representation, K.representation + s**2)
    torch.testing.assert_close(alike_K.gradient, K.gradient)


@BOTH
@dear
@given(seed=seeds, a=sizes)
def test_to_scale_the_classifier_is_to_divide_its_rate(kind, settings, power, rest, seed, a):
    """SGD at rate e: with W' = a W the gradient is g / a, so a W - e g / a = a (W - e / a^2 g); with gain and bias of
    the norm divided by a it is a g, so n / a - e a g = (n - a^2 e g) / a. Adam's step, its epsilon 0, is e times a
    quotient in which any factor of the gradient cancels: a W - e u = a (W - (e / a) u)."""
    model, *batch = random_batch(seed)
    scaled, rates = copy.deepcopy(model), dict.fromkeys((W, NORM, *rest), 1)
    scale(scaled, a)
    slower = trained(model, batch, kind, settings, rates | {W: 1 / a**power, NORM: a**power})
    assert_equal(trained(scaled, batch, kind, settings, rates), slower)


@BOTH
@dear
@given(seed=seeds, s=sizes)
def test_all_that_a_constant_feature_does_is_a_bias_of_the_logits(kind, settings, power, rest, seed, s):
    """SGD at rate e: its weights w have the gradient s db, with db that of a bias, so that s w moves by s^2 e db. By
    Adam, its epsilon 0, w moves as a bias does, and s w at s times the rate. Nothing else notices, for s is a constant:
    alike features in this sense are a rate."""
    model, *batch = random_batch(seed)
    alike, rates = copy.deepcopy(model), dict.fromkeys((W, *rest), 1)
    add_constant(alike, s)
    model.classifier.register_parameter("bias", torch.nn.Parameter(torch.zeros(model.config.vocab_size)))
    biased = trained(model, batch, kind, settings, rates | {BIAS: s**power})
    assert_equal(trained(alike, batch, kind, settings, rates), biased)


@BOTH
@dear
@given(seed=seeds)
def test_along_a_direction_that_is_no_axis_it_is_that_bias_for_sgd_and_not_for_adam(kind, settings, power, rest, seed):
    """All features and W are turned by one rotation, which leaves both policies as they are, but puts the constant into
    all features. SGD does not notice. Adam treats each number of W by itself, and does."""
    model, *batch = random_batch(seed)
    alike, rates = copy.deepcopy(model), dict.fromkeys((W, *rest), 1)
    add_constant(alike, 2.0)
    add_constant(model, 0.0)
    model.classifier.register_parameter("bias", torch.nn.Parameter(torch.zeros(model.config.vocab_size)))
    Q, _ = torch.linalg.qr(torch.randn(9, 9, generator=generator(seed)))
    for each in (alike, model):
        rotation = torch.nn.Linear(9, 9, bias=False)
        rotation.weight.data = Q
        each.body.norm = torch.nn.Sequential(each.body.norm, rotation)
        each.classifier.weight.data @= Q.T
    turned = trained(alike, batch, kind, settings, rates)
    apart = (turned - trained(model, batch, kind, settings, rates | {BIAS: 2**power})).abs().max()
    assert apart < 1e-9 if kind is torch.optim.SGD else apart > 1e-4


def test_a_constant_is_sized_in_parts_of_the_features_length():
    """Their root mean square at the states of 32 responses, here one to each of 32 questions."""
    (model, turned), task = (tiny_gpt(0, 17, 11) for _ in range(2)), Addition(1)
    turn(turned, task, ("s", 3), generator(0))
    pairs = task.train_pairs[:: len(task.train_pairs) // 32][:32].tolist()
    batch = rollout(model, task, [task.prompt(*pair) for pair in pairs], 1, generator(0))
    phi = model.features(batch.tokens)[batch.state_mask]
    assert turned.body.norm.size.item() == pytest.approx(3 * phi.norm().item() / len(phi) ** 0.5)


@pytest.mark.parametrize("knob", [("a", 0.0), ("a", float("nan")), ("s", -1.0), ("s", float("inf")), ("b", 1), ()])
def test_a_knob_that_makes_no_sense_is_refused(knob):
    with pytest.raises(ValueError, match="must be finite and|there is no knob"):
        turn(tiny_gpt(0, 17, 11), Addition(1), knob, generator(0))
