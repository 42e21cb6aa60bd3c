"""The command line: what a run leaves behind, that it repeats to the byte, and that bad input ends in one sentence."""

import csv
import dataclasses
import itertools
import json
import math
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from tiny import generator, tiny_gpt

import train_toy
from assets import tables
from assets.report import by_position, changes_by_position
from minicfrl import SFTConfig, make_probe
from ntk import empirical_ntk

ROOT = Path(__file__).parent.parent
TINY = "--workers 1 --digits 1 --sft-steps 40 --rl-steps 4 --classifier-steps 2 --prompts 8 --samples 4".split()
TINY += "--eval-every 2 --eval-prompts 2 --final-prompts 3".split()
ARMS = ["rl", "cf-rl", "rl-classifier-lr"]


def run(out, *flags):
    return train_toy.main([*TINY, "--out", str(out), *flags])


def rows_without_seconds(path):
    with open(path, newline="", encoding="utf-8") as file:
        return [{k: v for k, v in row.items() if not k.endswith("seconds")} for row in csv.DictReader(file)]


def rows_of(out):
    return rows_without_seconds(out / "metrics.csv")


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """One finished tiny run, to look at. Tests do not change it."""
    out = tmp_path_factory.mktemp("runs") / "finished"
    assert run(out) == 0
    return out


@pytest.fixture(scope="module")
def only_stage_1(tmp_path_factory):
    """A run in which nothing moves but the classifier in stage 1."""
    out = tmp_path_factory.mktemp("runs") / "only-stage-1"
    assert run(out, "--arms", "cf-rl,random-w,lp-ft,random-reward-sgd,sft-rl-sgd", "--lr", "0", "--sgd-lr", "0") == 0
    return out


def refused(capsys, *arguments):
    """Run a command line that must be refused: exit code 2, nothing printed but one line; returns that line."""
    with pytest.raises(SystemExit) as stopped:
        train_toy.main(list(arguments))
    printed = capsys.readouterr()
    assert stopped.value.code == 2 and printed.out == "" and printed.err.count("\n") == 1
    return printed.err


def test_a_run_leaves_what_the_readme_says(finished):
    policies = {f"{arm}-seed0.pt" for arm in ["sft", *ARMS]}
    assert {path.name for path in finished.iterdir()} == policies | {
        "config.json",
        "metrics.csv",
        "summary.json",
        "parts",
    }
    rows = rows_without_seconds(finished / "metrics.csv")
    arms = [(arm, step) for arm in ("cf-rl", "rl-classifier-lr", "rl") for step in ("2", "4")]  # by file name
    assert [(row["arm"], row["step"]) for row in rows] == [*arms, ("sft", "0")]
    tokens = [int(row["tokens"]) for row in rows[:2]]
    assert tokens[0] < tokens[1] and tokens[1] > 8 * 4 * 7  # so far: more than one update of 32 responses can hold
    assert all(float(row["reward"]) > 0 for row in rows[:-1])  # so there is something to learn, and to repeat
    config = json.loads((finished / "config.json").read_text(encoding="utf-8"))
    assert config["config"]["rl_steps"] == 4 and "torch" in config["versions"]
    summary = json.loads((finished / "summary.json").read_text(encoding="utf-8"))
    assert list(summary) == ["sft", *ARMS] and summary["rl"]["step"] == [4] and summary["sft"]["step"] == [0]


def test_all_rows_have_the_same_columns_in_the_same_order(finished, only_stage_1):
    """metrics.csv has one header for rows of all arms, of fine-tuning, of imitation and of RL. In each the tokens are a
    whole number; reward, flat and gradient_norm are either all numbers or, where there was no update of RL, all nan."""
    for out in (finished, only_stage_1):
        headers = {part.read_text(encoding="utf-8").partition("\n")[0] for part in (out / "parts").glob("*.csv")}
        assert len(headers) == 1
        for row in rows_of(out):
            rewarded = row["arm"] not in ("sft", "lp-ft") and (row["arm"], row["step"]) != ("sft-rl-sgd", "2")
            assert {math.isnan(float(row[name])) for name in ("reward", "flat", "gradient_norm")} == {not rewarded}
            assert row["tokens"].isdigit() and (row["tokens"] != "0") == rewarded


