"""Arms, experiments and judges: what each changes, and that nothing else differs."""

import copy
import itertools
from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tiny import ROUNDING, TinyTask, every_response, generator, gradients, seeds, tiny_gpt
from tiny_runs import SMALL, tiny
from torch.nn.utils import parameters_to_vector

from experiments import arms, real_model, toy
from experiments.arms import PARTS, START, WAYS, Arm, some, stages, train_as
from experiments.judges import KeptAdam, coin_flips, log_probability, self_certainty
from experiments.scores import load
from minicfrl import Addition, RLConfig, Rollout, Stage, rollout, sequence_logp, train_rl
from train_toy import stream

EXACT = 1e-10  # sums over some dozen responses in float64


def test_the_arms_are_what_the_pages_say():
    """Stage by stage: updates, what they train, its rate, and W's own."""
    x = arms.Experiment("table", some("rl"), rl_steps=50, n=7, lr=1e-3, rate=10)
    plain, rest, sgd, slow = Stage(50, lr=1e-3), Stage(43, lr=1e-3), (Stage(50, lr=0.02),), (Stage(50, lr=5e-5),)
    W_first, W_fast = Stage(7, "classifier", 1e-3, 1e-2), Stage(7, "all", 1e-3, 1e-2)
    table = {
        "rl": (plain,),
        "cf-rl": (W_first, rest),
        "control": (W_fast, rest),
        "cf-rl-same-lr": (replace(W_first, classifier_lr=1e-3), rest),
        "classifier-only": (replace(W_first, steps=50),),
        "classifier-last": (rest, W_first),
        "fast-classifier": (replace(W_fast, steps=50),),
        **{"rl-sgd": sgd, "random-reward": (plain,), "random-reward-sgd": sgd},
        **{"self-certainty": slow, "self-certainty-sgd": sgd, "log-probability": slow},
        "sft-rl-sgd": (Stage(7, "all", 4e-4, 4e-4), Stage(43, "all", 0.02)),
        **{"ft": (plain,), "lp-ft": (W_first, rest)},
    }
    planned = {name: stages(arm, x) for name, arm in WAYS.items()}
    assert planned == table | {"spread": planned["spread"]}  # which the next test looks at
    rewards = {"random-reward": coin_flips, "self-certainty": self_certainty, "log-probability": log_probability}
    for name, arm in WAYS.items():
        optimizer = "sgd" if name.endswith("-sgd") else KeptAdam if name == "spread" else "adam"
        reward = rewards.get(name.removesuffix("-sgd"), RLConfig.reward)
        assert RLConfig((plain,), **arm.rl) == RLConfig((plain,), optimizer=optimizer, reward=reward)
        assert arm.imitates == {"sft-rl-sgd": 1, "ft": 1, "lp-ft": 2}.get(name, 0)


@given(T=st.integers(1, 40), data=st.data(), order=st.sampled_from(["first", "last", "spread"]))
def test_every_order_has_the_same_budgets(T, data, order):
    """n updates of the part at its own rate and the rest of everything. Between two updates of a part that is spread
    lie (T - n) / (n + 1) others, up or down."""
    n = data.draw(st.integers(1, T))
    x = arms.Experiment("orders", [Arm("arm", order, rate=3)], rl_steps=T, n=n)
    plan = [stage for stage in stages(x.arms[0], x) for _ in range(stage.steps)]
    kinds = "".join({("classifier", 3 * x.lr): "W", ("all", None): "."}[s.trains, s.classifier_lr] for s in plan)
    if order == "spread":
        others = [len(other) for other in kinds.split("W")]
        assert sum(others) == T - n == len(kinds) - n and max(others) - min(others) <= 1
    else:
        assert (kinds if order == "first" else kinds[::-1]) == "W" * n + "." * (T - n)


