"""What a run measures, and when: every column of metrics.csv that is not about the update itself.

A new column is one more function of a Scene and one row of MEASURES, with the columns' meaning in columns.md.
"""

import copy
import functools
import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.utils import get_total_norm

from experiments.arms import MEASURED, SAMPLES, Config
from experiments.variations import kl_divergence
from minicfrl import Addition, Rollout, group_advantages, rollout
from model import GPT, check, confidence, entropy, residuals
from ntk import empirical_ntk, exact_split, split_effect
from train_toy import look, stream

# ---------------------------------------------------------------------------------------------------- what is looked at


@dataclass(frozen=True)
class Probe:
    """States that are followed through training: those of responses of one fixed policy, the start."""

    tokens: Tensor  # (B, T)
    advantages: Tensor  # (B,), of the responses, compared with each other
    state_mask: Tensor  # (B, T) bool, N states
    start: GPT  # a copy of the policy that wrote them

    @property
    def some_states(self):
        """(B, T) bool: about 16 of the states, evenly spread."""
        states = self.state_mask.nonzero()
        chosen = torch.zeros_like(self.state_mask)
        chosen[tuple(states[:: max(1, len(states) // 16)][:16].T)] = True
        return chosen

    @functools.cached_property
    def starting_G(self):
        return empirical_ntk(self.start, self.tokens, self.some_states).gradient


@torch.no_grad()
def make_probe(model: GPT, task, pairs: Tensor, generator) -> Probe:
    """The states of one sampled response to each operand pair of `pairs` (B, 2)."""
    batch = rollout(model, task, [task.prompt(a, b) for a, b in pairs.tolist()], 1, generator)
    advantages = group_advantages(batch.rewards.T, "mean")[0]  # (B,)
    return Probe(batch.tokens, advantages, batch.state_mask, copy.deepcopy(model))


def start_probe(config, task, model, seed):
    """The probe of a run: up to 32 responses of the starting policy."""
    return make_probe(model, task, task.heldout_pairs[: min(32, config.eval_prompts)], stream(seed, "probe"))


@dataclass(frozen=True)
class Scene:
    """A policy after some update of a run. Every look at it draws the same random numbers: only the policy differs."""

    config: Config
    seed: int
    step: int
    task: object
    model: GPT
    probe: Probe

    @property
    def at_an_end(self):
        return self.step in (0, self.config.rl_steps)

    @property
    def pairs(self):
        """Held-out operand pairs: at the ends of the run more of them."""
        return self.task.heldout_pairs[: self.config.final_prompts if self.at_an_end else self.config.eval_prompts]

    def draws(self, purpose):
        return stream(self.seed, purpose)


# ------------------------------------------------------------------------------------------------ accuracy, confidence


def pass_at_k(n: int, correct: int, k: int) -> float:
    """Unbiased estimate, from n samples of which `correct` are right, of the chance that k samples hold a right one.

    1 - C(n - correct, k) / C(n, k)  (Chen et al., arXiv 2107.03374). ValueError for impossible counts.
    """
    check(0 <= correct <= n and 1 <= k <= n, f"pass@{k} of {correct} right among {n} samples makes no sense")
    return 1 - math.comb(n - correct, k) / math.comb(n, k)


def different_answers(batch: Rollout, task) -> int:
    """How many different answers the samples of a prompt give, summed over the prompts."""
    samples, answers = batch.rewards.size(1), [task.answer(response) for response in batch.responses]
    return sum(len(set(answers[i : i + samples])) for i in range(0, len(answers), samples))


@torch.no_grad()
def departure(batch: Rollout, start: GPT) -> tuple[Tensor, Tensor]:
    """How the policy that sampled `batch` differs from `start` at its N states: KL(policy || start) in nats, and 1.0
    where the likeliest token is another one, (N,) twice."""
    reference = torch.cat([start(some) for some in batch.tokens.split(256)])[batch.state_mask]  # (N, V)
    changed = batch.state_logits.argmax(dim=1) != reference.argmax(dim=1)
    return kl_divergence(batch.state_logits, reference), changed.float()


@torch.no_grad()
def evaluate(
    model: GPT, task, pairs: Tensor, probe: Probe, generator, samples: int = 8, k: int = 8
) -> dict[str, float]:
    """Measure the policy on the prompts of `pairs` (B, 2), with `samples` samples each, and on the probe's states.

    Confidence, the top-1 probability, appears twice, since RL moves the states as well as what is predicted there:
    entropy and confidence on fresh samples of the policy, probe_entropy and probe_confidence on the fixed states. Every
    key is explained in columns.md.
    """
    batch = rollout(model, task, [task.prompt(a, b) for a, b in pairs.tolist()], samples, generator)
    shares = batch.state_logits[first_states(batch.state_mask)].softmax(dim=-1).mean(dim=0)  # (V,), of first tokens
    start, features = (policy.features(probe.tokens)[probe.state_mask] for policy in (probe.start, model))  # (N, d)
    probe_logits = model.classifier(features)
    return {
        "accuracy": batch.rewards.mean().item(),
        f"pass_at_{k}": sum(pass_at_k(samples, int(c), k) for c in batch.rewards.sum(dim=1)) / len(pairs),
        "distinct": different_answers(batch, task) / len(pairs),
        "entropy": entropy(batch.state_logits).mean().item(),
        "confidence": confidence(batch.state_logits).mean().item(),
        "probe_entropy": entropy(probe_logits).mean().item(),
        "probe_confidence": confidence(probe_logits).mean().item(),
        "classifier_norm": model.classifier.weight.norm().item(),
        "feature_change": ((features - start).norm(dim=1) / start.norm(dim=1)).mean().item(),
    } | {f"share_{pattern}": shares[task.encode(pattern)].item() for pattern in task.patterns}


@torch.no_grad()
def examine(model: GPT, task, pairs: Tensor, probe: Probe, generator, samples: int = 8) -> dict[str, float]:
    """What is measured at the ends of a run alone, on the samples that `evaluate` draws from such a generator: accuracy
    of the likeliest response, departure from the start, success of the patterns."""
    prompts = [task.prompt(a, b) for a, b in pairs.tolist()]
    batch = rollout(model, task, prompts, samples, generator)
    first = first_states(batch.state_mask)  # (N,), those that choose the pattern
    kl, changed = departure(batch, probe.start)  # (N,) twice
    row = {
        "greedy": rollout(model, task, prompts, 1).rewards.mean().item(),
        "kl": kl.sum().item() / len(batch.responses),
        "kl_first": kl[first].mean().item(),
        "changed_first": changed[first].mean().item(),
        "changed_later": changed[~first].mean().item(),
    }
    _, success = pattern_rates(model, task, pairs, generator)
    return row | {f"success_{pattern}": p for pattern, p in zip(task.patterns, success.mean(0).tolist(), strict=True)}


# ------------------------------------------------------------------------------------------ diversity, and the patterns


@torch.no_grad()
def diversity(model: GPT, task, pairs: Tensor, generator, samples: int = 64) -> dict[str, float]:
    """What more samples buy, on the prompts of `pairs` (B, 2): pass@k for k = 1, 2, 4, ... `samples` under the keys
    best_of_k, and the number of different answers among all samples of a prompt, different_answers."""
    ks = [2**i for i in range(samples.bit_length())]
    passed, different = dict.fromkeys(ks, 0.0), 0
    for some in pairs.split(8):  # a few prompts at once, for the sake of memory
        batch = rollout(model, task, [task.prompt(a, b) for a, b in some.tolist()], samples, generator)
        for correct in batch.rewards.sum(dim=1).int().tolist():
            passed = {k: passed[k] + pass_at_k(samples, correct, k) / len(pairs) for k in ks}
        different += different_answers(batch, task)
    return {f"best_of_{k}": passed[k] for k in ks} | {"different_answers": different / len(pairs)}


@dataclass(frozen=True)
class Forced:
    """A task in which every response begins with the token of `pattern`, which is given and not chosen."""

    task: object
    pattern: str

    def __getattr__(self, name):
        return getattr(self.task, name)

    def encode(self, prompt):
        return self.task.encode(prompt + self.pattern)

    def decode(self, tokens):
        return self.pattern + self.task.decode(tokens)


@torch.no_grad()
def pattern_rates(model: GPT, task, pairs: Tensor, generator) -> tuple[Tensor, Tensor]:
    """Shares and success rates of the three reasoning patterns at each prompt of `pairs` (B, 2): (B, 3) twice.

    A share is the probability of the pattern's token as the first of the response; success is whether one response
    that is forced to begin with it is right, an unbiased estimate of the chance.
    """
    prompts = [task.prompt(a, b) for a, b in pairs.tolist()]
    first = model(torch.tensor([task.encode(prompt) for prompt in prompts]))[:, -1].softmax(dim=-1)  # (B, V)
    success = [rollout(model, Forced(task, pattern), prompts, 1, generator).rewards for pattern in task.patterns]
    return first[:, task.encode(task.patterns)], torch.cat(success, dim=1)


def selection(before: tuple[Tensor, Tensor], after: tuple[Tensor, Tensor]) -> dict[str, float]:
    """What the change of accuracy is due to, between two results of `pattern_rates`: to the patterns' shares pi, or to
    their success rates p. With accuracy = sum_r pi_r p_r and bar for the mean of before and after,

        change of accuracy = sum_r (change of pi_r) bar p_r  +  sum_r bar pi_r (change of p_r)          (E11)

    exactly, prompt by prompt; the result is averaged over prompts. Our derivation, of what Chen et al. (arXiv
    2506.04695) say: that RL selects patterns, whose own success rates stay what they were.
    """
    (shares, success), (new_shares, new_success) = before, after
    by_shares = (new_shares - shares) * (success + new_success) / 2  # (B, 3)  (E11)
    by_success = (shares + new_shares) / 2 * (new_success - success)  # (B, 3)
    return {"gain_by_shares": by_shares.sum(1).mean().item(), "gain_by_success": by_success.sum(1).mean().item()}


# -------------------------------------------------------------------------------------------------- kernel and features


@torch.no_grad()
def kernel_row(model, probe):
    """The kernel (E7) on 32 states of the probe, what W has done to it since the start, and how alike features are."""
    chosen, bodies = probe.some_states, (probe.start.body, model.body)
    now = by_W = empirical_ntk(model, probe.tokens, chosen)
    if any(not torch.equal(p, q) for p, q in zip(*(body.parameters() for body in bodies), strict=True)):
        moved_W = copy.deepcopy(probe.start)
        moved_W.classifier = model.classifier
        by_W = empirical_ntk(moved_W, probe.tokens, chosen)
    R = now.representation.norm() * math.sqrt(now.gradient.size(1))  # times the norm of I_V
    row = [R, now.gradient.norm(), by_W.gradient.norm() / probe.starting_G.norm()]
    row.append(F.cosine_similarity(by_W.gradient.flatten(), probe.starting_G.flatten(), dim=0))
    features = model.features(probe.tokens)  # (B, T, d)
    i, t = chosen.nonzero(as_tuple=True)
    g = residuals(model.classifier(features)[chosen], probe.tokens[i, t + 1])
    g *= probe.advantages[i, None]  # (N, V), those of the probe's own responses
    pushed = torch.einsum("nv,nvmw,mw->", g, now.gradient, g)
    row.append(pushed / (g.square().sum() * now.gradient.norm()).clamp(min=1e-30))
    return dict(zip(NTK_COLUMNS, torch.stack(row).tolist(), strict=True)) | geometry(
        features[probe.state_mask], first_states(probe.state_mask)
    )


def first_states(mask):
    """Of the N states of `mask` (B, T), which are the first of their row, the ends of prompts: (N,) bool."""
    return (mask.cumsum(dim=1) == 1)[mask]


def geometry(phi, first):
    """How alike features (N, d) are at the ends of prompts, where `first` (N,) is true, and within responses."""
    row = {}
    for where, kind in {"prompt": phi[first], "continuation": phi[~first]}.items():
        raw, centred = cosines(kind), cosines(kind - kind.mean(dim=0))
        values = raw.mean(), (raw > 0).float().mean(), centred.square().mean().sqrt()
        row |= {f"{name}_{where}": value.item() for name, value in zip(GEOMETRY, values, strict=True)}
    return row


def cosines(features):
    """Those of all pairs of different rows of (N, d)."""
    unit = F.normalize(features, dim=1)
    return (unit @ unit.T)[~torch.eye(len(unit), dtype=torch.bool)]


# ---------------------------------------------------------------------------------------------- columns and their times


def at_every_look(scene):
    return True


def at_the_ends(scene):
    return scene.at_an_end


def at_stage_ends(scene):
    return scene.step in scene.config.stage_ends


def held_out(scene):
    return evaluate(scene.model, scene.task, scene.pairs, scene.probe, scene.draws("evaluation"), SAMPLES)


def accuracy_alone(scene):
    """All that hundreds of runs can afford."""
    with torch.no_grad():
        prompts = [scene.task.prompt(a, b) for a, b in scene.pairs.tolist()]
        batch = rollout(scene.model, scene.task, prompts, SAMPLES, scene.draws("evaluation"))
    measures = {"entropy": entropy, "confidence": confidence}
    row = {name: measure(batch.state_logits).mean().item() for name, measure in measures.items()}
    return {"accuracy": batch.rewards.mean().item(), **row}


def examined(scene):
    return examine(scene.model, scene.task, scene.pairs, scene.probe, scene.draws("evaluation"), SAMPLES)


@torch.no_grad()
def likeness(scene):
    mask = scene.probe.state_mask
    return geometry(scene.model.features(scene.probe.tokens)[mask], first_states(mask))


def many_samples(scene):
    some = scene.pairs[: scene.config.eval_prompts]
    return diversity(scene.model, scene.task, some, scene.draws("diversity"))


def gains(scene):
    policies = scene.probe.start, scene.model
    return selection(*(pattern_rates(m, scene.task, scene.pairs, scene.draws("selection")) for m in policies))


def kernel(scene):
    return kernel_row(scene.model, scene.probe)


@dataclass(frozen=True)
class Measure:
    """Columns that a function of a Scene fills when it is time, and that are nan otherwise."""

    fill: Callable
    when: Callable
    columns: tuple = ()  # their names, needed only where `when` can say no


NTK_COLUMNS = ("kernel_R", "kernel_G", "kernel_G_by_W", "kernel_G_cosine", "kernel_G_alignment")
GEOMETRY = ("cosine", "positive", "centred")
LIKENESS = tuple(f"{what}_{where}" for where in ("prompt", "continuation") for what in GEOMETRY)
KERNEL = NTK_COLUMNS + LIKENESS
AT_THE_ENDS = (
    "greedy",
    "kl",
    "kl_first",
    "changed_first",
    "changed_later",
    *(f"success_{p}" for p in Addition.patterns),
)
MEASURES = [
    Measure(held_out, at_every_look),
    Measure(examined, at_the_ends, AT_THE_ENDS),
    Measure(many_samples, at_the_ends, (*(f"best_of_{2**i}" for i in range(7)), "different_answers")),
    Measure(gains, at_the_ends, ("gain_by_shares", "gain_by_success")),
    Measure(kernel, at_stage_ends, KERNEL),
]


FEW = [Measure(accuracy_alone, at_every_look), Measure(likeness, at_stage_ends, LIKENESS)]
SETS = dict(zip(MEASURED, (MEASURES, FEW, FEW[:1]), strict=True))


MOVES = ("W_moved", "body_moved")


@torch.no_grad()
def moves(model, start):
    """How far W and the body have gone from `start`, a copy of the model's parameters, in parts of their norms then."""
    W, row = model.classifier.weight, {}
    for name, of_W in zip(MOVES, (True, False), strict=True):
        pairs = [(p, old) for p, old in zip(model.parameters(), start, strict=True) if (p is W) == of_W]
        far, norm = get_total_norm([p - old for p, old in pairs]), get_total_norm([old for _, old in pairs])
        row[name] = (far / norm).item()
    return row


def agreement(by_W: Tensor, by_body: Tensor) -> Tensor:
    """Does the representation part of (E8) point where the whole change does? (N, V) both -> their cosines (N,).

    The mean over the vocabulary is subtracted first, because adding a constant to all logits changes no probability.
    """
    by_W, both = (part - part.mean(dim=1, keepdim=True) for part in (by_W, by_W + by_body))
    return F.cosine_similarity(by_W, both, dim=1)


class Microscope:
    """What moves a policy: its features and W on fixed states, at one look and at the next, by the exact split."""

    def __init__(self, model, tokens, mask):
        self.model, self.tokens, self.state_mask, self.first = model, tokens, mask, first_states(mask)
        self.phi, self.W = look(model, self)

    @torch.no_grad()
    def moved(self):
        """What moved the policy since the last look: the columns of ntk.split_effect. Also agreement_prompt and
        agreement_continuation: how far W's part alone points where the whole does, at the first state of each row, the
        end of the prompt, and at the others, as means."""
        phi, W = look(self.model, self)
        logits, parts = self.phi @ self.W.T, exact_split(self.phi, self.W, phi, W)  # (N, V), three of them
        self.phi, self.W = phi, W
        cosines = agreement(parts[0], parts[1] + parts[2])  # (N,)
        where = {"agreement_prompt": cosines[self.first], "agreement_continuation": cosines[~self.first]}
        return split_effect(logits, *parts) | {name: values.mean().item() for name, values in where.items()}


class ToyView:
    """What there is to see of a tiny GPT in training: see runs.Watch."""

    def __init__(self, config, seed, task, model):
        self.config, self.seed, self.task, self.model = config, seed, task, model
        self.probe = start_probe(config, task, model, seed)
        self.microscope = Microscope(model, self.probe.tokens, self.probe.state_mask)

    def moved(self):
        """What moved the policy since the last look; nothing where hundreds of runs cannot afford to ask."""
        return {} if self.config.measures == "accuracy" else self.microscope.moved()

    def measure(self, step):
        """{column: value}, in the order of the set that the run asks for."""
        scene, row = Scene(self.config, self.seed, step, self.task, self.model, self.probe), {}
        for each in SETS[self.config.measures]:
            row |= each.fill(scene) if each.when(scene) else dict.fromkeys(each.columns, math.nan)
        return row
