"""Arms and experiments: what each changes, and that nothing else differs."""

import dataclasses
import itertools
import json
import math
from types import SimpleNamespace

import pytest
import torch
from tiny import tiny_gpt
from tiny_runs import DEFAULT_ARMS, rows_of, rows_without_seconds, run

import minicfrl
from experiments import arms, runs, toy
from experiments.arms import ARMS, EXPERIMENTS, PARTS, Config
from experiments.report import load_results
from experiments.runs import open_out
from experiments.variations import (
    JUDGES,
    ClippedAdam,
    KeptAdam,
    coin_flips,
    graded,
    log_probability,
    self_certainty,
    train_twice,
)
from minicfrl import Addition, RLConfig, SFTConfig, Stage
from train_toy import stream


def test_the_arms_are_what_the_readme_says():
    """Stage by stage, as (updates, what they train, its rate, W's own); and what else is not as the flags say."""
    config = Config(rl_steps=50, classifier_steps=7, lr=1e-3, classifier_lr=1e-2)
    plain, rest, sgd = Stage(50, "all", 1e-3), Stage(43, "all", 1e-3), Stage(50, "all", config.sgd_lr)
    first, slow = Stage(7, "classifier", 1e-3, 1e-2), Stage(50, "all", 1e-3 / 8)
    stages = {
        "rl": (plain,),
        "cf-rl": (first, rest),
        "control": (Stage(7, "all", 1e-3, 1e-2), rest),
        "cf-rl-same-lr": (Stage(7, "classifier", 1e-3, 1e-3), rest),
        "classifier-only": (Stage(50, "classifier", 1e-3, 1e-2),),
        "classifier-last": (rest, first),
        "fast-classifier": (Stage(50, "all", 1e-3, 1e-2),),
        "rl-sgd": (sgd,),
        "random-reward": (plain,),
        "random-reward-sgd": (sgd,),
        "self-certainty": (slow,),
        "self-certainty-sgd": (sgd,),
        "log-probability": (slow,),
        "kl-0.3": (plain,),
        "kl-1": (plain,),
        "random-w": (plain,),
        "sft-rl-sgd": (Stage(7, "all", 1e-3), Stage(43, "all", config.sgd_lr)),
        "ft": (plain,),
        "lp-ft": (first, rest),
    }
    between = [5, 5, 6, 5, 5, 6, 5, 6]  # 43 updates of everything, cut by 7 of W alone
    stages["spread"] = tuple(
        stage
        for n, alone in itertools.zip_longest(between, [dataclasses.replace(first, steps=1)] * 7)
        for stage in (dataclasses.replace(rest, steps=n), alone)
        if stage
    )
    for name, part in {**PARTS, "everything": "all"}.items():
        stages[f"{name}-only"] = (Stage(50, part, 1e-2),)
        if name != "everything":
            stages[f"{name}-first"] = (Stage(7, part, 1e-2), rest)
    assert {arm: config.stages(arm) for arm in ARMS} == stages
    rl = {arm: config.rl(arm) for arm in ARMS}
    assert [arm for arm in ARMS if rl[arm] is None] == ["ft", "lp-ft"]
    assert rl["spread"].optimizer is KeptAdam
    assert rl.pop("ft") is rl.pop("lp-ft") is None
    assert all(each.stages == stages[arm][1 if arm == "sft-rl-sgd" else 0 :] for arm, each in rl.items())
    assert {arm for arm, each in rl.items() if each.optimizer == "sgd"} == {arm for arm in rl if arm.endswith("-sgd")}
    rewards = {"random-reward": coin_flips, "self-certainty": self_certainty, "log-probability": log_probability}
    for arm, each in rl.items():
        assert each.reward is rewards.get(arm.removesuffix("-sgd"), RLConfig.reward)
        assert each.kl == float(arm.removeprefix("kl-") if arm.startswith("kl-") else 0)


def test_a_run_s_flags_reach_every_arm_that_does_not_change_them():
    config = Config(prompts=5, samples=3, baseline="rloo", kl=0.2)
    for arm in ("rl", "cf-rl", "classifier-last-4x2", "kl-1"):
        rl = config.rl(arm)
        assert (rl.prompts, rl.samples, rl.baseline, rl.kl) == (5, 3, "rloo", 1.0 if arm == "kl-1" else 0.2)


