"""Classifier-first reinforcement learning (CF-RL): policy-gradient RL in stages, the first of which trains W alone.

CF-RL (Tomihari, arXiv 2601.04670) trains the classifier W first, then the whole policy. This file holds all of it but
the policy (model.py), top down: stages; advantages (E2), the loss (E3), its gradient for W by hand (E4), a KL penalty
(E6); the loop (E5). Then what the loop needs: rollouts, the supervised fine-tuning that makes a starting policy, and
the task, arithmetic whose answers a program can verify. Left out on purpose: replay, ratio clipping, several updates
per batch, temperature, a Trainer. Every batch is sampled from the policy it updates.

Shapes: P prompts, G samples per prompt, R = P*G rows, T tokens, L = T-1 states, V vocabulary, d features. A state is
the position a token is predicted FROM, so the response token at t was chosen by the state at t-1. Entropy is in nats.
"""

import contextlib
import copy
import math
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

import tiktoken
import torch
from torch import Tensor
from torch.nn.functional import pad
from torch.nn.utils import get_total_norm
from torch.nn.utils.rnn import pad_sequence

from model import GPT, check, check_counts, check_tokens, entropy, residuals, sample, token_logp

# -------------------------------------------------------------------------------------------------- stages and settings


@dataclass(frozen=True)
class Stage:
    """A part of a run: so many updates, what they train and how fast. ValueError for unusable values."""

    steps: int  # optimiser steps: not micro-batches, not epochs
    trains: str = "all"  # or "classifier", or how names begin, up to a dot: "body", "body.blocks.1", "body.norm"
    lr: float = 4e-4  # learning rate of what is trained
    classifier_lr: float | None = None  # that of W, if W is trained at another

    def __post_init__(self):
        check_counts(steps=self.steps)
        _check_rates(lr=self.lr, classifier_lr=self.classifier_lr or 0.0)
        named = isinstance(self.trains, str) and self.trains
        check(named, f"trains must be all, classifier or the beginning of names, not {self.trains!r}")


def two_stages(steps=80, classifier_steps=20, lr=4e-4, classifier_lr=8e-3, trains="classifier") -> tuple[Stage, ...]:
    """CF-RL: of all `steps` updates the first `classifier_steps` train W alone, at a rate of its own, the rest
    everything at `lr`. Its rate matters most: here it is 20 times `lr`, and at `lr` CF-RL is slower than plain RL.

    So is it the rate that helps, or the freezing? trains="all" makes the **matched control**: the same rates, the same
    fresh optimiser, and nothing is frozen. classifier_steps=0 makes plain RL, of one stage. ValueError unless
    0 <= classifier_steps <= steps.
    """
    right = type(classifier_steps) is int and 0 <= classifier_steps <= steps
    check(right, f"classifier_steps={classifier_steps!r} is not between 0 and steps={steps}")
    first = [Stage(classifier_steps, trains, lr, classifier_lr)] if classifier_steps else []
    return (*first, Stage(steps - classifier_steps, "all", lr)) if classifier_steps < steps else tuple(first)


@dataclass(frozen=True)
class RLConfig:
    """Reinforcement learning, by default CF-RL. ValueError for unusable values."""

    stages: tuple[Stage, ...] = field(default_factory=two_stages)  # one after the other
    prompts: int = 32  # per update
    samples: int = 8  # responses per prompt: the group
    optimizer: str | Callable = "adam"  # or sgd, or a function of parameter groups
    reward: Callable = lambda batch, generator: batch.rewards  # the verifier's (P, G), or those of another judge
    baseline: str = "std"  # the kind of group_advantages
    kl: float = 0.0  # lambda of (E6), per nat

    def __post_init__(self):
        _check_rl(self)


# ----------------------------------------------------------------------------------------------------------- the method


