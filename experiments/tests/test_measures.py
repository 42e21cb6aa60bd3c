"""What is measured of a run, each column against a second way to compute it."""

import copy
import itertools
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny import ROUNDING, TinyTask, generator, seeds, states, tiny_gpt
from tiny_runs import tiny

from experiments import measures
from experiments.measures import Forced, Probe, follow, make_probe, measure, pass_at_k, pattern_rates, selection
from minicfrl import Addition, rollout
from model import confidence, entropy
from ntk import empirical_ntk
from train_toy import stream

TASK = TinyTask({"a": 1.0, "": 1.0})


def policy(seed):
    return tiny_gpt(seed, TASK.vocab_size, TASK.block_size)


def moved(model, update, part=""):
    """A copy of the model, moved by what the update has for the parameters whose names begin so."""
    after = copy.deepcopy(model)
    with torch.no_grad():
        for name, p in after.named_parameters():
            p += update[name] * name.startswith(part)
    return after


def update_of(model, draws, size):
    return {name: size * torch.randn(p.shape, generator=draws) for name, p in model.named_parameters()}


def by_kind(mask, values):
    """Those of states at the ends of prompts, the first of a row, and those within responses."""
    kinds = {"prompt": [], "continuation": []}
    for (i, t), value in zip(mask.nonzero().tolist(), values, strict=True):
        kinds["continuation" if mask[i, :t].any() else "prompt"].append(value)
    return kinds


def probe_of(start, tokens, mask):
    first = [not mask[i, :t].any() for i, t in mask.nonzero().tolist()]
    return Probe(tokens, mask, start, start.features(tokens)[mask].detach(), torch.tensor(first))


def test_pass_at_k_is_the_share_of_subsets_with_a_right_sample():
    """By listing all subsets of k of up to six samples, some of which are right. So it is unbiased, because every
    subset is a fresh draw of k."""
    for n in range(1, 7):
        for right, k in itertools.product(range(n + 1), range(1, n + 1)):
            subsets = list(itertools.combinations(range(n), k))
            assert abs(pass_at_k(n, right, k) - sum(min(s) < right for s in subsets) / len(subsets)) < ROUNDING


def followed(x, model, probe, updates, look=lambda step: {}):
    """The rows of a run that moves the model by these updates."""

    def records():
        for step, update in enumerate(updates, start=1):
            model.load_state_dict(moved(model, update).state_dict())
            yield {"step": step, "tokens": 10 * step}

    return [*follow(x, model, probe, records(), look)]


@given(seed=seeds, size=st.sampled_from([1e-3, 0.3]))
def test_the_microscope_s_columns_add_up_to_what_happened_on_the_probe(seed, size):
    """Over two updates, however large, in each of which a part is what its own parameters do alone. Only a step of
    x.looks is a row, but the sums and the tokens are of all."""
    start, draws = policy(seed), generator(seed)
    tokens, mask = states(start, 3, 3, seed)
    updates, path, expected = [update_of(start, draws, size) for _ in range(2)], [start], torch.zeros(3)

    def top_1(model):
        return confidence(model(tokens)[mask]).mean().item()

    for update in updates:
        parts = [top_1(moved(path[-1], update, part)) for part in ("", "classifier", "body")]
        expected += torch.tensor(parts) - top_1(path[-1])
        path.append(moved(path[-1], update))
    x, probe = tiny(rl_steps=2, n=2, every=2), probe_of(start, tokens, mask)
    (row,) = followed(x, copy.deepcopy(start), probe, updates, lambda step: {"measured": step})
    assert (row["step"], row["measured"], row["tokens"]) == (2, 2, 30) and row["seconds"] > 0
    change, *parts = (row[f"confidence_{part}"] for part in ("change", "by_W", "by_body", "residual"))
    assert [change, *parts[:2]] == pytest.approx(expected.tolist(), abs=ROUNDING)
    assert [change, change] == pytest.approx([sum(parts), top_1(path[-1]) - top_1(start)], abs=ROUNDING)


@given(seed=seeds)
def test_agreement_is_the_cosine_of_w_s_part_with_the_whole_less_their_means(seed):
    """State by state. 1e-9, because these are differences of logits."""
    model = policy(seed)
    tokens, mask = states(model, 4, 3, seed)
    mask[0] = True  # so that there are states of both kinds
    update = update_of(model, generator(seed), 0.1)
    before, by_W, whole = (each(tokens)[mask] for each in (model, moved(model, update, "class"), moved(model, update)))
    pairs = [((a - a.mean()), (b - b.mean())) for a, b in zip(by_W - before, whole - before, strict=True)]
    cosines = by_kind(mask, [(a @ b / a.norm() / b.norm()).item() for a, b in pairs])
    (row,) = followed(tiny(rl_steps=1, n=1), copy.deepcopy(model), probe_of(model, tokens, mask), [update])
    for kind, values in cosines.items():
        assert row[f"agreement_{kind}"] == pytest.approx(sum(values) / len(values), abs=1e-9)


