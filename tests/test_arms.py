"""Arms and experiments: what each changes, and that nothing else differs."""

import dataclasses
import json
import math

import pytest
import torch
from tiny_runs import DEFAULT_ARMS, rows_of, rows_without_seconds, run

import train_toy
from experiments import arms, runs
from experiments.arms import ARMS, EXPERIMENTS, Config
from experiments.runs import open_out
from minicfrl import SFTConfig, verified


def test_the_arms_are_what_the_readme_says():
    config = Config(rl_steps=50, classifier_steps=7, lr=1e-3, classifier_lr=1e-2)
    rl = {arm: config.rl(arm) for arm in ARMS}
    settings = {arm: (c.classifier_steps, c.lr, c.classifier_lr, c.stage_1, c.optimizer) for arm, c in rl.items()}
    assert settings == {
        "rl": (0, 1e-3, 1e-2, "classifier", "adam"),
        "cf-rl": (7, 1e-3, 1e-2, "classifier", "adam"),
        "rl-classifier-lr": (7, 1e-3, 1e-2, "all", "adam"),
        "cf-rl-same-lr": (7, 1e-3, 1e-3, "classifier", "adam"),
        "classifier-only": (50, 1e-3, 1e-2, "classifier", "adam"),
        "rl-sgd": (0, config.sgd_lr, 1e-2, "classifier", "sgd"),
        "body-first": (7, 1e-3, 1e-2, "body", "adam"),
        "random-reward": (0, 1e-3, 1e-2, "classifier", "adam"),
        "random-reward-sgd": (0, config.sgd_lr, 1e-2, "classifier", "sgd"),
        "self-certainty": (0, 1e-3 / 8, 1e-2, "classifier", "adam"),
        "self-certainty-sgd": (0, config.sgd_lr, 1e-2, "classifier", "sgd"),
        "log-probability": (0, 1e-3 / 8, 1e-2, "classifier", "adam"),
        "kl-0.3": (0, 1e-3, 1e-2, "classifier", "adam"),
        "kl-1": (0, 1e-3, 1e-2, "classifier", "adam"),
        "random-w": (0, 1e-3, 1e-2, "classifier", "adam"),
        "sft-rl-sgd": (0, config.sgd_lr, 1e-2, "classifier", "sgd"),
        "ft": (0, 1e-3, 1e-2, "classifier", "adam"),
        "lp-ft": (7, 1e-3, 1e-2, "classifier", "adam"),
    }
    rewards = {"random-reward": arms.coin_flips, "self-certainty": arms.self_certainty}
    rewards["log-probability"] = arms.log_probability
    for arm, each in rl.items():
        assert each.reward is rewards.get(arm.removesuffix("-sgd"), verified)
        assert each.kl == float(arm.removeprefix("kl-") if arm.startswith("kl-") else 0)
        assert each.steps == (43 if arm == "sft-rl-sgd" else 50)


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
    assert [row["step"] for row in rows] == ["2", "4"]
    assert [math.isnan(float(row["reward"])) for row in rows] == [True, False]


def test_a_tilt_is_more_fine_tuning_on_other_shares(monkeypatch, tmp_path):
    """And config.json says so."""
    stages = []
    monkeypatch.setattr(train_toy, "supervised_finetune", lambda model, task, stage, draws: stages.append(stage) or [])
    config = Config(digits=1, sft_steps=30, tilt="0,0,1", eval_prompts=2, final_prompts=3)
    open_out(tmp_path / "tilted", config)
    assert runs.job(train_toy.train, config, tmp_path / "tilted", 0, "sft") is None
    assert [(stage.steps, stage.mixture) for stage in stages] == [(30, SFTConfig.mixture), (150, (0.0, 0.0, 1.0))]
    record = json.loads((tmp_path / "tilted" / "config.json").read_text(encoding="utf-8"))
    assert record["sft"]["steps"] == 30 and record["tilt"]["mixture"] == [0, 0, 1]


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
    run(out, "--lr", "0", "--classifier-lr", "0")
    rows = {arm: rows_without_seconds(out / "parts" / f"{arm}-seed0.csv") for arm in DEFAULT_ARMS}
    for row in [row for arm in DEFAULT_ARMS for row in rows[arm]]:
        del row["arm"], row["stage"], row["gradient_norm"]  # stage 1 of cf-rl has W's gradient alone
    assert rows["rl"] == rows["cf-rl"] == rows["rl-classifier-lr"]


def test_every_seed_and_every_purpose_has_random_numbers_of_its_own():
    draws = [torch.rand((), generator=arms.generator(*key)).item() for key in ((0, "rl"), (1, "rl"), (0, "sft"))]
    assert len(set(draws)) == 3 and torch.rand((), generator=arms.generator(0, "rl")) == draws[0]