def group_advantages(rewards: Tensor, kind: str = "std") -> Tensor:
    """Rewards (P, G) -> advantages (P, G): how much better each sample did than its own group  (E2).

    mean  the reward minus the group's mean (Dr. GRPO)       std   that, over the group's population std (GRPO)
    rloo  the reward minus the mean of the OTHER samples     none  the reward itself (REINFORCE)

    Except for `none`, a group of equal rewards (of one sample, for one) prefers nothing: exactly 0, where rounding in
    the mean divided by a vanishing std would be noise of order 1. Equal means: up to a few roundings. ValueError for
    rewards that are not finite.

    >>> group_advantages(torch.tensor([[1., 0., 1., 0.], [.1, .1, .1, .1]])).tolist()
    [[1.0, -1.0, 1.0, -1.0], [0.0, 0.0, 0.0, 0.0]]
    """
    _check_rewards(rewards, kind)
    if kind == "none":
        return rewards.clone()
    G = rewards.size(1)
    advantages = rewards - rewards.mean(dim=1, keepdim=True)  # (P, G)  (E2)
    if kind == "std":
        advantages = advantages / rewards.std(dim=1, correction=0, keepdim=True)
    elif kind == "rloo":
        advantages = advantages * G / max(G - 1, 1)
    span = rewards.amax(dim=1, keepdim=True) - rewards.amin(dim=1, keepdim=True)  # (P, 1)
    rounding = 4 * torch.finfo(rewards.dtype).eps * rewards.abs().amax(dim=1, keepdim=True)
    return advantages.masked_fill(span <= rounding, 0.0)


def sequence_logp(model: GPT, tokens: Tensor) -> Tensor:
    """tokens (B, T) -> (B, T-1): log pi(tokens[:, t+1] | tokens[:, :t+1]) in nats; 0 at prompts whose logits the model
    leaves out. ValueError for bad tokens."""
    check_tokens(model, tokens)
    return _logp_of_last(model(tokens)[:, :-1], tokens)


def _logp_of_last(logits, tokens):
    """Log-probabilities (R, T-1) from the logits (R, L, V) that the last L of the tokens (R, T) were chosen from."""
    return pad(token_logp(logits, tokens[:, -logits.size(1) :]), (tokens.size(1) - 1 - logits.size(1), 0))


def policy_gradient_loss(logp: Tensor, advantages: Tensor, mask: Tensor, count: int | None = None) -> Tensor:
    """-1/N sum_i A_i sum_t log pi(y_it): logp (R, L), advantages (R,), mask (R, L) -> ()  (E3).

    Only its gradient means anything: the value can be 0 while the policy learns. N is ONE count of tokens for the whole
    batch, not one per response; of a part of a batch pass the batch's `count`, and the parts' losses add up.
    """
    N = _count_tokens(count, mask, advantages, logp=logp)
    return -(advantages[:, None] * logp.masked_fill(~mask, 0.0)).sum() / N  # (E3)


def classifier_gradient(features, logits, actions, advantages, mask, count: int | None = None) -> Tensor:
    """The gradient of (E3) with respect to W for fixed features, by hand: all that stage 1 needs  (E4).

    d log pi(y) / d logits = e_y - pi, and logits = W phi, so  dL/dW = -1/N sum_i A_i sum_t (e_{y_it} - pi_it) phi_it^T.

    features (R, L, d), logits (R, L, V), actions (R, L), advantages (R,), mask (R, L) -> (V, d). `count` as in
    `policy_gradient_loss`. Our derivation. ValueError for shapes that disagree.
    """
    N = _count_tokens(count, mask, advantages, features=features, logits=logits, actions=actions)
    weights = (advantages[:, None] * mask)[mask]  # (n,), the states of these rows that chose a response token
    g = residuals(logits[mask], actions[mask])  # (n, V)
    return -(weights[:, None] * g).T @ features[mask] / N  # (V, d)  (E4)