@pytest.mark.parametrize("arm", ["rl", "rl-sgd", "ft", "classifier-last"])
def test_a_stage_1_longer_than_the_run_is_refused_whatever_the_arm(arm):
    """Also by an arm without a stage 1: what a run says of the others would be wrong."""
    with pytest.raises(ValueError, match="classifier_steps=81 is not between 0 and steps=80"):
        Config(arms=arm, classifier_steps=81)


def test_the_classifier_alone_at_last_leaves_the_body_as_it_is_to_the_bit(monkeypatch):
    """Not in the stage before. By coin flips: an untrained policy is never right."""
    config = Config(digits=1, rl_steps=4, classifier_steps=2, prompts=4, samples=4, lr=1e-2)
    monkeypatch.setitem(
        ARMS, "classifier-last", dataclasses.replace(ARMS["classifier-last"], rl={"reward": coin_flips})
    )
    task, model, moved = Addition(1), tiny_gpt(0, 17, 11), []
    before = [p.detach().clone() for p in model.parameters()]
    for record in arms.train_as("classifier-last", config, 0, task, model):
        after = [p.detach().clone() for p in model.parameters()]
        *body, W = (not torch.equal(p, q) for p, q in zip(before, after, strict=True))
        moved.append((record["stage"], all(body), any(body), W))
        before = after
    assert moved == [(1, True, True, True)] * 2 + [(2, False, False, True)] * 2


def test_a_cell_of_any_arm_is_run_and_recorded(only_stage_1):
    """3 updates of all, then one of W at twice the rate --lr, which is 0 here: nothing moves, to the bit."""
    *rows, start = [row for row in rows_of(only_stage_1) if row["arm"] in ("classifier-last-1x2", "sft")]
    assert [(row["step"], row["stage"]) for row in rows] == [("2", "1"), ("4", "2")]
    assert {row["classifier_norm"] for row in rows} == {start["classifier_norm"]}


def test_random_reward_arms_learn_from_coins_and_are_evaluated_on_the_truth(only_stage_1):
    *rows, start = [row for row in rows_of(only_stage_1) if row["arm"] in ("random-reward-sgd", "sft")]
    assert all(0.2 < float(row["reward"]) < 0.8 for row in rows)  # 32 flips: 3 standard errors are 0.27
    assert rows[-1]["accuracy"] == start["accuracy"]  # nothing moved, so the last evaluation is the first again


def test_random_w_starts_where_stage_1_would_end_but_for_the_direction(only_stage_1):
    """With a learning rate of 0 after stage 1 both end where they were moved to, equally far from the start."""
    arms = ("sft", "cf-rl", "random-w")
    W = {arm: torch.load(only_stage_1 / f"{arm}-seed0.pt")["classifier.weight"] for arm in arms}
    stage_1, nudge = W["cf-rl"] - W["sft"], W["random-w"] - W["sft"]
    assert nudge.norm().item() == pytest.approx(stage_1.norm().item()) and stage_1.any()
    assert abs((nudge * stage_1).sum()) < 0.5 * nudge.norm() * stage_1.norm()


def test_linear_probing_moves_the_classifier_and_no_feature(only_stage_1):
    *rows, start = [row for row in rows_of(only_stage_1) if row["arm"] in ("lp-ft", "sft")]
    assert [row["stage"] for row in rows] == ["1", "2"]
    assert all(float(row["feature_change"]) == 0 for row in rows)
    assert rows[0]["classifier_norm"] == rows[1]["classifier_norm"] != start["classifier_norm"]


def test_fine_tuning_first_is_followed_by_rl_and_both_count_as_updates(only_stage_1):
    """Updates 1 and 2 imitate, so there is no reward; 3 and 4 are rewarded."""
    rows = [row for row in rows_of(only_stage_1) if row["arm"] == "sft-rl-sgd"]
    assert [(row["step"], row["stage"]) for row in rows] == [("2", "1"), ("4", "2")]
    assert [math.isnan(float(row["reward"])) for row in rows] == [True, False]


def test_a_tilt_is_more_fine_tuning_on_other_shares(monkeypatch, tmp_path):
    """And config.json says so."""
    configs = []
    make_start = toy.make_start
    monkeypatch.setattr(
        toy, "make_start", lambda *those, **sizes: configs.append(those[2]) or make_start(*those, **sizes)
    )
    monkeypatch.setattr(toy, "supervised_finetune", lambda model, task, sft, draws: configs.append(sft) or [])
    config = Config(digits=1, sft_steps=30, tilt="0,0,1", eval_prompts=2, final_prompts=3)
    open_out(tmp_path / "tilted", config)
    assert runs.job(toy.train_start, config, tmp_path / "tilted", 0, "sft") is None
    assert [(sft.stages[0].steps, sft.mixture) for sft in configs] == [(30, SFTConfig.mixture), (150, (0.0, 0.0, 1.0))]
    record = json.loads((tmp_path / "tilted" / "config.json").read_text(encoding="utf-8"))
    assert record["sft"]["stages"][0]["steps"] == 30 and record["tilt"]["mixture"] == [0, 0, 1]
    assert config.finetuning_steps == 180


