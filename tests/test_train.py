"""The training loops: what each stage may touch, what the control shares with CF-RL, and what is reproducible."""

import copy
import itertools
import math
import re
import statistics

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, precondition, rule
from profiles import dear
from strategies import seeds
from tiny import ROUNDING, Letters, generator, tiny_gpt

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
    rollout,
    sequence_logp,
    supervised_finetune,
    train_rl,
)

LR, CLASSIFIER_LR = 1e-2, 3e-2


def coin_flips(batch, generator):
    return torch.randint(2, batch.rewards.shape, generator=generator)


def rl(*stages, **changes):
    """On batches of 3 prompts x 6 samples."""
    return RLConfig(stages, **{"prompts": 3, "samples": 6, **changes})


def first(trains):
    """A first update of a part, with W at its own rate."""
    return Stage(1, trains, LR, CLASSIFIER_LR)


TRAINS = ["classifier", "body", "all"]


def policy(seed):
    return tiny_gpt(seed, Letters.vocab_size, Letters.block_size)


def batch_of(model, task, config, draws):
    """The batch that an update of such a run begins with, drawn once more."""
    pairs = task.train_pairs[torch.randint(len(task.train_pairs), (config.prompts,), generator=draws)].tolist()
    return rollout(model, task, [task.prompt(a, b) for a, b in pairs], config.samples, draws)


def weights(model):
    return {name: p.detach().clone() for name, p in model.named_parameters()}


def moved(before, model):
    return {name for name, p in model.named_parameters() if not torch.equal(p, before[name])}


def trained(seed, config):
    """A policy after training, and its records."""
    model = policy(seed)
    return model, list(train_rl(model, Letters(), config, generator(seed)))


# ------------------------------------------------------------------------------------------------------------- rollouts


PROMPTS = st.lists(st.sampled_from(["w?", "x?", "y?", "z?"]), min_size=1, max_size=5)


@given(seed=seeds, prompts=PROMPTS, samples=st.integers(1, 4))
def test_a_rollout_holds_what_was_sampled(seed, prompts, samples):
    """A full forward pass gives its log-probabilities again, up to rounding; a response without an end token fills the
    block."""
    model, task = policy(seed), Letters()
    batch = rollout(model, task, prompts, samples, generator(seed))
    chosen = batch.mask[:, 1:]
    assert batch.logp.shape == chosen.shape
    again = sequence_logp(model, batch.tokens)
    torch.testing.assert_close(batch.logp[chosen], again[chosen], rtol=0, atol=100 * ROUNDING)
    assert torch.equal(batch.state_mask[:, :-1], chosen) and not batch.state_mask[:, -1].any()
    for tokens, mask, text in zip(batch.tokens, batch.mask, batch.responses, strict=True):
        response = tokens[mask].tolist()
        ended = response[-1] == task.end_token
        assert task.decode(response[: len(response) - ended]) == text
        assert ended or len(response) == task.block_size - 2


@given(seed=seeds, prompts=PROMPTS, samples=st.integers(1, 4))
def test_every_response_is_judged_against_its_own_prompt(seed, prompts, samples):
    """Row p*S + g begins with prompt p and earns rewards[p, g], whatever P and S: the verdict of the prompt that its
    own tokens begin with, or 0 without an end token. The rewards are of the policy's precision, here float32."""
    task, model = Letters(), policy(seed).to(torch.float32)
    batch = rollout(model, task, prompts, samples, generator(seed))
    assert batch.rewards.shape == (len(prompts), samples) and batch.rewards.dtype == torch.float32
    for p, g in itertools.product(range(len(prompts)), range(samples)):
        tokens, mask = batch.tokens[p * samples + g], batch.mask[p * samples + g]
        assert task.decode(tokens[:2].tolist()) == prompts[p]
        ended = tokens[mask][-1] == task.end_token
        earned = task.verify(prompts[p], batch.responses[p * samples + g]) if ended else 0.0
        assert batch.rewards[p, g].item() == pytest.approx(earned, rel=1e-6)


# --------------------------------------------------------------------------------------------------------------- stages


