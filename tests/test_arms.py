"""Arms and experiments: what each changes, and that nothing else differs."""

import dataclasses
import json
import math

import pytest
import torch
from tiny import tiny_gpt
from tiny_runs import DEFAULT_ARMS, rows_of, rows_without_seconds, run

import train_toy
from experiments import arms, runs
from experiments.arms import ARMS, EXPERIMENTS, Config, coin_flips
from experiments.runs import open_out
from minicfrl import Addition, RLConfig, SFTConfig, Stage


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
        "body-first": (Stage(7, "body", 1e-3, 1e-2), rest),
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
    assert {arm: config.stages(arm) for arm in ARMS} == stages
    rl = {arm: config.rl(arm) for arm in ARMS}
    assert [arm for arm in ARMS if rl[arm] is None] == ["ft", "lp-ft"]
    assert rl.pop("ft") is rl.pop("lp-ft") is None
    assert all(each.stages == stages[arm][1 if arm == "sft-rl-sgd" else 0 :] for arm, each in rl.items())
    assert {arm for arm, each in rl.items() if each.optimizer == "sgd"} == {arm for arm in rl if arm.endswith("-sgd")}
    rewards = {"random-reward": arms.coin_flips, "self-certainty": arms.self_certainty}
    rewards["log-probability"] = arms.log_probability
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
    monkeypatch.setattr(train_toy, "supervised_finetune", lambda model, task, sft, draws: configs.append(sft) or [])
    config = Config(digits=1, sft_steps=30, tilt="0,0,1", eval_prompts=2, final_prompts=3)
    open_out(tmp_path / "tilted", config)
    assert runs.job(train_toy.train_start, config, tmp_path / "tilted", 0, "sft") is None
    assert [(sft.stages[0].steps, sft.mixture) for sft in configs] == [(30, SFTConfig.mixture), (150, (0.0, 0.0, 1.0))]
    record = json.loads((tmp_path / "tilted" / "config.json").read_text(encoding="utf-8"))
    assert record["sft"]["stages"][0]["steps"] == 30 and record["tilt"]["mixture"] == [0, 0, 1]
    assert config.finetuning_steps == 180


@pytest.mark.parametrize("name", EXPERIMENTS)
def test_an_experiment_is_other_defaults_that_flags_override(name, monkeypatch, tmp_path):
    seen = []
    monkeypatch.setattr(train_toy, "run", lambda config, out, *_: seen.append(config) or [])
    for flags in ([], ["--seeds", "2"]):
        assert train_toy.main(["--experiment", name, *flags]) == 0
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
    draws = [torch.rand((), generator=arms.generator(*key)).item() for key in ((0, "rl"), (1, "rl"), (0, "sft"))]
    assert len(set(draws)) == 3 and torch.rand((), generator=arms.generator(0, "rl")) == draws[0]
