"""Classifier-first reinforcement learning (CF-RL): policy-gradient RL in stages, the first of which trains W alone.

CF-RL (Tomihari, arXiv 2601.04670) trains the classifier W first and then the whole policy. This file holds the method,
top down: the settings of a run; advantages (E2), the loss (E3), what its gradient is for W (E4), a KL penalty (E6); and
the training loop (E5). After that comes what the loop needs: rollouts, the supervised fine-tuning that makes a starting
policy, and the task, which is arithmetic whose answers a program can verify. The policy is in model.py. We leave out
replay, ratio clipping, several updates per batch, and temperature, because every batch is sampled from the very policy
that it updates.

Shapes: P prompts, S samples per prompt, B = P*S rows, T tokens, L states of a row, V vocabulary, d features. A state is
a position FROM which a token is predicted, so the token at t was chosen by the state at t-1. Entropy is in nats.
"""

import contextlib
import copy
import math
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import tiktoken
import torch
from torch import Tensor, nn

from model import check, check_counts, check_policy, check_tokens, entropy, residuals, sample, token_logp

# -------------------------------------------------------------------------------------------------- stages and settings


@dataclass(frozen=True)
class Stage:
    """A part of a run: how many updates, what they train, and at which rate. ValueError for unusable values."""

    steps: int  # optimiser steps
    trains: str = "all"  # or "classifier", or how parameter names begin, up to a dot: "body", "body.blocks.1"
    lr: float = 4e-4  # learning rate of what is trained
    classifier_lr: float | None = None  # the rate of W, if W is trained at another one

    def __post_init__(self):
        check_counts(steps=self.steps)
        _check_rates(lr=self.lr, classifier_lr=self.classifier_lr or 0.0)


BASELINES = ("std", "mean", "rloo", "none")
OPTIMIZERS = {"adam": torch.optim.Adam, "sgd": torch.optim.SGD}


@dataclass(frozen=True)
class RLConfig:
    """Settings of reinforcement learning. ValueError for unusable values."""

    stages: tuple[Stage, ...]  # one after the other. CF-RL has two; train_toy.py shows them
    prompts: int = 32  # P, per update
    samples: int = 8  # S, responses per prompt: the group
    optimizer: str | Callable = "adam"  # or "sgd", or a function that makes an optimiser of torch's parameter groups
    reward: Callable = lambda batch, generator: batch.rewards  # (P, S): the verifier's, or what another function gives
    baseline: str = "std"  # the kind of group_advantages
    kl: float = 0.0  # lambda of (E6), per nat

    def __post_init__(self):
        _check_stages(self.stages)
        check_counts(prompts=self.prompts, samples=self.samples)
        _check_rates(kl=self.kl)
        known = self.optimizer in OPTIMIZERS or callable(self.optimizer)
        check(known, f"optimizer must be one of {', '.join(OPTIMIZERS)} or a function, not {self.optimizer!r}")
        check(self.baseline in BASELINES, f"baseline must be one of {', '.join(BASELINES)}, not {self.baseline!r}")
        grouped = self.samples > 1 or self.baseline == "none"
        check(grouped, f"samples=1 leaves the baseline {self.baseline!r} no group to compare with")


def _check_stages(stages):
    right = isinstance(stages, tuple) and stages and all(isinstance(stage, Stage) for stage in stages)
    check(right, f"stages must be a tuple of Stage, at least one, not {stages!r}")


def _check_rates(**rates):
    for name, rate in rates.items():
        check(0 <= rate < math.inf, f"{name} must be finite and not negative, not {rate}")


# ----------------------------------------------------------------------------------------------------------- the method