def names_of(model, beginning):
    """The parameters whose names begin like this, part by part."""
    parts = [] if beginning == "all" else beginning.split(".")
    return {name for name, _ in model.named_parameters() if name.split(".")[: len(parts)] == parts}


BEGINNINGS = {".".join(name.split(".")[:n]) for name, _ in policy(0).named_parameters() for n in range(1, 6)}
WHOLES = st.sampled_from(["all", "classifier", "body"])
PARTS = WHOLES | st.sampled_from(sorted(BEGINNINGS))


class Stages(RuleBasedStateMachine):
    """Whatever was trained, frozen or left behind before: a stage moves what it names and nothing else, to the bit, and
    is a run of its own from where the one before stopped. A parameter that nothing uses rests too, without a gradient.

    A state machine is worth its lines where the past may leak: optimisers, gradients, random numbers. An example test
    takes one past, W first and then everything. Here hypothesis chooses a past, and shrinks one that leaks to few
    steps. The model of what is right is a copy of the policy that has no past: it makes the same stage alone.
    """

    @initialize(seed=seeds)
    def start(self, seed):
        self.model, self.draws, self.left = policy(seed), generator(seed), []
        self.model.body.norm.unused = torch.nn.Parameter(torch.ones(3))

    @precondition(lambda self: not self.left)
    @rule(part=PARTS, learns=st.booleans())
    def freeze_or_thaw(self, part, learns):
        for name in names_of(self.model, part):
            self.model.get_parameter(name).requires_grad_(learns)

    @rule(part=PARTS)
    def leave_a_stray_gradient(self, part):
        for name in names_of(self.model, part):
            self.model.get_parameter(name).grad = torch.ones_like(self.model.get_parameter(name))

    def run(self, model, draws, *stages):
        if self.tuned:
            return supervised_finetune(model, Letters(), SFTConfig(stages, rows=4, mixture=(1, 1)), draws)
        return train_rl(model, Letters(), RLConfig(stages, prompts=2, samples=4, reward=coin_flips), draws)

    @precondition(lambda self: not self.left)
    @rule(tuned=st.booleans(), stages=st.lists(st.tuples(st.integers(1, 2), WHOLES | PARTS), min_size=1, max_size=3))
    def begin(self, tuned, stages):
        self.tuned, self.step = tuned, 0
        stages = [Stage(steps, trains, LR, CLASSIFIER_LR) for steps, trains in stages]
        self.left = [(n, stage, i) for n, stage in enumerate(stages, start=1) for i in range(stage.steps)]
        self.training = self.run(self.model, self.draws, *stages)

    @precondition(lambda self: self.left)
    @rule(count=st.integers(1, 6))
    def update(self, count):
        while self.left and count:
            count -= 1
            self.one_update()

    def one_update(self):
        """Fine-tuning's rates depend on the whole run, so there the copy makes this update alone, for its gradient."""
        (number, stage, i), *self.left = self.left
        named = {name for name in names_of(self.model, stage.trains) if self.model.get_parameter(name).requires_grad}
        learns = named - {"body.norm.unused"}
        if not named:
            self.left = []
            with pytest.raises(ValueError, match="names no parameter of the model that can be trained"):
                next(self.training)
            return
        if i == 0 or self.tuned:
            self.copy, draws = copy.deepcopy(self.model), torch.Generator()
            self.copy.zero_grad()
            draws.set_state(self.draws.get_state())
            self.alone = self.run(self.copy, draws, stage)
        before, self.step = weights(self.model), self.step + 1
        record, again = next(self.training), next(self.alone)
        assert record == {**again, "stage": number, "step": self.step}
        flat = record.get("flat") == 1  # then nothing, or momentum alone, moves
        assert moved(before, self.model) <= learns if flat else moved(before, self.model) == learns
        for (name, p), q in zip(self.model.named_parameters(), self.copy.parameters(), strict=True):
            assert self.tuned or torch.equal(p, q), name
            assert (p.grad is not None) == (name in learns), name
            assert p.grad is None or torch.equal(p.grad, q.grad), name


TestStages = Stages.TestCase
TestStages.settings = settings(stateful_step_count=10)


