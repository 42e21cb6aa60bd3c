"""The map over stage lengths and classifier rates: its arms, its verdicts, and budgets counted in four ways."""

import copy
import dataclasses

import pytest
import torch
from tiny import tiny_gpt
from tiny_runs import refused, rows_of, run

from experiments.arms import EXPERIMENTS, Config, two_stages
from experiments.order import (
    BASES,
    accounting_table,
    asked_again,
    at_equal,
    finished_in_stage_1,
    map_table,
    tuned,
    ways,
)
from experiments.report import load_results
from experiments.speed import END, OVER_THE_RUN
from experiments.variations import coin_flips
from experiments.verdicts import judge
from minicfrl import Addition, RLConfig, Stage, policy_gradient_loss, rollout, sequence_logp, train_rl
from model import GPT, GPTConfig
from train_toy import stream

MAP = ("--measures", "accuracy", "--arms", "rl", "--stage-lengths", "1,2", "--rate-multiples", "1,5")


def test_a_cell_is_its_arm_with_another_length_and_rate():
    """All else stays: batch, rates of the body, what stage 1 trains."""
    config = Config(rl_steps=9, classifier_steps=4, lr=1e-3, stage_lengths="2,4", rate_multiples="1,2.5", arms="rl")
    frozen, control = config.rl("cf-rl-4x2.5"), config.rl("control-4x2.5")
    assert frozen == RLConfig(two_stages(9, 4, 1e-3, 2.5e-3))
    assert control == RLConfig(two_stages(9, 4, 1e-3, 2.5e-3, trains="all"))
    assert config.rl("classifier-last-4x2.5") == RLConfig(two_stages(9, 4, 1e-3, 2.5e-3)[::-1])
    assert config.rl("body-first-9x2.5") == RLConfig((Stage(9, "body", 2.5e-3),))
    four = ("cf-rl", "control", "classifier-last", "spread")
    cells = [f"{arm}-{k}x{m}" for arm in four for k in (2, 4) for m in ("1", "2.5")]
    assert config.arm_list == ["rl", *cells, "fast-classifier-9x1", "fast-classifier-9x2.5"]


@pytest.mark.parametrize("multiple", [1e-7, 0.25, 1.0, 20.0, 1e6])
def test_a_cell_s_name_holds_any_multiple(multiple):
    config = Config(stage_lengths="2", rate_multiples=str(multiple), arms="rl", lr=1e-3)
    for arm in config.arm_list[1:]:
        rates = {stage.classifier_lr for stage in config.stages(arm)} - {None}
        assert [*rates] == [pytest.approx(multiple * 1e-3)]


@pytest.mark.parametrize("n, T", [(1, 4), (3, 12), (5, 7), (7, 50)])
def test_spread_and_classifier_last_have_cf_rl_s_budgets(n, T):
    """As many updates of W alone, at its rate, and as many of everything; spread has no two of either kind more apart
    than evenness asks: between two updates of W lie (T - n) / (n + 1) others, up or down."""
    config = Config(rl_steps=T, classifier_steps=n)

    def budgets(arm):
        each = [stage for stage in config.stages(arm) for _ in range(stage.steps)]
        kinds = [(stage.trains, stage.classifier_lr, stage.lr) for stage in each]
        return {kind: kinds.count(kind) for kind in kinds}

    assert budgets("cf-rl") == budgets("classifier-last") == budgets("spread")
    between = [stage.steps for stage in config.stages("spread") if stage.trains == "all"]
    assert max(between) - min(between) <= 1 and len(between) <= n + 1


def test_the_control_of_the_whole_run_at_plain_rl_s_own_rate_is_plain_rl():
    """Two constant rates that are one: the same weights to the bit."""
    task, config = Addition(1), Config(digits=1, rl_steps=3, classifier_steps=1, prompts=4, samples=4)
    start = GPT(GPTConfig(task.vocab_size, task.block_size, n_embd=16), stream(0, "init"))
    weights = {}
    for arm in ("rl", "control-3x1", "control-3x5"):
        model = copy.deepcopy(start)
        flipped = dataclasses.replace(config.rl(arm), reward=coin_flips)  # an untrained policy is never right
        list(train_rl(model, task, flipped, stream(0, "rl")))
        weights[arm] = torch.cat([p.flatten() for p in model.parameters()])
    assert torch.equal(weights["rl"], weights["control-3x1"])
    assert not torch.equal(weights["rl"], weights["control-3x5"])