def group_advantages(rewards: Tensor, kind: str = "std") -> Tensor:
    """Rewards (P, S) -> advantages (P, S): how much better was each sample than its own group?  (E2)

    mean  the reward minus the group's mean (Dr. GRPO)       std   that, divided by the group's population std (GRPO)
    rloo  the reward minus the mean of the OTHER samples     none  the reward itself (REINFORCE)

    (arXiv 2503.20783, 2402.03300 and, of rloo, 2402.14740.)

    Except for `none`, a group of equal rewards gets exactly 0, because it prefers nothing. (Otherwise the mean's
    rounding error, over a std that is almost 0, would be noise of order 1.) Equal means equal up to a few roundings.
    ValueError for rewards that are not finite.

    >>> group_advantages(torch.tensor([[1., 0., 1., 0.], [.1, .1, .1, .1]])).tolist()
    [[1.0, -1.0, 1.0, -1.0], [0.0, 0.0, 0.0, 0.0]]
    """
    right = rewards.ndim == 2 and rewards.size(1) > 0 and rewards.is_floating_point()
    check(right, f"rewards must be (P, S) floats with S > 0, not {tuple(rewards.shape)} {rewards.dtype}")
    for reward in rewards[~rewards.isfinite()].tolist():
        raise ValueError(f"rewards must be finite, not {reward}")
    check(kind in BASELINES, f"kind must be one of {', '.join(BASELINES)}, not {kind!r}")
    if kind == "none":
        return rewards.clone()
    S = rewards.size(1)
    advantages = rewards - rewards.mean(dim=1, keepdim=True)  # (P, S)  (E2)
    if kind == "std":
        advantages = advantages / rewards.std(dim=1, correction=0, keepdim=True)
    elif kind == "rloo":
        advantages = advantages * S / max(S - 1, 1)
    span = rewards.amax(dim=1, keepdim=True) - rewards.amin(dim=1, keepdim=True)  # (P, 1)
    rounding = 4 * torch.finfo(rewards.dtype).eps * rewards.abs().amax(dim=1, keepdim=True)
    return advantages.masked_fill(span <= rounding, 0.0)


def sequence_logp(model: nn.Module, tokens: Tensor) -> Tensor:
    """tokens (B, T) -> (B, T-1): log pi(tokens[:, t+1] | tokens[:, :t+1]) in nats. If the model returns logits of the
    last positions only, the earlier entries are 0. ValueError for bad tokens."""
    check_tokens(model, tokens)
    return _logp_of_last(model(tokens)[:, :-1], tokens)


def _logp_of_last(logits, tokens):
    """Log-probabilities (B, T-1) from the logits (B, L, V) that the last L of the tokens (B, T) were chosen from."""
    return nn.functional.pad(token_logp(logits, tokens[:, -logits.size(1) :]), (tokens.size(1) - 1 - logits.size(1), 0))


def policy_gradient_loss(logp: Tensor, advantages: Tensor, mask: Tensor, count: int | None = None) -> Tensor:
    """-1/N sum_i A_i sum_t log pi(y_it): logp (B, L), advantages (B,), mask (B, L) -> ()  (E3).

    Only its gradient means anything: the value can be 0 while the policy learns. N is ONE count of tokens for the whole
    batch, not one per response. For a part of a batch pass the `count` of the whole, and the parts' losses add up.
    ValueError for shapes that disagree, or if there is no token.
    """
    N = _count_tokens(count, mask, advantages, logp=logp)
    return -(advantages[:, None] * logp.masked_fill(~mask, 0.0)).sum() / N  # (E3)


def classifier_gradient(features, logits, actions, advantages, mask, count: int | None = None) -> Tensor:
    """The gradient of (E3) with respect to W, written out. It is what stage 1 follows  (E4).

    d log pi(y) / d logits = e_y - pi, and logits = W phi, so  dW = -1/N sum_i A_i sum_t (e_{y_it} - pi_it) phi_it^T.
    train_rl does not call this, because autograd finds the same; a test compares the two.

    features (B, L, d), logits (B, L, V), actions (B, L), advantages (B,), mask (B, L) -> (V, d). `count` is as in
    `policy_gradient_loss`. Our derivation. ValueError for shapes that disagree.
    """
    N = _count_tokens(count, mask, advantages, features=features, logits=logits, actions=actions)
    weights = (advantages[:, None] * mask)[mask]  # (n,): A_i for each of the n response tokens of these rows
    r = residuals(logits[mask], actions[mask])  # (n, V): e_y - pi
    return -(weights[:, None] * r).T @ features[mask] / N  # (V, d)  (E4)