def centred_log_ratio(logp: Tensor, reference_logp: Tensor, mask: Tensor, samples: int) -> Tensor:
    """log pi(y) - log pi_ref(y) of whole responses, minus the group's mean: (R, L) three times -> (P, G) in nats  (E6).

    Subtracting lambda times this from the advantages of (E3) descends lambda KL(pi || pi_ref), times (G-1)/G, since a
    sample is part of its mean, and over the responses' mean length. It is a difference of logs, treated as a constant,
    and comes AFTER the rewards are normalised: inside, the std would blow it up to full strength in every solved group.
    Our derivation:
    grad KL = E[log(pi/pi_ref) grad log pi] + E[grad log pi], and the last term is 0.
    """
    ratio = (logp - reference_logp).masked_fill(~mask, 0.0).sum(dim=1).view(-1, samples)  # (P, G)
    return ratio - ratio.mean(dim=1, keepdim=True)


SLICE = 128  # rows scored at once


def _backward(model, batch, advantages, stage, trained):
    """Leave the gradient of (E3), in a stage of W alone by (E4), in `.grad` of the parameters `trained`.

    All others have none: frozen means None, for an optimiser that knew them would, by its momentum, move what has a
    gradient of 0. Rows without advantage add exactly nothing, so only the others are scored, a slice at a time: with
    one N the slices add up.
    """
    W, count, L = model.classifier.weight, int(batch.mask.sum()), batch.logits.size(1)
    model.zero_grad()
    for rows in advantages.nonzero().flatten().split(SLICE):  # if there is none, one empty slice: zeros, and a step
        tokens, mask = batch.tokens[rows], batch.mask[rows, 1:]
        if stage.trains == "classifier":
            with torch.no_grad():  # nothing is differentiated
                features, actions = model.features(tokens)[:, -1 - L : -1], tokens[:, -L:]  # (R, L, d), (R, L)
                logits = model.classifier(features)  # (R, L, V)
                gradient = classifier_gradient(features, logits, actions, advantages[rows], mask[:, -L:], count)  # (E4)
                W.grad = gradient if W.grad is None else W.grad + gradient
        else:
            loss = policy_gradient_loss(sequence_logp(model, tokens), advantages[rows], mask, count)  # (E3)
            _require_finite("loss", loss.item())
            loss.backward(inputs=trained)


def _descend(optimizer):
    """One optimiser step, in place; returns the gradients' norm. FloatingPointError if that is not finite.

    Nothing is clipped: one norm for all would hold W back where the body learns, and not where it rests.
    """
    norm = get_total_norm([p.grad for p in _parameters(optimizer) if p.grad is not None]).item()
    _require_finite("gradient norm", norm)
    optimizer.step()
    return norm


def train_rl(model: GPT, task, config: RLConfig, generator) -> Iterator[dict]:
    """RL in stages. CF-RL has two, in which W and the body theta follow the gradient of (E3),

        stage 1:  W <- step(W, dL/dW)        stage 2:  (W, theta) <- step((W, theta), dL/d(W, theta))         (E5)

    each with a fresh optimiser, fresh for ALL parameters: so stage 2 IS ordinary RL from the policy that stage 1 left,
    and CF-RL differs from its control in the freezing alone. `generator` draws prompts and responses.

    Yields one record per update: step; stage (1, 2, ...); reward (mean over the batch, before the update); entropy
    (exact, mean over the batch's states, nats); flat (share of rows without advantage); gradient_norm; tokens (sampled
    in this update). FloatingPointError, naming step and quantity, rather than train on what is not finite.
    """
    check(isinstance(generator, torch.Generator), f"RL samples, so it needs a torch.Generator, not {generator!r}")
    reference, step = copy.deepcopy(model) if config.kl else None, 0
    for number, stage in enumerate(config.stages, start=1):
        optimizer = _optimizer(model, stage, config.optimizer)  # (E5)
        for _ in range(stage.steps):
            step += 1
            with naming_the_step(step):
                # Sample G responses to each of P training prompts, and let the verifier judge them.
                pairs = task.train_pairs[torch.randint(len(task.train_pairs), (config.prompts,), generator=generator)]
                prompts = [task.prompt(a, b) for a, b in pairs.tolist()]
                batch = rollout(model, task, prompts, config.samples, generator)
                rewards = config.reward(batch, generator)  # (P, G)
                # Compare every sample with its group.
                advantages = group_advantages(rewards, config.baseline)  # (P, G)  (E2)
                if reference is not None:
                    with torch.no_grad():  # both by one function: at the start the ratio is 0 to the bit
                        logp, reference_logp = (sequence_logp(policy, batch.tokens) for policy in (model, reference))
                    log_ratio = centred_log_ratio(logp, reference_logp, batch.mask[:, 1:], config.samples)
                    advantages = advantages - config.kl * log_ratio  # (E6)
                # Gradient and step.
                _backward(model, batch, advantages.flatten(), stage, _parameters(optimizer))
                gradient_norm = _descend(optimizer)
            seen = {"reward": rewards.mean().item(), "entropy": entropy(batch.state_logits).mean().item()}
            seen |= {"flat": 1 - (advantages != 0).float().mean().item(), "tokens": int(batch.mask.sum())}
            yield {"step": step, "stage": number, "gradient_norm": gradient_norm, **seen}