# ----------------------------------------------------------------------------------------------------------- the rows

X = tiny(prompts=2, last_prompts=2, measures="all")


@given(seed=st.integers(0, 1000))
@settings(max_examples=5)
def test_a_row_reports_what_the_samples_show(seed):
    """Recomputed one sample and one prompt at a time, from the random numbers that every look draws."""
    model = policy(seed + 1)
    row = measure(X, seed, TASK, model, make_probe(policy(seed), TASK, seed, 2), 4)
    batch = rollout(model, TASK, ["0", "1"], 8, stream(seed, "evaluation"))
    states = [batch.logits[i, t] for i, t in batch.mask[:, 1:].nonzero().tolist()]
    first = model(torch.tensor([[0], [1]]))[:, -1].softmax(dim=-1).mean(dim=0)
    greedy = []
    for prompt in (0, 1):
        tokens = [prompt]
        while len(tokens) < 3 and tokens[-1] != TASK.end_token:
            tokens.append(model(torch.tensor([tokens]))[0, -1].argmax().item())
        greedy.append(tokens in ([prompt, 4], [prompt, 2, 4]))  # which are right: nothing, and a
    expected = {
        "accuracy": batch.responses.count("") / 16 + sum(row[-2:].tolist() == [2, 4] for row in batch.tokens) / 16,
        "entropy": sum(entropy(s).item() for s in states) / len(states),
        "confidence": sum(confidence(s).item() for s in states) / len(states),
        **{"share_a": first[2].item(), "share_b": first[3].item(), "greedy": sum(greedy) / 2},
        "classifier_norm": model.classifier.weight.square().sum().sqrt().item(),
    }
    assert {name: row[name] for name in expected} == pytest.approx(expected)


def test_what_is_costly_is_measured_at_the_ends_and_there_on_more_prompts(monkeypatch):
    """KL at the start and the end of the run; of the kernel and the features also the end of stage 1. The prompts are
    the first of the held-out pairs, 3 and at the two ends 4."""
    seen, task, model = [], Addition(1), tiny_gpt(0, 17, 11)
    probe, x = make_probe(model, task, 0, 3), tiny(measures="all", every=1)
    monkeypatch.setattr(measures, "rollout", lambda *those: seen.append(those[2:4]) or rollout(*those))
    rows = [measure(x, 0, task, model, probe, step) for step in (0, 1, 2, 4)]
    assert [len(prompts) for prompts, samples in seen if samples == 8] == [4, 3, 3, 4] and len(probe.tokens) == 3
    assert ["kl" in row for row in rows] == ["best_of_64" in row for row in rows] == [True, False, False, True]
    assert ["kernel_G_by_W" in row for row in rows] == ["W_moved" in row for row in rows] == [True, False, True, True]


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
        answers += sum(len({task.answer(r) for r in batch.responses[5 * i : 5 * i + 5]}) for i in range(len(some)))
    expected = {f"best_of_{k}": sum(pass_at_k(5, c, k) for c in right) / prompts for k in (1, 2, 4)}
    assert row == pytest.approx(expected | {"different_answers": answers / prompts})


# ------------------------------------------------------------------------------------------------------- the patterns


@given(seed=seeds, prompts=st.integers(1, 4), patterns=st.integers(1, 4))
def test_the_change_of_accuracy_is_split_without_a_rest(seed, prompts, patterns):
    """(E11), the product rule for finite differences; and what does not change is not the cause."""
    pi, p, new_pi, new_p = torch.rand(4, prompts, patterns, generator=generator(seed))
    total = (new_pi * new_p - pi * p).sum(dim=1).mean().item()
    split = selection((pi, p), (new_pi, new_p))
    assert split["gain_by_shares"] + split["gain_by_success"] == pytest.approx(total, abs=ROUNDING)
    assert selection((pi, p), (pi, new_p))["gain_by_shares"] == selection((pi, p), (new_pi, p))["gain_by_success"] == 0


@given(seed=seeds)
def test_shares_and_success_rates_are_those_of_each_prompt(seed):
    """Success is averaged over 400 forced responses to each prompt: within 5 standard errors, at most 0.125, of the
    exact chance, which here is that of the end token, after the pattern's, coming next."""
    task = TinyTask({"a": 1.0, "b": 1.0})
    model, pairs = policy(seed), task.heldout_pairs.repeat(400, 1)
    shares, success = (values.view(400, 2, 2) for values in pattern_rates(model, task, pairs, generator(seed)))
    for prompt, (pattern, token) in itertools.product((0, 1), enumerate((2, 3))):
        exact = model(torch.tensor([[prompt, token]])).softmax(dim=-1)[0]
        assert shares[0, prompt, pattern].item() == pytest.approx(exact[0, token].item())
        assert success[:, prompt, pattern].mean().item() == pytest.approx(exact[1, task.end_token].item(), abs=0.125)


