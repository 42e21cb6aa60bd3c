"""Stand-in with the three functions that the laboratory takes from the book's run; the run itself comes with it."""

import zlib

import torch
from tqdm import tqdm

from minicfrl import supervised_finetune
from model import GPT, GPTConfig


def stream(seed, purpose):
    """A stream of random numbers of its own for each seed and purpose."""
    return torch.Generator(torch.get_default_device()).manual_seed(zlib.crc32(f"{purpose} {seed}".encode()))


def make_start(task, seed, sft, **sizes):
    """The policy that every arm starts from: a GPT that has imitated demonstrations."""
    model = GPT(GPTConfig(task.vocab_size, task.block_size, **sizes), stream(seed, "init"))
    steps = sum(stage.steps for stage in sft.stages)
    updates = supervised_finetune(model, task, sft, stream(seed, "sft"))
    for _ in tqdm(updates, desc="sft", total=steps, leave=False, disable=None):
        pass
    return model


@torch.no_grad()
def look(model, probe):
    """The features (N, d) of the probe's states, and the classifier (V, d), as they are now."""
    return model.features(probe.tokens)[probe.state_mask], model.classifier.weight.detach().clone()
