"""What a run measures, each column against a second way to compute it."""

import dataclasses
import itertools
import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tiny import ROUNDING, TinyTask, generator, seeds, tiny_gpt
from tiny_runs import rows_of, run

from experiments import measures
from experiments.arms import Config
from experiments.measures import (
    KERNEL,
    MEASURES,
    Forced,
    Scene,
    ToyView,
    diversity,
    evaluate,
    examine,
    kernel_row,
    make_probe,
    moves,
    pass_at_k,
    start_probe,
)
from minicfrl import Addition, rollout
from model import confidence, entropy
from ntk import empirical_ntk


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
    row |= examine(model, task, task.heldout_pairs, probe, generator(seed), samples=4)
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
        forced = rollout(model, Forced(task, pattern), ["0", "1"], 1, draws)
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
    batch = rollout(model, task, ["0", "1"], 5, draws)
    texts = [batch.responses[:5], batch.responses[5:]]
    assert list(row) == ["best_of_1", "best_of_2", "best_of_4", "different_answers"]
    for k in (1, 2, 4):
        expected = sum(pass_at_k(5, int(rewards.sum()), k) for rewards in batch.rewards) / 2
        assert row[f"best_of_{k}"] == pytest.approx(expected)
    assert row["different_answers"] == sum(len(set(group)) for group in texts) / 2


class LastLetter(TinyTask):
    """The answer is a response's last letter, what comes before it is scratch; the empty response has none."""

    def answer(self, response):
        return response[-1] if response else None


@given(seed=seeds)
def test_different_answers_are_counted_not_responses(seed):
    """Responses that differ in their scratch alone are one answer; no answer counts as one, however often it occurs.
    Each answer is counted at its first occurrence."""
    task, model, draws = LastLetter(), tiny_gpt(seed, 5, 3), generator(seed)

    def count(responses):
        answers = [task.answer(response) for response in responses]
        return sum(answer not in answers[:i] for i, answer in enumerate(answers))

    responses = rollout(model, task, ["0", "1"], 16, draws).responses
    groups = [responses[:16], responses[16:]]
    row = diversity(model, task, task.heldout_pairs, generator(seed), samples=16)
    assert row["different_answers"] == sum(map(count, groups)) / 2
    probe = make_probe(model, task, task.heldout_pairs, generator(seed))
    row = evaluate(model, task, task.heldout_pairs, probe, generator(seed), samples=16, k=1)
    assert row["distinct"] == sum(map(count, groups)) / 2


class ByPrompt(TinyTask):
    """A response that ends earns 1 for prompt 1 and as many halves as it has letters for prompt 0."""

    def verify(self, prompt, response):
        return 1.0 if prompt == "1" else len(response) / 2


@given(seed=seeds, prompts=st.lists(st.integers(0, 1), min_size=1, max_size=6))
def test_the_probe_compares_its_responses_with_each_other(seed, prompts):
    """One response per pair, all of them one group, in the pairs' order: its reward minus the mean of all."""
    task, model = ByPrompt(), tiny_gpt(seed, 5, 3)
    probe = make_probe(model, task, torch.tensor([[a, 0] for a in prompts]), generator(seed))
    rewards = []
    for prompt, tokens, states in zip(prompts, probe.tokens.tolist(), probe.state_mask.tolist(), strict=True):
        assert tokens[0] == prompt
        response = tokens[1 : 1 + sum(states)]
        ended = response[-1] == task.end_token
        rewards.append(task.verify(str(prompt), task.decode(response[:-1])) if ended else 0.0)
    assert probe.advantages.tolist() == pytest.approx([reward - sum(rewards) / len(rewards) for reward in rewards])


