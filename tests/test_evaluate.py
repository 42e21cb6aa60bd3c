"""The measures of the tables, each against a second way to compute it."""

import itertools
import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tiny import ROUNDING, TinyTask, generator, seeds, tiny_gpt

from minicfrl import confidence, diversity, entropy, evaluate, make_probe, pass_at_k, rollout


@given(n=st.integers(1, 12), data=st.data())
def test_pass_at_k_is_unbiased(n, data):
    """Over c ~ Binomial(n, p) its expectation is the chance that k fresh samples are not all wrong."""
    k, p = data.draw(st.integers(1, n)), data.draw(st.floats(0, 1))
    mean = sum(math.comb(n, c) * p**c * (1 - p) ** (n - c) * pass_at_k(n, c, k) for c in range(n + 1))
    assert abs(mean - (1 - (1 - p) ** k)) < ROUNDING


@given(n=st.integers(1, 8), data=st.data())
def test_pass_at_k_is_the_share_of_subsets_with_a_right_sample(n, data):
    """By listing all subsets of size k of n samples of which c are right; so it never falls with k."""
    correct = data.draw(st.integers(0, n))
    shares = []
    for k in range(1, n + 1):
        subsets = list(itertools.combinations(range(n), k))
        shares.append(sum(min(subset) < correct for subset in subsets) / len(subsets))
        assert abs(pass_at_k(n, correct, k) - shares[-1]) < ROUNDING
    assert shares == sorted(shares)


@pytest.mark.parametrize("n, correct, k", [(4, 5, 1), (4, -1, 1), (4, 2, 0), (4, 2, 5)])
def test_pass_at_k_refuses_impossible_counts(n, correct, k):
    with pytest.raises(ValueError, match=f"pass@{k} of {correct} right among {n} samples"):
        pass_at_k(n, correct, k)


@given(seed=seeds, vocab_size=st.integers(1, 9))
def test_entropy_and_confidence_match_torch_distributions(seed, vocab_size):
    logits = 5 * torch.randn(3, vocab_size, generator=generator(seed))
    reference = torch.distributions.Categorical(logits=logits)
    torch.testing.assert_close(entropy(logits), reference.entropy(), rtol=0, atol=ROUNDING)
    torch.testing.assert_close(confidence(logits), reference.probs.max(dim=-1).values, rtol=0, atol=ROUNDING)


def test_entropy_of_a_certain_policy_is_zero_not_nan():
    assert entropy(torch.tensor([0.0, -torch.inf])) == 0 and confidence(torch.tensor([0.0, -torch.inf])) == 1


@given(seed=seeds)
def test_an_evaluation_reports_what_its_samples_show(seed):
    """Recomputed from the rollouts that the same generator gives, one sample and one prompt at a time."""
    task = TinyTask({"a": 1.0, "": 1.0})
    model = tiny_gpt(seed, task.vocab_size, task.block_size)
    probe = make_probe(model, task, task.heldout_pairs, generator(seed))
    row = evaluate(model, task, task.heldout_pairs, probe, generator(seed), samples=4, k=2)
    draws = generator(seed)
    batch = rollout(model, task, ["0", "1"], 4, draws)
    texts = [batch.responses[:4], batch.responses[4:]]
    right = [int(rewards.sum()) for rewards in batch.rewards]
    assert row["accuracy"] == pytest.approx(sum(right) / 8)
    assert row["pass_at_2"] == pytest.approx(sum(pass_at_k(4, c, 2) for c in right) / 2)
    assert row["distinct"] == sum(len(set(group)) for group in texts) / 2
    greedy = 0.0
    for prompt in (0, 1):
        tokens = [prompt]
        while len(tokens) < 3 and tokens[-1] != task.end_token:
            tokens.append(model(torch.tensor([tokens]))[0, -1].argmax().item())
        greedy += task.verify("", task.decode(tokens[1:-1])) / 2 if tokens[-1] == task.end_token else 0.0
    assert row["greedy"] == pytest.approx(greedy)
    for pattern in "ab":
        forced = rollout(model, task, ["0", "1"], 1, draws, pattern)
        assert row[f"success_{pattern}"] == pytest.approx(forced.rewards.mean().item())
    states = [batch.logits[i, t] for i in range(8) for t in range(batch.logits.size(1)) if batch.mask[i, t + 1]]
    assert row["entropy"] == pytest.approx(sum(entropy(s).item() for s in states) / len(states))
    assert row["confidence"] == pytest.approx(sum(confidence(s).item() for s in states) / len(states))
    first = model(torch.tensor([[0], [1]]))[:, -1].softmax(dim=-1).mean(dim=0)
    assert row["share_a"] == pytest.approx(first[2].item()) and row["share_b"] == pytest.approx(first[3].item())
    assert row["classifier_norm"] == pytest.approx(model.classifier.weight.square().sum().sqrt().item())
    assert row["feature_change"] == 0


@given(seed=seeds)
def test_diversity_counts_what_many_samples_hold(seed):
    """Recomputed from the rollouts that the same generator gives: pass@k at powers of 2, answers over all samples."""
    task, model, draws = TinyTask({"a": 1.0, "": 1.0}), tiny_gpt(seed, 5, 3), generator(seed)
    row = diversity(model, task, task.heldout_pairs, generator(seed), samples=5)
    batches = [rollout(model, task, [prompt], 5, draws) for prompt in "01"]
    assert list(row) == ["best_of_1", "best_of_2", "best_of_4", "different_answers"]
    for k in (1, 2, 4):
        expected = sum(pass_at_k(5, int(batch.rewards.sum()), k) for batch in batches) / 2
        assert row[f"best_of_{k}"] == pytest.approx(expected)
    assert row["different_answers"] == sum(len(set(batch.responses)) for batch in batches) / 2


@given(seed=seeds, size=st.sampled_from([0.5, 2.0]))
def test_feature_change_is_relative_to_the_start(seed, size):
    """Scaling the final LayerNorm's gain and bias by 1 + size moves every feature vector by `size` of its length."""
    task = TinyTask()
    model = tiny_gpt(seed, task.vocab_size, task.block_size)
    probe = make_probe(model, task, task.heldout_pairs, generator(seed))
    with torch.no_grad():
        model.body.norm.weight *= 1 + size
        model.body.norm.bias *= 1 + size
    row = evaluate(model, task, task.heldout_pairs, probe, generator(seed), samples=2, k=1)
    assert row["feature_change"] == pytest.approx(size)


@given(seed=seeds)
def test_the_probe_stays_when_the_policy_moves(seed):
    """Scaling W by 3 leaves the probe's states; its entropy is that of the scaled logits there."""
    task = TinyTask()
    model = tiny_gpt(seed, task.vocab_size, task.block_size)
    probe = make_probe(model, task, task.heldout_pairs, generator(seed))
    logits = model(probe.tokens)[probe.state_mask]
    with torch.no_grad():
        model.classifier.weight *= 3
    row = evaluate(model, task, task.heldout_pairs, probe, generator(seed), samples=2, k=1)
    assert row["probe_entropy"] == pytest.approx(entropy(3 * logits).mean().item())
    assert row["probe_confidence"] == pytest.approx(confidence(3 * logits).mean().item())