def test_a_cut_map_goes_on_with_what_is_missing(tmp_path, capsys):
    assert run(tmp_path, *MAP) == 0
    printed = capsys.readouterr().out
    whole, kept = rows_of(tmp_path), (tmp_path / "cf-rl-1x5-seed0.pt").stat().st_mtime_ns
    assert (
        "n" in printed.split()
        and "cf-rl minus its control" in printed
        and len({row["arm"] for row in whole}) == 1 + 1 + 4 * 4 + 2
    )
    (tmp_path / "control-2x5-seed0.pt").unlink()
    (tmp_path / "metrics.csv").unlink()
    assert run(tmp_path, *MAP) == 0
    assert rows_of(tmp_path) == whole and (tmp_path / "cf-rl-1x5-seed0.pt").stat().st_mtime_ns == kept


@pytest.mark.parametrize(
    "flags, named",
    [
        (["--stage-lengths", "2,x", "--rate-multiples", "1"], "'2,x'"),
        (["--stage-lengths", "2", "--rate-multiples", "1,"], "'1,'"),
        (["--stage-lengths", ",", "--rate-multiples", "1"], "','"),
        (["--stage-lengths", "2"], "rate_multiples=''"),
        (["--rate-multiples", "2"], "stage_lengths=''"),
        (["--stage-lengths", "2", "--rate-multiples", "nan"], "'nan'"),
        (["--stage-lengths", "2", "--rate-multiples", "-1"], "'-1'"),
        (["--stage-lengths", "0", "--rate-multiples", "1"], "'0'"),
        (["--stage-lengths", "99", "--rate-multiples", "1"], "99"),
        (["--stage-lengths", "2,2", "--rate-multiples", "1"], "'cf-rl-2x1' is there twice"),
        (["--arms", "cf-rl-2xfast"], "'cf-rl-2xfast'"),
        (["--arms", "cf-rl-2x1.2.3"], "'cf-rl-2x1.2.3' is not one of"),
        (["--arms", "cf-rl-2x1e400"], "classifier_lr must be finite"),
        (["--arms", "sarsa-2x1"], "'sarsa-2x1' is not one of"),
        (["--arms", "classifier-last-99x1"], "99"),
    ],
)
def test_a_map_that_cannot_be_is_refused_before_any_work(flags, named, tmp_path, capsys):
    assert named in refused(capsys, "--quick", "--out", str(tmp_path / "run"), *flags)
    assert not (tmp_path / "run").exists()


# ------------------------------------------------------------------------------------------------- made-up summaries


def made_up(gap, in_stage_1=0.0, seeds=10):
    """A 2 x 2 map whose cf-rl differs from the arms beside it as `gap(cell, seed)` says."""
    config = Config(
        seeds=seeds, arms="rl", rl_steps=8, classifier_steps=4, stage_lengths="2,4", rate_multiples="1,5", eval_every=2
    )
    summary = {}
    for arm in config.arm_list:
        first = arm.startswith("cf-rl")
        own = [gap(arm.removeprefix("cf-rl-"), seed) if first else 0.0 for seed in range(seeds)]
        curve = [0.0, in_stage_1 if first else 0.0, 0.5, 0.6, 0.7]
        curves = {"step": [[0, 2, 4, 6, 8]] * seeds, "accuracy": [curve] * seeds}
        summary[arm] = {"seed": list(range(seeds)), "curves": curves}
        summary[arm]["accuracy_over_the_run"] = [0.4 + seed / 10 + x for seed, x in enumerate(own)]
        summary[arm]["accuracy"] = [0.5 + seed / 10 for seed in range(seeds)]
    return config, summary