@pytest.mark.parametrize("name", EXPERIMENTS)
def test_an_experiment_is_other_defaults_that_flags_override(name, monkeypatch, tmp_path):
    seen = []
    monkeypatch.setattr(toy, "run", lambda config, out, *_: seen.append(config) or [])
    for flags in ([], ["--seeds", "2"]):
        assert toy.main([name, *flags]) == 0
    assert seen[0] == Config(**EXPERIMENTS[name])
    assert seen[1] == dataclasses.replace(seen[0], seeds=2)


def test_every_arm_sees_the_same_prompts_and_starts_from_the_same_policy(tmp_path):
    """Where nothing is learnt (both learning rates 0) the arms' rows are equal, rewards and gradients included."""
    out = tmp_path / "still"
    run(out, "--lr", "0", "--classifier-lr", "0", "--measures", "few")
    rows = {arm: rows_without_seconds(out / "parts" / f"{arm}-seed0.csv") for arm in DEFAULT_ARMS}
    for row in [row for arm in DEFAULT_ARMS for row in rows[arm]]:
        del row["arm"], row["stage"], row["gradient_norm"]  # stage 1 of cf-rl has W's gradient alone
    assert rows["rl"] == rows["cf-rl"] == rows["control"]


def test_every_seed_and_every_purpose_has_random_numbers_of_its_own():
    draws = [torch.rand((), generator=stream(*key)).item() for key in ((0, "rl"), (1, "rl"), (0, "sft"))]
    assert len(set(draws)) == 3 and torch.rand((), generator=stream(0, "rl")) == draws[0]


def batch_moved(config, arm, updates=2, seed=0):
    """Which parameters, entry by entry, each of the first updates of an arm moves; on one-digit sums, by coin flips."""
    task, model, moved = Addition(1), tiny_gpt(seed, 17, 11), []
    before = torch.nn.utils.parameters_to_vector(model.parameters()).detach()
    for _ in itertools.islice(arms.train_as(arm, config, seed, task, model), updates):
        after = torch.nn.utils.parameters_to_vector(model.parameters()).detach()
        moved.append(after != before)
        before = after
    return moved


SMALL = dict(digits=1, rl_steps=4, classifier_steps=2, prompts=4, samples=4, lr=1e-2, judge="coin-flips")


def test_scattered_parameters_are_as_many_as_w_has_and_the_same_until_all_move():
    """Those that could move and did not are embeddings of tokens that the batch lacks."""
    size = 17 * 8
    first, second, third = batch_moved(Config(**SMALL), "scattered-first", 3)
    assert size / 2 < first.sum() <= size and size / 2 < (first | second).sum() <= size < third.sum()
    assert all(moved.sum() <= size for moved in batch_moved(Config(**SMALL), "scattered-only", 4))


@pytest.mark.parametrize("part, of", PARTS.items())
def test_a_part_alone_moves_nothing_else(part, of):
    """Parameters are in the model's order, so a part is known by its place."""
    names = [name for name, p in tiny_gpt(0, 17, 11).named_parameters() for _ in range(p.numel())]
    inside = torch.tensor([of == "all" or f"{name}.".startswith(f"{of}.") for name in names])
    (moved,) = batch_moved(Config(**SMALL), f"{part}-only", 1)
    assert moved.any() and not (moved & ~inside).any()


def test_adam_that_is_kept_goes_on_where_a_fresh_one_would_begin_again():
    """Two stages that train all at one rate are then one stage, to the bit; with a fresh one they are not."""
    ends = {}
    for optimizer in ("adam-kept", "adam"):
        for arm in ("rl", "control"):
            config = Config(**SMALL | dict(classifier_lr=1e-2, optimizer=optimizer))
            model = tiny_gpt(0, 17, 11)
            list(arms.train_as(arm, config, 0, Addition(1), model))
            ends[optimizer, arm] = torch.nn.utils.parameters_to_vector(model.parameters())
    assert torch.equal(ends["adam-kept", "rl"], ends["adam-kept", "control"])
    assert torch.equal(ends["adam", "rl"], ends["adam-kept", "rl"])
    assert not torch.equal(ends["adam", "rl"], ends["adam", "control"])


