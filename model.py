"""The policy: a small GPT, cut where classifier-first RL cuts it.

    logits = W phi(x; theta)                                                                   (E1)

The **body** (theta) turns a prefix x into the features phi, the last hidden state after the final LayerNorm. The
**classifier** W, also called the unembedding, turns features into next-token logits. Paper: Tomihari, "Learning
Dynamics in RL Post-Training for Language Models", arXiv 2601.04670.

In GPT-2, W and the token embedding are one matrix: they are tied. Here they are two, because a tied W is also a part of
the body, and training it alone would move the features. (To untie a model:
`head.weight = nn.Parameter(head.weight.detach().clone())`.) Everything else is GPT-2 but for the exact GELU: learned
positions, pre-norm blocks, a 4x MLP. We leave out dropout, mixed precision, and fused attention: on a CPU it has no
forward-mode derivative, which ntk.py needs.

Shapes: P prompts, B rows, T tokens, V vocabulary, d features, h heads.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn


def check(right: object, fault: str):
    """Raise a ValueError that says what is wrong, unless it is right."""
    if not right:
        raise ValueError(fault)


def check_counts(**counts):
    """Raise ValueError, naming the culprit, unless every argument is a whole number of at least 1."""
    for name, value in counts.items():
        whole = isinstance(value, int) and not isinstance(value, bool)
        check(whole and value >= 1, f"{name} must be a whole number of at least 1, not {value!r}")


@dataclass(frozen=True)
class GPTConfig:
    """Sizes of the policy, in tokens (vocab_size, block_size), blocks, heads and features. ValueError if unusable."""

    vocab_size: int
    block_size: int
    n_layer: int = 2
    n_head: int = 4
    n_embd: int = 64

    def __post_init__(self):
        check_counts(**vars(self))
        check(self.n_embd % self.n_head == 0, f"n_embd={self.n_embd} is not divisible by n_head={self.n_head}")


class Attention(nn.Module):
    """Causal multi-head self-attention, by hand: softmax(Q K^T / sqrt(d/h)) V per head."""

    def __init__(self, config):
        super().__init__()
        self.n_head = config.n_head
        self.qkv = nn.Linear(config.n_embd, 3 * config.n_embd)
        self.proj = nn.Linear(config.n_embd, config.n_embd)

    def forward(self, x, cache=None):
        B, T, d = x.shape
        qkv = self.qkv(x).view(B, T, 3, self.n_head, d // self.n_head)
        q, k, v = qkv.permute(2, 0, 3, 1, 4)  # each (B, h, T, d/h)
        if cache is not None:  # while sampling we append these keys and values to those of the earlier positions
            if cache:
                k, v = torch.cat((cache[0], k), dim=2), torch.cat((cache[1], v), dim=2)
            cache[:] = k, v
        so_far = k.size(2)  # positions that can be attended to: T, and those in the cache
        scores = q @ k.transpose(2, 3) / math.sqrt(d // self.n_head)  # (B, h, T, so_far)
        if T > 1:  # the last position has no future
            future = torch.ones(T, so_far, dtype=torch.bool, device=x.device).triu(so_far - T + 1)
            scores = scores.masked_fill(future, -math.inf)  # after the softmax the future weighs exactly 0
        return self.proj((scores.softmax(dim=-1) @ v).transpose(1, 2).reshape(B, T, d))


class Block(nn.Module):
    """One pre-norm transformer block: x + attention, then x + MLP."""

    def __init__(self, config):
        super().__init__()
        d = config.n_embd
        self.attention_norm, self.attention = nn.LayerNorm(d), Attention(config)
        self.mlp_norm, self.mlp = nn.LayerNorm(d), nn.Sequential(nn.Linear(d, 4 * d), nn.GELU(), nn.Linear(4 * d, d))

    def forward(self, x, cache=None):
        x = x + self.attention(self.attention_norm(x), cache)
        return x + self.mlp(self.mlp_norm(x))


class Body(nn.Module):
    """The feature extractor: tokens (B, T) -> phi (B, T, d). Its parameters are the theta of (E1)."""

    def __init__(self, config):
        super().__init__()
        self.token_embedding = nn.Embedding(config.vocab_size, config.n_embd)
        self.position_embedding = nn.Embedding(config.block_size, config.n_embd)
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.n_layer))
        self.norm = nn.LayerNorm(config.n_embd)

    def forward(self, tokens, cache=None):
        """With a cache, `tokens` continues those of earlier calls. A cache has one list per block, empty at first."""
        start = cache[0][0].size(2) if cache and cache[0] else 0
        end, block_size = start + tokens.size(1), self.position_embedding.num_embeddings
        check(end <= block_size, f"{end} tokens are more than block_size={block_size}")
        positions = torch.arange(start, end, device=tokens.device)  # (T,)
        x = self.token_embedding(tokens) + self.position_embedding(positions)  # (B, T, d)
        for block, block_cache in zip(self.blocks, cache or [None] * len(self.blocks), strict=True):
            x = block(x, block_cache)
        return self.norm(x)


class GPT(nn.Module):
    """A GPT as body and classifier; `model(tokens)` is (B, T) -> logits (B, T, V) in nats  (E1).

    `generator` draws the initial weights; without one torch's global generator does.

    **What a policy is.** `sample`, `train_rl`, `supervised_finetune` and ntk.py take this class, or any nn.Module with

        config.vocab_size           V: tokens are 0 to V-1
        features(tokens)            (B, T) -> phi (B, T, d), causal
        classifier                  a plain nn.Linear(d, V, bias=False) that shares its weight with nothing in the body
        model(tokens)               classifier(features(tokens)) exactly (E1), at all positions or the last ones alone
        body                        the nn.Module that holds all other parameters; body(tokens) is features(tokens)
        body(tokens, cache)         phi of tokens that continue those of earlier calls. `cache` is one list for each of
                                    `body.blocks`, empty at first. The body stores tensors in it whose first dimension
                                    is the row, and `sample` repeats the rows

    `check_policy` refuses a model that it sees break these rules. It also removes torch.compile's wrapper.
    """

    def __init__(self, config: GPTConfig, generator: torch.Generator | None = None):
        super().__init__()
        self.config = config
        self.body = Body(config)
        self.classifier = nn.Linear(config.n_embd, config.vocab_size, bias=False)
        for name, parameter in self.named_parameters():
            if name.endswith("bias"):
                nn.init.zeros_(parameter)
            elif parameter.ndim == 2:  # GPT-2 draws from N(0, 0.02): this narrow body learns faster from 0.1
                into_residual = name.endswith(("attention.proj.weight", "mlp.2.weight"))  # 2 n_layer of them add up
                nn.init.normal_(parameter, 0, 0.1 / math.sqrt(2 * config.n_layer if into_residual else 1), generator)

    def features(self, tokens: Tensor) -> Tensor:
        """tokens (B, T) -> phi (B, T, d), after the final LayerNorm. ValueError if T exceeds the block."""
        return self.body(tokens)

    def forward(self, tokens: Tensor) -> Tensor:
        return self.classifier(self.features(tokens))  # (E1)


def entropy(logits: Tensor) -> Tensor:
    """Exact entropy of softmax(logits), in nats: (..., V) -> (...)."""
    return torch.special.entr(logits.softmax(dim=-1)).sum(dim=-1)


def confidence(logits: Tensor) -> Tensor:
    """The top-1 probability, that of the likeliest token: (..., V) -> (...)."""
    return logits.softmax(dim=-1).amax(dim=-1)


def token_logp(logits: Tensor, actions: Tensor) -> Tensor:
    """log pi(action) in nats: logits (..., V), actions (...) -> (...)."""
    return logits.log_softmax(dim=-1).gather(-1, actions.unsqueeze(-1)).squeeze(-1)


def residuals(logits: Tensor, actions: Tensor) -> Tensor:
    """e_y - pi, the gradient of log pi(y) in the logits: logits (N, V), actions (N,) -> (N, V)."""
    r = -logits.softmax(dim=-1)
    r[torch.arange(len(r)), actions] += 1
    return r


def check_policy(model: nn.Module, tokens: Tensor) -> nn.Module:
    """The policy, without torch.compile's wrapper. ValueError, with the reason, if it breaks a rule of GPT's docstring.
    We try it on the first row of `tokens` (B, T)."""
    model = getattr(model, "_orig_mod", model)
    head = model.classifier
    plain = type(head) is nn.Linear and head.bias is None and isinstance(head.weight, nn.Parameter)  # no weight_norm
    check(plain, f"the classifier must be nn.Linear with bias=False, else logits are not W phi (E1): {head}")
    for name, parameter in model.body.named_parameters():
        apart = parameter.untyped_storage().data_ptr() != head.weight.untyped_storage().data_ptr()
        check(apart, f"the classifier is tied to body.{name}, so W is a part of the body too: untie them")
    check_tokens(model, tokens)
    with torch.no_grad():
        logits, phi = model(tokens[:1]), model.features(tokens[:1])
        W_phi = nn.functional.linear(phi[:, -logits.size(1) :], head.weight)
    rounding = 100 * torch.finfo(phi.dtype).eps * W_phi.abs().max()  # because not every device adds in one order
    odd = (logits - W_phi).abs().max() > rounding
    check(not odd, "logits are not W phi (E1): either something is done to them, or dropout is on: call model.eval()")
    return model


def check_tokens(model: nn.Module, tokens: Tensor):
    """Raise ValueError unless `tokens` is a (B, T) batch of whole numbers inside the model's vocabulary."""
    right = tokens.ndim == 2 and tokens.dtype == torch.long
    check(right, f"tokens must be (B, T) int64, not {tuple(tokens.shape)} {tokens.dtype}")
    for token in tokens[(tokens < 0) | (tokens >= model.config.vocab_size)].tolist():
        raise ValueError(f"token {token} is outside the vocabulary of {model.config.vocab_size}")