def _count_tokens(count, mask, advantages, **others):
    """N of (E3): the `count` that is given, else the mask's tokens. ValueError if N is 0, or for shapes that differ."""
    shapes = {name: tuple(x.shape) for name, x in {**others, "advantages": advantages}.items()}
    right = mask.ndim == 2 and mask.dtype == torch.bool and all(x.shape[:2] == mask.shape for x in others.values())
    check(right and advantages.shape == mask.shape[:1], f"mask {tuple(mask.shape)} {mask.dtype} does not fit {shapes}")
    count = int(mask.sum()) if count is None else count
    check(count >= 1, "mask selects no token")
    return count


def centred_log_ratio(logp: Tensor, reference_logp: Tensor, mask: Tensor, samples: int) -> Tensor:
    """log pi(y) - log pi_ref(y) of whole responses, minus the group's mean: (B, L) three times -> (P, S) in nats  (E6).

    Subtract lambda times this from the advantages, and (E3) also descends lambda KL(pi || pi_ref), up to two factors:
    (S-1)/S, because a sample is a part of its group's mean, and 1 over the responses' mean length. We need not
    differentiate the ratio, because grad KL = E[log(pi/pi_ref) grad log pi] + E[grad log pi], and the last term is 0.
    We subtract it AFTER the rewards are normalised. Otherwise they would be divided by the std of a solved group, which
    is almost 0, and the penalty would be as large as any reward. Our derivation.
    """
    ratio = (logp - reference_logp).masked_fill(~mask, 0.0).sum(dim=1).view(-1, samples)  # (P, S)
    return ratio - ratio.mean(dim=1, keepdim=True)


def train_rl(model: nn.Module, task, config: RLConfig, generator: torch.Generator) -> Iterator[dict]:
    """RL in stages. CF-RL has two, in which W and the body theta follow the gradient of (E3):

        stage 1:  W <- step(W, dW)        stage 2:  (W, theta) <- step((W, theta), (dW, dtheta))              (E5)

    Every stage starts with a fresh optimiser of ALL that it trains. So stage 2 IS plain RL from the policy that stage 1
    left, and an arm that trains everything at CF-RL's rates differs from CF-RL in the freezing alone.

    `model` is a policy (model.GPT says what that is), `task` a task (`Addition` says); `generator` draws prompts and
    responses. Yields one record per update: step, and stage (1, 2, ...); reward, the batch's mean before the update;
    entropy, the exact mean over the batch's states, in nats; flat, the share of rows without advantage; gradient_norm;
    tokens, how many were sampled for this update. ValueError for what cannot be trained. FloatingPointError, with the
    step and the quantity, where something is not finite; the policy is then as the last update left it.
    """
    check(isinstance(generator, torch.Generator), f"RL samples, so it needs a torch.Generator, not {generator!r}")
    model = _checked(model, task)
    reference, step = copy.deepcopy(model) if config.kl else None, 0
    for number, stage in enumerate(config.stages, start=1):
        optimizer, trained = _optimizer(model, stage, OPTIMIZERS.get(config.optimizer, config.optimizer))  # (E5)
        for _ in range(stage.steps):
            step += 1
            with naming_the_step(step):
                # Sample S responses to each of P training prompts, and let the verifier judge them.
                prompts = [task.prompt(*pair) for pair in _draw_pairs(task, config.prompts, generator)]
                batch = rollout(model, task, prompts, config.samples, generator)
                rewards = torch.as_tensor(config.reward(batch, generator), dtype=batch.rewards.dtype).detach()  # (P, S)
                check(rewards.shape == batch.rewards.shape, f"reward gave {tuple(rewards.shape)} numbers, not (P, S)")
                # Compare every sample with its group.
                advantages = group_advantages(rewards, config.baseline)  # (P, S)  (E2)
                if reference is not None:
                    with torch.no_grad():  # both by one function: at the start the ratio is 0 to the bit
                        logp, reference_logp = (sequence_logp(policy, batch.tokens) for policy in (model, reference))
                    log_ratio = centred_log_ratio(logp, reference_logp, batch.mask[:, 1:], config.samples)
                    advantages = advantages - config.kl * log_ratio  # (E6)
                # Find the gradient, and take a step.
                _set_gradients(model, batch, advantages.flatten(), stage, trained)
                gradient_norm = _descend(optimizer, trained)
            yield {
                "step": step,
                "stage": number,
                "reward": rewards.mean().item(),
                "entropy": entropy(batch.state_logits).mean().item(),
                "flat": (advantages == 0).float().mean().item(),
                "gradient_norm": gradient_norm,
                "tokens": int(batch.mask.sum()),
            }