def test_clipping_scales_all_gradients_to_norm_1_together():
    """Adam's second step tells: its first is the same for any scale."""
    p, q = (torch.nn.Parameter(torch.zeros(2)) for _ in "pq")
    clipped, plain = ClippedAdam([p]), torch.optim.Adam([q])
    for gradient in (torch.tensor([3.0, 4.0]), torch.tensor([0.3, 0.4])):
        p.grad, q.grad = gradient.clone(), gradient / max(1, gradient.norm().item())
        clipped.step()
        plain.step()
    torch.testing.assert_close(p, q)


def test_the_second_pass_over_a_batch_is_by_the_clipped_ratio(monkeypatch):
    """The first is train_rl's update, from the same random numbers. The second moves along sum A r grad log pi / N over
    the tokens whose ratio has not left 1 +- clip on the advantage's side, recomputed here token by token."""
    config = Config(**SMALL | dict(passes=2, optimizer="sgd", lr=3.0)).rl("rl")
    flips = coin_flips(SimpleNamespace(rewards=torch.zeros(4, 4)), stream(0, "flips"))
    config = dataclasses.replace(config, stages=(Stage(1, lr=3.0),), reward=lambda batch, draws: flips)
    task, once, twice = Addition(1), tiny_gpt(0, 17, 11), tiny_gpt(0, 17, 11)
    batches = []
    monkeypatch.setattr(
        "experiments.variations.rollout", lambda *a: batches.append(minicfrl.rollout(*a)) or batches[-1]
    )
    list(minicfrl.train_rl(once, task, config, stream(0, "rl")))
    list(train_twice(twice, task, config, stream(0, "rl"), clip=0.05))
    (batch,) = batches
    loss, used = 0.0, 0
    new, old = minicfrl.sequence_logp(once, batch.tokens), batch.logp
    advantages = minicfrl.group_advantages(flips).flatten()
    for i, t in batch.mask[:, 1:].nonzero().tolist():
        ratio, A = (new[i, t] - old[i, t]).exp(), advantages[i]
        if A > 0 and ratio < 1.05 or A < 0 and ratio > 0.95:
            loss, used = loss - A * ratio, used + 1
    assert 0 < used < (batch.mask[:, 1:] & (advantages != 0)[:, None]).sum()  # some are clipped, some are not
    once.zero_grad()
    (loss / batch.mask.sum()).backward()
    for p, q in zip(once.parameters(), twice.parameters(), strict=True):
        torch.testing.assert_close(p - 3.0 * p.grad, q, rtol=0, atol=1e-10)


def test_a_grade_is_the_share_of_right_digits_and_noise():
    """Of 47+85=132 the answer 142 has two of three digits, 022 one; what is too short, too long or none has less."""
    task = Addition(2)
    responses = ("d142", "d022", "d13", "s1213", "d132", "d1320")
    rows = [task.encode("47+85=" + response) for response in responses]
    tokens = torch.tensor([row + [task.end_token] * (12 - len(row)) for row in rows])
    mask = torch.arange(12) >= torch.tensor([6] * 6)[:, None]
    batch = minicfrl.Rollout(tokens, mask, torch.zeros(6, 11, 17), torch.zeros(1, 6), responses)
    noise = 0.1 * torch.randn(1, 6, generator=stream(0, "noise"))
    grades = graded(batch, stream(0, "noise")) - noise
    assert grades[0].tolist() == pytest.approx([2 / 3, 1 / 3, 2 / 3, 0, 1, 3 / 4])
    assert set(JUDGES) == {"verifier", "coin-flips", "graded"}


@pytest.mark.parametrize(
    "flags, fault",
    [
        (dict(judge="nobody"), "judge must be one of verifier, coin-flips, graded, not 'nobody'"),
        (dict(passes=3), "passes must be 1 or 2, not 3"),
        (dict(passes=2, kl=0.1), "passes=2 has no KL penalty, so kl=0.1 must be 0"),
        (dict(optimizer="lion"), "optimizer must be one of adam, sgd, .*, not 'lion'"),
        (dict(arms="rl@a0"), "arm 'rl@a0': a scale must be positive"),
        (dict(arms="rl@snan"), "arm 'rl@snan' is not one of"),
        (dict(arms="rl@s1e999"), "arm 'rl@s1e999': a knob cannot be turned infinitely far"),
        (dict(arms="rl@a1e999"), "arm 'rl@a1e999': a knob cannot be turned infinitely far"),
        (dict(arms="norm-first-0x2"), "steps must be a whole number of at least 1, not 0"),
    ],
)
def test_settings_that_make_no_sense_are_refused_by_name(flags, fault):
    with pytest.raises(ValueError, match=fault):
        Config(**flags)