def _optimizer(model, stage, kind, **settings):
    """A fresh optimiser of what a stage trains, W at its own rate. What rests is not in it: weight decay would move it.

    Parameters that require no gradient rest too. ValueError if there is nothing to train.
    """
    W, classifier_lr = model.classifier.weight, stage.lr if stage.classifier_lr is None else stage.classifier_lr
    named = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    trained = [p for name, p in named if stage.trains == "all" or f"{name}.".startswith(f"{stage.trains}.")]
    check(trained, f"trains={stage.trains!r} names no parameter of the model that can be trained")
    groups = [{"params": [p for p in trained if p is W], "lr": classifier_lr}]
    groups += [{"params": [p for p in trained if p is not W], "lr": stage.lr}]
    return (kind if callable(kind) else OPTIMIZERS[kind])(groups, **settings)


def _parameters(optimizer):
    return [p for group in optimizer.param_groups for p in group["params"]]


# ------------------------------------------------------------------------------------------------------------- rollouts


@dataclass(frozen=True)
class Rollout:
    """G responses to each of P prompts, as sampled. Rows are grouped by prompt: row p*G + g is sample g of prompt p."""

    tokens: Tensor  # (R, T) int64
    mask: Tensor  # (R, T) bool, true on response tokens: the end token included, nothing after it
    logits: Tensor  # (R, L, V), those that the last L of the T tokens, the responses, were sampled from
    rewards: Tensor  # (P, G)
    responses: tuple[str, ...]  # R texts, without the end token

    @property
    def state_mask(self) -> Tensor:
        """(R, T) bool: true on the states that chose the response tokens, one position earlier than `mask`."""
        return torch.cat((self.mask[:, 1:], torch.zeros_like(self.mask[:, :1])), dim=1)

    @property
    def logp(self) -> Tensor:
        """(R, T-1): log-probability of tokens[:, 1:] as sampled, in nats; 0 for those of the prompt."""
        return _logp_of_last(self.logits, self.tokens)

    @property
    def state_logits(self) -> Tensor:
        """(N, V): the logits of the N states that chose a response token, row by row."""
        return self.logits[self.mask[:, -self.logits.size(1) :]]


