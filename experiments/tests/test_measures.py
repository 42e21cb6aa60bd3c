"""What is measured of a run, each column against a second way to compute it."""

import copy
import functools
import itertools
from unittest import mock

import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st
from profiles import dear
from tiny import ROUNDING, TinyTask, generator, seeds, tiny_gpt
from tiny_runs import tiny
from torch.distributions import Categorical, kl_divergence
from torch.nn.utils import parameters_to_vector

from experiments import measures
from experiments.measures import make_probe, pass_at_k, pattern_rates, selection
from minicfrl import Addition, rollout
from model import confidence
from ntk import empirical_ntk
from train_toy import stream


class TwoTokens(TinyTask):  # in a prompt, so that a state of it need not be its end, which is at position 1
    block_size = 4

    def prompt(self, a, b):
        return f"{a}0"


TASK = TwoTokens({"": 1.0, "a": 1.0, "b": 1.0})
TASK.heldout_pairs = TASK.heldout_pairs.repeat(10, 1)
policy = functools.partial(tiny_gpt, vocab_size=TASK.vocab_size, block_size=TASK.block_size)


def with_other(part, model, other):
    """A copy of the model with the body or the classifier of the other."""
    both = copy.deepcopy(model)
    setattr(both, part, getattr(other, part))
    return both


def states_of(probe, model):
    """Logits, and which of them are at the ends of prompts."""
    return model(probe.tokens)[probe.state_mask].detach(), probe.state_mask.nonzero()[:, 1] == 1


def course(seed):
    """A probe; the policies before and after three updates; and the rows of a run that makes them. An update takes a
    second, and to look at one, at the second and at the third, takes 100."""
    path, clock = [policy(seed + n) for n in range(4)], [0.0]
    probe, model = make_probe(path[0], TASK, seed, 4), copy.deepcopy(path[0])

    def records():
        for step in (1, 2, 3):
            model.load_state_dict(path[step].state_dict())
            clock[0] += 1
            yield {"step": step, "tokens": 10 * step}

    def look(step):
        clock[0] += 100
        return {"measured": step}

    with mock.patch.object(measures, "time", mock.Mock(process_time=lambda: clock[0])):
        rows = [*measures.follow(tiny(rl_steps=3, n=2, every=3), model, probe, records(), look)]
    return probe, path, rows


@dear
@given(seed=seeds)
def test_the_microscope_s_columns_add_up_to_what_happened_on_the_probe(seed):
    """A part of an update is what its own parameters do alone; sums and tokens are of all updates, the time of the
    training. Agreement: of the last update, state by state, less the mean logit."""
    (probe, path, rows), rises = course(seed), torch.zeros(3)
    for n, (old, new) in enumerate(itertools.pairwise(path), start=1):
        parts = new, with_other("classifier", old, new), with_other("body", old, new)
        (before, first), *after = (states_of(probe, model) for model in (old, *parts))
        rises += torch.stack([confidence(logits).mean() - confidence(before).mean() for logits, _ in after])
        whole, by_W = ((logits - before) - (logits - before).mean(dim=1, keepdim=True) for logits, _ in after[:2])
        cosines = torch.stack([a @ b / a.norm() / b.norm() for a, b in zip(by_W, whole, strict=True)])
        expected = {"step": n, "measured": n, "seconds": n, "tokens": (10, 30, 60)[n - 1]}
        expected["agreement_continuation"] = cosines[~first].mean()
        expected |= zip(("confidence_change", "confidence_by_W", "confidence_by_body"), rises, strict=True)
        expected["confidence_residual"] = rises[0] - rises[1] - rises[2]
        assert n == 1 or agrees(rows[n - 2], expected)


X = tiny(prompts=1, last_prompts=2, measures="all")  # two prompts are looked at in the end, update 4, and before it one


def agrees(row, expected):
    return all(row[k] == pytest.approx(float(v), rel=1e-6, abs=1e-9, nan_ok=True) for k, v in expected.items())


@dear
@given(seed=st.integers(0, 1000), step=st.sampled_from([1, 4]))
@example(seed=0, step=4)  # a share of 5/13, which is counted in float32
@torch.no_grad()
def test_a_row_reports_what_the_samples_show(seed, step):
    """By the definitions, with the random numbers that every look draws. What is costly is there at the end alone."""
    start, model, draws = policy(seed), policy(seed + 1), stream(seed, "evaluation")
    prompts, pairs = ["00", "10"][: 1 + (step == 4)], TASK.heldout_pairs[:2]
    batch = rollout(model, TASK, prompts, 8, draws)
    (logits, first), (old, _) = (states_of(batch, m) for m in (model, start))
    pi, chosen = Categorical(logits=logits), logits[first].softmax(dim=1).mean(dim=0)
    expected = {"accuracy": batch.rewards.mean(), "entropy": pi.entropy().mean(), "confidence": pi.probs.amax(1).mean()}
    expected |= {"share_a": chosen[2], "share_b": chosen[3]}
    row = measures.measure(X, seed, TASK, model, make_probe(start, TASK, seed, 20), step)
    if step == 4:
        kl, changed = kl_divergence(pi, Categorical(logits=old)), 1.0 * (logits.argmax(dim=1) != old.argmax(dim=1))
        success = pattern_rates(model, TASK, pairs, draws)[1].mean(dim=0)
        expected |= {"greedy": rollout(model, TASK, prompts, 1).rewards.mean(), "kl": kl.sum() / 16}
        expected |= {"kl_first": kl[first].mean(), "success_a": success[0], "success_b": success[1]}
        expected |= {"changed_first": changed[first].mean(), "changed_later": changed[~first].mean()}
        expected |= measures.diversity(model, TASK, pairs[:1], stream(seed, "diversity"))
        expected |= selection(*(pattern_rates(m, TASK, pairs, stream(seed, "selection")) for m in (start, model)))
    assert agrees(row, expected) and ("kl" in row) == ("best_of_64" in row) == ("kernel_G_by_W" in row) == (step == 4)


