"""What a policy, a task and a reward must be: what is not is refused, saying why, and never trained wrongly."""

import copy

import numpy as np
import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st
from strategies import policies, seeds
from tiny import Letters, TinyTask, generator, tiny_gpt
from torch import nn

from minicfrl import (
    RLConfig,
    SFTConfig,
    Stage,
    _demonstrations,
    rollout,
    sequence_logp,
    supervised_finetune,
    train_rl,
)
from model import GPT, GPTConfig, check_policy
from ntk import empirical_ntk, logit_change

STAGES = ["classifier", "all"]


def update(model, task, trains="all", reward=None, prompts=4, samples=2, optimizer="sgd"):
    """One update of RL; its record."""
    changes = {} if reward is None else {"reward": reward}
    config = RLConfig((Stage(1, trains, 0.1),), prompts, samples, optimizer=optimizer, baseline="none", **changes)
    return next(train_rl(model, task, config, generator(0)))


def policy():
    return tiny_gpt(0, TinyTask.vocab_size, TinyTask.block_size)


# --------------------------------------------------------------------------------------------------------------- reward


@pytest.mark.parametrize("trains", STAGES)
@pytest.mark.parametrize("shape", [(1, 8), (8, 1), (2, 4), (2, 2), (8,), (4,), (), (4, 2, 1), (0, 2)])
def test_rewards_of_another_shape_are_refused_in_both_kinds_of_stage(trains, shape):
    """P = 4 prompts, S = 2 samples. (1, 8) would compare across groups, (8, 1) never learn, (2, 4) mix up groups."""
    model, wrong = policy(), lambda batch, draws: torch.ones(shape)
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(ValueError, match=r"reward gave \(.*\) numbers, not \(P, S\)"):
        update(model, TinyTask(), trains, wrong)
    assert all(torch.equal(p, before[name]) for name, p in model.state_dict().items())


KINDS = {
    "a list": lambda model, batch: batch.rewards.tolist(),
    "an array of integers": lambda model, batch: batch.rewards.numpy().astype(np.int32),
    "float64": lambda model, batch: batch.rewards.double(),
    "truth values": lambda model, batch: batch.rewards.bool(),
    "numbers that the policy made": lambda model, batch: batch.rewards + zeros_with_a_graph(model, batch),
}


def zeros_with_a_graph(model, batch):
    logp = sequence_logp(model, batch.tokens).sum(dim=1).view_as(batch.rewards)
    return logp - logp.detach()


@pytest.mark.parametrize("trains", STAGES)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_rewards_of_any_kind_of_number_train_as_the_verifier_s(kind, trains, dtype):
    """To the bit, in the policy's own precision: 0 and 1 are the same in all. No gradient flows through them."""
    task = TinyTask({"a": 1.0, "b": 1.0, "": 1.0})
    models = [policy().to(dtype) for _ in range(2)]
    update(models[0], task, trains)
    update(models[1], task, trains, lambda batch, draws: KINDS[kind](models[1], batch))
    assert all(torch.equal(p, q) for p, q in zip(*(m.parameters() for m in models), strict=True))
    assert not torch.equal(models[0].classifier.weight, policy().classifier.weight.to(dtype))


# --------------------------------------------------------------------------------------------------------------- policy


class Scaled(nn.Linear):
    def forward(self, x):
        return 3 * super().forward(x)


class ScaledLater(GPT):
    def forward(self, tokens):
        return super().forward(tokens) / 3


def with_classifier(head):
    model = policy()
    model.classifier = head(model.classifier)
    return model


def scaled(head):
    new = Scaled(head.in_features, head.out_features, bias=False)
    new.weight = head.weight
    return new


def tied():
    model = policy()
    model.classifier.weight = model.body.token_embedding.weight
    return model


def tied_to_a_part():
    model = policy()
    model.body.token_embedding = nn.Embedding(6, 8)
    model.classifier.weight = nn.Parameter(model.body.token_embedding.weight.data[1:])
    return model


def noisy():
    model = policy()
    model.body.norm = nn.Sequential(model.body.norm, nn.Dropout(0.5))
    return model


def old_weight_norm(head):
    with pytest.warns(FutureWarning):
        return nn.utils.weight_norm(head)


ODD = {
    "a bias": (lambda: with_classifier(lambda head: nn.Linear(head.in_features, head.out_features)), "bias=False"),
    "scaled logits": (lambda: with_classifier(scaled), "bias=False"),
    "scaled logits, in forward": (lambda: ScaledLater(GPTConfig(5, 3, 1, 2, 8), generator(0)), "logits are not W phi"),
    "weight norm": (lambda: with_classifier(nn.utils.parametrizations.weight_norm), "bias=False"),
    "weight norm as it was": (lambda: with_classifier(old_weight_norm), "bias=False"),
    "two layers": (lambda: with_classifier(lambda head: nn.Sequential(head, nn.Tanh())), "bias=False.*Tanh"),
    "tied to a part of the embedding": (tied_to_a_part, "the classifier is tied to body.token_embedding.weight"),
    "tied": (tied, "the classifier is tied to body.token_embedding.weight"),
    "dropout": (noisy, r"dropout is on: call model.eval\(\)"),
}