SLICE = 128  # rows that are scored at once, which bounds memory


def _set_gradients(model, batch, advantages, stage, trained):
    """Leave the gradient of (E3) in `.grad` of the parameters `trained`. For W alone it equals (E4), as a test checks.

    All other parameters get no gradient (None). We skip rows whose advantage is 0, because they contribute nothing.
    Dividing by the whole batch's count of tokens in every slice makes the slices' gradients sum to the batch's.
    """
    count, L = int(batch.mask.sum()), batch.logits.size(1)
    model.zero_grad()
    for rows in advantages.nonzero().flatten().split(SLICE):  # if there are none, one empty slice gives zeros
        tokens, mask = batch.tokens[rows], batch.mask[rows, -L:]
        with torch.set_grad_enabled(stage.trains != "classifier"):  # W alone needs no graph through the body
            features = model.features(tokens)[:, -1 - L : -1]  # (B, L, d): the state at t-1 chose the token at t
        logp = token_logp(model.classifier(features), tokens[:, -L:])  # (B, L)
        loss = policy_gradient_loss(logp, advantages[rows], mask, count)  # (E3)
        _require_finite("loss", loss.item())
        loss.backward(inputs=trained)


def _optimizer(model, stage, make):
    """A fresh optimiser, and the parameters that the stage trains, W at its own rate. ValueError if there are none.

    Frozen parameters are not given to the optimiser, so neither momentum nor weight decay can move them. A parameter
    that requires no gradient is frozen in every stage.
    """
    W, classifier_lr = model.classifier.weight, stage.lr if stage.classifier_lr is None else stage.classifier_lr
    named = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    trained = [p for name, p in named if stage.trains == "all" or f"{name}.".startswith(f"{stage.trains}.")]
    check(trained, f"trains={stage.trains!r} names no parameter of the model that can be trained")
    groups = [{"params": [p for p in trained if p is W], "lr": classifier_lr}]
    return make([*groups, {"params": [p for p in trained if p is not W], "lr": stage.lr}]), trained


def _descend(optimizer, trained):
    """Take one optimiser step, in place, and return the gradients' norm. FloatingPointError if that is not finite.

    We do not clip gradients. Clipping by a norm that all share would shrink W's step more in the control, where the
    body has gradients too, than in CF-RL, and then the two would differ in more than the freezing.
    """
    norm = nn.utils.get_total_norm([p.grad for p in trained if p.grad is not None]).item()
    _require_finite("gradient norm", norm)
    optimizer.step()
    return norm


# ------------------------------------------------------------------------------------------------------------- rollouts


@dataclass(frozen=True)
class Rollout:
    """S responses to each of P prompts, as sampled. Rows are grouped by prompt: row p*S + s is sample s of prompt p."""

    tokens: Tensor  # (B, T) int64
    mask: Tensor  # (B, T) bool, true on response tokens: the end token included, nothing after it
    logits: Tensor  # (B, L, V): the last L of the T tokens, the responses, were sampled from these
    rewards: Tensor  # (P, S), the verifier's
    responses: tuple[str, ...]  # B texts, without the end token

    @property
    def state_mask(self) -> Tensor:
        """(B, T) bool: true on the states that chose the response tokens, one position earlier than `mask`."""
        return torch.cat((self.mask[:, 1:], torch.zeros_like(self.mask[:, :1])), dim=1)

    @property
    def logp(self) -> Tensor:
        """(B, T-1): log-probability of tokens[:, 1:] as sampled, in nats; 0 for those of the prompt."""
        return _logp_of_last(self.logits, self.tokens)

    @property
    def state_logits(self) -> Tensor:
        """(N, V): the logits of the N states that chose a response token, row by row."""
        return self.logits[self.mask[:, -self.logits.size(1) :]]


