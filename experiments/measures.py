"""What is measured of a policy in training: the columns of a run's files, which columns.md explains.

`follow` looks at a policy as it trains, and its rows are those columns. A new one is one more entry in `measure`.
"""

import copy
import math
import time
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.utils import get_total_norm

from experiments.judges import kl_divergence
from minicfrl import Rollout, naming_the_step, rollout
from model import GPT, check, confidence, entropy
from ntk import empirical_ntk, exact_split, split_effect
from train_toy import SAMPLES, held_out, look, stream

# ------------------------------------------------------------------------------------- what is looked at, and the rows


@dataclass(frozen=True)
class Probe:
    """States that are followed through training: those of responses of one fixed policy, the start."""

    tokens: Tensor  # (B, T)
    state_mask: Tensor  # (B, T) bool, N states
    start: GPT  # a copy of the policy that wrote them
    phi: Tensor  # (N, d), its features there
    first: Tensor  # (N,) bool: which states are the first of their row, the end of the prompt


def first_states(mask):
    """Of the N states of `mask` (B, T), which are the first of their row: (N,) bool."""
    return (mask.cumsum(dim=1) == 1)[mask]


@torch.no_grad()
def make_probe(model, task, seed, prompts: int) -> Probe:
    """The states of one sampled response to each of so many held-out prompts."""
    batch = held_out(model, task, seed, prompts, samples=1, purpose="probe")
    phi, _ = look(model, batch)
    return Probe(batch.tokens, batch.state_mask, copy.deepcopy(model), phi, first_states(batch.state_mask))


def follow(x, model, probe, records, measure):
    """Rows about a policy in training, at every step of x.looks but the start: what all updates so far did to the top-1
    probability on the probe's states, by the exact split, and what `measure(step)` says now."""
    now, seconds, tokens, moved = look(model, probe), 0.0, 0, dict.fromkeys(MOVED, 0.0)
    clock = time.process_time()
    for record in records:
        seconds, tokens = seconds + time.process_time() - clock, tokens + record.get("tokens", 0)
        row = {"step": record["step"], "tokens": tokens}
        if x.measures in ("all", "few"):  # which hundreds of runs cannot afford
            (phi, W), now = now, look(model, probe)
            parts = exact_split(phi, W, *now)
            effect = split_effect(phi @ W.T, *parts)
            moved = {name: total + effect[name] for name, total in moved.items()}
            row |= moved | agreement(probe, parts)
        if record["step"] in x.looks:
            with naming_the_step(record["step"]):
                yield row | measure(record["step"]) | {"seconds": seconds}
        clock = time.process_time()


MOVED = tuple(f"confidence_{part}" for part in ("change", "by_W", "by_body", "residual"))


def agreement(probe, parts):
    """Does W's part of the change of the logits, (N, V) of three, point where the whole does? The mean cosine within
    responses.

    The mean over the vocabulary is subtracted first, because adding a constant to all logits changes no probability.
    """
    whole = parts[0] + (parts[1] + parts[2])
    by_W, whole = (part - part.mean(dim=1, keepdim=True) for part in (parts[0], whole))
    return {"agreement_continuation": F.cosine_similarity(by_W, whole, dim=1)[~probe.first].mean().item()}


@torch.no_grad()
def measure(x, seed, task, model, probe, step):
    """What the experiment asks of the toy's policy after so many updates. Every look draws the same random numbers."""
    at_an_end, at_a_stage_end = step in (0, x.rl_steps), step in x.ends
    pairs, draws = task.heldout_pairs[: x.last_prompts if at_an_end else x.prompts], stream(seed, "evaluation")
    prompts = [task.prompt(a, b) for a, b in pairs.tolist()]
    batch = rollout(model, task, prompts, SAMPLES, draws)
    row = {"accuracy": batch.rewards.mean().item(), "entropy": entropy(batch.state_logits).mean().item()}
    row |= {f"accuracy_{name}": batch.rewards[i::2].mean().item() for i, name in enumerate(("even", "odd"))}
    row["confidence"] = confidence(batch.state_logits).mean().item()
    if x.measures != "accuracy":
        phi, _ = look(model, probe)
        row |= geometry(probe, phi) if at_a_stage_end else {}
    if x.measures == "all":
        shares = batch.state_logits[first_states(batch.state_mask)].softmax(dim=-1).mean(dim=0)  # (V,), of first tokens
        row |= {f"share_{pattern}": shares[task.encode(pattern)].item() for pattern in task.patterns}
        row["classifier_norm"] = model.classifier.weight.norm().item()
        row["feature_change"] = feature_change(probe, phi)
        if at_an_end:
            row |= departure(batch, probe.start)
            row["greedy"] = rollout(model, task, prompts, 1).rewards.mean().item()
            success = pattern_rates(model, task, pairs, draws)[1].mean(dim=0).tolist()
            row |= {f"success_{pattern}": p for pattern, p in zip(task.patterns, success, strict=True)}
            row |= diversity(model, task, pairs[: x.prompts], stream(seed, "diversity"))
            rates = (pattern_rates(m, task, pairs, stream(seed, "selection")) for m in (probe.start, model))
            row |= selection(*rates)
        if at_a_stage_end:
            row |= moves(model, probe.start) | {"kernel_G_by_W": growth_of_G(model, probe)}
    return row