def rollout(model: GPT, task, prompts: Sequence[str], samples: int, generator=None) -> Rollout:
    """Sample `samples` responses to each prompt and verify them; greedily if there is no generator.

    A response without an end token is unfinished and earns 0.
    """
    check_counts(prompts=len(prompts), samples=samples)
    start = torch.tensor([task.encode(prompt) for prompt in prompts])  # (P, T0)
    tokens, mask, logits = sample(model, start, task.block_size - start.size(1), task.end_token, generator, samples)
    responses, rewards = [], []
    rows = zip(tokens[:, start.size(1) :].tolist(), mask.sum(dim=1).tolist(), strict=True)
    for i, (response, length) in enumerate(rows):
        ended = response[length - 1] == task.end_token
        responses.append(task.decode(response[: length - ended]))
        rewards.append(task.verify(prompts[i // samples], responses[-1]) * ended)
    rewards = torch.tensor(rewards, dtype=logits.dtype).view(-1, samples)
    return Rollout(tokens, mask, logits, rewards, tuple(responses))


# -------------------------------------------------------------------------------------------------- the starting policy


@dataclass(frozen=True)
class SFTConfig:
    """Supervised fine-tuning, which makes the starting policy. ValueError for unusable values."""

    stages: tuple[Stage, ...] = field(default_factory=lambda: (Stage(1000, lr=3e-3),))  # Adam's rates, at their highest
    rows: int = 48  # demonstrations per update
    noise: float = 0.1  # probability that a column of s is demonstrated wrong
    mixture: tuple[float, ...] = (0.4, 0.3, 0.3)  # shares of the demonstrations in task.patterns: d, s, g

    def __post_init__(self):
        _check_stages(self.stages)
        check_counts(rows=self.rows)
        one_each = len(self.mixture) == len(Addition.patterns) and min(self.mixture) >= 0 < sum(self.mixture) < math.inf
        check(one_each, f"mixture={self.mixture} does not give one share for each of {Addition.patterns}")
        check(0 <= self.noise <= 1, f"noise must lie between 0 and 1, not {self.noise}")


def _demonstrations(task, config, generator):
    """A batch of demonstrations of training pairs: tokens (R, T), and their response mask (R, T)."""
    pairs = task.train_pairs[torch.randint(len(task.train_pairs), (config.rows,), generator=generator)].tolist()
    choices = torch.tensor(config.mixture).multinomial(config.rows, replacement=True, generator=generator).tolist()
    rows = []
    for (a, b), choice in zip(pairs, choices, strict=True):
        response = task.demonstration(a, b, task.patterns[choice], noise=config.noise, generator=generator)
        rows.append(torch.tensor(task.encode(task.prompt(a, b) + response) + [task.end_token]))
    tokens = pad_sequence(rows, batch_first=True, padding_value=task.end_token)  # (R, T)
    position, ends = torch.arange(tokens.size(1)), torch.tensor([[len(row)] for row in rows])  # (T,), (R, 1)
    return tokens, (position >= len(task.prompt(0, 0))) & (position < ends)


def supervised_finetune(model: GPT, task, config: SFTConfig, generator) -> Iterator[dict]:
    """Fit the policy to demonstrations: (E3) with every advantage 1. Yields step, stage and loss after each update.

    The rates rise over 20 updates, and fall linearly over all of them.
    """
    step, steps = 0, sum(stage.steps for stage in config.stages)
    for number, stage in enumerate(config.stages, start=1):
        optimizer = _optimizer(model, stage, "adam", betas=(0.9, 0.98))
        rates = [group["lr"] for group in optimizer.param_groups]
        for _ in range(stage.steps):
            step += 1
            for group, rate in zip(optimizer.param_groups, rates, strict=True):
                group["lr"] = rate * min(step / 20, 1 - (step - 1) / steps)
            tokens, mask = _demonstrations(task, config, generator)
            model.zero_grad()
            loss = policy_gradient_loss(sequence_logp(model, tokens), torch.ones(config.rows), mask[:, 1:])
            loss.backward(inputs=_parameters(optimizer))
            with naming_the_step(step):
                _require_finite("loss", loss.item())
                _descend(optimizer)
            yield {"step": step, "stage": number, "loss": loss.item()}


# ------------------------------------------------------------------------------------------- the task, and its verifier


class Addition:
    """Sums of two numbers of `digits` digits (1 to 3). A prompt is `12+34=`; a response takes one of three patterns:

    d  direct:  d, then the answer. Demonstrated with the carries dropped: sure of itself, right if nothing carries.
    s  scratch: s, then for each column from the right its carry and its digit, then `;` and the answer.
    g  guess:   g, then random digits.

    About a tenth of the operand pairs is held out, (b, a) together with (a, b). The end token is no part of any text.

    >>> task = Addition(digits=2)
    >>> task.prompt(47, 85), [task.demonstration(47, 85, pattern) for pattern in "ds"]
    ('47+85=', ['d022', 's1213;132'])
    >>> task.verify("47+85=", "s1213;132"), task.verify("47+85=", "d022")
    (1.0, 0.0)
    """

    patterns = "dsg"
    alphabet = "0123456789+=;dsg"

    def __init__(self, digits: int = 2):
        check_counts(digits=digits)
        check(digits <= 3, f"digits must be 1, 2 or 3, not {digits}")
        self.digits = digits
        self.vocab_size = len(self.alphabet) + 1
        self.end_token = len(self.alphabet)
        ranks = {character.encode(): token for token, character in enumerate(self.alphabet)}
        special = {"<end>": self.end_token}
        self.tokenizer = tiktoken.Encoding("sums", pat_str=".", mergeable_ranks=ranks, special_tokens=special)
        self.block_size = 5 * digits + 6  # the prompt, the longest demonstration (s) and the end token
        size = (10**digits, 10**digits)  # of one dtype, whatever the default: the split must never move
        draw = torch.rand(size, generator=torch.Generator().manual_seed(0), dtype=torch.float32)
        held_out = torch.minimum(draw, draw.T) < 0.05  # symmetric: knowing b+a must not give a+b away
        order = torch.randperm(int(held_out.sum()), generator=torch.Generator().manual_seed(0))
        self.heldout_pairs, self.train_pairs = held_out.nonzero()[order], (~held_out).nonzero()  # (N, 2) each

    def prompt(self, a: int, b: int) -> str:
        """The question as text, both operands zero-padded. ValueError for an operand out of range."""
        for operand in (a, b):
            right = isinstance(operand, int) and 0 <= operand < 10**self.digits
            check(right, f"operand {operand!r} is not a whole number of 1 to {self.digits} digits")
        return f"{a:0{self.digits}d}+{b:0{self.digits}d}="

    def operands(self, prompt: str) -> tuple[int, int]:
        """The inverse of `prompt`. ValueError for any other text."""
        match = re.fullmatch(rf"([0-9]{{{self.digits}}})\+([0-9]{{{self.digits}}})=", prompt)
        if not match:
            raise ValueError(f"{prompt!r} is not a prompt such as {self.prompt(1, 2)!r}")
        return int(match[1]), int(match[2])

    def demonstration(self, a: int, b: int, pattern: str, *, noise: float = 0.0, generator=None) -> str:
        """A response in the given pattern. In s each column's digit is wrong with probability `noise`, and the answer
        repeats what the columns say. `generator` draws the noise and the digits of g. ValueError for a bad argument."""
        self.prompt(a, b)  # checks the operands
        check(0 <= noise <= 1, f"noise must lie between 0 and 1, not {noise}")
        if pattern == "g":
            guess = torch.randint(10, (self.digits + 1,), generator=generator)
            return "g" + "".join(map(str, guess.tolist()))
        columns = [(a // 10**i % 10, b // 10**i % 10) for i in range(self.digits)]  # from the right
        if pattern == "d":
            return "d0" + "".join(str((x + y) % 10) for x, y in reversed(columns))
        check(pattern == "s", f"pattern {pattern!r} is not one of {self.patterns}")
        carry, scratch, answer = 0, "", ""
        for x, y in columns:
            carry, digit = divmod(x + y + carry, 10)
            if noise and torch.rand((), generator=generator) < noise:
                digit = (digit + int(torch.randint(1, 10, (), generator=generator))) % 10
            scratch, answer = f"{scratch}{carry}{digit}", f"{digit}{answer}"
        return f"s{scratch};{carry}{answer}"

    def answer(self, response: str) -> str | None:
        """What a response gives as its answer: all that follows d or g, what follows the only `;` of s, or None."""
        pattern, rest = response[:1], response[1:]
        if pattern == "s":
            return rest.partition(";")[2] if rest.count(";") == 1 else None
        return rest if pattern in ("d", "g") else None

    def verify(self, prompt: str, response: str) -> float:
        """The reward: 1.0 if the answer is the sum in digits + 1 digits, else 0.0. ValueError for a bad prompt."""
        return float(self.answer(response) == f"{sum(self.operands(prompt)):0{self.digits + 1}d}")

    def encode(self, text: str) -> list[int]:
        """Text -> tokens, one per character. ValueError naming a foreign character."""
        for character in text:
            if character not in self.alphabet:  # checked first: tiktoken panics, beyond `except Exception`
                raise ValueError(f"character {character!r} is not in the alphabet {self.alphabet}")
        return self.tokenizer.encode_ordinary(text)

    def decode(self, tokens: Sequence[int]) -> str:
        """Tokens -> text. ValueError naming a token that stands for no character (the end token, for one)."""
        for token in tokens:
            if type(token) is not int or not 0 <= token < self.end_token:
                raise ValueError(f"token {token!r} stands for no character")
        return self.tokenizer.decode(tokens)


# --------------------------------------------------------------------------------------------------------- small checks


@contextlib.contextmanager
def naming_the_step(step):
    """Within, a FloatingPointError says at which step it happened."""
    try:
        yield
    except FloatingPointError as error:
        raise FloatingPointError(f"step {step}: {error}") from None


def _require_finite(name, value):
    if not math.isfinite(value):
        raise FloatingPointError(f"the {name} is {value}")


BASELINES = ("std", "mean", "rloo", "none")
OPTIMIZERS = {"adam": torch.optim.Adam, "sgd": torch.optim.SGD}


def _check_choice(name, value, choices):
    check(value in choices, f"{name} must be one of {', '.join(choices)}, not {value!r}")


def _check_rates(**rates):
    for name, value in rates.items():
        check(0 <= value < math.inf, f"{name} must be finite and not negative, not {value}")


def _check_stages(stages):
    right = isinstance(stages, tuple) and stages and all(isinstance(stage, Stage) for stage in stages)
    check(right, f"stages must be a tuple of Stage, at least one, not {stages!r}")


def _check_rl(config):
    _check_stages(config.stages)
    check_counts(prompts=config.prompts, samples=config.samples)
    _check_rates(kl=config.kl)
    check(callable(config.reward), f"reward must be a function of a rollout, not {config.reward!r}")
    if not callable(config.optimizer):
        _check_choice("optimizer", config.optimizer, OPTIMIZERS)
    _check_choice("baseline", config.baseline, BASELINES)
    grouped = config.samples > 1 or config.baseline == "none"
    check(grouped, f"samples=1 leaves the baseline {config.baseline!r} no group to compare with")


def _check_rewards(rewards, kind):
    right = rewards.ndim == 2 and rewards.size(1) > 0 and rewards.is_floating_point()
    check(right, f"rewards must be (P, G) floats with G > 0, not {tuple(rewards.shape)} {rewards.dtype}")
    for reward in rewards[~rewards.isfinite()].tolist():
        raise ValueError(f"rewards must be finite, not {reward}")
    _check_choice("kind", kind, BASELINES)


def _count_tokens(count, mask, advantages, **others):
    """N of (E3): the `count` that is given, or the mask's tokens. ValueError if there are none, or for shapes."""
    shapes = {name: tuple(x.shape) for name, x in {**others, "advantages": advantages}.items()}
    right = mask.ndim == 2 and mask.dtype == torch.bool and all(x.shape[:2] == mask.shape for x in others.values())
    check(right and advantages.shape == mask.shape[:1], f"mask {tuple(mask.shape)} {mask.dtype} does not fit {shapes}")
    count = int(mask.sum()) if count is None else count
    check(count >= 1, "mask selects no token")
    return count