@pytest.mark.parametrize("kind", ODD)
def test_a_policy_whose_logits_are_not_w_phi_is_refused_by_both_loops_and_by_the_kernel(kind):
    """For (E4) and for the split of the kernel they must be W phi: with logits of 3 W phi, (E4) is a third of the
    gradient. In whatever stage, because what W alone can do is compared with what everything can."""
    make, message = ODD[kind]
    task, tokens = TinyTask({"a": 1.0}), torch.tensor([[0, 1]])
    for trains in STAGES:
        with pytest.raises(ValueError, match=f"(?s){message}"):
            update(make(), task, trains)
    with pytest.raises(ValueError, match=f"(?s){message}"):
        next(supervised_finetune(make(), TinyTask(), SFTConfig((Stage(1),), mixture=(1, 1)), generator(0)))
    for call in (empirical_ntk, lambda *arguments: logit_change(*arguments, {})):
        with pytest.raises(ValueError, match=f"(?s){message}"):
            call(make(), tokens, torch.ones_like(tokens, dtype=torch.bool))


@given(policy=policies(), size=st.sampled_from([1e-3, 1.0, 1e3]))
def test_a_policy_as_the_book_makes_it_is_taken_whatever_its_size(policy, size):
    model = copy.deepcopy(policy.model)
    with torch.no_grad():
        model.classifier.weight *= size
    for dtype in (torch.float64, torch.float32, torch.bfloat16):
        assert check_policy(model.to(dtype), torch.tensor([[0, 1]])) is model


@pytest.mark.parametrize("trains", STAGES)
def test_a_compiled_policy_trains_as_the_policy_in_it(trains):
    models = [policy() for _ in range(2)]
    for model in (models[0], torch.compile(models[1], backend="eager")):
        update(model, TinyTask({"a": 1.0, "b": 0.5}), trains)
    assert all(torch.equal(p, q) for p, q in zip(*(m.parameters() for m in models), strict=True))


# ----------------------------------------------------------------------------------------------------------------- task


LENGTHS = st.tuples(*[st.integers(1, 3)] * 4)


@given(seed=seeds, begins=st.booleans(), lengths=LENGTHS, patterns=st.sampled_from(["1", "12", "1234"]))
@example(seed=0, begins=True, lengths=(1, 1, 1, 1), patterns="12")
@example(seed=0, begins=False, lengths=(1, 2, 3, 1), patterns="12")
def test_fine_tuning_credits_the_response_and_no_token_of_the_prompt(seed, begins, lengths, patterns):
    """Whatever prompts are in tokens: with a begin token, and of unequal lengths."""
    task = Letters(patterns, begins, lengths)
    config = SFTConfig((Stage(1),), rows=8, mixture=(1.0,) * len(patterns))
    tokens, mask = _demonstrations(task, config, generator(seed))
    for row, marks in zip(tokens.tolist(), mask, strict=True):
        response = [token for token, marked in zip(row, marks.tolist(), strict=True) if marked]
        start = int(marks.int().argmax())
        assert marks.tolist() == [start <= t < start + len(response) for t in range(len(row))]  # in one piece
        asked = task.decode(row[begins:start])
        assert asked in {task.prompt(a, 0) for a in range(4)} and row[:start] == task.encode(asked)
        answer = task.decode(response[:-1])
        assert response[-1] == task.end_token and set(answer) == {asked[0]} and len(answer) <= 2


def test_a_prompt_whose_tokens_change_with_what_follows_is_refused():
    """As where a tokenizer merges the last token of the prompt with the first of the response."""

    class Merging(Letters):
        def encode(self, text):
            return super().encode(text if text.endswith("?") else text.replace("?", ""))

    with pytest.raises(ValueError, match="the tokens of '.\\?' do not begin those of '"):
        _demonstrations(Merging(), SFTConfig((Stage(1),), mixture=(1, 1)), generator(0))


@pytest.mark.parametrize("trains", STAGES)
def test_another_task_trains(trains):
    """Four patterns, another alphabet, the end token 0, a begin token: both loops move the policy and reward rises."""
    task = Letters("1234", begins=True)
    model = tiny_gpt(0, task.vocab_size, task.block_size)
    sft = SFTConfig((Stage(30, lr=1e-2),), rows=16, mixture=(1.0,) * 4)
    losses = [record["loss"] for record in supervised_finetune(model, task, sft, generator(0))]
    assert losses[-1] < 0.7 * losses[0]
    model = tiny_gpt(0, task.vocab_size, task.block_size)
    config = RLConfig((Stage(40, trains, 2e-2),), prompts=8, samples=4)
    rewards = [record["reward"] for record in train_rl(model, task, config, generator(0))]
    assert sum(rewards[-5:]) > sum(rewards[:5]) + 0.5


def test_a_task_with_more_tokens_than_the_policy_is_refused_by_both_loops():
    small, sft = tiny_gpt(0, 5, 8), SFTConfig((Stage(1),), mixture=(1, 1))
    for training in (
        train_rl(small, Letters(), RLConfig((Stage(1),)), generator(0)),
        supervised_finetune(small, Letters(), sft, generator(0)),
    ):
        with pytest.raises(ValueError, match="token 5 is outside the vocabulary of 5"):
            next(training)


def test_prompts_of_unequal_lengths_are_refused_in_a_rollout():
    task = Letters(lengths=(1, 2, 1, 1))
    with pytest.raises(ValueError, match=r"prompts must be equally long in tokens, not \[2, 3\]"):
        rollout(tiny_gpt(0, task.vocab_size, task.block_size), task, ["w?", "xx?"], 2, generator(0))