def test_the_microscope_s_columns_add_up_to_what_happened_on_the_probe(finished):
    """Its changes telescope: summed over all updates they are the probe's confidence and entropy now, minus those at
    the start. While the body is frozen nothing is the body's doing. 1e-5: the file keeps six digits."""
    rows = [{k: v if k == "arm" else float(v) for k, v in row.items()} for row in rows_of(finished)]
    start = rows.pop()
    assert start["arm"] == "sft" and start["confidence_change"] == 0
    for row in rows:
        for name in ("entropy", "confidence"):
            change = row[f"{name}_change"]
            parts = sum(row[f"{name}_{part}"] for part in ("by_W", "by_body", "residual"))
            assert change == pytest.approx(parts, abs=1e-5)
            assert change == pytest.approx(row[f"probe_{name}"] - start[f"probe_{name}"], abs=1e-5)
            frozen = row["arm"] == "cf-rl" and row["step"] == 2
            assert (row[f"{name}_by_body"] == 0) == frozen and row[f"{name}_by_W"] != 0


def test_the_kernel_is_measured_at_the_ends_of_the_stages(finished):
    """Updates 0, 2 and 4 here. While the body rests, all that happens to the kernel is what W did to G, and R stays."""
    rows = {(row["arm"], row["step"]): {k: float(row[k]) for k in train_toy.KERNEL} for row in rows_of(finished)}
    assert not any(math.isnan(value) for row in rows.values() for value in row.values())
    start, stage_1 = rows["sft", "0"], rows["cf-rl", "2"]
    assert start["kernel_G_by_W"] == 1 and start["kernel_G_cosine"] == 1
    assert stage_1["kernel_R"] == start["kernel_R"] and stage_1["cosine_prompt"] == start["cosine_prompt"]
    assert stage_1["kernel_G"] == pytest.approx(stage_1["kernel_G_by_W"] * start["kernel_G"], rel=1e-5)
    assert stage_1["kernel_G_cosine"] < 1 and rows["rl", "4"]["kernel_R"] != start["kernel_R"]


def test_the_report_by_position_agrees_with_the_run_at_the_end_of_the_prompt(finished):
    """Position 0 are the states that the run's own columns call the prompt's."""
    config = train_toy.read_config(finished)[1]
    measures = by_position(config, finished)
    start = rows_of(finished)[-1]
    for name in ("cosine", "positive"):
        assert measures[name][0][0] == pytest.approx(float(start[f"{name}_prompt"]), abs=1e-5)
    assert len(measures["agreement"][0]) > 1 and all(-1 <= value <= 1 for value in measures["agreement"][0])


def test_between_the_ends_of_stages_the_kernel_is_left_out(tmp_path):
    """A group of one is fine too, without a baseline."""
    flags = ["--arms", "rl", "--eval-every", "1", "--sft-steps", "3", "--samples", "1", "--baseline", "none"]
    assert run(tmp_path / "often", *flags) == 0
    measured = {row["step"]: row["kernel_G"] != "nan" for row in rows_of(tmp_path / "often")}
    assert measured == {"0": True, "1": False, "2": True, "3": False, "4": True}


def test_the_gains_are_those_of_the_policy_since_the_start(monkeypatch, tmp_path):
    """(E10) from the probe's start to the policy at hand, on the pairs of the last evaluation."""
    task, start, model = train_toy.Addition(1), *(tiny_gpt(seed, vocab_size=17, block_size=11) for seed in (0, 1))
    probe = make_probe(start, task, task.heldout_pairs[:2], generator(0))
    config = train_toy.Config(digits=1, rl_steps=20, eval_prompts=2, final_prompts=3)
    monkeypatch.setattr(train_toy, "pattern_rates", lambda policy, task, pairs, draws: (policy, len(pairs)))
    seen = []
    monkeypatch.setattr(train_toy, "selection", lambda *rates: seen.extend(rates) or {})
    (tmp_path / "parts").mkdir()
    record = {**train_toy.NO_UPDATE, "step": 20}
    train_toy.log_row(config, tmp_path, 0, "rl", record, task, model, probe, {})
    assert seen == [(probe.start, 3), (model, 3)]