@pytest.mark.parametrize("rows, length", [(1, 3), (4, 8), (7, 9), (30, 11)])
def test_some_states_are_up_to_16_of_the_probe_s_evenly_spread(rows, length):
    """Of up to 31 states the first 16; of more, every (n // 16)th."""
    mask = torch.rand(rows, length, generator=generator(0)) < 0.9
    probe = measures.Probe(torch.zeros(rows, length), torch.zeros(rows), mask, None)
    states = mask.nonzero().tolist()
    assert probe.some_states.nonzero().tolist() == states[:: max(1, len(states) // 16)][:16]


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
    rows = {(row["arm"], row["step"]): {k: float(row[k]) for k in KERNEL} for row in rows_of(finished)}
    assert not any(math.isnan(value) for row in rows.values() for value in row.values())
    start, stage_1 = rows["sft", "0"], rows["cf-rl", "2"]
    assert start["kernel_G_by_W"] == 1 and start["kernel_G_cosine"] == 1
    assert stage_1["kernel_R"] == start["kernel_R"] and stage_1["cosine_prompt"] == start["cosine_prompt"]
    assert stage_1["kernel_G"] == pytest.approx(stage_1["kernel_G_by_W"] * start["kernel_G"], rel=1e-5)
    assert stage_1["kernel_G_cosine"] < 1 and rows["rl", "4"]["kernel_R"] != start["kernel_R"]


def test_between_the_ends_of_stages_the_kernel_is_left_out(tmp_path):
    """A group of one is fine too, without a baseline."""
    flags = ["--arms", "rl", "--eval-every", "1", "--sft-steps", "3", "--samples", "1", "--baseline", "none"]
    assert run(tmp_path / "often", *flags) == 0
    measured = {row["step"]: row["kernel_G"] != "nan" for row in rows_of(tmp_path / "often")}
    assert measured == {"0": True, "1": False, "2": True, "3": False, "4": True}


def scene(step, seed=0, model_seed=1, **changes):
    """A policy that is not its probe's, on one-digit sums: 8 updates, stage 1 of 2, evaluations on 2 and 3 prompts."""
    settings = dict(digits=1, rl_steps=8, classifier_steps=2, eval_prompts=2, final_prompts=3)
    config, task = Config(**settings | changes), Addition(1)
    start, model = (tiny_gpt(each, vocab_size=17, block_size=11) for each in (0, model_seed))
    return Scene(config, seed, step, task, model, start_probe(config, task, start, seed))


def measure(scene):
    """As it is seen by a view that began where the probe did."""
    view = ToyView(scene.config, scene.seed, scene.task, scene.probe.start)
    view.model = scene.model
    return view.measure(scene.step)


def test_columns_are_numbers_when_it_is_their_time_and_nan_otherwise():
    """Every column but those of the held-out evaluation: what only the start and the end need, the kernel at the ends
    of the stages too. Whatever the step, the columns are the same, in the same order."""
    ends = {*(f"best_of_{2**i}" for i in range(7)), "different_answers", "gain_by_shares", "gain_by_success"}
    ends |= {"greedy", "kl", "kl_first", "changed_first", "changed_later", "success_d", "success_s", "success_g"}
    columns = None
    for step in (0, 1, 2, 5, 8):
        row = measure(scene(step))
        absent = (set() if step in (0, 8) else ends) | (set() if step in (0, 2, 8) else set(KERNEL))
        assert {name for name, value in row.items() if math.isnan(value)} == absent
        assert list(row) == (columns := columns or list(row))
    assert ends | set(KERNEL) == {name for each in MEASURES for name in each.columns} < set(columns)


def test_every_look_of_a_run_draws_the_same_random_numbers():
    """Whatever was measured before, and at whatever step: two looks at one policy agree to the bit, and where nothing
    moved the gains are exactly 0. Another seed looks at other samples."""
    first = measure(scene(0, final_prompts=2))
    for step in (8, 1, 3):
        torch.rand(3)  # the global random state plays no part
        row = measure(scene(step, final_prompts=2))
        assert {name: value for name, value in row.items() if not math.isnan(value)}.items() <= first.items()
    looked_at = scene(1)
    assert measures.held_out(looked_at) == measures.held_out(looked_at) == measures.held_out(scene(3))
    assert measures.held_out(scene(1, seed=1)) != measures.held_out(looked_at)
    assert measures.gains(scene(8, model_seed=0)) == {"gain_by_shares": 0, "gain_by_success": 0}


def test_an_evaluation_uses_more_prompts_at_the_ends(monkeypatch):
    """The first of the held-out pairs: 2 of them in between, 3 at the start and at the end. The probe has one response
    to each pair of an evaluation, up to 32."""
    seen = []
    monkeypatch.setattr(measures, "evaluate", lambda model, task, pairs, *_: seen.append(pairs.tolist()))
    for step in (0, 1, 2, 8):
        measures.held_out(scene(step))
    pairs = Addition(1).heldout_pairs[:3].tolist()
    assert seen == [pairs, pairs[:2], pairs[:2], pairs]
    for count, rows in ((2, 2), (64, 32)):
        task = TinyTask()
        task.heldout_pairs = task.heldout_pairs.repeat(20, 1)
        probe = start_probe(Config(eval_prompts=count), task, tiny_gpt(0, 5, 3), 0)
        assert len(probe.tokens) == len(probe.advantages) == rows


def test_a_probe_without_advantages_pushes_nowhere():
    """Rewards all equal: the alignment is 0, not 0/0."""
    model = tiny_gpt(0, 5, 3)
    assert (
        kernel_row(model, make_probe(model, TinyTask(), torch.tensor([[0, 0], [1, 0]]), generator(0)))[
            "kernel_G_alignment"
        ]
        == 0
    )


def test_the_gains_are_those_of_the_policy_since_the_start(monkeypatch):
    """(E11) from the probe's start to the policy at hand, on the pairs of the last evaluation, which is when they are
    measured. What looks at the patterns too is left out."""
    start, model = (tiny_gpt(seed, vocab_size=17, block_size=11) for seed in (0, 1))
    view = ToyView(Config(digits=1, rl_steps=20, eval_prompts=2, final_prompts=3), 0, Addition(1), start)
    view.model = model
    monkeypatch.setattr(measures, "pattern_rates", lambda policy, task, pairs, draws: (policy, len(pairs)))
    seen = []
    monkeypatch.setattr(measures, "selection", lambda *rates: seen.extend(rates) or {})
    monkeypatch.setattr(measures, "examine", lambda *_: {})
    view.measure(20)
    assert seen == [(view.probe.start, 3), (model, 3)]


def test_the_kernel_s_columns_are_what_the_readme_says():
    """Computed once more from the definitions, for a policy whose W and body both moved."""
    task, start = Addition(1), tiny_gpt(0, vocab_size=17, block_size=11)
    probe = make_probe(start, task, task.heldout_pairs[:3], generator(0))
    probe = dataclasses.replace(
        probe, advantages=torch.tensor([0.5, -0.25, -0.25])
    )  # an untrained policy is never right
    model = tiny_gpt(1, vocab_size=17, block_size=11)
    row = kernel_row(model, probe)

    states, mask = probe.state_mask.nonzero(), torch.zeros_like(probe.state_mask)
    mask[tuple(states[:: max(1, len(states) // 16)][:16].T)] = True
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


def test_moves_are_distances_in_parts_of_the_norms_at_the_start():
    """W doubled has moved by its own norm, and a body at rest by nothing; then the other way round, by a tenth."""
    model = tiny_gpt(0)
    start = [p.detach().clone() for p in model.parameters()]
    with torch.no_grad():
        model.classifier.weight *= 2
    assert moves(model, start) == {"W_moved": pytest.approx(1.0), "body_moved": 0.0}
    with torch.no_grad():
        model.classifier.weight /= 2
        for p in model.body.parameters():
            p *= 1.1
    assert moves(model, start) == {"W_moved": 0.0, "body_moved": pytest.approx(0.1)}