@pytest.mark.parametrize("tuned", [False, True])
@pytest.mark.parametrize("stages", [[(2, "classifier"), (2, "body"), (1, "all")], [(1, "all"), (2, "all")]])
def test_w_alone_then_the_rest_and_two_stages_alike_are_runs_of_their_own(tuned, stages):
    """Two pasts never to leave out, as hypothesis prints them. Of fine-tuning: what moves, and gradients."""
    state = Stages()
    state.start(seed=0)
    state.leave_a_stray_gradient(part="all")
    state.begin(tuned=tuned, stages=stages)
    state.update(count=9)


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


@given(seed=seeds, kind=st.sampled_from(sorted(OPTIMIZERS)))
def test_the_control_steps_the_classifier_as_cf_rl_does_and_the_body_as_rl_does(seed, kind):
    """At the first update, from one policy and batch: the control's new W is CF-RL's, its new body plain RL's. Adam's
    first step divides a gradient by its own size, so rounding shows where a gradient is near 0: 1e-6 of the step."""
    settings = dict(optimizer=kind, reward=coin_flips)
    configs = (rl(stage, **settings) for stage in (first("classifier"), first("all"), Stage(1, "all", LR)))
    cf_rl, control, plain = (trained(seed, config)[0] for config in configs)
    torch.testing.assert_close(control.classifier.weight, cf_rl.classifier.weight, rtol=0, atol=1e-6 * CLASSIFIER_LR)
    for p, q in zip(control.body.parameters(), plain.body.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=0, atol=1e-6 * LR)


@given(seed=seeds)
def test_stage_1_follows_the_gradient_that_is_written_out_by_hand(seed):
    """(E4) for the whole batch of 18 rows, some of them without advantage, and the gradient that an update of W alone
    leaves. Two ways to add the same numbers: rounding."""
    model, task, config = policy(seed), Letters(), rl(first("classifier"), optimizer="sgd")
    start = copy.deepcopy(model)
    next(train_rl(model, task, config, generator(seed)))
    batch = batch_of(start, task, config, generator(seed))
    features, advantages = start.features(batch.tokens)[:, :-1], group_advantages(batch.rewards).flatten()
    logits, actions = start.classifier(features), batch.tokens[:, 1:]
    by_hand = classifier_gradient(features, logits, actions, advantages, batch.mask[:, 1:])
    torch.testing.assert_close(model.classifier.weight.grad, by_hand, rtol=0, atol=100 * ROUNDING)