FAULTS = {
    "n=5 of arm 'rl' is not between 1 and 4": dict(n=5),
    "n=2.0 of arm 'cell'": dict(arms=[Arm("cell", n=2.0)]),
    "tiny has no arm, or two of one name: .'sft', 'rl', 'rl'.": dict(arms=some("rl rl")),
    "arm 'x' has no such order: 'middle'": dict(arms=[Arm("x", "middle")]),
    "optimizer must be one of adam, sgd or .*, not 'lion'": dict(arms=[Arm("x", rl=dict(optimizer="lion"))]),
    "seeds=range.0, 0. holds no seed": dict(seeds=range(0)),
    "no such measures: 'many'": dict(measures="many"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_an_experiment_that_makes_no_sense_is_refused_by_name(fault):
    with pytest.raises(ValueError, match=fault):
        arms.Experiment("tiny", **dict(arms=some("rl")) | SMALL | FAULTS[fault])


def test_a_part_is_named_by_the_beginning_of_its_parameters_and_one_that_is_not_there_is_refused():
    """It ends at a dot. A policy of one block has no second one."""
    toy.check_start(tiny([Arm("in", part="body.blocks.1"), *some("rl cf-rl")]))
    for arm, sizes in ((Arm("out", part="body.block"), {}), (Arm("out", part="body.blocks.1"), dict(n_layer=1))):
        with pytest.raises(ValueError, match=f"arm 'out' trains {arm.part}, and the policy has no parameter of that"):
            toy.check_start(tiny([arm], policy=sizes))


# -------------------------------------------------------------------------------------------------------- training


def weights_along(arm):
    """The weights before and after each update of an arm, as vectors. An untrained policy is never right, so it learns
    from coin flips."""
    model, x = tiny_gpt(0, 17, 11), tiny(rl=dict(prompts=8, samples=4, reward=coin_flips), lr=1e-2)
    steps = itertools.chain([None], train_as(arm, x, 0, Addition(1), model))
    return [parameters_to_vector(model.parameters()).detach().clone() for _ in steps]


@pytest.mark.parametrize("part", PARTS.values())
def test_a_part_moves_when_it_is_its_turn_and_then_nothing_else_does(part):
    """Bit by bit: first, two updates of the part and two of everything; last, the other way round."""
    names = [name for name, p in tiny_gpt(0, 17, 11).named_parameters() for _ in range(p.numel())]
    of_part = torch.tensor([part == "all" or f"{name}.".startswith(f"{part}.") for name in names])
    for order, turns in (("first", "P P . ."), ("last", ". . P P"), ("alone", "P P P P")):
        steps = itertools.pairwise(weights_along(Arm("arm", order, part, rate=2, body_rate=2)))
        for turn, (before, after) in zip(turns.split(), steps, strict=True):
            assert (before != after)[of_part].any()
            assert part == "all" or (before != after)[~of_part].any() == (turn == ".")


def test_an_arm_is_train_rl_on_its_stages_with_the_random_numbers_of_the_seed_alone():
    """So every arm of a seed sees the same prompts."""
    arm, x, model = Arm("arm", rl=dict(samples=3, reward=coin_flips)), tiny(), tiny_gpt(0, 17, 11)
    other = copy.deepcopy(model)
    records = list(train_as(arm, x, 5, Addition(1), model))
    config = RLConfig(stages(arm, x), prompts=8, samples=3, reward=coin_flips)
    assert records == list(train_rl(other, Addition(1), config, stream(5, "rl")))
    assert parameters_to_vector(model.parameters()).equal(parameters_to_vector(other.parameters()))


def test_adam_that_is_kept_goes_on_where_a_fresh_one_begins_again():
    """Two stages that train all at one rate are then one stage, to the bit; with a fresh Adam they are not."""
    (one, kept), (plain, fresh) = (
        [weights_along(Arm("arm", order, "all", rate=1, rl=dict(optimizer=kind)))[-1] for order in ("", "first")]
        for kind in (KeptAdam, "adam")
    )
    assert one.equal(kept) and one.equal(plain) and not plain.equal(fresh)


def test_what_imitates_counts_as_updates_and_only_the_rest_is_rewarded():
    rewarded = {}
    for arm in some("ft lp-ft sft-rl-sgd"):
        records = list(train_as(arm, tiny(), 0, Addition(1), tiny_gpt(0, 17, 11)))
        assert [record["step"] for record in records] == [1, 2, 3, 4]
        rewarded[arm.name] = ["reward" in record for record in records]
    assert rewarded == {"ft": [False] * 4, "lp-ft": [False] * 4, "sft-rl-sgd": [False, False, True, True]}


def test_every_arm_starts_from_the_same_policy_whatever_knob_is_turned(tmp_path):
    """At rate 0 all say to the end what the start says. It was tilted to guesses, which it has learnt. One knob doubles
    W, the other makes features alike."""
    ways = [*some("rl spread"), Arm("a", knob=("a", 2)), Arm("s", knob=("s", 2))]
    x = tiny([replace(way, lr=0.0) for way in ways], tilt=(0, 0, 1), measures="all", prompts=2, rl_steps=2)
    (tmp_path / "locks").mkdir()
    start, *ends = ([*toy.rows_of(x, tmp_path, 0, arm)][-1] for arm in (START, *x.arms))
    assert start["share_g"] > 0.8  # of demonstrations without a tilt .3 are guesses
    for row in ends:
        assert all(row[name] == pytest.approx(start[name]) for name in ("accuracy", "entropy", "share_g", "best_of_8"))
        assert row["confidence_change"] == 0
    assert ends[2]["classifier_norm"] == pytest.approx(2 * start["classifier_norm"])
    assert ends[3]["cosine_continuation"] > 0.8 > start["cosine_continuation"]


# -------------------------------------------------------------------------------------------------------------- judges


def test_coin_flips_are_fair_whatever_the_response_and_a_seed_repeats_them():
    """10,000 flips: within 5 standard errors of 1/2."""
    empty = torch.zeros(1, 1)
    for truth in (torch.zeros(100, 100), torch.ones(100, 100)):
        flips, again = (coin_flips(Rollout(empty, empty, empty, truth, ()), generator(0)) for _ in range(2))
        assert flips.unique().tolist() == [0, 1] and abs(flips.mean() - 0.5) < 5 * 0.5 / 10_000**0.5
        assert flips.equal(again)


@given(seed=seeds)
def test_self_certainty_is_the_mean_divergence_of_the_uniform_distribution_from_the_policy(seed):
    """Response by response and state by state, by torch.distributions."""
    task = TinyTask()
    batch = rollout(tiny_gpt(seed, task.vocab_size, task.block_size), task, ["0", "1"], 3, generator(seed))
    uniform, expected = torch.distributions.Categorical(logits=torch.zeros(task.vocab_size)), []
    for logits, mask in zip(batch.logits, batch.mask[:, 1:], strict=True):
        policies = [torch.distributions.Categorical(logits=state) for state in logits[mask]]
        expected.append(sum(torch.distributions.kl_divergence(uniform, pi) for pi in policies) / len(policies))
    torch.testing.assert_close(self_certainty(batch), torch.stack(expected).view(2, 3), rtol=0, atol=ROUNDING)


def expected_gradient(seed, judge, length):
    """sum_y pi(y) r(y) grad log pi(y), with every response y of up to `length` tokens of a tiny policy and its reward
    held fixed; and autograd's gradient of minus the responses' exact entropy."""
    model = tiny_gpt(seed, vocab_size=3, block_size=3, n_layer=1, n_head=1, n_embd=4)
    tokens, mask = every_response(length=length)
    batch = Rollout(tokens, mask, model(tokens).detach()[:, :-1], torch.zeros(1, len(tokens)), ("",) * len(tokens))
    logp = (sequence_logp(model, tokens) * mask[:, 1:]).sum(dim=1)  # (K,)
    estimate = gradients(model, (logp.detach().exp() * judge(batch).flatten() * logp).sum())
    return estimate, gradients(model, (logp.exp() * logp).sum())


@given(seed=seeds)
def test_log_probability_is_minus_the_entropy_gradient_and_self_certainty_does_not_move_its_own_state(seed):
    """The certainty of a single state is the same for every token drawn there, and a constant has no policy gradient:
    it acts by steering to states that are certain later. With two tokens there is such a later state."""
    torch.testing.assert_close(*expected_gradient(seed, log_probability, length=2), rtol=0, atol=EXACT)
    one, two = (expected_gradient(seed, self_certainty, length)[0].abs().max() for length in (1, 2))
    assert one < EXACT < two


# ---------------------------------------------------------------------------------------------------- what was chosen


def best_of_each(runs, kind, of="run"):
    """Of the arms of each kind, the one with the largest sum of a score, in the order of the kinds."""
    ways = itertools.groupby(runs.x.arms, kind)
    return [max(arms, key=lambda arm: sum(runs.values(arm.name, of))) for _, arms in ways]


@pytest.mark.parametrize("start", ["", "-learning"])
def test_each_part_of_the_toy_has_the_rate_at_which_it_reached_most_alone(start):
    """On seeds from 100 on, which no result has. So it has first, in W's place."""
    tuning, used = load(arms.EXPERIMENTS[f"tuning{start}"]), arms.EXPERIMENTS[f"parts{start}"]
    assert min(tuning.x.seeds) >= 100 > max(used.seeds)
    *alone, everything = best_of_each(tuning, lambda arm: arm.part, "accuracy")
    chosen = [replace(arm, name=arm.name.replace("only", "first"), order="first") for arm in alone]
    assert used.arms == [*some("rl"), *alone, *chosen, everything]


def test_smollm2_has_the_rates_that_were_best_over_ten_updates():
    """On seeds of their own. CF-RL and its control have as the experiment's rate what was best for stage 1."""
    tuning, real, parts, used = (
        load(real_model.EXPERIMENTS[name]) for name in ("real-tuning", "real", "real-parts-tuning", "real-parts")
    )
    assert min(*tuning.x.seeds, *parts.x.seeds) >= 100 > max(*real.x.seeds, *used.x.seeds)
    cf_rl, *others = best_of_each(tuning, lambda arm: arm.name.rpartition("-x")[0])
    assert cf_rl.rate == real.x.rate and WAYS["cf-rl"].rate is WAYS["control"].rate is None
    assert all(arm in real.x.arms for arm in others)
    assert best_of_each(parts, lambda arm: arm.part) == used.x.arms


@pytest.mark.parametrize("name", ["order", "order-learning"])
def test_what_was_best_on_a_map_is_what_is_run_again_on_other_seeds(name):
    """The best cell of each way, by the accuracy over the run."""
    mapped, again = load(arms.EXPERIMENTS[name]), arms.EXPERIMENTS[f"{name}-again"]
    rl, *cells = best_of_each(mapped, lambda arm: arm.name.rpartition("-")[0])
    assert again.arms == [*some("rl"), *cells]
    assert min(again.seeds) > max(mapped.x.seeds) and again.sft_steps == mapped.x.sft_steps