def test_the_report_by_position_adds_up_to_what_the_run_says_of_whole_responses(finished):
    """Where the KL is and where likeliest tokens changed: the same quantities as the run's columns, on other samples of
    the policy, 24 of them. At the first token there is one value per prompt, so that they are equal."""
    config, rows = train_toy.read_config(finished)[1], rows_of(finished)
    (last,) = (row for row in rows if row["arm"] == "rl" and row["step"] == "4")
    measures = changes_by_position(config, finished)
    assert measures["kl"][0][0] == pytest.approx(float(last["kl_first"]), rel=1e-4)
    assert measures["changed"][0][0] == pytest.approx(float(last["changed_first"]), rel=1e-4)
    longest = sum(measures["kl"][0])
    assert float(last["kl_first"]) < float(last["kl"]) < 2 * longest


def test_the_kernel_s_columns_are_what_the_readme_says():
    """Computed once more from the definitions, for a policy whose W and body both moved."""
    task, start = train_toy.Addition(1), tiny_gpt(0, vocab_size=17, block_size=11)
    probe = make_probe(start, task, task.heldout_pairs[:3], generator(0))
    probe = dataclasses.replace(
        probe, advantages=torch.tensor([0.5, -0.25, -0.25])
    )  # an untrained policy is never right
    model = tiny_gpt(1, vocab_size=17, block_size=11)
    row = train_toy.kernel_row(model, probe)

    states, mask = probe.state_mask.nonzero(), torch.zeros_like(probe.state_mask)
    assert len(states) < 64  # so they all count, up to the 32nd
    mask[tuple(states[:32].T)] = True
    K, K0 = empirical_ntk(model, probe.tokens, mask), empirical_ntk(start, probe.tokens, mask)
    start.classifier.weight.data.copy_(model.classifier.weight)
    G, G0 = empirical_ntk(start, probe.tokens, mask).gradient, K0.gradient
    assert row["kernel_R"] == pytest.approx((K.full() - K.gradient).norm().item())
    assert row["kernel_G"] == pytest.approx(K.gradient.norm().item())
    assert row["kernel_G_by_W"] == pytest.approx((G.norm() / G0.norm()).item())
    assert row["kernel_G_cosine"] == pytest.approx(((G * G0).sum() / G.norm() / G0.norm()).item())

    i, t = mask.nonzero(as_tuple=True)
    residuals = torch.eye(17)[probe.tokens[i, t + 1]] - model(probe.tokens)[mask].softmax(dim=1).detach()
    g = (probe.advantages[i, None] * residuals).flatten()
    G = K.gradient.reshape(len(g), len(g))
    expected = g @ G @ g / (g @ g) / G.norm() if g.any() else torch.tensor(0.0)
    assert row["kernel_G_alignment"] == pytest.approx(expected.item())

    features = model.features(probe.tokens)
    kinds = {"prompt": features[:, 3], "continuation": [x for i, j in states if j > 3 for x in features[i, j][None]]}
    for kind, vectors in kinds.items():
        vectors = [vector.detach() for vector in vectors]
        mean = sum(vectors) / len(vectors)
        pairs = list(itertools.permutations(vectors, 2))
        cosines = [(x @ y / x.norm() / y.norm()).item() for x, y in pairs]
        centred = [((x - mean) @ (y - mean) / (x - mean).norm() / (y - mean).norm()).item() for x, y in pairs]
        assert row[f"cosine_{kind}"] == pytest.approx(sum(cosines) / len(pairs))
        assert row[f"positive_{kind}"] == pytest.approx(sum(c > 0 for c in cosines) / len(pairs))
        assert row[f"centred_{kind}"] == pytest.approx((sum(c * c for c in centred) / len(pairs)) ** 0.5)