@given(
    seed=seeds,
    P=st.integers(1, 5),
    S=st.integers(2, 4),
    baseline=st.sampled_from(BASELINES),
    trains=st.sampled_from(TRAINS),
    k=st.integers(1, 2),
    rows_at_once=st.integers(1, 20),
)
def test_an_update_compares_every_response_with_its_own_group(seed, P, S, baseline, trains, k, rows_at_once):
    """Two SGD steps and their records, each rebuilt row by row from (E2), (E3) and (E6), for any numbers of prompts,
    samples and rows that are scored at once. The second is not at the reference, so the penalty acts; it comes after
    the rewards are normalised. The std of a group magnifies rounding: 1e-9."""
    stages = Stage(k, trains, 0.1, 0.2), Stage(1, "all", 0.1)
    config = RLConfig(stages, prompts=P, samples=S, kl=0.5, baseline=baseline, optimizer="sgd")
    task, model, same_draws = Letters(), policy(seed), generator(seed)
    reference, training = copy.deepcopy(model), train_rl(model, task, config, generator(seed))
    for step in (1, 2):
        before = copy.deepcopy(model)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("minicfrl.SLICE", rows_at_once)
            record = next(training)
        batch = batch_of(before, task, config, same_draws)
        rewards, mask = batch.rewards.flatten().tolist(), batch.mask[:, 1:]
        logp, reference_logp = ((sequence_logp(m, batch.tokens) * mask).sum(dim=1) for m in (before, reference))
        ratio, loss, least, most = (logp - reference_logp).tolist(), 0.0, 0, 0
        for row, reward in enumerate(rewards):
            own = range(row // S * S, row // S * S + S)  # the rows of the same group
            group = [rewards[i] for i in own]
            advantage = reward - (0 if baseline == "none" else statistics.fmean(group))
            if len(set(group)) == 1 and baseline != "none":
                advantage = 0.0
            elif baseline == "std":
                advantage /= statistics.pstdev(group)
            elif baseline == "rloo":
                advantage = reward - (sum(group) - reward) / (S - 1)
            advantage -= 0.5 * (ratio[row] - statistics.fmean(ratio[i] for i in own))
            least, most = least + (len(set(group)) == 1 and baseline != "none"), most + (abs(advantage) < ROUNDING)
            loss = loss - advantage * logp[row] / mask.sum()
        names, parameters = zip(*before.named_parameters(), strict=True)
        slopes = dict(zip(names, torch.autograd.grad(loss, parameters), strict=True))
        trains_now = trains if step <= k else "all"
        for name, p in model.named_parameters():
            rate = 0.2 if name == "classifier.weight" and step <= k else 0.1
            slopes[name] *= name in names_of(model, trains_now)
            torch.testing.assert_close(p, before.get_parameter(name) - rate * slopes[name], rtol=0, atol=1e-9)
        norm = torch.cat([slope.flatten() for slope in slopes.values()]).norm().item()
        rebuilt = dict(reward=statistics.fmean(rewards), gradient_norm=norm)
        rebuilt |= dict(tokens=int(mask.sum()), entropy=entropy(before(batch.tokens)[batch.state_mask]).mean().item())
        if step == 1:  # an advantage that is 0 in one way to add can be 1e-17 in the other
            assert least - 0.1 < record["flat"] * len(rewards) < most + 0.1
        assert {name: record[name] for name in rebuilt} == pytest.approx(rebuilt, rel=1e-6, abs=1e-9)


@pytest.mark.parametrize("trains", ["classifier", "body", "all", "body.blocks.1"])
@pytest.mark.parametrize("tuned", [False, True])
def test_stage_1_of_rl_builds_no_graph_through_the_body_and_every_other_stage_does(trains, tuned):
    """Whether any features of one update, those of its rollout and its KL penalty included, can be differentiated."""
    model, known, stages = tiny_gpt(0, 17, 11), [], (Stage(1, trains),)
    model.body.register_forward_hook(lambda body, tokens, features: known.append(features.requires_grad))
    if tuned:
        next(supervised_finetune(model, Addition(1), SFTConfig(stages, rows=4), generator(0)))
    else:
        next(train_rl(model, Addition(1), RLConfig(stages, 3, 6, reward=coin_flips, kl=0.1), generator(0)))
    assert len(known) > 1 and any(known) == (tuned or trains != "classifier")


@given(seed=seeds)
def test_the_kl_penalty_alone_moves_nothing_at_the_start(seed):
    """Rewards all equal, the policy its own reference: every advantage is exactly 0. A mere rounding error here would
    become a full step: Adam's first divides each gradient by its own size."""
    model = policy(seed)
    before = weights(model)
    equal = lambda batch, draws: torch.ones_like(batch.rewards)  # noqa: E731
    list(train_rl(model, Letters(), rl(Stage(1), kl=1.0, reward=equal), generator(seed)))
    assert not moved(before, model)


def test_demonstrations_follow_the_mixture_and_the_noise_and_credit_responses_alone():
    """2,000 rows: each share within five standard errors; the mask is the response with its end token."""
    task, config = Addition(2), SFTConfig((Stage(1),), rows=2000, mixture=(0.5, 0.3, 0.2), noise=1.0)
    tokens, mask = _demonstrations(task, config, generator(0))
    texts = []
    for row, marks in zip(tokens, mask, strict=True):
        prompt, response = row[:6].tolist(), row[marks].tolist()
        assert marks.nonzero()[0] == 6 and response[-1] == task.end_token
        texts.append(task.decode(response[:-1]))
        assert texts[-1][0] != "s" or task.verify(task.decode(prompt), texts[-1]) == 0.0  # noise 1: always wrong
    for pattern, share in zip(task.patterns, config.mixture, strict=True):
        assert abs(sum(text[0] == pattern for text in texts) / 2000 - share) < 5 * (share * (1 - share) / 2000) ** 0.5


def test_fine_tuning_is_adam_by_its_definition_on_the_loss_per_response_token():
    """Loss, gradient and step written out once more: the mean of -log pi over response tokens; Adam's two averages with
    betas 0.9 and 0.98 and epsilon 1e-8, unbiased, both from 0 again where a stage begins; no weight decay. A gradient
    that is 0 but for rounding is kept small by epsilon: 1e-9."""
    stages = Stage(2, "classifier", 1e-2, 3e-2), Stage(2, "all", 1e-2), Stage(1, "all", 1e-2)
    config, task = SFTConfig(stages, rows=4), Addition(1)
    model, twin, draws = tiny_gpt(0, 17, 11), tiny_gpt(0, 17, 11), generator(1)
    for step, record in enumerate(supervised_finetune(model, task, config, generator(1)), start=1):
        tokens, mask = _demonstrations(task, config, draws)
        logp = twin(tokens)[:, :-1].log_softmax(dim=-1)
        picked = [logp[i, t - 1, tokens[i, t]] for i, t in mask.nonzero().tolist()]
        loss = -sum(picked) / len(picked)
        assert record["loss"] == pytest.approx(loss.item())
        if step in (1, 3, 5):
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


# ------------------------------------------------------------------------------------------------------ reproducibility


@dear
@given(seed=seeds, trains=st.sampled_from(TRAINS))
def test_two_runs_that_take_turns_are_each_as_alone(seed, trains):
    """To the bit: one seed has one result, whatever else the process trains or draws between two updates. Another seed
    has another."""
    config = rl(first(trains), Stage(2))
    alone = [trained(each, config) for each in (seed, seed + 1)]
    models = [policy(each) for each in (seed, seed + 1)]
    runs = [train_rl(m, Letters(), config, generator(seed + i)) for i, m in enumerate(models)]
    turns = []
    for records in zip(*runs, strict=True):
        torch.rand(3)  # the global random state plays no part
        turns.append(records)
    assert [*zip(*turns, strict=True)] == [tuple(records) for _, records in alone] and alone[0][1] != alone[1][1]
    for model, (twin, _) in zip(models, alone, strict=True):
        assert all(torch.equal(p, q) for p, q in zip(model.parameters(), twin.parameters(), strict=True))


def test_held_out_pairs_never_appear_in_fine_tuning_or_rl():
    """Every prompt of 800 draws of each kind is noted: all are training pairs, and nearly all occur."""
    task, seen = Addition(1), set()
    prompt, training_pairs = task.prompt, {tuple(pair) for pair in task.train_pairs.tolist()}
    task.prompt = lambda *pair: seen.add(pair) or prompt(*pair)
    model = tiny_gpt(0, task.vocab_size, task.block_size)
    for records in (
        supervised_finetune(model, task, SFTConfig((Stage(4),), rows=200), generator(0)),
        train_rl(model, task, rl(Stage(4), prompts=200, samples=2), generator(0)),
    ):
        seen.clear()
        list(records)
        assert seen <= training_pairs and len(seen) > 0.95 * len(training_pairs)


# ----------------------------------------------------------------------------------------------------------- bad input


@pytest.mark.parametrize(
    "make, message",
    [
        (lambda: RLConfig(ONE, prompts=1.5), "prompts must be a whole number of at least 1, not 1.5"),
        (lambda: RLConfig(ONE, samples=1), "samples=1 leaves the baseline 'std' no group to compare with"),
        (lambda: RLConfig(ONE, optimizer="lion"), "optimizer must be one of adam, sgd or a function, not 'lion'"),
        (lambda: RLConfig(ONE, baseline="median"), "baseline must be one of std, mean, rloo, none, not 'median'"),
        (lambda: SFTConfig(ONE, rows=0), "rows must be a whole number of at least 1, not 0"),
        (lambda: probe(SFTConfig(ONE, mixture=(1.0, 1.0))), "(1.0, 1.0) does not give one share for each of dsg"),
        (lambda: probe(SFTConfig(ONE, noise=1.5)), "noise must lie between 0 and 1, not 1.5"),
        (lambda: RLConfig(()), "stages must be a tuple of Stage, at least one, not ()"),
        (lambda: SFTConfig([Stage(1)]), "stages must be a tuple of Stage, at least one, not [Stage("),
        (lambda: RLConfig((Stage(1), 2)), "stages must be a tuple of Stage, at least one, not (Stage("),
        (lambda: Stage(0), "steps must be a whole number of at least 1, not 0"),
        (lambda: Stage(1.5), "steps must be a whole number of at least 1, not 1.5"),
        (lambda: Stage(True), "steps must be a whole number of at least 1, not True"),
        (lambda: rollout(policy(0), Letters(), [], 1), "prompts must be a whole number of at least 1, not 0"),
        (lambda: rollout(policy(0), Letters(), ["00"], 0), "samples must be a whole number of at least 1, not 0"),
    ],
)
def test_unusable_settings_are_refused(make, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        make()


ONE = (Stage(1),)


def probe(config):
    next(supervised_finetune(tiny_gpt(0, 17, 11), Addition(1), config, generator(0)))


def test_without_a_baseline_one_sample_is_enough():
    assert RLConfig(ONE, samples=1, baseline="none").samples == 1


@given(rate=st.floats(max_value=-1e-300) | st.sampled_from([math.inf, math.nan]))
def test_a_rate_that_is_negative_or_not_finite_is_refused(rate):
    for name, make in (("lr", Stage), ("classifier_lr", Stage), ("kl", RLConfig)):
        with pytest.raises(ValueError, match=re.escape(f"{name} must be finite and not negative, not {rate}")):
            make(1 if make is Stage else ONE, **{name: rate})


@pytest.mark.parametrize("trains", ["all", "classifier"])
@pytest.mark.parametrize("optimizer", ["adam", "sgd"])
@pytest.mark.parametrize(
    "bad, error",
    [
        (1e308, "step 2: the loss is -?inf"),
        (1e200, "step 2: the gradient norm is inf"),
        (math.nan, "rewards must be finite, not nan"),
    ],
)
def test_rl_leaves_the_policy_as_it_was_where_something_is_not_finite_and_names_it(trains, optimizer, bad, error):
    """Bit for bit what the update before left: with rewards of 1e308 the loss overflows, with 1e200 it does not, but
    the gradient's norm, a root of squares, does."""
    rewards, model = iter([1.0, bad]), policy(0)
    reward = lambda batch, draws: torch.full_like(batch.rewards, next(rewards))  # noqa: E731
    config = RLConfig((Stage(2, trains),), 3, 6, optimizer, reward, "none")
    training = train_rl(model, Letters(), config, generator(0))
    next(training)
    before = weights(model)
    with pytest.raises((FloatingPointError, ValueError), match=error):
        next(training)
    assert not moved(before, model)


@pytest.mark.parametrize(
    "trains, factor, error", [("classifier", 1e308, "the loss is inf"), ("all", 1e200, "norm is inf")]
)
def test_fine_tuning_leaves_the_policy_as_it_was_where_something_is_not_finite(trains, factor, error):
    """With logits of 1e308 and more the loss overflows while W's gradient is finite; with 1e200 the loss is finite, and
    the gradient's norm overflows."""
    model = tiny_gpt(0, 17, 11)
    with torch.no_grad():
        model.classifier.weight *= factor / (10 * model.classifier.weight.abs().max())
    before = weights(model)
    with pytest.raises(FloatingPointError, match=f"step 1: .*{error}"):
        next(supervised_finetune(model, Addition(1), SFTConfig((Stage(1, trains),), rows=4), generator(0)))
    assert not moved(before, model)


def test_an_absurd_learning_rate_stops_the_next_rollout():
    training = train_rl(policy(0), Letters(), RLConfig((Stage(3, lr=1e300),), 3, 6), generator(0))
    with pytest.raises(FloatingPointError, match="step 2: the policy's logits are not finite"):
        list(training)


def test_rl_without_a_generator_is_refused_for_it_would_be_greedy():
    """All samples of a group would be one: nothing to compare, and nothing said."""
    with pytest.raises(ValueError, match="RL samples, so it needs a torch.Generator, not None"):
        next(train_rl(policy(0), Letters(), rl(Stage(2)), None))