def cosines_of_pairs(vectors):
    return torch.stack([a @ b / a.norm() / b.norm() for a, b in itertools.combinations(vectors, 2)])


@dear
@given(seed=seeds, step=st.sampled_from([0, 2, 4]))
@torch.no_grad()
def test_a_row_at_the_end_of_a_stage_reports_how_far_the_policy_is_from_its_start(seed, step):
    """In parts of norms there; of G by W's move alone, at 16 states, evenly spread; and how alike two features are."""
    start, model = policy(seed), policy(seed + 1)
    probe = make_probe(start, TASK, seed, 20)
    row, (_, first) = measures.measure(X, seed, TASK, model, probe, step), states_of(probe, model)
    some, states = torch.zeros_like(probe.state_mask), probe.state_mask.nonzero()
    some[tuple(states[:: len(states) // 16][:16].T)] = True
    G, old_G = (empirical_ntk(m, probe.tokens, some).gradient for m in (with_other("classifier", start, model), start))
    phi, old_phi = (m.features(probe.tokens)[probe.state_mask] for m in (model, start))
    (W, old_W), body = (m.classifier.weight for m in (model, start)), parameters_to_vector(model.body.parameters())
    old_body = parameters_to_vector(start.body.parameters())
    expected = {
        "classifier_norm": W.square().sum().sqrt(),
        "feature_change": sum((a - b).norm() / b.norm() for a, b in zip(phi, old_phi, strict=True)) / len(phi),
        "W_moved": (W - old_W).norm() / old_W.norm(),
        "body_moved": (body - old_body).norm() / old_body.norm(),
        "kernel_G_by_W": G.norm() / old_G.norm(),
        "cosine_continuation": cosines_of_pairs(phi[~first]).mean(),
        "positive_continuation": (cosines_of_pairs(phi[~first]) > 0).float().mean(),
    }
    assert agrees(row, expected)


@given(seed=seeds, prompts=st.integers(1, 20))
def test_diversity_counts_right_samples_and_different_answers(seed, prompts):
    """Recomputed from the rollouts that the same generator gives, eight prompts at a time. An answer is what follows
    the pattern's letter, so that different responses can be one answer."""
    task, model, draws, right, answers = Addition(1), tiny_gpt(seed, 17, 11), generator(seed), [], 0
    task.verify = lambda prompt, response: float(len(response) > 3)  # because nothing else is right here
    pairs = task.heldout_pairs.repeat(4, 1)[:prompts]
    row = measures.diversity(model, task, pairs, generator(seed), samples=5)
    for some in pairs.split(8):
        batch = rollout(model, task, [task.prompt(*pair) for pair in some.tolist()], 5, draws)
        right += batch.rewards.sum(dim=1).int().tolist()
        answers += sum(len({*map(task.answer, batch.responses[i : i + 5])}) for i in range(0, 5 * len(some), 5))
    expected = {f"best_of_{k}": sum(pass_at_k(5, c, k) for c in right) / prompts for k in (1, 2, 4)}
    assert row == pytest.approx(expected | {"different_answers": answers / prompts})


def test_pass_at_k_is_the_share_of_subsets_with_a_right_sample():
    """By listing all subsets of k of up to six samples, some of which are right. So it is unbiased, because every
    subset is a fresh draw of k."""
    for n in range(1, 7):
        for right, k in itertools.product(range(n + 1), range(1, n + 1)):
            subsets = list(itertools.combinations(range(n), k))
            assert abs(pass_at_k(n, right, k) - sum(min(s) < right for s in subsets) / len(subsets)) < ROUNDING


@given(seed=seeds, prompts=st.integers(1, 4), patterns=st.integers(1, 4))
def test_the_change_of_accuracy_is_split_without_a_rest(seed, prompts, patterns):
    """(E11), the product rule for finite differences; and what does not change is not the cause."""
    pi, p, new_pi, new_p = torch.rand(4, prompts, patterns, generator=generator(seed))
    split = selection((pi, p), (new_pi, new_p))
    assert sum(split.values()) == pytest.approx((new_pi * new_p - pi * p).sum(dim=1).mean().item(), abs=ROUNDING)
    assert selection((pi, p), (pi, new_p))["gain_by_shares"] == selection((pi, p), (new_pi, p))["gain_by_success"] == 0


@given(seed=seeds)
def test_shares_and_success_rates_are_those_of_each_prompt(seed):
    """Success is averaged over 400 forced responses to each prompt: within 5 standard errors, at most 0.125, of the
    exact chance, which here is that of the end token, after the pattern's, coming next."""
    model, pairs = policy(seed), TASK.heldout_pairs[:2].repeat(400, 1)
    shares, success = (values.view(400, 2, 2) for values in pattern_rates(model, TASK, pairs, generator(seed)))
    for prompt, (pattern, token) in itertools.product((0, 1), enumerate((2, 3))):
        exact = model(torch.tensor([[prompt, 0, token]])).softmax(dim=-1)[0]
        assert shares[0, prompt, pattern].item() == pytest.approx(exact[1, token].item())
        assert success[:, prompt, pattern].mean().item() == pytest.approx(exact[2, TASK.end_token].item(), abs=0.125)
