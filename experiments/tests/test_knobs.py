"""Two knobs, one rate: what leaves a policy as it is and changes how fast its parts learn, exactly and for many steps.

Both are driven through knobs.py, the loss (E3) and torch's optimisers, in float64; the other side of each equation is
the policy as it was, with other learning rates or with a bias that is added by hand.
"""

import copy

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny import ROUNDING, random_batch, seeds, states, tiny_gpt
from torch import nn

from experiments.knobs import add_constant, scale
from minicfrl import policy_gradient_loss, token_logp
from ntk import empirical_ntk

sizes = st.floats(0.25, 4)


def trained(model, batch, rates, steps=4, kind=torch.optim.SGD, bias=None, **settings):
    """A copy of the model after some steps of (E3) on one batch, and the bias that was added to its logits, if any.
    `rates` are (parameters of a model, rate); what they do not name rests."""
    tokens, mask, advantages = batch
    model, bias = copy.deepcopy(model), None if bias is None else nn.Parameter(bias)
    groups = [{"params": [*parameters(model, bias)], "lr": rate} for parameters, rate in rates]
    optimizer = kind(groups, lr=0.0, **settings)
    for _ in range(steps):
        logits = model(tokens)[:, :-1] + (0 if bias is None else bias)
        optimizer.zero_grad()
        policy_gradient_loss(token_logp(logits, tokens[:, 1:]), advantages, mask[:, 1:]).backward()
        optimizer.step()
    return model, bias


def classifier(model, bias):
    return model.classifier.parameters()


def norm(model, bias):
    return model.body.norm.parameters()


def rest(model, bias):
    return [p for name, p in model.body.named_parameters() if not name.startswith("norm.")]


def mlp(model, bias):
    """Of the rest, parameters whose gradient is nowhere 0: Adam without its epsilon divides by it."""
    return model.body.blocks[-1].mlp[2].parameters()


def body(model, bias):
    return model.body.parameters()


def the_bias(model, bias):
    return [bias]


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


@given(seed=seeds, a=sizes)
@settings(max_examples=5)
def test_to_scale_the_classifier_is_to_divide_its_rate_by_the_square(seed, a):
    """SGD at rate e: with W' = a W the gradient is g / a, so a W - e g / a = a (W - e / a^2 g); with gain and bias of
    the norm divided by a it is a g, so n / a - e a g = (n - a^2 e g) / a. Step by step the policies stay equal."""
    model, *batch = random_batch(seed)
    scaled, e = copy.deepcopy(model), 0.05
    scale(scaled, a)
    new, _ = trained(scaled, batch, [(classifier, e), (norm, e), (rest, e)])
    old, _ = trained(model, batch, [(classifier, e / a**2), (norm, e * a**2), (rest, e)])
    assert_same_logits(new, old, batch[0])


@given(seed=seeds, a=sizes)
@settings(max_examples=5)
def test_for_adam_without_its_epsilon_scaling_divides_the_rate_by_the_factor(seed, a):
    """Its step is e times a quotient in which any factor of the gradient cancels: a W - e u = a (W - (e / a) u)."""
    model, *batch = random_batch(seed)
    scaled, e = copy.deepcopy(model), 1e-3
    scale(scaled, a)
    new, _ = trained(scaled, batch, [(classifier, e), (norm, e), (mlp, e)], kind=torch.optim.Adam, eps=0.0)
    old, _ = trained(model, batch, [(classifier, e / a), (norm, e * a), (mlp, e)], kind=torch.optim.Adam, eps=0.0)
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


@given(seed=seeds, s=sizes)
@settings(max_examples=5)
def test_all_that_a_constant_feature_does_is_a_bias_of_the_logits(seed, s):
    """SGD at rate e: its weights w have the gradient s db, with db that of a bias, so that s w moves by s^2 e db: as a
    bias at rate s^2 e. Nothing else notices, since s is a constant. So alike features in this sense are a rate."""
    model, *batch = random_batch(seed)
    alike, e = copy.deepcopy(model), 0.05
    add_constant(alike, s)
    new, _ = trained(alike, batch, [(classifier, e), (body, e)])
    start = torch.zeros(model.config.vocab_size)
    old, bias = trained(model, batch, [(classifier, e), (body, e), (the_bias, e * s**2)], bias=start)
    assert_same_logits(new, old, batch[0], bias.detach())
    torch.testing.assert_close(s * new.classifier.weight[:, -1], bias)


@given(seed=seeds, s=sizes)
@settings(max_examples=5)
def test_for_adam_without_its_epsilon_it_is_a_bias_at_s_times_the_rate(seed, s):
    model, *batch = random_batch(seed)
    alike, e, settings = copy.deepcopy(model), 1e-3, dict(kind=torch.optim.Adam, eps=0.0)
    add_constant(alike, s)
    new, _ = trained(alike, batch, [(classifier, e), (mlp, e)], **settings)
    start = torch.zeros(model.config.vocab_size)
    old, bias = trained(model, batch, [(classifier, e), (mlp, e), (the_bias, e * s)], bias=start, **settings)
    assert_same_logits(new, old, batch[0], bias.detach())


@pytest.mark.parametrize(
    "turn, size", [(scale, 0.0), (scale, float("nan")), (add_constant, -1.0), (add_constant, float("inf"))]
)
def test_a_knob_that_makes_no_sense_is_refused(turn, size):
    with pytest.raises(ValueError, match=f"must be finite and .*, not {size}"):
        turn(tiny_gpt(0), size)