def rollout(model: nn.Module, task, prompts: Sequence[str], samples: int, generator=None) -> Rollout:
    """Sample `samples` responses to each prompt and verify them; greedily if there is no generator.

    A response without an end token is unfinished and earns 0. ValueError for prompts of unequal lengths in tokens.
    """
    check_counts(prompts=len(prompts), samples=samples)
    encoded = [task.encode(prompt) for prompt in prompts]
    check(len(set(map(len, encoded))) == 1, f"prompts must be equally long in tokens, not {[*map(len, encoded)]}")
    start = torch.tensor(encoded)  # (P, T0)
    tokens, mask, logits = sample(model, start, task.block_size - start.size(1), task.end_token, generator, samples)
    responses, rewards = [], []
    rows = zip(tokens[:, start.size(1) :].tolist(), mask.sum(dim=1).tolist(), strict=True)
    for i, (response, length) in enumerate(rows):
        ended = response[length - 1] == task.end_token
        responses.append(task.decode(response[: length - ended]))
        rewards.append(task.verify(prompts[i // samples], responses[-1]) * ended)
    rewards = torch.tensor(rewards, dtype=logits.dtype).view(-1, samples)
    return Rollout(tokens, mask, logits, rewards, tuple(responses))


def _draw_pairs(task, count, generator):
    return task.train_pairs[torch.randint(len(task.train_pairs), (count,), generator=generator)].tolist()


# -------------------------------------------------------------------------------------------------- the starting policy


@dataclass(frozen=True)
class SFTConfig:
    """Settings of supervised fine-tuning, which makes the starting policy. ValueError for unusable values."""

    stages: tuple[Stage, ...]  # Adam's rates, times a factor that rises and then falls
    rows: int = 48  # demonstrations per update
    noise: float = 0.1  # probability that a column of s is demonstrated wrong
    mixture: tuple[float, ...] = (0.4, 0.3, 0.3)  # shares of the demonstrations in task.patterns: d, s, g

    def __post_init__(self):
        _check_stages(self.stages)
        check_counts(rows=self.rows)


def _demonstrations(task, config, generator):
    """A batch of demonstrations of training pairs: tokens (B, T), and the mask (B, T) of their responses."""
    pairs = _draw_pairs(task, config.rows, generator)
    choices = torch.tensor([*map(float, config.mixture)]).multinomial(config.rows, True, generator=generator).tolist()
    rows, masks = [], []
    for pair, choice in zip(pairs, choices, strict=True):
        prompt, pattern = task.prompt(*pair), task.patterns[choice]
        response = task.demonstration(*pair, pattern, noise=config.noise, generator=generator)
        start, row = task.encode(prompt), [*task.encode(prompt + response), task.end_token]
        check(row[: len(start)] == start, f"the tokens of {prompt!r} do not begin those of {prompt + response!r}")
        rows.append(row)
        masks.append([False] * len(start) + [True] * (len(row) - len(start)))
    T = max(map(len, rows))
    tokens = torch.tensor([row + [task.end_token] * (T - len(row)) for row in rows])  # (B, T)
    return tokens, torch.tensor([mask + [False] * (T - len(mask)) for mask in masks])


def supervised_finetune(model: nn.Module, task, config: SFTConfig, generator: torch.Generator) -> Iterator[dict]:
    """Fit the policy to demonstrations: (E3) with every advantage 1. Yields step, stage and loss after each update.

    In update n of N, over all stages, the rates are multiplied by min(n / 20, 1 - (n - 1) / N). ValueError for what
    cannot be trained.
    """
    one_each = len(config.mixture) == len(task.patterns)
    check(one_each, f"mixture={config.mixture} does not give one share for each of {task.patterns}")
    model = _checked(model, task)
    step, steps = 0, sum(stage.steps for stage in config.stages)
    for number, stage in enumerate(config.stages, start=1):
        optimizer, trained = _optimizer(model, stage, lambda groups: OPTIMIZERS["adam"](groups, betas=(0.9, 0.98)))
        rates = [group["lr"] for group in optimizer.param_groups]
        for _ in range(stage.steps):
            step += 1
            for group, rate in zip(optimizer.param_groups, rates, strict=True):
                group["lr"] = rate * min(step / 20, 1 - (step - 1) / steps)
            tokens, mask = _demonstrations(task, config, generator)
            model.zero_grad()
            loss = policy_gradient_loss(sequence_logp(model, tokens), torch.ones(config.rows), mask[:, 1:])
            loss.backward(inputs=trained)
            with naming_the_step(step):
                _require_finite("loss", loss.item())
                _descend(optimizer, trained)
            yield {"step": step, "stage": number, "loss": loss.item()}


def _checked(model, task):
    """The policy, checked on a prompt of the task."""
    return check_policy(model, torch.tensor([task.encode(task.prompt(*task.train_pairs[0].tolist()))]))


@contextlib.contextmanager
def naming_the_step(step: int):
    """Within, a FloatingPointError says at which step it happened."""
    try:
        yield
    except FloatingPointError as error:
        raise FloatingPointError(f"step {step}: {error}") from None


def _require_finite(name, value):
    if not math.isfinite(value):
        raise FloatingPointError(f"the {name} is {value}")


# ------------------------------------------------------------------------------------------- the task, and its verifier


class Addition:
    """Sums of two numbers of `digits` digits (1 to 3). A prompt is `12+34=`; a response takes one of three patterns:

    d  direct:  d, then the answer. It is demonstrated with the carries dropped, so it is right if nothing carries.
    s  scratch: s, then for each column from the right its carry and its digit, then `;` and the answer.
    g  guess:   g, then random digits.

    About a tenth of the operand pairs is held out, (b, a) together with (a, b). The end token is no part of any text.

    **What a task is.** `rollout` and `train_rl` take this class, or any object with

        train_pairs                      (N, 2) int64: the numbers of each training question
        prompt(a, b)                     a question as text. The prompts of one rollout are equally long in tokens
        encode(text), decode(tokens)     from text to a list of tokens, and back. encode may put a begin token first
        end_token                        the token that ends a response
        block_size                       how many tokens the longest prompt, response and end token have together
        verify(prompt, response)         the reward, a number

    To make a start, `supervised_finetune` also needs

        patterns                         a string or a list that names the ways to answer
        demonstration(a, b, pattern, noise=..., generator=...)    a response as text, in that way

    and to evaluate it train_toy.py needs heldout_pairs, questions like train_pairs that are never trained on.

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
        end = {"<end>": self.end_token}
        self.tokenizer = tiktoken.Encoding("sums", pat_str=".", mergeable_ranks=ranks, special_tokens=end)
        self.block_size = 5 * digits + 6  # the prompt, the longest demonstration (s) and the end token
        size = (10**digits, 10**digits)  # and float32, whatever the default dtype: the split must never move
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
            if character not in self.alphabet:  # checked first: `except Exception` misses tiktoken's panic
                raise ValueError(f"character {character!r} is not in the alphabet {self.alphabet}")
        return self.tokenizer.encode_ordinary(text)

    def decode(self, tokens: Sequence[int]) -> str:
        """Tokens -> text. ValueError naming a token that stands for no character (the end token, for one)."""
        for token in tokens:
            if type(token) is not int or not 0 <= token < self.end_token:
                raise ValueError(f"token {token!r} stands for no character")
        return self.tokenizer.decode(tokens)
