"""The training loops: what each stage may touch, what the control shares with CF-RL, and what is reproducible."""

import copy
import itertools
import re
import statistics
import zlib

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from tiny import ROUNDING, TinyTask, generator, gradients, seeds, tiny_gpt

from minicfrl import (
    BASELINES,
    OPTIMIZERS,
    Addition,
    RLConfig,
    SFTConfig,
    Stage,
    _demonstrations,
    classifier_gradient,
    entropy,
    group_advantages,
    policy_gradient_loss,
    rollout,
    sequence_logp,
    supervised_finetune,
    train_rl,
)

REWARDS = {"": 0.2, "a": 1.0, "aa": 0.5, "b": -1.0, "0": -0.5, "1": 0.1, "ab": 0.7}
LR, CLASSIFIER_LR, SFT_LR = 1e-2, 3e-2, 3e-3


def coin_flips(batch, generator):
    return torch.randint(2, batch.rewards.shape, generator=generator)


def log_probability(batch, generator):
    """log pi(response) as the reward: its policy gradient is minus that of the responses' entropy."""
    return (batch.logp * batch.mask[:, 1:]).sum(dim=1).view_as(batch.rewards)


def two_stages(steps, first, lr, classifier_lr, trains="classifier"):
    """Of all updates the first `first` train a part, W at its own rate; the others train everything."""
    stages = [(first, trains, lr, classifier_lr), (steps - first, "all", lr)]
    return tuple(Stage(*stage) for stage in stages if stage[0])


def fast(steps=3, classifier_steps=0, lr=LR, classifier_lr=CLASSIFIER_LR, trains="classifier", **changes):
    """RL for these tests: plain, or in two stages, on batches of 3 prompts x 6 samples."""
    stages = two_stages(steps, classifier_steps, lr, classifier_lr, trains)
    return RLConfig(stages, **{"prompts": 3, "samples": 6, **changes})


def sft(steps, classifier_steps=0, lr=SFT_LR, classifier_lr=None, **changes):
    """Fine-tuning, or linear probing and then fine-tuning, on batches of 4 demonstrations."""
    return SFTConfig(two_stages(steps, classifier_steps, lr, classifier_lr), **{"rows": 4, **changes})


TRAINS = ["classifier", "body", "all"]


def policy(seed):
    return tiny_gpt(seed, TinyTask.vocab_size, TinyTask.block_size)


def weights(model):
    return {name: p.detach().clone() for name, p in model.named_parameters()}


def moved(before, model):
    return {name for name, p in model.named_parameters() if not torch.equal(p, before[name])}


def trained(seed, config, task=None):
    """A policy after training, and its records."""
    model = policy(seed)
    return model, list(train_rl(model, task or TinyTask(REWARDS), config, generator(seed)))


# ------------------------------------------------------------------------------------------------------------- rollouts


@given(seed=seeds, samples=st.integers(1, 8))
def test_a_rollout_holds_what_was_sampled(seed, samples):
    """Log-probabilities are recomputed by a full forward; rewards and texts are read off the tokens."""
    model, task = policy(seed), TinyTask(REWARDS)
    batch = rollout(model, task, ["0", "1"], samples, generator(seed))
    assert batch.rewards.shape == (2, samples) and batch.logp.shape == batch.mask[:, 1:].shape
    chosen = batch.mask[:, 1:]
    torch.testing.assert_close(
        batch.logp[chosen], sequence_logp(model, batch.tokens)[chosen], rtol=0, atol=100 * ROUNDING
    )
    assert torch.equal(batch.state_mask[:, :-1], chosen) and not batch.state_mask[:, -1].any()
    for i, (tokens, mask, text) in enumerate(zip(batch.tokens, batch.mask, batch.responses, strict=True)):
        response = tokens[mask].tolist()
        ended = response[-1] == task.end_token
        # The prompts' letters can be sampled too: decode what is text, as the task does.
        assert task.decode(response[: len(response) - ended]) == text
        assert batch.rewards.flatten()[i] == (task.verify("", text) if ended else 0.0)


class FourPrompts(TinyTask):
    """Four prompts of one letter; what a response earns depends on the prompt."""

    def __init__(self):
        super().__init__()
        self.train_pairs = torch.tensor([[0, 0], [1, 0], [2, 0], [3, 0]])

    def prompt(self, a, b):
        return self.alphabet[a]

    def verify(self, prompt, response):
        return zlib.crc32(f"{prompt} {response}".encode()) % 7 / 7


@given(seed=seeds, prompts=st.lists(st.sampled_from("01ab"), min_size=1, max_size=5), samples=st.integers(1, 4))
def test_every_response_is_judged_against_its_own_prompt(seed, prompts, samples):
    """Row p*S + g begins with prompt p and earns rewards[p, g], whatever P and S: the verdict of the prompt that its
    own tokens begin with. The rewards are of the policy's precision."""
    task, model = FourPrompts(), policy(seed).to(torch.float32)
    batch = rollout(model, task, prompts, samples, generator(seed))
    assert batch.rewards.shape == (len(prompts), samples) and batch.rewards.dtype == torch.float32
    for p, g in itertools.product(range(len(prompts)), range(samples)):
        tokens, mask = batch.tokens[p * samples + g], batch.mask[p * samples + g]
        assert task.alphabet[tokens[0]] == prompts[p]
        ended = tokens[mask][-1] == task.end_token
        earned = task.verify(prompts[p], batch.responses[p * samples + g]) if ended else 0.0
        assert batch.rewards[p, g].item() == pytest.approx(earned, rel=1e-6)  # float32