def test_the_map_pairs_a_cell_with_its_own_neighbours():
    """Seeds differ by a tenth each, which cancels; the cells differ among themselves, and one seed of one arm is not
    there: then the others are compared."""
    config, summary = made_up(lambda cell, seed: {"2x1": 0.1, "2x5": 0.2, "4x1": -0.3, "4x5": 0.0}[cell] + seed / 1e4)
    for name in ("seed", "accuracy_over_the_run", "accuracy"):
        del summary["control-4x5"][name][3]
    rows = map_table(config, summary, OVER_THE_RUN)
    assert rows[0] == ["n, rate of W", *(f"minus {base}" for base in BASES)] and len(BASES) == 3
    assert [row[0] for row in rows[1:]] == ["2, 1x", "2, 5x", "4, 1x", "4, 5x"]
    assert [row[1].partition(" ")[0] for row in rows[1:]] == ["+0.100", "+0.200", "-0.300", "+0.000"]
    assert [row[3].rpartition(": ")[2] for row in rows[1:4]] == ["faster", "faster", "slower"]
    assert map_table(config, summary, END)[1][1] == "+0.000 ±0.000: equal"
    del summary["cf-rl-2x1"]
    summary["cf-rl-2x5"]["seed"] = range(10, 20)  # on none of these have its neighbours finished
    assert map_table(config, summary, OVER_THE_RUN)[1][1:] == map_table(config, summary, OVER_THE_RUN)[2][1:]
    assert map_table(config, summary, OVER_THE_RUN)[1][1:] == ["stopped"] * 3


def test_cells_that_stage_1_finishes_are_marked():
    config, summary = made_up(lambda cell, seed: 0.1, in_stage_1=0.95)
    assert finished_in_stage_1(config, summary, (2, 1.0))
    assert map_table(config, summary, OVER_THE_RUN)[1][1] == "(+0.100 ±0.000: faster)"


def test_reaching_the_threshold_after_stage_1_is_not_reaching_it_within():
    config, summary = made_up(lambda cell, seed: 0.1)
    for curves in (arm["curves"] for arm in summary.values()):
        curves["accuracy"] = [[0.0, 0.2, 0.95, 0.95, 0.95]] * 10
    assert not finished_in_stage_1(config, summary, (2, 1.0)) and finished_in_stage_1(config, summary, (4, 1.0))


def test_a_tuned_arm_is_the_best_of_its_way_and_runs_again_beside_what_has_its_cell():
    config, summary = made_up(lambda cell, seed: 0.5 if cell == "4x5" else 0.0)
    summary["spread-2x5"]["accuracy_over_the_run"] = [0.9] * 10
    best = tuned(config, summary)
    assert best["cf-rl"] == "cf-rl-4x5" and best["spread"] == "spread-2x5"
    assert [len(arms) for arms in ways(config).values()] == [4, 4, 4, 4, 2]
    assert asked_again(best | {"control": "control-2x1", "fast-classifier": "fast-classifier-8x5"}) == [
        ("cf-rl-4x5", "rl"),
        ("cf-rl-4x5", "fast-classifier-8x5"),
        ("cf-rl-4x5", "control-2x1"),
        ("cf-rl-4x5", "control-4x5"),
        ("cf-rl-4x5", "classifier-last-4x5"),
        ("cf-rl-4x5", "spread-4x5"),
        ("fast-classifier-8x5", "rl"),
    ]


def test_many_questions_at_once_are_asked_at_a_stricter_level():
    """Ten differences of .03 +- .035, t = 2.6, are beyond doubt if they are all that is asked (t = 2.3), and not beside
    others (t = 3.1 and more): not on a map of four cells and three bases, not as one of eight accounts."""
    noise = [0.03 + sign * 0.035 for sign in (1, -1)] * 5
    config, summary = made_up(lambda cell, seed: noise[seed])
    assert judge(OVER_THE_RUN.gaps(config, summary, "cf-rl-2x1", "control-2x1")) == "more"
    assert all(cell.endswith("undecided") for cell in map_table(config, summary, OVER_THE_RUN)[1][1:])
    accounts = {"rl": straight([0.1] * 10), "control": straight([0.1] * 10)}
    accounts["cf-rl"] = straight([0.1 + x / 4 for x in noise])
    assert judge(at_equal(accounts, "cf-rl", "rl", 4, "samples")) == "more"
    assert [row[2].rpartition(": ")[2] for row in accounting_table(config, accounts)[1:]] == ["undecided"] * 2


def straight(slopes, tokens=10, wait=0, steps=9):
    """Accuracies that rise by a slope an update after the first `wait`, a run for each; so many tokens an update."""
    curves = {
        "step": [list(range(steps))] * len(slopes),
        "accuracy": [[slope * max(0, n - wait) for n in range(steps)] for slope in slopes],
        "tokens": [[n * tokens for n in range(steps)]] * len(slopes),
    }
    return {"seed": list(range(len(slopes))), "curves": curves}