def test_a_policy_with_a_constant_feature_is_kept_and_answers(tmp_path, capsys):
    """At rate 0 it says what the start says; and its file knows how large the feature is."""
    assert run(tmp_path / "run", "--arms", "rl@s2,rl@a2", "--lr", "0", "--measures", "few") == 0
    rows = {row["arm"]: row["accuracy"] for row in rows_of(tmp_path / "run")}
    assert rows["rl@s2"] == rows["rl@a2"] == rows["sft"]
    config = runs.read_config(tmp_path / "run")[1]
    _, model = runs.load_policy(config, tmp_path / "run", "rl@s2", 0)
    assert model.body.norm.size > 0 and model.classifier.weight[:, -1].eq(0).all()
    capsys.readouterr()
    assert toy.main(["plain", "--out", str(tmp_path / "run"), "--ask", "4+5="]) == 0
    assert "rl@s2" in capsys.readouterr().out


@pytest.mark.parametrize("start", ["", "-learning"])
def test_each_part_has_the_rate_at_which_it_reached_most_alone(start):
    """Chosen on seeds 100 to 102, which no result has, by the accuracy at the end; first it has the same."""
    (tuning, tried), (parts, _) = (load_results()[0][f"{name}{start}"] for name in ("tuning", "parts"))
    assert (tuning.seed, tuning.seeds) == (100, 3) and parts.seed + parts.seeds < 100
    for part in (*PARTS, "classifier", "everything"):
        arms_of = [arm for arm in tuning.arm_list if arm.startswith(f"{part}-only-")]
        best = max(arms_of, key=lambda arm: sum(tried[arm]["accuracy"]))
        assert len(arms_of) == 4 and best in parts.arm_list
        first = "cf-rl-20" if part == "classifier" else f"{part}-first-20"
        assert part == "everything" or f"{first}x{best.rpartition('x')[2]}" in parts.arm_list


@pytest.mark.parametrize("tuned, used", [("real-tuning", "real"), ("real-parts-tuning", "real-parts")])
def test_in_smollm2_each_part_has_the_rate_that_was_best_over_ten_updates(tuned, used):
    """On seeds from 100 on, which no run has. CF-RL's is that of its stage 1."""
    (tuning, tried), (run, _) = (load_results()[0][name] for name in (tuned, used))
    assert tuning.seed == 100 and run.seed + run.seeds < 100
    for way, arms_of in itertools.groupby(tuning.arm_list, lambda arm: arm.rpartition("-")[0]):
        best = max(arms_of, key=lambda arm: sum(tried[arm]["accuracy_over_the_run"]))
        in_run = [arm.stages(run) for arm in map(arms.arm_named, run.arm_list)]
        rates = {(stages[0].trains, stages[0].lr, stages[0].classifier_lr) for stages in in_run}
        first = arms.arm_named(best).stages(tuning)[0]
        assert (first.trains, first.lr, first.classifier_lr) in rates, way


def test_a_part_is_named_by_the_beginning_of_its_parameters_and_one_that_is_not_there_is_refused():
    """Alone or first, at a rate of its own, also as a cell; of a policy of one block the second is no part."""
    config = Config(arms="body.blocks.0.mlp-only,body.norm-first-3x7", rl_steps=8, classifier_steps=2, lr=1e-3)
    assert config.stages("body.blocks.0.mlp-only") == (Stage(8, "body.blocks.0.mlp", config.classifier_lr),)
    assert config.stages("body.norm-first-3x7") == (Stage(3, "body.norm", 7e-3), Stage(5, "all", 1e-3))
    for arm in ("body.base.layers.3-only", "body.nor-first", "body.offset-only"):
        with pytest.raises(ValueError, match=f"arm '{arm}' trains .*, and the policy has no parameter of that name"):
            Config(arms=arm)
    with pytest.raises(ValueError, match="arm 'last-block-only' trains body.blocks.1, and the policy has no parameter"):
        Config(arms="last-block-only", layers=1)
    with pytest.raises(ValueError, match="is not one of"):
        Config(arms="classifier.weight-only")