def test_rollout_refuses_bad_counts():
    for prompts, samples, message in (([], 1, "prompts must be"), (["0"], 0, "samples must be .*not 0")):
        with pytest.raises(ValueError, match=message):
            rollout(policy(0), TinyTask(), prompts, samples)


# --------------------------------------------------------------------------------------------------------------- stages


def optimisers(monkeypatch, training):
    """Every Adam that it makes, as (number of parameters, learning rate) of its groups that are not empty."""
    made = []

    def record(groups, **settings):
        made.append([(len(group["params"]), group["lr"]) for group in groups if group["params"]])
        return torch.optim.Adam(groups, **settings)

    monkeypatch.setitem(OPTIMIZERS, "adam", record)
    list(training)
    return made


@given(seed=seeds, k=st.integers(1, 4))
def test_stage_1_moves_the_classifier_and_not_one_bit_of_the_body(seed, k):
    """Stage 1 forms no other gradient, and its optimiser knows no other parameter."""
    model = policy(seed)
    before = weights(model)
    records = list(train_rl(model, TinyTask(REWARDS), fast(k, k), generator(seed)))
    learnt = any(record["flat"] < 1 for record in records)
    assert moved(before, model) == ({"classifier.weight"} if learnt else set())


def test_body_first_moves_the_body_and_not_one_bit_of_the_classifier():
    model = policy(0)
    before = weights(model)
    for record in train_rl(model, TinyTask(REWARDS), fast(4, 3, trains="body"), generator(0)):
        assert ("classifier.weight" in moved(before, model)) == (record["stage"] == 2)
        assert "body.norm.weight" in moved(before, model)


def test_linear_probing_trains_the_classifier_alone_then_everything_from_a_fresh_optimiser():
    """Stage 1 leaves the body as it is to the bit."""
    model, task = tiny_gpt(0, 17, 11), Addition(1)
    before = weights(model)
    for record in supervised_finetune(model, task, sft(4, 2), generator(0)):
        assert record["stage"] == 1 + (record["step"] > 2)
        assert moved(before, model) == ({"classifier.weight"} if record["stage"] == 1 else set(before))


def test_the_body_moves_from_the_first_update_of_stage_2():
    model = policy(1)
    training = train_rl(model, TinyTask(REWARDS), fast(classifier_steps=2), generator(1))
    for stage in (1, 1, 2):
        before = weights(model)
        record = next(training)
        assert record["stage"] == stage and record["flat"] < 1
        assert ("body.norm.weight" in moved(before, model)) == (stage == 2)


@given(seed=seeds, stages=st.lists(st.tuples(st.integers(1, 2), st.sampled_from(TRAINS)), min_size=1, max_size=3))
@example(seed=0, stages=[(2, "classifier"), (2, "all")])
@example(seed=0, stages=[(1, "all"), (1, "all"), (2, "all")])
def test_every_stage_is_a_run_of_its_own_from_where_the_one_before_stopped(seed, stages):
    """A fresh optimiser for all parameters, and the same stream of random numbers: a switch loses no draw. So CF-RL's
    stage 2 is plain RL. The stages are counted from 1, and the updates are counted through."""
    stages = tuple(Stage(steps, trains, LR, CLASSIFIER_LR) for steps, trains in stages)
    whole, records = trained(seed, RLConfig(stages, prompts=3, samples=6))
    model, task, draws, parts = policy(seed), TinyTask(REWARDS), generator(seed), []
    for number, stage in enumerate(stages, start=1):
        for record in train_rl(model, task, RLConfig((stage,), prompts=3, samples=6), draws):
            parts.append({**record, "stage": number, "step": len(parts) + 1})
    assert all(torch.equal(p, q) for p, q in zip(whole.parameters(), model.parameters(), strict=True))
    assert records == parts


def test_every_stage_of_fine_tuning_begins_with_a_fresh_optimiser_of_all_that_it_trains(monkeypatch):
    """Three stages, the last like the first: three optimisers, at a twentieth of their rates until the first update."""
    stages = (Stage(2, "all", 1e-2, 2e-2), Stage(1, "body", 1e-2), Stage(2, "all", 1e-2, 2e-2))
    model, records = tiny_gpt(0, 17, 11), []
    training = supervised_finetune(model, Addition(1), SFTConfig(stages, rows=4), generator(0))
    both = [(1, 2e-2), (len(list(model.body.parameters())), 1e-2)]
    assert optimisers(monkeypatch, (records.append(record) for record in training)) == [both, both[1:], both]
    assert [(record["step"], record["stage"]) for record in records] == [(1, 1), (2, 1), (3, 2), (4, 3), (5, 3)]


