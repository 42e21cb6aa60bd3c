"""What a job of the toy does: the start that all arms of a seed share, or one arm's training from it."""

import functools
import io

import torch

from experiments import knobs
from experiments.arms import START, check_parts, train_as
from experiments.measures import follow, make_probe, measure
from experiments.runs import once
from minicfrl import Addition, RLConfig, Stage, supervised_finetune, train_rl
from model import GPT, GPTConfig
from train_toy import make_start, stream

QUICK = dict(digits=1, sft_steps=100, seeds=range(1), prompts=16, last_prompts=16)


def check_start(x):
    """ValueError if an arm trains a part that the policy does not have."""
    task = Addition(x.digits)
    with torch.device("meta"):
        model = GPT(GPTConfig(task.vocab_size, task.block_size, **x.policy))
    check_parts(x, [name for name, _ in model.named_parameters()])


def policy(x, content):
    """The task, and the policy that a file of an experiment holds."""
    task = Addition(x.digits)
    model = GPT(GPTConfig(task.vocab_size, task.block_size, **x.policy))
    model.load_state_dict(torch.load(io.BytesIO(content), weights_only=True))
    return task, model


def new_start(x, seed):
    """A policy that has imitated demonstrations, then had x.before updates of RL, as bytes."""
    task, ((_, sft), *more) = Addition(x.digits), x.finetuning()
    model = make_start(task, seed, sft, **x.policy)
    for name, config in more:
        list(supervised_finetune(model, task, config, stream(seed, name)))
    if x.before:
        list(train_rl(model, task, RLConfig((Stage(x.before, lr=x.lr),), **x.rl), stream(seed, "before")))
    weights = io.BytesIO()
    torch.save(model.state_dict(), weights)
    return weights.getvalue()


def rows_of(x, out, seed, arm):
    """The rows of a job. Every arm of a seed starts from the same policy, which the first that needs it makes, and with
    the same random numbers."""
    task, model = policy(x, once(out / f"sft-seed{seed}.pt", lambda: new_start(x, seed)))
    if arm.knob:
        knobs.turn(model, task, arm.knob, stream(seed, "knob"))
    probe = make_probe(model, task, seed, min(32, x.prompts))
    look = functools.partial(measure, x, seed, task, model, probe)
    if arm == START:
        yield {"step": 0} | look(0)
        return
    yield from follow(x, model, probe, train_as(arm, x, seed, task, model), look)
