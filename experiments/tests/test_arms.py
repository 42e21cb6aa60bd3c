"""Arms, experiments and judges: what each changes, and that nothing else differs."""

import itertools
import re
from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tiny import ROUNDING, every_response, gradients, seeds, tiny_gpt
from tiny_runs import tiny
from torch.distributions import Categorical, kl_divergence
from torch.nn.utils import parameters_to_vector

from experiments import arms, claims, real_model, report, toy
from experiments.arms import START, WAYS, Arm, some, stages, train_as
from experiments.judges import KeptAdam, coin_flips, log_probability, self_certainty
from experiments.scores import load
from minicfrl import Addition, RLConfig, Rollout, SFTConfig, Stage, supervised_finetune, train_rl
from train_toy import stream


def test_the_arms_and_their_rates_are_as_written_here():
    """Stage by stage: updates, what they train, its rate, and W's own."""
    W, fast, rest, plain = Stage(20, "classifier", 4e-4, 8e-3), Stage(20, "all", 4e-4, 8e-3), Stage(60), Stage(80)
    table = {"cf-rl": (W, rest), "control": (fast, rest), "classifier-last": (rest, W), "lp-ft": (W, rest)}
    table |= {"classifier-only": (replace(W, steps=80),), "fast-classifier": (replace(fast, steps=80),)}
    table |= {"cf-rl-same-lr": (replace(W, classifier_lr=4e-4), rest), "spread": (Stage(2), replace(W, steps=1))}
    table |= {"sft-rl-sgd": (replace(fast, classifier_lr=4e-4), Stage(60, lr=0.02))}
    table |= dict.fromkeys(("rl", "random-reward", "ft"), (plain,))
    table |= dict.fromkeys(("rl-sgd", "random-reward-sgd", "self-certainty-sgd"), (Stage(80, lr=0.02),))
    table |= dict.fromkeys(("self-certainty", "log-probability"), (Stage(80, lr=5e-5),))
    x, real = (make("the defaults", some("rl")) for make in (arms.Experiment, real_model.RealExperiment))
    assert {name: stages(arm, x)[:2] for name, arm in WAYS.items()} == table
    assert stages(WAYS["cf-rl"], real) == (Stage(4, "classifier", 2e-5, 4e-4), Stage(16, lr=2e-5))
    rewards = {"random-reward": coin_flips, "self-certainty": self_certainty, "log-probability": log_probability}
    for name, arm in WAYS.items():
        optimizer = "sgd" if name.endswith("-sgd") else KeptAdam if name == "spread" else "adam"
        reward = rewards.get(name.removesuffix("-sgd"), RLConfig.reward)
        assert RLConfig((plain,), **arm.rl) == RLConfig((plain,), optimizer=optimizer, reward=reward)
        assert arm.imitates == {"sft-rl-sgd": 1, "ft": 1, "lp-ft": 2}.get(name, 0)


def test_how_fast_is_asked_at_these_thresholds():
    """0.9; in toy 2 0.3; in SmolLM2 0.6."""
    for name in claims.ASKED.keys() & report.EXPERIMENTS.keys():
        threshold = 0.6 if name.startswith("real") else 0.3 if "learning" in name else 0.9
        assert report.EXPERIMENTS[name].threshold == threshold, name


@given(T=st.integers(1, 40), data=st.data(), order=st.sampled_from(["first", "last", "spread"]))
def test_every_order_has_the_same_budgets(T, data, order):
    """n updates of the part at its own rate and the rest of everything. Between two updates of a part that is spread
    lie (T - n) / (n + 1) others, up or down."""
    n = data.draw(st.integers(1, T))
    x = arms.Experiment("orders", [Arm("arm", order, rate=3)], rl_steps=T, n=n)
    plan = [stage for stage in stages(x.arms[0], x) for _ in range(stage.steps)]
    kinds = "".join({("classifier", 3 * x.lr): "W", ("all", None): "."}[s.trains, s.classifier_lr] for s in plan)
    others = [len(other) for other in kinds.split("W")]
    assert sum(others) == T - n == len(kinds) - n
    assert max(others) - min(others) <= 1 if order == "spread" else others[-1 if order == "first" else 0] == T - n