def test_the_arms_are_what_the_readme_says():
    config = train_toy.Config(rl_steps=50, classifier_steps=7, lr=1e-3, classifier_lr=1e-2)
    arms = {arm: config.rl(arm) for arm in train_toy.ARMS}
    settings = {arm: (c.classifier_steps, c.lr, c.classifier_lr, c.stage_1, c.optimizer) for arm, c in arms.items()}
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
    rewards = {"random-reward": "coin flips", "self-certainty": "self-certainty", "log-probability": "log-probability"}
    for arm, rl in arms.items():
        assert rl.reward == rewards.get(arm.removesuffix("-sgd"), "verifier")
        assert rl.kl == float(arm.removeprefix("kl-") if arm.startswith("kl-") else 0)
        assert rl.steps == (43 if arm == "sft-rl-sgd" else 50)


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
    config = train_toy.Config(digits=1, sft_steps=30, tilt="0,0,1", eval_prompts=2, final_prompts=3)
    train_toy.open_out(tmp_path / "tilted", config)
    assert train_toy.train(config, tmp_path / "tilted", 0, "sft") is None
    assert [(stage.steps, stage.mixture) for stage in stages] == [(30, SFTConfig.mixture), (150, (0.0, 0.0, 1.0))]
    record = json.loads((tmp_path / "tilted" / "config.json").read_text(encoding="utf-8"))
    assert record["sft"]["steps"] == 30 and record["tilt"]["mixture"] == [0, 0, 1]


@pytest.mark.parametrize("name", train_toy.EXPERIMENTS)
def test_an_experiment_is_other_defaults_that_flags_override(name, monkeypatch, tmp_path):
    seen = []
    monkeypatch.setattr(train_toy, "run", lambda config, out, workers: seen.append(config) or [])
    for flags in ([], ["--seeds", "2"]):
        assert train_toy.main(["--experiment", name, *flags]) == 0
    assert seen[0] == train_toy.Config(**train_toy.EXPERIMENTS[name])
    assert seen[1] == dataclasses.replace(seen[0], seeds=2)


def test_intervals_are_student_s_and_differences_are_paired_by_seed():
    """Three values 1, 2, 3: the mean's standard error is 1/sqrt(3), Student's t with 2 degrees of freedom 4.30."""
    assert tables.cell({"x": [1.0, 2.0, 3.0]}, "x", ".2f") == "2.00 ±2.48"
    assert tables.cell({"x": [0.0, 1.0] * 50}, "x", ".3f") == "0.500 ±0.100"  # 1.984 x 0.5025 / 10
    names = [name for _, name, _ in tables.PAIRED]
    summary = {"sft": {}, "rl": {"seed": [0, 1]} | dict.fromkeys(names, [1.0, 5.0])}
    summary |= {"cf-rl": {"seed": [0, 1]} | dict.fromkeys(names, [2.0, 6.0]), "kl": {"seed": [0]}}
    heading, row = tables.paired_table(summary)
    assert row == ["cf-rl"] + ["+1.000 ±0.000"] * 5 + ["+1.0 ±0.0"] and len(heading) == 7


