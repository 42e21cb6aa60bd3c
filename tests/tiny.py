"""What several test files share: tiny policies, a step, an order, a task so small that every response can be listed."""

import copy
import itertools
import zlib

import torch
from hypothesis import strategies as st

from minicfrl import policy_gradient_loss, sequence_logp
from model import GPT, GPTConfig

ROUNDING = 1e-12  # a few additions and products of numbers of order 1 in float64
seeds = st.integers(0, 2**32 - 1)


def generator(seed):
    return torch.Generator().manual_seed(seed)


def tiny_gpt(seed, vocab_size=5, block_size=6, n_layer=2, n_head=2, n_embd=8):
    """A random policy with weights large enough that no probability is near uniform."""
    draws = generator(seed)  # one for all parameters: else the embedding and W would be nearly the same
    model = GPT(GPTConfig(vocab_size, block_size, n_layer, n_head, n_embd), draws)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.3 * torch.randn(parameter.shape, generator=draws)
    return model


def states(model, rows, length, seed):
    """Random tokens (rows, length), and a mask of about half their positions, at least one, several in a row."""
    draw = generator(seed)
    tokens = torch.randint(model.config.vocab_size, (rows, length), generator=draw)
    mask = torch.rand(rows, length, generator=draw) < 0.5
    mask[-1, -1] = True
    return tokens, mask


def random_batch(seed, rows=4, prompt=2, length=4, model=None):
    """A policy, and rows of tokens with response masks of different lengths and random advantages."""
    model = model or tiny_gpt(seed)
    draw = generator(seed)
    T = prompt + length
    tokens = torch.randint(model.config.vocab_size, (rows, T), generator=draw)
    lengths = torch.randint(1, length + 1, (rows, 1), generator=draw)
    position = torch.arange(T)
    mask = (position >= prompt) & (position < prompt + lengths)
    return model, tokens, mask, torch.randn(rows, generator=draw)


def gradients(model, scalar):
    """One vector: d scalar / d all parameters, zeros where it does not depend on one."""
    parameters = list(model.parameters())
    parts = torch.autograd.grad(scalar, parameters, retain_graph=True, allow_unused=True, materialize_grads=True)
    return torch.cat([part.flatten() for part in parts])


def loss_of(model, tokens, mask, advantages, count=None):
    """(E3) of a batch: tokens and mask (B, T), advantages (B,)."""
    return policy_gradient_loss(sequence_logp(model, tokens), advantages, mask[:, 1:], count)


def sgd_step(model, part, batch, eta):
    """A copy of the model after one ordinary step on the parameters whose names begin so."""
    model = copy.deepcopy(model)
    optimizer = torch.optim.SGD([p for name, p in model.named_parameters() if name.startswith(part)], lr=eta)
    loss_of(model, *batch).backward()
    optimizer.step()
    return model


def assert_second_order(error, rounding=1e-11):
    """Half the step, a quarter of the error. A first-order mistake would leave half, and 4 is exact but for the third
    order, to which 0.3 is allowed. Nothing is said of an error that is rounding."""
    whole, half = error(1.0), error(0.5)
    assert whole <= rounding or abs(whole / half - 4) < 0.3, (whole, half)


class TinyTask:
    """Prompts `0` and `1`; responses of up to two of the letters a, b and an end token. `rewards`: text -> reward."""

    patterns, alphabet, end_token, vocab_size, block_size, digits = "ab", "01ab", 4, 5, 3, 1

    def __init__(self, rewards=None):
        self.rewards = rewards or {}
        self.train_pairs = torch.tensor([[0, 0], [1, 0]])
        self.heldout_pairs = self.train_pairs

    def prompt(self, a, b):
        return str(a)

    def encode(self, text):
        return [self.alphabet.index(character) for character in text]

    def decode(self, tokens):
        return "".join(self.alphabet[token] for token in tokens)

    def verify(self, prompt, response):
        return float(self.rewards.get(response, 0.0))

    def answer(self, response):
        return response


class Letters:
    """Four questions, demonstrated by repeating their letter once or twice: another alphabet than the book's, the end
    token first. Prompts can be of unequal lengths, and texts can have a begin token. What a response earns depends on
    its prompt, and is often 0."""

    alphabet, end_token, vocab_size, block_size = "wxyz?", 0, 7, 8
    begin_token = 6

    def __init__(self, patterns="12", begins=False, lengths=(1, 1, 1, 1)):
        self.patterns, self.begins, self.lengths = patterns, begins, lengths
        self.train_pairs = self.heldout_pairs = torch.tensor([[0, 0], [1, 0], [2, 0], [3, 0]])

    def prompt(self, a, b):
        return self.alphabet[a] * self.lengths[a] + "?"

    def encode(self, text):
        return [self.begin_token] * self.begins + [1 + self.alphabet.index(letter) for letter in text]

    def decode(self, tokens):
        return "".join("_" if token == self.begin_token else self.alphabet[token - 1] for token in tokens)

    def verify(self, prompt, response):
        return zlib.crc32(f"{prompt} {response}".encode()) % 7 / 7

    def demonstration(self, a, b, pattern, noise=0.0, generator=None):
        return self.alphabet[a] * (1 + self.patterns.index(pattern) % 2)


def every_response(prompt=0, vocab_size=3, end_token=2, length=2):
    """All responses of up to `length` tokens that stop at the end token: tokens and mask, (K, 1 + length)."""
    rows, masks = [], []
    for response in itertools.product(range(vocab_size), repeat=length):
        stop = response.index(end_token) + 1 if end_token in response else length
        if all(token == end_token for token in response[stop:]):  # one padding per response
            rows.append((prompt, *response))
            masks.append([False] + [t < stop for t in range(length)])
    return torch.tensor(rows), torch.tensor(masks)