def names_of(model, beginning):
    """The parameters whose names begin like this, part by part."""
    parts = beginning.split(".")
    return {name for name, _ in model.named_parameters() if name.split(".")[: len(parts)] == parts}


BEGINNINGS = [".".join(name.split(".")[:n]) for name, _ in policy(0).named_parameters() for n in range(1, 6)]


@given(seed=seeds, trains=st.sampled_from(sorted(set(BEGINNINGS))))
@example(seed=0, trains="body.norm")
@example(seed=0, trains="body.blocks.1")
@example(seed=0, trains="classifier")
def test_a_stage_trains_the_parameters_that_begin_like_its_name_and_no_other(seed, trains):
    """The others stay as they are to the bit, and have no gradient, not even one of 0."""
    model = policy(seed)
    before = weights(model)
    config = RLConfig((Stage(1, trains, LR),), prompts=3, samples=6, reward=log_probability)
    (record,) = train_rl(model, TinyTask(), config, generator(seed))
    named = names_of(model, trains)
    assert moved(before, model) == (named if record["flat"] < 1 else set())
    assert {name for name, p in model.named_parameters() if p.grad is not None} == named


def test_names_match_at_dots():
    """Block 1 is not block 10."""
    model = tiny_gpt(0, TinyTask.vocab_size, TinyTask.block_size, n_layer=11)
    before = weights(model)
    config = RLConfig((Stage(1, "body.blocks.1", LR),), prompts=3, samples=6)
    list(train_rl(model, TinyTask(REWARDS), config, generator(0)))
    assert moved(before, model) == names_of(model, "body.blocks.1") and len(moved(before, model)) == 12


@pytest.mark.parametrize(
    "trains", ["body.blocks.2", "body.block", "body.blocks.1.", "head", "classifier.bias", "nothing", "", "None"]
)
def test_a_stage_of_unknown_parameters_is_refused_by_name(trains):
    """By either loop, before anything moves."""
    model, stages = tiny_gpt(0, 17, 11), (Stage(1, trains),)
    before = weights(model)
    for training in (
        train_rl(model, Addition(1), RLConfig(stages), generator(0)),
        supervised_finetune(model, Addition(1), SFTConfig(stages), generator(0)),
    ):
        with pytest.raises(ValueError, match=f"trains='{re.escape(trains)}' names no parameter of the model"):
            next(training)
    assert not moved(before, model)


@pytest.mark.parametrize("loop", [train_rl, supervised_finetune])
def test_what_rests_has_no_gradient_at_all(loop):
    """None, whatever was left there: with a gradient of 0, and momentum, Adam would go on moving it. W alone, all, the
    body alone, and W alone again, after either kind of backward pass."""
    stages = tuple(Stage(2, trains, LR) for trains in ("classifier", "all", "body", "classifier"))
    rl = RLConfig(stages, prompts=3, samples=6, reward=coin_flips)
    model, config = tiny_gpt(0, 17, 11), rl if loop is train_rl else SFTConfig(stages, rows=4)
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    for record in loop(model, Addition(1), config, generator(0)):
        trains = stages[record["stage"] - 1].trains
        assert (model.classifier.weight.grad is None) == (trains == "body")
        assert {p.grad is None for p in model.body.parameters()} == {trains == "classifier"}


@pytest.mark.parametrize("kind", ["adam", "sgd"])
def test_a_parameter_that_requires_no_gradient_rests_and_the_others_train_as_torch_would(kind):
    """The first block and a norm's gain: bit for bit. The others by autograd of the whole batch's loss and the
    optimiser itself, two updates of it; 1e-6 of a step, for Adam divides gradients that are near 0 by their size."""
    model = policy(0)
    frozen = names_of(model, "body.blocks.0") | {"body.norm.weight"}
    for name in frozen:
        model.get_parameter(name).requires_grad_(False)
    twin, before, task, draws = copy.deepcopy(model), weights(model), TinyTask(REWARDS), generator(0)
    list(train_rl(model, task, fast(2, optimizer=kind), generator(0)))
    optimizer = OPTIMIZERS[kind]([p for p in twin.parameters() if p.requires_grad], lr=LR)
    for _ in range(2):
        pairs = task.train_pairs[torch.randint(2, (3,), generator=draws)].tolist()
        batch = rollout(twin, task, [task.prompt(a, b) for a, b in pairs], 6, draws)
        advantages = group_advantages(batch.rewards).flatten()
        optimizer.zero_grad()
        policy_gradient_loss(sequence_logp(twin, batch.tokens), advantages, batch.mask[:, 1:]).backward()
        optimizer.step()
    assert moved(before, model) == set(before) - frozen
    for p, q in zip(model.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=0, atol=1e-6 * LR)


def test_a_stage_of_what_requires_no_gradient_is_refused():
    model = policy(0)
    model.classifier.requires_grad_(False)
    with pytest.raises(ValueError, match="trains='classifier' names no parameter of the model that can be trained"):
        next(train_rl(model, TinyTask(REWARDS), fast(3, 1), generator(0)))