def test_the_summary_takes_the_first_crossing_and_counts_stopped_seeds_as_never(tmp_path):
    """Made-up rows: seed 0 crosses 0.9 at update 8, exactly; seed 1 stopped early."""
    config = train_toy.Config(seeds=2, arms="rl,cf-rl", classifier_steps=5)
    (tmp_path / "parts").mkdir()
    for arm, steps in (("sft", [0]), ("rl", [4, 8, 12]), ("cf-rl", [4, 8, 12])):
        train_toy.policy_file(tmp_path, arm, 0).write_bytes(b"")
        for step in steps:
            row = dict.fromkeys((*train_toy.CURVES, "classifier_norm", "feature_change", *train_toy.KERNEL), 0.5)
            row |= {"arm": arm, "seed": 0, "step": step, "accuracy": [0.1, 0.5, 0.9, 0.95][step // 4]}
            train_toy.append_row(train_toy.rows_file(tmp_path, arm, 0), row)
    summary = train_toy.summarise(config, tmp_path)
    assert summary["rl"]["updates_to_threshold"] == [8, None]
    assert summary["rl"]["accuracy"] == [0.95] and summary["rl"]["curves"]["step"] == [[0, 4, 8, 12]]
    assert summary["rl"]["full_updates_to_threshold"] == [8, None]
    assert summary["cf-rl"]["full_updates_to_threshold"] == [3, None]  # stage 1 for free
    assert summary["rl"]["accuracy_over_the_run"] == [pytest.approx((0.5 + 0.9 + 0.95) / 3)]


def test_every_arm_sees_the_same_prompts_and_starts_from_the_same_policy(tmp_path):
    """Where nothing is learnt (both learning rates 0) the arms' rows are equal, rewards and gradients included."""
    out = tmp_path / "still"
    run(out, "--lr", "0", "--classifier-lr", "0")
    rows = {arm: rows_without_seconds(out / "parts" / f"{arm}-seed0.csv") for arm in ARMS}
    for row in [row for arm in ARMS for row in rows[arm]]:
        del row["arm"], row["stage"], row["gradient_norm"]  # stage 1 of cf-rl has W's gradient alone
    assert rows["rl"] == rows["cf-rl"] == rows["rl-classifier-lr"]


def test_two_runs_with_one_seed_write_identical_metrics(finished, tmp_path):
    """And the rows of an arm do not depend on which other arms there are."""
    run(tmp_path / "again", "--arms", "cf-rl")
    first, again = (
        [row for row in rows_of(out) if row["arm"] in ("sft", "cf-rl")] for out in (finished, tmp_path / "again")
    )
    assert first == again


def test_every_seed_and_every_purpose_has_random_numbers_of_its_own():
    draws = [torch.rand((), generator=train_toy.generator(*key)).item() for key in ((0, "rl"), (1, "rl"), (0, "sft"))]
    assert len(set(draws)) == 3 and torch.rand((), generator=train_toy.generator(0, "rl")) == draws[0]


def test_a_run_is_continued_with_what_is_missing_and_ends_the_same(finished, tmp_path):
    """As if it had been cut short: one policy gone, its rows half written."""
    cut = tmp_path / "cut"
    shutil.copytree(finished, cut)
    (cut / "cf-rl-seed0.pt").unlink()
    rows = cut / "parts" / "cf-rl-seed0.csv"
    rows.write_text("".join(rows.read_text(encoding="utf-8").splitlines(keepends=True)[:2]), encoding="utf-8")
    untouched = (cut / "rl-seed0.pt").stat().st_mtime_ns
    assert run(cut) == 0
    assert (cut / "rl-seed0.pt").stat().st_mtime_ns == untouched
    (cut / "metrics.csv").unlink()
    assert run(cut) == 0  # nothing is missing but this file
    assert rows_without_seconds(cut / "metrics.csv") == rows_without_seconds(finished / "metrics.csv")


def test_saved_policies_answer(finished, capsys):
    assert train_toy.main(["--out", str(finished), "--ask", "4+8="]) == 0  # the run's own configuration, no flags
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[-1] for line in lines] == ["sft", *ARMS]
    assert all(line.startswith("  4+8= ") and ("✗" in line or "✓" in line) for line in lines)


def test_asking_trains_nothing(finished, capsys, tmp_path):
    """Not even what is missing: an unfinished run answers with the policies that are there."""
    (tmp_path / "unfinished").mkdir()
    shutil.copy(finished / "config.json", tmp_path / "unfinished")
    question = ["--out", str(tmp_path / "unfinished"), "--ask", "4+8="]
    assert "holds no policy yet" in refused(capsys, *question)
    shutil.copy(finished / "cf-rl-seed0.pt", tmp_path / "unfinished")
    assert train_toy.main(question) == 0 and capsys.readouterr().out.count("\n") == 1


def test_plot_draws_a_picture(finished, tmp_path):
    pytest.importorskip("matplotlib")
    shutil.copytree(finished, tmp_path / "plot")
    assert run(tmp_path / "plot", "--plot") == 0
    assert (tmp_path / "plot" / "curves.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    "flags, message",
    [
        (["--learning-rate", "1"], "unrecognized arguments: --learning-rate 1"),
        (["--rl-steps", "0"], "rl_steps must be a whole number of at least 1, not 0"),
        (["--rl-steps", "2.5"], "invalid int value: '2.5'"),
        (["--seeds", "-1"], "seeds must be a whole number of at least 1, not -1"),
        (["--workers", "0"], "workers must be a whole number of at least 1, not 0"),
        (["--classifier-steps", "81"], "classifier_steps=81 is not between 0 and steps=80"),
        (["--digits", "4"], "digits must be 1, 2 or 3, not 4"),
        (["--samples", "1"], "samples=1 leaves the baseline 'std' no group to compare with"),
        (["--arms", "rl,sarsa"], "arm 'sarsa' is not one of rl, cf-rl"),
        (["--arms", "rl,rl"], "arm 'rl' is there twice"),
        (["--arms", ""], "arm '' is not one of rl, cf-rl"),
        (["--baseline", "median"], "baseline must be one of std, mean, rloo, none, not 'median'"),
        (["--tilt", "0.8,few"], "tilt must be shares such as 0.8,0.01,0.19, not '0.8,few'"),
        (["--tilt", "0.5,0.5"], "mixture=(0.5, 0.5) does not give one share for each of DSG"),
        (["--lr", "nan"], "lr must be finite and not negative, not nan"),
        (["--threshold", "1.5"], "threshold must lie between 0 and 1, not 1.5"),
        (["--ask", "47+8x="], "'47+8x=' is not a prompt such as '01+02='"),
        (["--plot"], "--plot needs --out DIR to draw in"),
        (["--experiment", "alchemy"], "argument --experiment: invalid choice: 'alchemy'"),
        (["--qui"], "unrecognized arguments: --qui"),
    ],
)
def test_bad_arguments_end_in_one_sentence_and_exit_code_2(capsys, flags, message):
    assert message in refused(capsys, *flags)


def test_results_are_never_overwritten(capsys, finished, tmp_path):
    before = {path: path.read_bytes() for path in finished.rglob("*") if path.is_file()}
    message = refused(capsys, *TINY, "--seed", "1", "--out", str(finished))
    assert "holds a run with seed 0, not 1: choose another --out" in message
    assert {path: path.read_bytes() for path in finished.rglob("*") if path.is_file()} == before

    (tmp_path / "thesis.txt").write_text("mine", encoding="utf-8")
    assert "is not empty and holds no run" in refused(capsys, "--out", str(tmp_path))
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.txt"]

    (tmp_path / "odd").mkdir()
    for damaged in ('{"lr": 1}', "[]", "", '{"config": {"arms": "rl", "seed": "x"}}'):
        (tmp_path / "odd" / "config.json").write_text(damaged, encoding="utf-8")
        assert "config.json is not the record of a run" in refused(capsys, "--out", str(tmp_path / "odd"))


def test_a_folder_that_cannot_be_made_is_refused(capsys, tmp_path):
    (tmp_path / "file").write_text("", encoding="utf-8")
    assert str(tmp_path / "file") in refused(capsys, "--out", str(tmp_path / "file" / "results"))


def test_an_arm_that_is_not_finite_stops_with_step_and_quantity_and_the_others_go_on(capsys, tmp_path):
    """An absurd learning rate in stage 1 breaks the arms that use it, not plain RL."""
    assert run(tmp_path / "broken", "--classifier-lr", "1e308", "--arms", "rl,cf-rl", "--sft-steps", "3") == 1
    printed = capsys.readouterr()
    assert "cf-rl, seed 0, stopped at step 2: the policy's logits are not finite" in printed.err
    assert (tmp_path / "broken" / "rl-seed0.pt").exists() and not (tmp_path / "broken" / "cf-rl-seed0.pt").exists()
    assert "No verdict without all of" in printed.out
    flags = ["--classifier-lr", "1e308", "--arms", "cf-rl", "--eval-every", "1", "--sft-steps", "3"]
    assert run(tmp_path / "at-evaluation", *flags) == 1
    assert "cf-rl, seed 0, stopped at step 1: the policy's logits are not finite" in capsys.readouterr().err


def test_the_verdict_says_what_the_numbers_say():
    """Each of its endings, from made-up updates to the threshold; None stands for never, 4 apart is a tie."""

    def verdict(rl, cf_rl, control):
        return tables.verdict(
            train_toy.Config(seeds=len(rl)),
            {arm: {"updates_to_threshold": n} for arm, n in zip(ARMS, (rl, cf_rl, control), strict=True)},
        )

    assert "took rl 40 updates and cf-rl 12 (one seed): cf-rl was faster" in verdict([40], [12], [20])
    assert "took 20: so training the classifier first helped" in verdict([40], [12], [20])
    assert "so what helped is the classifier's learning rate" in verdict([40], [12], [16])
    assert "rl 12 updates and cf-rl more than 80 (one seed): cf-rl was slower" in verdict([12], [None], [12])
    assert "cf-rl was about as fast" in verdict([16], [12], [8])
    assert "neither rl nor cf-rl reached" in verdict([None], [None], [8])
    assert "20 updates and cf-rl 8 (medians of 3 seeds): cf-rl" in verdict([4, 20, None], [8, 4, 80], [9, 9, 9])


def test_help_explains_every_flag(capsys):
    with pytest.raises(SystemExit) as stopped:
        train_toy.main(["--help"])
    assert stopped.value.code == 0
    text = capsys.readouterr().out
    assert all(f"--{name.replace('_', '-')}" in text for name in train_toy.Config.__dataclass_fields__)


def environment():
    return {**os.environ, "PYTHONPATH": str(ROOT)}


def test_the_quick_run_works_in_two_processes(tmp_path):
    """As users start it: a fresh interpreter, spawned workers, float32, no folder for results."""
    flags = "--quick --arms rl,cf-rl --sft-steps 9 --rl-steps 4 --eval-prompts 4 --final-prompts 4 --workers 2"
    command = [sys.executable, str(ROOT / "train_toy.py"), *flags.split()]
    done = subprocess.run(command, cwd=tmp_path, env=environment(), capture_output=True, text=True, encoding="utf-8")
    assert done.returncode == 0 and done.stderr == ""
    assert "cf-rl" in done.stdout and "No verdict without all of" in done.stdout
    assert list(tmp_path.iterdir()) == []


class DeadlyPath(type(Path())):
    """Kills the process that unpickles it, as a worker does with its job."""

    def __reduce__(self):
        return os._exit, (1,)


def test_a_worker_that_dies_ends_the_run_with_a_sentence(tmp_path):
    """Instead of waiting for it for ever."""
    (complaint,) = train_toy.run(train_toy.Config(arms="rl"), DeadlyPath(tmp_path), workers=2)
    assert "a worker process died" in complaint


@pytest.mark.skipif(os.name == "nt", reason="POSIX signals")
def test_ctrl_c_keeps_the_rows_written_so_far_and_leaves_no_worker(finished, tmp_path):
    """The workers leave it to the parent, for which a kill is the same. They hold its pipes: had one stayed,
    `communicate` would time out."""
    assert signal.getsignal(signal.SIGTERM) is signal.default_int_handler  # since `finished` ran
    out = tmp_path / "long"
    command = [sys.executable, str(ROOT / "train_toy.py"), *TINY, "--workers", "2", "--out", str(out)]
    command += ["--rl-steps", "100000", "--arms", "rl"]  # one worker is at work, one idle
    process = subprocess.Popen(
        command, env=environment(), stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True, start_new_session=True
    )
    started = time.monotonic()
    while not (out / "parts" / "rl-seed0.csv").exists():
        assert process.poll() is None and time.monotonic() - started < 60
        time.sleep(0.1)
    os.killpg(process.pid, signal.SIGINT)  # as a terminal does: to the workers too
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 130 and errors == f"interrupted: the rows written so far are kept in {out}\n"
    rows = rows_without_seconds(out / "metrics.csv")
    assert {row["arm"] for row in rows} == {"sft", "rl"} and all(row["success_G"] for row in rows)