@given(seed=seeds)
def test_a_forced_pattern_starts_every_response_and_is_not_credited(seed):
    """It comes after a prompt of several tokens, at whose end the shares are read."""
    task, model = Addition(1), tiny_gpt(seed, 17, 11)
    batch = rollout(model, Forced(task, "s"), ["1+2=", "3+4="], 3, generator(seed))
    assert all(text.startswith("s") for text in batch.responses)
    assert not batch.mask[:, :5].any() and batch.mask[:, 5].all()
    shares, _ = pattern_rates(model, task, torch.tensor([[1, 2]]), generator(seed))
    exact = model(torch.tensor([task.encode("1+2=")]))[0, -1].softmax(dim=-1)[task.encode("dsg")]
    torch.testing.assert_close(shares[0], exact, rtol=0, atol=ROUNDING)


@given(seed=seeds)
def test_departure_is_the_sum_of_kls_and_says_where_the_likeliest_token_changed(seed):
    """Recomputed state by state by torch.distributions. If every response ends at once, there is no later state."""
    start, model = policy(seed), policy(seed + 1)
    batch = rollout(model, TASK, ["0", "1"], 8, generator(seed))
    new, old = (each(batch.tokens)[batch.state_mask] for each in (model, start))
    policies = [torch.distributions.Categorical(logits=logits) for logits in (new, old)]
    kls = by_kind(batch.state_mask, torch.distributions.kl_divergence(*policies).tolist())
    changed = by_kind(batch.state_mask, [float(a.argmax() != b.argmax()) for a, b in zip(new, old, strict=True)])
    expected = {"kl": sum(kls["prompt"] + kls["continuation"]) / 16, "kl_first": sum(kls["prompt"]) / 16}
    for name, values in zip(("changed_first", "changed_later"), changed.values(), strict=True):
        expected[name] = sum(values) / len(values) if values else math.nan
    assert measures.departure(batch, start) == pytest.approx(expected, nan_ok=True)


# ------------------------------------------------------------------------------------------------ kernel and features


def test_growth_of_g_is_what_w_s_move_did_to_its_norm_at_16_states():
    """For a policy whose W and body both moved; computed once more from the definition, at every other of 34 states."""
    start, model = tiny_gpt(0), tiny_gpt(1)
    tokens, _ = states(start, 17, 4, 0)
    mask, some = torch.zeros(2, 17, 4, dtype=torch.bool)
    mask[:, 1:3] = some[:16, 1] = True
    with_W = copy.deepcopy(start)
    with_W.classifier.weight.data.copy_(model.classifier.weight)
    G, G0 = (empirical_ntk(each, tokens, some).gradient.norm().item() for each in (with_W, start))
    assert measures.growth_of_G(model, probe_of(start, tokens, mask)) == pytest.approx(G / G0)


@given(seed=seeds)
def test_geometry_is_about_the_cosines_of_all_pairs_of_a_kind(seed):
    model = policy(seed)
    tokens, mask = states(model, 4, 3, seed)
    mask[:2] = True
    phi = model.features(tokens)[mask].detach()
    row, cosines = measures.geometry(probe_of(model, tokens, mask), phi), {}
    for kind, vectors in by_kind(mask, phi).items():
        cosines[kind] = [(x @ y / x.norm() / y.norm()).item() for x, y in itertools.permutations(vectors, 2)]
    expected = {f"cosine_{kind}": sum(values) / len(values) for kind, values in cosines.items()}
    positive = sum(cosine > 0 for cosine in cosines["continuation"]) / len(cosines["continuation"])
    assert row == pytest.approx(expected | {"positive_continuation": positive}, abs=1e-7)  # a share in float32


def test_distances_are_in_parts_of_the_norms_at_the_start():
    """W doubled has moved by its own norm; the body, a tenth longer, by a tenth, and so have features whose norm is."""
    start, tokens = tiny_gpt(0), torch.zeros(2, 3, dtype=torch.long)
    itself = {name: p.detach() for name, p in start.named_parameters()}
    tenth = {name: p / 10 for name, p in itself.items()}
    assert measures.moves(moved(start, itself, "classifier"), start) == {"W_moved": pytest.approx(1), "body_moved": 0}
    assert measures.moves(moved(start, tenth, "body"), start) == {"W_moved": 0, "body_moved": pytest.approx(0.1)}
    phi, longer = (each.features(tokens)[0] for each in (start, moved(start, tenth, "body.norm.")))
    assert measures.feature_change(Probe(None, None, None, phi, None), longer) == pytest.approx(0.1)
