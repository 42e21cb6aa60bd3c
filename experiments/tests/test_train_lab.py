"""What the laboratory adds to the training loop: its stages, its judges, and responses that begin as it says."""

import dataclasses

import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from tiny import TinyTask, generator, seeds, tiny_gpt
from torch.nn.utils import parameters_to_vector

from experiments.arms import coin_flips, log_probability, self_certainty, two_stages
from experiments.measures import Forced
from minicfrl import RLConfig, Stage, rollout, train_rl

REWARDS = {"": 0.2, "a": 1.0, "aa": 0.5, "b": -1.0, "0": -0.5, "1": 0.1, "ab": 0.7}


def policy(seed):
    return tiny_gpt(seed, TinyTask.vocab_size, TinyTask.block_size)


def trained(steps, reward):
    """A policy's weights before and after that many updates, and their records."""
    model, config = policy(0), RLConfig((Stage(steps, lr=1e-2),), prompts=3, samples=6, reward=reward)
    before = parameters_to_vector(model.parameters()).detach()
    records = list(train_rl(model, TinyTask(), config, generator(0)))
    return before, parameters_to_vector(model.parameters()), records


@given(seed=seeds)
def test_a_forced_pattern_starts_every_response_and_is_not_credited(seed):
    batch = rollout(policy(seed), Forced(TinyTask(REWARDS), "a"), ["0", "1"], 3, generator(seed))
    assert all(text.startswith("a") for text in batch.responses)
    assert not batch.mask[:, :2].any() and batch.mask[:, 2].all()


@given(
    steps=st.integers(1, 8), classifier_steps=st.integers(-3, 9), trains=st.sampled_from(["classifier", "body", "all"])
)
@example(steps=4, classifier_steps=0, trains="classifier")
@example(steps=4, classifier_steps=4, trains="classifier")
@example(steps=4, classifier_steps=5, trains="classifier")
def test_two_stages_are_the_first_updates_and_the_rest(steps, classifier_steps, trains):
    """All of them can be of the first stage, or none: then nothing of that stage matters."""
    if not 0 <= classifier_steps <= steps:
        with pytest.raises(ValueError, match=f"classifier_steps={classifier_steps} is not between 0 and steps={steps}"):
            two_stages(steps, classifier_steps)
        return
    stages = two_stages(steps, classifier_steps, 1e-3, 1e-2, trains)
    first, rest = (
        Stage(max(classifier_steps, 1), trains, 1e-3, 1e-2),
        Stage(max(steps - classifier_steps, 1), "all", 1e-3),
    )
    assert stages == {0: (rest,), steps: (first,)}.get(classifier_steps, (first, rest))


@pytest.mark.parametrize("classifier_steps", [1.5, 2.0, True, None, "2"])
def test_a_part_that_is_no_whole_number_is_refused(classifier_steps):
    with pytest.raises(ValueError, match=f"classifier_steps={classifier_steps!r} is not between 0 and steps=4"):
        two_stages(4, classifier_steps)


def test_the_control_of_cf_rl_is_its_stages_with_nothing_frozen():
    cf_rl, control = two_stages(), two_stages(trains="all")
    assert [stage.trains for stage in cf_rl] == ["classifier", "all"]
    assert control == (dataclasses.replace(cf_rl[0], trains="all"), cf_rl[1])


def test_other_rewards_train_the_policy_where_the_verifier_rewards_nothing():
    """TinyTask() is never content, so under its own reward nothing moves. To reward the sampled log-probability is to
    descend the entropy: 60 updates leave a tenth of it."""
    for reward in (RLConfig.reward, coin_flips, self_certainty, log_probability):
        before, after, _ = trained(1, reward)
        assert before.equal(after) == (reward is RLConfig.reward)
    _, _, records = trained(60, log_probability)
    assert records[-1]["entropy"] < 0.1 * records[0]["entropy"]