def test_equal_budgets_of_four_kinds_by_hand():
    """An arm that gains nothing in its 4 updates of stage 1 and then as plain RL does: with stage 1 for free it is
    plain RL; at equal samples it is 4 updates behind after the wait. Twice the tokens cost half the budget. In
    operations an update of stage 1 costs half: 4 of them are worth 2, so the arm is only 2 updates behind."""
    rl, waits = straight([0.1]), straight([0.1], wait=4)
    summary = {"rl": rl, "arm": waits, "long": straight([0.1], 20)}
    assert at_equal(summary, "arm", "rl", 4, "stage 1 for free")[0] == pytest.approx(0.0, abs=1e-9)
    # what stage 1 gains is there from the first paid update on: 0.4 more, of four evaluations at no cost the last
    assert at_equal(summary | {"gains": rl}, "gains", "rl", 4, "stage 1 for free")[0] == pytest.approx(0.4, abs=1e-9)
    # over updates 0 to 8: -(0.1 n) up to 4, then -0.4: areas 0.8 and 1.6 over 8; the grid has 201 points
    assert at_equal(summary, "arm", "rl", 4, "samples")[0] == pytest.approx(-0.3, abs=2e-3)
    assert at_equal(summary, "long", "rl", 0, "samples")[0] == pytest.approx(0.0, abs=1e-9)
    # up to 80 tokens: 0.1 b/20 against 0.1 b/10, on average 0.2 against 0.4
    assert at_equal(summary, "long", "rl", 0, "tokens")[0] == pytest.approx(-0.2, abs=1e-9)
    # in updates of plain RL: the arm waits for 2, and ends at 6: -(0.1 b) up to 2, then -0.2: areas 0.2 and 0.8 over 6
    assert at_equal(summary, "arm", "rl", 4, "operations")[0] == pytest.approx(-1.0 / 6, abs=2e-3)


def moved(policy, batch, advantages, rates, turns):
    """A copy of `policy` after some updates by Adam along (E3) on one batch. `turns` are (which parts, how often)."""
    policy = copy.deepcopy(policy)
    for parts, updates in turns:
        groups = [{"params": getattr(policy, part).parameters(), "lr": rates[part]} for part in parts]
        optimizer = torch.optim.Adam(groups)
        for _ in range(updates):
            policy.zero_grad()
            logp = sequence_logp(policy, batch.tokens)
            policy_gradient_loss(logp, advantages, batch.mask[:, 1:]).backward()
            optimizer.step()
    return policy


def order_effect(policy, batch, advantages, rates, updates):
    """How much it matters whether W moves first and the body then, or both at once: the difference of the logits at the
    batch's states, relative to how far they move. The order is of second order in the step, so this is of first."""
    turns = {"both": [(("classifier", "body"), updates)], "in turn": [(("classifier",), updates), (("body",), updates)]}
    with torch.no_grad():
        start = policy(batch.tokens)[batch.state_mask]
    ends = [moved(policy, batch, advantages, rates, turn) for turn in turns.values()]
    with torch.no_grad():
        both, in_turn = (each(batch.tokens)[batch.state_mask] for each in ends)
    return ((in_turn - both).norm() / (both - start).norm()).item()


def test_the_order_of_two_moves_is_of_second_order():
    """W, then the body, against both at once, on one batch: relative to the move itself the difference falls with the
    rates, where a first-order difference would stay. An eighth of the rates leaves .27 and .18 of it here, not 1/8: by
    Adam, gradients near zero that change their sign move a whole step the other way."""
    model, task = tiny_gpt(0, vocab_size=17, block_size=11, n_embd=16), Addition(1)
    batch = rollout(model, task, ["1+2=", "7+8="], 8, stream(1, "x"))
    advantages, rates = torch.randn(16, generator=stream(2, "x")), {"classifier": 0.02, "body": 0.002}
    for updates in (1, 4):
        full, eighth = (
            order_effect(model, batch, advantages, {part: scale * rate for part, rate in rates.items()}, updates)
            for scale in (1, 1 / 8)
        )
        assert 0 < eighth < 0.4 * full < 0.1


@pytest.mark.parametrize("name", ["order", "order-learning"])
def test_what_a_map_chose_is_what_is_run_again(name):
    """On seeds that the map has not seen."""
    results, *_ = load_results()
    config, again = results[name][0], Config(**EXPERIMENTS[f"{name}-again"])
    chosen = asked_again(tuned(*results[name]))
    assert {arm for pair in chosen for arm in pair} == set(again.arm_list)
    assert again.seed == config.seed + config.seeds and again.sft_steps == config.sft_steps