FAULTS = {
    "n=5 of arm 'rl' is not between 1 and 4": dict(n=5),
    "n=2.0 of arm 'cell'": dict(arms=[Arm("cell", n=2.0)]),
    "tiny has no arm, or two of one name: .'sft', 'rl', 'rl'.": dict(arms=some("rl rl")),
    "arm 'x' has no such order: 'middle'": dict(arms=[Arm("x", "middle")]),
    "'out' trains body.block, and the policy has no parameter": dict(arms=[Arm("out", part="body.block")]),
    "'out' trains body.blocks.1, and": dict(arms=[Arm("out", part="body.blocks.1")], policy=dict(n_layer=1)),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_an_experiment_that_makes_no_sense_is_refused_by_name(fault):
    """A part is the beginning of parameters' names, up to a dot."""
    toy.check_start(tiny([Arm("in", part="body.blocks.1"), *some("rl cf-rl")]))
    with pytest.raises(ValueError, match=fault):
        toy.check_start(tiny(**dict(arms=some("rl")) | FAULTS[fault]))


@pytest.mark.parametrize("name, k", [("cf-rl", 0), ("rl-sgd", 0), ("lp-ft", 2), ("sft-rl-sgd", 1)])
def test_an_arm_is_the_book_s_training_with_random_numbers_of_the_seed_alone(name, k):
    """So every arm of a seed sees the same prompts. The first k stages imitate demonstrations of s without a wrong
    digit, and count as updates. (An untrained policy is never right, so it learns from coin flips.)"""
    x, arm = tiny(), replace(WAYS[name], rl=WAYS[name].rl | dict(samples=3, reward=coin_flips))
    (model, twin), task = (tiny_gpt(0, 17, 11) for _ in range(2)), Addition(1)
    draws, plan = stream(5, "rl"), stages(arm, x)
    records, expected = list(train_as(arm, x, 5, task, model)), []
    if plan[:k]:
        expected += supervised_finetune(twin, task, SFTConfig(plan[:k], mixture=(0, 1, 0), noise=0), draws)
    if plan[k:]:
        expected += train_rl(twin, task, RLConfig(plan[k:], prompts=8, **arm.rl), draws)
    assert records == [record | {"step": step} for step, record in enumerate(expected, start=1)]
    assert parameters_to_vector(model.parameters()).equal(parameters_to_vector(twin.parameters()))


def test_adam_that_is_kept_goes_on_where_a_fresh_one_begins_again():
    """Two stages that train all at one rate are then one stage, to the bit; with a fresh Adam they are not."""
    ends = {}
    for order, kind in itertools.product(("", "first"), (KeptAdam, "adam")):
        arm, model = Arm("arm", order, "all", rate=1, rl=dict(optimizer=kind, reward=coin_flips)), tiny_gpt(0, 17, 11)
        list(train_as(arm, tiny(), 0, Addition(1), model))
        ends[order, kind] = parameters_to_vector(model.parameters())
    assert ends["", KeptAdam].equal(ends["first", KeptAdam]) and ends["", KeptAdam].equal(ends["", "adam"])
    assert not ends["", "adam"].equal(ends["first", "adam"])


def test_every_arm_starts_from_the_same_policy_whatever_knob_is_turned(tmp_path):
    """At rate 0 all say to the end what the start says. It was tilted to guesses, which it has learnt. One knob doubles
    W, the other makes features alike."""
    ways = [*some("spread"), Arm("a", knob=("a", 2)), Arm("s", knob=("s", 2))]
    x = tiny([replace(way, lr=0.0) for way in ways], tilt=(0, 0, 1), measures="all", prompts=2, rl_steps=2)
    start, *ends = ([*toy.rows_of(x, tmp_path, 0, arm)][-1] for arm in (START, *x.arms))
    assert start["share_g"] > 0.8  # of demonstrations without a tilt .3 are guesses
    for row in ends:
        assert all(row[name] == pytest.approx(start[name]) for name in ("accuracy", "entropy", "share_g", "best_of_8"))
        assert row["confidence_change"] == 0
    assert ends[1]["classifier_norm"] == pytest.approx(2 * start["classifier_norm"])
    assert ends[2]["cosine_continuation"] > 0.8 > start["cosine_continuation"]


def every_batch(seed, length):
    """A tiny policy, every response of up to so many tokens as its batch, and their log-probabilities (K,)."""
    model, (tokens, mask) = tiny_gpt(seed, 3, 3, n_layer=1, n_head=1, n_embd=4), every_response(length=length)
    batch = Rollout(tokens, mask, model(tokens)[:, :-1], torch.zeros(1, len(tokens)), ("",) * len(tokens))
    return model, batch, (batch.logp * mask[:, 1:]).sum(dim=1)


@given(seed=seeds)
def test_self_certainty_is_the_mean_divergence_of_the_uniform_distribution_from_the_policy(seed):
    _, batch, _ = every_batch(seed, length=2)
    kl = kl_divergence(Categorical(logits=torch.zeros(3)), Categorical(logits=batch.logits))  # (K, L)
    expected = (kl * batch.mask[:, 1:]).sum(dim=1) / batch.mask[:, 1:].sum(dim=1)
    torch.testing.assert_close(self_certainty(batch)[0], expected, rtol=0, atol=ROUNDING)


@given(seed=seeds)
def test_log_probability_is_minus_the_entropy_gradient_and_self_certainty_does_not_move_its_own_state(seed):
    """sum_y pi(y) r(y) grad log pi(y), each reward held fixed. The certainty of a single state is the same for every
    token drawn there, and a constant has no policy gradient: it acts by steering to states that are certain later. With
    two tokens there is such a later state. (1e-10: sums over a dozen responses.)"""
    moves = {}
    for length, judge in itertools.product((1, 2), (log_probability, self_certainty)):
        model, batch, logp = every_batch(seed, length)
        moves[length, judge] = gradients(model, (logp.exp().detach() * judge(batch)[0].detach() * logp).sum())
    of_entropy = gradients(model, (logp.exp() * logp).sum())
    torch.testing.assert_close(moves[2, log_probability], of_entropy, rtol=0, atol=1e-10)
    assert moves[1, self_certainty].abs().max() < 1e-10 < moves[2, self_certainty].abs().max()


@pytest.mark.parametrize("start", ["", "-learning"])
def test_each_way_at_its_best_has_the_rates_that_came_first_to_the_threshold(start):
    """By the rules of rules.md; W last, spread and the matched control have CF-RL's, the body plain RL's."""
    tuning, used = load(arms.EXPERIMENTS[f"best-tuning{start}"]), arms.EXPERIMENTS[f"best{start}"]
    ways = itertools.groupby(tuning.x.arms, lambda arm: arm.name.partition("-0.")[0])
    chosen = [min(each, key=lambda arm: sum(tuning.values(arm.name, "took"))) for _, each in ways]
    rates = {arm.name: (arm.lr, arm.rate) for arm in (*used.arms, *arms.EXPERIMENTS[f"again{start}"].arms)}
    assert [*rates.values()][:4] == [(arm.lr, arm.rate) for arm in chosen]
    assert rates["classifier-last"] == rates["spread"] == rates["matched"] == rates["cf-rl"]
    assert rates["body-only"] == rates["body-first"] == (rates["rl"][0], 1)
    assert max(tuning.x.seeds) < min(used.seeds)


def test_smollm2_s_ways_have_the_rates_that_came_first_to_the_threshold():
    """By the rules of rules.md: what was within an update of the best of its way on the first seed went on."""
    first, more = (load(real_model.EXPERIMENTS[f"real-best-{name}"]) for name in ("tuning", "finals"))
    ways = [[*each] for _, each in itertools.groupby(first.x.arms, lambda arm: re.split(r"-\d", arm.name)[0])]
    took = {arm.name: sum(first.values(arm.name, "took")) for arm in first.x.arms}
    left = [[arm for arm in way if took[arm.name] < 1 + min(took[a.name] for a in way)] for way in ways]
    assert sorted(sum(left, []), key=str) == sorted(more.x.arms, key=str)
    best = [min(way, key=lambda arm: took[arm.name] + sum(more.values(arm.name, "took"))) for way in left]
    assert tuple((arm.lr, arm.rate) for arm in best) == real_model.BEST
    assert real_model.EXPERIMENTS["real-best"].arms == arms.best(*real_model.BEST)