@pytest.mark.parametrize("trains", ["all", "body", "classifier"])
def test_a_parameter_that_nothing_uses_is_skipped(trains):
    """It has no gradient; all others move as without it, to the bit, by either loop."""
    for loop, config in ((train_rl, fast(2, 2, trains=trains, reward=coin_flips)), (supervised_finetune, None)):
        config = config or SFTConfig((Stage(2, trains),), rows=4)
        model = tiny_gpt(0, 17, 11)
        twin = copy.deepcopy(model)
        model.body.unused = torch.nn.Parameter(torch.ones(3))
        for each in (model, twin):
            list(loop(each, Addition(1), config, generator(0)))
        assert torch.equal(model.body.unused, torch.ones(3)) and model.body.unused.grad is None
        assert all(torch.equal(p, model.get_parameter(name)) for name, p in twin.named_parameters())


@given(seed=seeds)
def test_the_control_steps_the_classifier_as_cf_rl_does_and_the_body_as_rl_does(seed):
    """At the first update, from one policy and batch: the control's new W is CF-RL's, its new body plain RL's. Adam's
    first step divides a gradient by its own size, so rounding shows where a gradient is near 0: 1e-6 of the step."""
    cf_rl, control, rl = (trained(seed, config)[0] for config in (fast(1, 1), fast(1, 1, trains="all"), fast(1)))
    torch.testing.assert_close(control.classifier.weight, cf_rl.classifier.weight, rtol=0, atol=1e-6 * CLASSIFIER_LR)
    for p, q in zip(control.body.parameters(), rl.body.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=0, atol=1e-6 * LR)


BODY = len(list(policy(0).body.parameters()))


@pytest.mark.parametrize(
    "trains, first",
    [
        ("classifier", [(1, CLASSIFIER_LR)]),
        ("all", [(1, CLASSIFIER_LR), (BODY, LR)]),
        ("body", [(BODY, LR)]),
    ],
)
def test_the_control_shares_learning_rates_and_restarts_with_cf_rl(trains, first, monkeypatch):
    """The optimisers of the two arms differ by the body's group in stage 1 and in nothing else, and both make a new one
    of all parameters at the switch."""
    config = fast(classifier_steps=2, trains=trains)
    made = optimisers(monkeypatch, train_rl(policy(0), TinyTask(REWARDS), config, generator(0)))
    assert made == [first, [(1, LR), (BODY, LR)]]


@given(seed=seeds, rows_at_once=st.integers(1, 20))
def test_stage_1_follows_the_gradient_that_is_written_out_by_hand(seed, rows_at_once):
    """(E4) for the whole batch of 18 rows, some of them without advantage, and the gradient that an update of W alone
    leaves, slice by slice. Two ways to add the same numbers: rounding."""
    model, task, config, draws = policy(seed), TinyTask(REWARDS), fast(1, 1, optimizer="sgd"), generator(seed)
    start = copy.deepcopy(model)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("minicfrl.SLICE", rows_at_once)
        next(train_rl(model, task, config, generator(seed)))
    pairs = task.train_pairs[torch.randint(2, (3,), generator=draws)].tolist()
    batch = rollout(start, task, [task.prompt(*pair) for pair in pairs], 6, draws)
    features, advantages = start.features(batch.tokens)[:, :-1], group_advantages(batch.rewards).flatten()
    logits, actions = start.classifier(features), batch.tokens[:, 1:]
    by_hand = classifier_gradient(features, logits, actions, advantages, batch.mask[:, 1:])
    torch.testing.assert_close(model.classifier.weight.grad, by_hand, rtol=0, atol=100 * ROUNDING)


@given(seed=seeds)
def test_an_update_follows_the_gradient_of_the_whole_batch(seed):
    """Rows without advantage are not scored again, but they count as tokens: one SGD step, rebuilt from all rows."""
    model, config = policy(seed), fast(1, lr=0.1, prompts=4, samples=2, optimizer="sgd")
    task, draws = TinyTask(REWARDS), generator(seed)
    start = copy.deepcopy(model)
    (record,) = train_rl(model, task, config, draws)
    draws = generator(seed)
    pairs = task.train_pairs[torch.randint(2, (4,), generator=draws)].tolist()
    batch = rollout(start, task, [task.prompt(a, b) for a, b in pairs], 2, draws)
    advantages = group_advantages(batch.rewards).flatten()
    loss = policy_gradient_loss(sequence_logp(start, batch.tokens), advantages, batch.mask[:, 1:])
    gradient = gradients(start, loss)
    old, new = (torch.cat([p.detach().flatten() for p in m.parameters()]) for m in (start, model))
    torch.testing.assert_close(new, old - 0.1 * gradient, rtol=0, atol=100 * ROUNDING)
    norm = gradient.norm().item()
    assert abs(record["gradient_norm"] - norm) < 1e-9 * max(norm, 1.0)
    assert record["reward"] == pytest.approx(batch.rewards.mean().item())
    assert record["flat"] == pytest.approx((advantages == 0).double().mean().item())
    assert record["tokens"] == batch.mask.sum()
    assert record["entropy"] == pytest.approx(entropy(batch.state_logits).mean().item())