@torch.no_grad()
def sample(
    model: nn.Module, prompts: Tensor, max_new_tokens: int, end_token: int, generator=None, samples: int = 1
) -> tuple[Tensor, Tensor, Tensor]:
    """Continue every row of `prompts` (P, T0), `samples` times each, until its end token, by at most `max_new_tokens`.

    We draw from softmax(logits) as it is, at temperature 1 and without truncation, because the policy that samples must
    be the policy that is differentiated. Without a generator the most likely token is taken instead.

    There are B = P * samples rows, in the prompts' order. Returns tokens (B, T), in which shorter rows are padded with
    the end token; mask (B, T), true on response tokens, the end token included and nothing after it; and the logits
    (B, T-T0, V) that tokens[:, T0:] were drawn from. ValueError for bad arguments, FloatingPointError for logits that
    are not finite.
    """
    check_tokens(model, prompts)
    check_counts(prompt_tokens=prompts.size(1), max_new_tokens=max_new_tokens, samples=samples)
    check(0 <= end_token < model.config.vocab_size, f"end token {end_token} is outside the vocabulary")
    cache = [[] for _ in model.body.blocks]
    first = model.classifier(model.body(prompts, cache)[:, -1:])  # (P, 1, V): each prompt is read once
    logits = [first.repeat_interleave(samples, dim=0)]  # each (B, 1, V)
    for keys_and_values in cache:
        keys_and_values[:] = (x.repeat_interleave(samples, dim=0) for x in keys_and_values)
    tokens = prompts.repeat_interleave(samples, dim=0)  # (B, T0), and one longer with every token drawn
    mask = torch.zeros_like(tokens, dtype=torch.bool)
    ended = torch.zeros_like(tokens[:, 0], dtype=torch.bool)  # (B,)
    while True:
        last = logits[-1][:, 0]  # (B, V)
        if not last.isfinite().all():
            raise FloatingPointError("the policy's logits are not finite")
        token = last.argmax(1, True) if generator is None else last.softmax(1).multinomial(1, generator=generator)
        token[ended] = end_token
        tokens = torch.cat((tokens, token), dim=1)
        mask = torch.cat((mask, ~ended[:, None]), dim=1)  # the end token is a part of the response
        ended = ended | (token[:, 0] == end_token)
        if ended.all() or tokens.size(1) == prompts.size(1) + max_new_tokens:
            return tokens, mask, torch.cat(logits, dim=1)
        logits.append(model.classifier(model.body(token, cache)))  # the cache knows the earlier positions