# ------------------------------------------------------------------------------------------------ accuracy, confidence


def pass_at_k(n: int, correct: int, k: int) -> float:
    """Unbiased estimate, from n samples of which `correct` are right, of the chance that k samples hold a right one.

    1 - C(n - correct, k) / C(n, k)  (Chen et al., arXiv 2107.03374). ValueError for impossible counts.
    """
    check(0 <= correct <= n and 1 <= k <= n, f"pass@{k} of {correct} right among {n} samples makes no sense")
    return 1 - math.comb(n - correct, k) / math.comb(n, k)


def feature_change(probe, phi):
    return ((phi - probe.phi).norm(dim=1) / probe.phi.norm(dim=1)).mean().item()


def apart(logits, reference):
    """How far the policy's logits (N, V) are from the start's, at each state: KL(policy || start) in nats, and 1 where
    the likeliest token is another one, 0 elsewhere."""
    return kl_divergence(logits, reference), (logits.argmax(dim=1) != reference.argmax(dim=1)).to(logits.dtype)


def departure(batch: Rollout, start) -> dict[str, float]:
    """How the policy that sampled `batch` differs from `start` at the states of its samples: KL(policy || start) of
    whole responses in nats, and of their first token; where the likeliest token is another one."""
    reference = torch.cat([start(some) for some in batch.tokens.split(256)])[batch.state_mask]  # (N, V)
    (kl, changed), first = apart(batch.state_logits, reference), first_states(batch.state_mask)  # (N,) each
    row = {"kl": kl.sum().item() / len(batch.responses), "kl_first": kl[first].mean().item()}
    return row | {"changed_first": changed[first].mean().item(), "changed_later": changed[~first].mean().item()}


# ------------------------------------------------------------------------------------------ diversity, and the patterns


@torch.no_grad()
def diversity(model, task, pairs: Tensor, generator, samples: int = 64) -> dict[str, float]:
    """What more samples buy, on the prompts of `pairs` (B, 2): pass@k for k = 1, 2, 4, ... `samples` under the keys
    best_of_k, and the number of different answers among all samples of a prompt, different_answers."""
    ks = [2**i for i in range(samples.bit_length())]
    passed, different = dict.fromkeys(ks, 0.0), 0
    for some in pairs.split(8):  # a few prompts at once, for the sake of memory
        batch = rollout(model, task, [task.prompt(a, b) for a, b in some.tolist()], samples, generator)
        for correct in batch.rewards.sum(dim=1).int().tolist():
            passed = {k: passed[k] + pass_at_k(samples, correct, k) / len(pairs) for k in ks}
        answers = [task.answer(response) for response in batch.responses]
        different += sum(len(set(answers[i : i + samples])) for i in range(0, len(answers), samples))
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
def pattern_rates(model, task, pairs: Tensor, generator) -> tuple[Tensor, Tensor]:
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


def growth_of_G(model, probe) -> float:
    """What W's moves since the start have done to the norm of G (E7), with the body as it was: the ratio, at about 16
    of the probe's states, evenly spread."""
    states, some = probe.state_mask.nonzero(), torch.zeros_like(probe.state_mask)  # (N, 2), (B, T)
    some[tuple(states[:: max(1, len(states) // 16)][:16].T)] = True
    moved_W = copy.deepcopy(probe.start)
    moved_W.classifier = model.classifier
    now, start = (empirical_ntk(policy, probe.tokens, some).gradient.norm() for policy in (moved_W, probe.start))
    return (now / start).item()


def geometry(probe, phi) -> dict[str, float]:
    """How alike the features (N, d) of all states but each row's first are: the mean cosine of all pairs, and the
    share of positive ones."""
    unit = F.normalize(phi, dim=1)[~probe.first]
    pairs = (unit @ unit.T)[~torch.eye(len(unit), dtype=torch.bool)]
    return {"cosine_continuation": pairs.mean().item(), "positive_continuation": (pairs > 0).float().mean().item()}


@torch.no_grad()
def moves(model, start) -> dict[str, float]:
    """How far W and the body are from the start's, in parts of their norms there."""
    row = {}
    for name, of_W in (("W_moved", True), ("body_moved", False)):
        named = zip(model.named_parameters(), start.parameters(), strict=True)
        pairs = [(p, old) for (n, p), old in named if n.startswith("classifier.") == of_W]
        far, norm = get_total_norm([p - old for p, old in pairs]), get_total_norm([old for _, old in pairs])
        row[name] = (far / norm).item()
    return row