def own_group(row, S):
    """The rows of the same group."""
    return range(row // S * S, row // S * S + S)


@given(
    seed=seeds,
    P=st.integers(1, 5),
    S=st.integers(2, 4),
    baseline=st.sampled_from(BASELINES),
    trains=st.sampled_from(TRAINS),
    k=st.integers(0, 2),
)
def test_an_update_compares_every_response_with_its_own_group(seed, P, S, baseline, trains, k):
    """Two SGD steps, each rebuilt row by row from (E2), (E3) and (E6), for any numbers of prompts and samples. The
    second is not at the reference, so the penalty acts; it comes after the rewards are normalised."""
    stages = two_stages(2, k, lr=0.1, classifier_lr=0.2, trains=trains)
    config = RLConfig(stages, prompts=P, samples=S, kl=0.5, baseline=baseline, optimizer="sgd")
    task, model, draws = FourPrompts(), policy(seed), generator(seed)
    reference, same_draws = copy.deepcopy(model), generator(seed)
    training = train_rl(model, task, config, draws)
    for step in (1, 2):
        before = copy.deepcopy(model)
        next(training)
        pairs = task.train_pairs[torch.randint(4, (P,), generator=same_draws)].tolist()
        batch = rollout(before, task, [task.prompt(a, b) for a, b in pairs], S, same_draws)
        rewards, mask = batch.rewards.flatten().tolist(), batch.mask[:, 1:]
        logp, reference_logp = ((sequence_logp(m, batch.tokens) * mask).sum(dim=1) for m in (before, reference))
        ratio, loss = (logp - reference_logp).tolist(), 0.0
        for row, reward in enumerate(rewards):
            group = [rewards[i] for i in own_group(row, S)]
            advantage = reward - (0 if baseline == "none" else statistics.fmean(group))
            if len(set(group)) == 1 and baseline != "none":
                advantage = 0.0
            elif baseline == "std":
                advantage /= statistics.pstdev(group)
            elif baseline == "rloo":
                advantage = reward - (sum(group) - reward) / (S - 1)
            advantage -= 0.5 * (ratio[row] - statistics.fmean(ratio[i] for i in own_group(row, S)))
            loss = loss - advantage * logp[row] / mask.sum()
        names, parameters = zip(*before.named_parameters(), strict=True)
        slopes = dict(zip(names, torch.autograd.grad(loss, parameters), strict=True))
        trained = trains if step <= k else "all"
        for name, p in model.named_parameters():
            of_W = name == "classifier.weight"
            rate = 0.2 if of_W and step <= k else 0.1
            rests = trained == ("body" if of_W else "classifier")
            expected = before.get_parameter(name) - (0.0 if rests else rate) * slopes[name]
            torch.testing.assert_close(p, expected, rtol=0, atol=1000 * ROUNDING)


def updates(kind, model, steps, draws, kl=0.0):
    """Updates of one kind, from the first: of fine-tuning or linear probing, of plain RL, or of a stage 1 of RL."""
    k = 0 if kind in ("fine-tuning", "plain") else steps
    if kind in ("fine-tuning", "probing"):
        return supervised_finetune(model, Addition(1), sft(steps, k), draws)
    trains = "all" if kind == "plain" else kind
    return train_rl(model, Addition(1), fast(steps, k, trains=trains, reward=log_probability, kl=kl), draws)


KINDS = ["classifier", "body", "all", "plain", "probing", "fine-tuning"]


@pytest.mark.parametrize("kind", KINDS)
def test_an_update_s_gradient_belongs_to_that_update_alone(kind):
    """To the bit: a fresh copy of the policy that makes the third update alone forms the same gradient, though it never
    saw the first two. And what an earlier `backward` left behind plays no part."""
    model, draws = tiny_gpt(0, 17, 11), generator(0)
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    training = updates("plain" if kind == "all" else kind, model, 3, draws)
    part = {"classifier": model.classifier, "probing": model.classifier, "body": model.body}.get(kind, model)
    for _ in range(3):
        fresh, same_draws = tiny_gpt(0, 17, 11), torch.Generator()
        fresh.load_state_dict(model.state_dict())
        same_draws.set_state(draws.get_state())
        next(training)
        list(updates("plain" if kind == "all" else kind, fresh, 1, same_draws))
        gradient = {name: p.grad for name, p in fresh.named_parameters()}
        for name, p in model.named_parameters():
            if any(p is q for q in part.parameters()):
                assert torch.equal(p.grad, gradient[name]), name


@pytest.mark.parametrize("kind", KINDS)
def test_stage_1_of_rl_builds_no_graph_through_the_body_and_every_other_stage_does(kind):
    """Whether any features of one update, those of its rollout and its KL penalty included, can be differentiated."""
    model, known = tiny_gpt(0, 17, 11), []
    model.body.register_forward_hook(lambda body, tokens, features: known.append(features.requires_grad))
    next(updates(kind, model, 1, generator(0), kl=0.1))
    assert len(known) > 1 and any(known) == (kind != "classifier")


@pytest.mark.parametrize("classifier_steps", [0, 30])
def test_the_kl_penalty_acts_in_both_stages(classifier_steps):
    """The exact KL of the first token to the start after 30 updates, all of one stage, with and without it."""
    kls = {}
    for kl in (0.0, 3.0):
        config = fast(30, classifier_steps, classifier_lr=1e-2, kl=kl)
        model = policy(3)
        start = copy.deepcopy(model)
        list(train_rl(model, TinyTask(REWARDS), config, generator(0)))
        with torch.no_grad():
            logp, reference = (m(torch.tensor([[0]]))[0, -1].log_softmax(dim=-1) for m in (model, start))
        kls[kl] = (logp.exp() * (logp - reference)).sum().item()
    assert 0 < kls[3.0] < 0.5 * kls[0.0]


@pytest.mark.parametrize("trains", TRAINS)
@given(seed=seeds)
def test_the_gradient_does_not_depend_on_how_many_rows_are_scored_at_once(trains, seed):
    """Its slices share one count of tokens, so they add up, in (E3) and in (E4)."""
    config = fast(1, 1, trains=trains)
    (whole,) = trained(seed, config)[1]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("minicfrl.SLICE", 4)
        (sliced,) = trained(seed, config)[1]
    assert sliced["gradient_norm"] == pytest.approx(whole["gradient_norm"], rel=1e-9)


@given(seed=seeds)
def test_the_kl_penalty_alone_moves_nothing_at_the_start(seed):
    """Rewards all equal, the policy its own reference: every advantage is exactly 0. A mere rounding error here would
    become a full step: Adam's first divides each gradient by its own size."""
    model = policy(seed)
    before = weights(model)
    list(train_rl(model, TinyTask(), fast(1, kl=1.0), generator(seed)))
    assert not moved(before, model)


def test_demonstrations_follow_the_mixture_and_the_noise_and_credit_responses_alone():
    """2,000 rows: each share within five standard errors (0.055); the mask is the response with its end token."""
    task, config = Addition(2), SFTConfig((Stage(1),), rows=2000, mixture=(0.5, 0.3, 0.2), noise=1.0)
    tokens, mask = _demonstrations(task, config, generator(0))
    texts = []
    for row, marks in zip(tokens, mask, strict=True):
        prompt, response = row[:6].tolist(), row[marks].tolist()
        assert marks.nonzero()[0] == 6 and response[-1] == task.end_token
        texts.append(task.decode(response[:-1]))
        assert texts[-1][0] != "s" or task.verify(task.decode(prompt), texts[-1]) == 0.0  # noise 1: always wrong
    for pattern, share in zip(task.patterns, config.mixture, strict=True):
        assert abs(sum(text[0] == pattern for text in texts) / 2000 - share) < 0.055


def test_the_learning_rate_of_fine_tuning_warms_up_and_falls_to_zero():
    """Adam's first step moves a weight by the learning rate: 1/20 of it at the first update; hardly any at the last."""
    task, moves = Addition(1), []
    model = tiny_gpt(0, task.vocab_size, task.block_size)
    before = model.classifier.weight.detach().clone()
    for _ in supervised_finetune(model, task, sft(100, lr=1e-2, rows=8), generator(0)):
        moves.append((model.classifier.weight - before).abs().max().item())
        before = model.classifier.weight.detach().clone()
    assert moves[0] == pytest.approx(1e-2 / 20, rel=1e-3) and moves[-1] < 0.1 * max(moves)


def test_fine_tuning_is_adam_by_its_definition_on_the_loss_per_response_token():
    """Loss, gradient and step written out once more: the mean of -log pi over response tokens; Adam's two averages with
    betas 0.9 and 0.98 and epsilon 1e-8, unbiased, both from 0 again where a stage begins; no weight decay. A gradient
    that is 0 but for rounding is kept small by epsilon: 1e-9."""
    config, task = sft(5, 2, lr=1e-2, classifier_lr=3e-2), Addition(1)
    model, twin, draws = tiny_gpt(0, 17, 11), tiny_gpt(0, 17, 11), generator(1)
    for step, record in enumerate(supervised_finetune(model, task, config, generator(1)), start=1):
        tokens, mask = _demonstrations(task, config, draws)
        logp = twin(tokens)[:, :-1].log_softmax(dim=-1)
        picked = [logp[i, t - 1, tokens[i, t]] for i, t in mask.nonzero().tolist()]
        loss = -sum(picked) / len(picked)
        assert record["loss"] == pytest.approx(loss.item())
        if step in (1, 3):
            trained, n = list((twin.classifier if step == 1 else twin).parameters()), 0
            m, v = [torch.zeros_like(p) for p in trained], [torch.zeros_like(p) for p in trained]
        slopes, n = torch.autograd.grad(loss, trained), n + 1
        rate = (3e-2 if step < 3 else 1e-2) * min(step / 20, 1 - (step - 1) / 5)
        for i, (p, slope) in enumerate(zip(trained, slopes, strict=True)):
            m[i], v[i] = 0.9 * m[i] + 0.1 * slope, 0.98 * v[i] + 0.02 * slope**2
            with torch.no_grad():
                p -= rate * m[i] / (1 - 0.9**n) / ((v[i] / (1 - 0.98**n)).sqrt() + 1e-8)
        for p, q in zip(model.parameters(), twin.parameters(), strict=True):
            torch.testing.assert_close(p, q, rtol=0, atol=1e-9)


def test_rl_raises_the_reward_and_supervision_lowers_the_loss():
    """On the tiny task the best response earns 1: from a random policy 60 updates reach 0.9 of it. On one-digit sums
    the loss of 60 updates of fine-tuning falls by half a nat or more."""
    _, records = trained(0, fast(60, samples=8))
    assert records[0]["reward"] < 0.5 and records[-1]["reward"] > 0.9
    task = Addition(1)
    model = tiny_gpt(0, task.vocab_size, task.block_size)
    losses = [r["loss"] for r in supervised_finetune(model, task, sft(60, lr=1e-2, rows=32), generator(0))]
    assert losses[-1] < losses[0] - 0.5


def test_other_rewards_train_the_policy_where_the_verifier_rewards_nothing():
    """TinyTask() is never content, so under its own reward nothing moves. To reward the sampled log-probability is to
    descend the entropy: 60 updates leave a tenth of it."""
    for reward in (RLConfig.reward, coin_flips, log_probability):
        model = policy(0)
        before = weights(model)
        list(train_rl(model, TinyTask(), fast(1, reward=reward), generator(0)))
        assert bool(moved(before, model)) == (reward is not RLConfig.reward)
    _, records = trained(0, fast(60, reward=log_probability), TinyTask())
    assert records[-1]["entropy"] < 0.1 * records[0]["entropy"]


@pytest.mark.parametrize("classifier_steps", [0, 2])
def test_a_learning_rate_of_zero_changes_no_weight_and_a_positive_one_does(classifier_steps):
    for lr in (0.0, 1e-3):
        model = policy(0)
        before = weights(model)
        config = fast(classifier_steps=classifier_steps, lr=lr, classifier_lr=lr)
        list(train_rl(model, TinyTask(REWARDS), config, generator(0)))
        assert bool(moved(before, model)) == (lr > 0)


# ------------------------------------------------------------------------------------------------------ reproducibility


@settings(max_examples=5)
@given(seed=seeds)
def test_the_same_seed_gives_the_same_bits_and_another_seed_does_not(seed):
    first, records = trained(seed, fast())
    torch.rand(3)  # the global random state plays no part
    second, again = trained(seed, fast())
    assert records == again
    assert all(torch.equal(p, q) for p, q in zip(first.parameters(), second.parameters(), strict=True))
    other = policy(seed)
    assert list(train_rl(other, TinyTask(REWARDS), fast(), generator(seed + 1))) != records


class Watched(Addition):
    """Notes the operands of every prompt it writes."""

    def __init__(self):
        super().__init__(1)
        self.seen = set()

    def prompt(self, a, b):
        self.seen.add((a, b))
        return super().prompt(a, b)


def test_held_out_pairs_never_appear_in_fine_tuning_or_rl():
    """Every prompt of 100 updates of each kind is noted: all are training pairs, and nearly all occur."""
    task = Watched()
    model = tiny_gpt(0, task.vocab_size, task.block_size)
    training = {tuple(pair) for pair in task.train_pairs.tolist()}
    for records in (
        supervised_finetune(model, task, sft(100, rows=16), generator(0)),
        train_rl(model, task, fast(100, prompts=8), generator(0)),
    ):
        task.seen.clear()
        list(records)
        assert task.seen <= training
        assert len(task.seen & training) > 0.95 * len(training)


# ----------------------------------------------------------------------------------------------------------- bad input


@pytest.mark.parametrize(
    "changes, message",
    [
        (dict(prompts=1.5), "prompts must be a whole number of at least 1, not 1.5"),
        (dict(samples=1), "samples=1 leaves the baseline 'std' no group to compare with"),
        (dict(optimizer="lion"), "optimizer must be one of adam, sgd or a function, not 'lion'"),
        (dict(baseline="median"), "baseline must be one of std, mean, rloo, none, not 'median'"),
        (dict(kl=float("nan")), "kl must be finite and not negative, not nan"),
        (dict(stages=()), "stages must be a tuple of Stage, at least one, not ()"),
        (dict(stages=[Stage(1)]), "stages must be a tuple of Stage, at least one, not [Stage(steps=1"),
        (dict(stages=(Stage(1), 2)), "stages must be a tuple of Stage, at least one, not (Stage(steps=1"),
    ],
)
def test_an_unusable_configuration_is_refused(changes, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        RLConfig(**{"stages": (Stage(1),), **changes})
    if "stages" in changes:
        with pytest.raises(ValueError, match=re.escape(message)):
            SFTConfig(**changes)
    assert RLConfig((Stage(1),), samples=1, baseline="none").samples == 1


@pytest.mark.parametrize(
    "changes, message",
    [
        (dict(rows=0), "rows must be a whole number of at least 1, not 0"),
        (dict(mixture=(1.0, 1.0)), "mixture=(1.0, 1.0) does not give one share for each of dsg"),
        (dict(noise=1.5), "noise must lie between 0 and 1, not 1.5"),
    ],
)
def test_an_unusable_configuration_of_fine_tuning_is_refused(changes, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        config = SFTConfig((Stage(1),), **changes)
        next(supervised_finetune(tiny_gpt(0, 17, 11), Addition(1), config, generator(0)))


@pytest.mark.parametrize(
    "changes, message",
    [
        (dict(steps=0), "steps must be a whole number of at least 1, not 0"),
        (dict(steps=1.5), "steps must be a whole number of at least 1, not 1.5"),
        (dict(steps=True), "steps must be a whole number of at least 1, not True"),
        (dict(lr=-1.0), "lr must be finite and not negative, not -1.0"),
        (dict(classifier_lr=-1.0), "classifier_lr must be finite and not negative, not -1.0"),
    ],
)
def test_an_unusable_stage_is_refused(changes, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        Stage(**{"steps": 1, **changes})


def test_training_stops_where_something_is_not_finite_and_names_it():
    """An absurd learning rate overflows the logits at the next update; infinite advantages make the loss infinite."""
    with pytest.raises(FloatingPointError, match="step 2: the policy's logits are not finite"):
        trained(0, fast(lr=1e300))
    with pytest.raises(FloatingPointError, match="step 1: the loss is -?(inf|nan)"):
        trained(0, fast(baseline="none"), TinyTask(dict.fromkeys(REWARDS, 1e308)))
    with pytest.raises(FloatingPointError, match="step 1: the loss is -?(inf|nan)"):
        trained(0, fast(classifier_steps=1, baseline="none"), TinyTask(dict.fromkeys(REWARDS, 1e308)))
    with pytest.raises(ValueError, match="rewards must be finite, not nan"):
        trained(0, fast(), TinyTask(dict.fromkeys(REWARDS, float("nan"))))
    task = Addition(1)
    with pytest.raises(FloatingPointError, match="step 2: "):
        list(supervised_finetune(tiny_gpt(0, 17, 11), task, sft(3, lr=1e300, rows=2), generator(0)))


@pytest.mark.parametrize("classifier_steps", [0, 3])
@pytest.mark.parametrize("optimizer", ["adam", "sgd"])
@pytest.mark.parametrize(
    "bad, error", [(1e308, "(loss|gradient norm) is"), (1e200, "gradient norm is inf"), ("nan", "not nan")]
)
def test_rl_leaves_the_policy_as_it_was_where_something_is_not_finite(classifier_steps, optimizer, bad, error):
    """Bit for bit what the update before left: with rewards of 1e308 the loss overflows, with 1e200 it does not, but
    the gradient's norm, a root of squares, does."""
    rewards = iter([1.0, float(bad)])
    config = fast(
        classifier_steps=classifier_steps,
        optimizer=optimizer,
        baseline="none",
        reward=lambda batch, draws: torch.full_like(batch.rewards, next(rewards)),
    )
    model = policy(0)
    training = train_rl(model, TinyTask(), config, generator(0))
    next(training)
    before = weights(model)
    with pytest.raises((FloatingPointError, ValueError), match=error):
        next(training)
    assert not moved(before, model)


@pytest.mark.parametrize(
    "stage, factor, error", [(1, 1e308, "step 1: the loss is inf"), (2, 1e200, "step 1: the gradient norm is inf")]
)
def test_fine_tuning_leaves_the_policy_as_it_was_where_something_is_not_finite(stage, factor, error):
    """With logits of 1e308 and more the loss overflows while W's gradient is finite; with 1e200 the loss is finite, and
    the gradient's norm overflows."""
    model = tiny_gpt(0, 17, 11)
    with torch.no_grad():
        model.classifier.weight *= factor / (10 * model.classifier.weight.abs().max())
    before = weights(model)
    config = sft(2, 2 - stage)
    with pytest.raises(FloatingPointError, match=error):
        list(supervised_finetune(model, Addition(1), config, generator(0)))
    assert not moved(before, model)


@pytest.mark.parametrize("bad", [-1e-9, float("inf"), float("nan")])
@pytest.mark.parametrize("name, make", [("lr", Stage), ("classifier_lr", Stage), ("kl", RLConfig)])
def test_every_rate_is_checked(name, make, bad):
    settings = {"steps": 1, name: bad} if make is Stage else {"stages": (Stage(1),), name: bad}
    with pytest.raises(ValueError, match=f"{name} must be finite and not negative, not {bad}"):
        make(**settings)


def test_rl_without_a_generator_is_refused_for_it_would_be_greedy():
    """All samples of a group would be one: nothing to compare, and nothing said."""
    with pytest.raises(ValueError, match="RL samples, so it needs a torch.Generator, not None"):
        next(train_rl(policy(0), TinyTask(REWARDS), fast(2), None))
