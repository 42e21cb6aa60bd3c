"""Two knobs, one rate: what leaves a policy as it is and changes how fast its parts learn, exactly and for many steps.

Both are driven through knobs.py, the loss (E3) and torch's optimisers, in float64; the other side of each equation is
the policy as it was, with other learning rates or with a bias that is added by hand.
"""

import copy

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny import ROUNDING, generator, random_batch, seeds, states, tiny_gpt
from torch import nn

from experiments.knobs import add_constant, scale, turn
from minicfrl import Addition, policy_gradient_loss, rollout
from model import token_logp
from ntk import empirical_ntk

sizes = st.floats(0.25, 4)
SGD, ADAM = (torch.optim.SGD, {}, 0.05), (torch.optim.Adam, dict(eps=0.0), 1e-3)
# Parts by how their names begin. Adam without its epsilon divides by the gradient, so there we train, of the rest, a
# part whose gradient is nowhere 0.
W, NORM, MLP = "classifier.", "body.norm.", "body.blocks.1.mlp.2."
REST = ("body.token", "body.position", "body.blocks.")


def trained(model, batch, how, rates, bias=None, steps=4):
    """A copy of the model after some steps of (E3) on one batch, and the bias that was added to its logits, if any.
    `rates` are {beginning of names, or "bias": multiple of the rate}; what they do not name rests."""
    (tokens, mask, advantages), (kind, settings, e) = batch, how
    model, bias = copy.deepcopy(model), None if bias is None else nn.Parameter(bias)
    named = [*model.named_parameters(), ("bias", bias)]
    groups = [{"params": [p for n, p in named if n.startswith(part)], "lr": e * x} for part, x in rates.items()]
    optimizer = kind(groups, **settings)
    for _ in range(steps):
        logits = model(tokens)[:, :-1] + (0 if bias is None else bias)
        optimizer.zero_grad()
        policy_gradient_loss(token_logp(logits, tokens[:, 1:]), advantages, mask[:, 1:]).backward()
        optimizer.step()
    return model, bias


def assert_same_logits(model, other, tokens, bias=0.0):
    torch.testing.assert_close(model(tokens), other(tokens) + bias, rtol=0, atol=1e3 * ROUNDING)  # after 4 steps


@given(seed=seeds, a=sizes)
def test_a_scaled_classifier_is_the_same_policy_with_another_R(seed, a):
    """a W (phi / a) = W phi; and <phi / a, phi' / a> is R / a^2. How much goes through W is how W is written."""
    model = tiny_gpt(seed)
    scaled = copy.deepcopy(model)
    scale(scaled, a)
    tokens, mask = states(model, 3, 5, seed)
    assert_same_logits(scaled, model, tokens)
    R, scaled_R = (empirical_ntk(each, tokens, mask).representation for each in (model, scaled))
    torch.testing.assert_close(scaled_R, R / a**2)


@pytest.mark.parametrize("how, power, rest", [(SGD, 2, REST), (ADAM, 1, (MLP,))], ids=["SGD", "Adam"])
@given(seed=seeds, a=sizes)
@settings(max_examples=5)
def test_to_scale_the_classifier_is_to_divide_its_rate(how, power, rest, seed, a):
    """SGD at rate e: with W' = a W the gradient is g / a, so a W - e g / a = a (W - e / a^2 g); with gain and bias of
    the norm divided by a it is a g, so n / a - e a g = (n - a^2 e g) / a. Adam's step, its epsilon 0, is e times a
    quotient in which any factor of the gradient cancels: a W - e u = a (W - (e / a) u)."""
    model, *batch = random_batch(seed)
    scaled, others = copy.deepcopy(model), dict.fromkeys(rest, 1)
    scale(scaled, a)
    new, _ = trained(scaled, batch, how, {W: 1, NORM: 1} | others)
    old, _ = trained(model, batch, how, {W: 1 / a**power, NORM: a**power} | others)
    assert_same_logits(new, old, batch[0])


@given(seed=seeds, s=st.floats(0, 4))
def test_a_constant_feature_adds_its_square_to_R_and_leaves_policy_and_G(seed, s):
    """Its weights are 0, so it is in no logit and in no backpropagated gradient; <(phi, s), (phi', s)> = <phi, phi'> +
    s^2, between any two states: all features become alike."""
    model = tiny_gpt(seed)
    tokens, mask = states(model, 3, 5, seed)
    alike = copy.deepcopy(model)
    add_constant(alike, s)
    assert_same_logits(alike, model, tokens)
    K, alike_K = (empirical_ntk(each, tokens, mask) for each in (model, alike))
    torch.testing.assert_close(alike_K.representation, K.representation + s**2)
    torch.testing.assert_close(alike_K.gradient, K.gradient)


@pytest.mark.parametrize("how, power, rest", [(SGD, 2, (NORM, *REST)), (ADAM, 1, (MLP,))], ids=["SGD", "Adam"])
@given(seed=seeds, s=sizes)
@settings(max_examples=5)
def test_all_that_a_constant_feature_does_is_a_bias_of_the_logits(how, power, rest, seed, s):
    """SGD at rate e: its weights w have the gradient s db, with db that of a bias, so that s w moves by s^2 e db: as a
    bias at rate s^2 e. By Adam, its epsilon 0, w moves as a bias does, and s w at s times the rate. Nothing else
    notices, because s is a constant. So alike features in this sense are a rate."""
    model, *batch = random_batch(seed)
    alike, rates = copy.deepcopy(model), dict.fromkeys((W, *rest), 1)
    add_constant(alike, s)
    new, _ = trained(alike, batch, how, rates)
    old, bias = trained(model, batch, how, rates | {"bias": s**power}, torch.zeros(model.config.vocab_size))
    assert_same_logits(new, old, batch[0], bias.detach())
    torch.testing.assert_close(s * new.classifier.weight[:, -1], bias)


def test_a_constant_is_sized_in_parts_of_the_features_length():
    """Their root mean square at the states of 32 responses, here one to each of 32 questions."""
    model, task, turned = tiny_gpt(0, 17, 11), Addition(1), tiny_gpt(0, 17, 11)
    turn(turned, task, ("s", 3), generator(0))
    pairs = task.train_pairs[:: len(task.train_pairs) // 32][:32].tolist()
    batch = rollout(model, task, [task.prompt(*pair) for pair in pairs], 1, generator(0))
    lengths = model.features(batch.tokens)[batch.state_mask].norm(dim=1)
    assert turned.body.norm.size.item() == pytest.approx(3 * lengths.square().mean().sqrt().item())


@pytest.mark.parametrize("knob", [("a", 0.0), ("a", float("nan")), ("s", -1.0), ("s", float("inf")), ("b", 1), ()])
def test_a_knob_that_makes_no_sense_is_refused(knob):
    with pytest.raises(ValueError, match="must be finite and|there is no knob"):
        turn(tiny_gpt(0, 17, 11), Addition(1), knob, generator(0))
