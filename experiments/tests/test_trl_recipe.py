"""The recipe for a real model on tiny models and TRL's own trainer, used as the README says. Offline, on a CPU."""

import os
import re
import subprocess
import sys
import warnings
from pathlib import Path
from types import SimpleNamespace

import numpy
import pytest
import torch

os.environ |= {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false", "TRANSFORMERS_VERBOSITY": "error"}
with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # theirs
    pytest.importorskip("trl", reason='needs the extra: pip install -e ".[trl]"')
    from datasets import Dataset
    from torch.distributed.tensor import DTensor
    from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM, TrainerCallback
    from transformers.distributed import DistributedConfig
    from trl import GRPOConfig, GRPOTrainer
    from trl_bridge import PLAIN, character_tokenizer, from_transformers, to_transformers, trl_trainer

    from experiments.trl_microscope import Microscope
    from experiments.trl_recipe import ClassifierFirst, two_rates

from tiny import generator, tiny_gpt

from minicfrl import Addition, RLConfig, Stage, policy_gradient_loss, sequence_logp

pytestmark = pytest.mark.filterwarnings("ignore")
ROOT = Path(__file__).parent.parent.parent
USAGE = re.search(r"```python\n(.*?)```", (ROOT / "README.md").read_text(encoding="utf-8"), re.DOTALL)[1]
ALPHABET = "0123456789+="
END = len(ALPHABET)
STAGES = [(True, False)] * 2 + [(True, True)] * 3  # of five updates, two of them in stage 1: does W move, the body?


@pytest.fixture(autouse=True, scope="module")
def float32():
    """As people train."""
    torch.set_default_dtype(torch.float32)
    yield
    torch.set_default_dtype(torch.float64)


def tiny(kind="gpt2", tied=False, dropout=0.0, seed=0):
    torch.manual_seed(seed)
    common = dict(vocab_size=END + 1, bos_token_id=END, eos_token_id=END, tie_word_embeddings=tied)
    if kind == "gpt2":
        common |= dict.fromkeys(("resid_pdrop", "embd_pdrop", "attn_pdrop"), dropout)
        return GPT2LMHeadModel(GPT2Config(n_layer=2, n_embd=32, n_head=4, n_positions=16, **common))
    sizes = dict(num_hidden_layers=2, hidden_size=32, num_attention_heads=4, intermediate_size=64)
    return LlamaForCausalLM(LlamaConfig(max_position_embeddings=16, **sizes, **common))


def reward(completions, **_):
    """Of many values, so that no group is flat and every update moves something."""
    return [sum(c in "0123456789" for c in text) + 0.01 * len(text) for text in completions]


def trainer_of(model, out, callbacks, optimizers=(None, None), steps=5, **changes):
    """With weight decay, which moves whatever the optimiser touches."""
    sizes = dict(per_device_train_batch_size=16, num_generations=4, max_completion_length=5)
    args = GRPOConfig(str(out), max_steps=steps, learning_rate=1e-2, weight_decay=0.1, **PLAIN | sizes | changes)
    prompts = Dataset.from_list([{"prompt": f"{i % 10}+{i // 10}="} for i in range(100)])
    tokenizer = character_tokenizer(ALPHABET, END)
    return GRPOTrainer(model, reward, args, prompts, None, tokenizer, callbacks=callbacks, optimizers=optimizers)


def halves(model):
    """Copies of the classifier's parameters, and of the body's."""
    classifier = {id(p) for p in model.get_output_embeddings().parameters()}
    parts = {True: [], False: []}
    for p in model.parameters():
        parts[id(p) in classifier].append(p.detach().full_tensor() if isinstance(p, DTensor) else p.detach().clone())
    return parts[True], parts[False]


def same(some, others):
    return all(torch.equal(a, b) for a, b in zip(some, others, strict=True))


class Watch(TrainerCallback):
    """The two halves of the model before training and after every update, the rates, and Adam's count of each
    parameter that it remembers."""

    def __init__(self):
        self.seen, self.rates, self.adam = [], [], []

    def on_train_begin(self, args, state, control, model, **kwargs):
        self.seen.append(halves(model))

    def on_pre_optimizer_step(self, args, state, control, optimizer, **kwargs):
        self.rates.append([group["lr"] for group in optimizer.param_groups])

    def on_step_end(self, args, state, control, model, optimizer, **kwargs):
        self.seen.append(halves(model))
        self.adam.append([int(each["step"]) for each in optimizer.state.values()])

    def moved(self):
        updates = zip(self.seen[:-1], self.seen[1:], strict=True)
        return [tuple(not same(*halves) for halves in zip(old, new, strict=True)) for old, new in updates]


def trained(model, out, classifier_steps=2, freeze=True, resume=None, callbacks=(), rates=None, **changes):
    watch, optimizers = Watch(), rates(model) if rates else (None, None)
    callbacks = [ClassifierFirst(classifier_steps, freeze), watch, *callbacks]
    trainer_of(model, out, callbacks, optimizers, **changes).train(resume_from_checkpoint=resume)
    return watch


def rated(lr=1e-3, classifier_lr=2e-2, steps=2):
    return lambda model: two_rates(model, steps, lr, classifier_lr)


CHANGES = {"plain": {}, "clipped": dict(max_grad_norm=1.0, gradient_checkpointing=True)}
CHANGES["accumulated"] = dict(gradient_accumulation_steps=2)


@pytest.mark.parametrize("kind", ["gpt2", "llama"])
@pytest.mark.parametrize("how", CHANGES)
def test_the_body_rests_bit_for_bit_in_stage_1_and_all_moves_afterwards(kind, how, tmp_path):
    assert trained(tiny(kind), tmp_path, **CHANGES[how]).moved() == STAGES


def test_stage_2_starts_with_a_fresh_optimiser(tmp_path):
    """Adam counts its steps per parameter: after five updates, two of them in stage 1, every count is three."""
    model = tiny()
    assert trained(model, tmp_path).adam[-1] == [3] * len(list(model.parameters()))


def test_the_control_is_matched_and_freezes_nothing(tmp_path):
    """Also where TRL clips by the norm of all gradients: the first update moves W by the same bits in both arms."""
    arms = [trained(tiny(), tmp_path, freeze=freeze, **CHANGES["clipped"]) for freeze in (True, False)]
    assert arms[1].moved() == [(True, True)] * 5
    assert same(*(watch.seen[1][0] for watch in arms)) and not same(*(watch.seen[1][1] for watch in arms))


@pytest.mark.parametrize("lr, classifier_lr", [(1e-3, 2e-2), (0.0, 2e-2), (1e-3, 0.0)])
def test_the_classifier_has_a_rate_of_its_own_in_stage_1_and_either_may_be_0(lr, classifier_lr, tmp_path):
    """Group 0 is the classifier's. What has a rate of 0 rests, because there is no weight decay."""
    watch = trained(tiny(), tmp_path, freeze=False, rates=rated(lr, classifier_lr))
    assert watch.rates == [[classifier_lr, lr]] * 2 + [[lr, lr]] * 3
    assert watch.moved() == [(rates[0] > 0, rates[1] > 0) for rates in watch.rates]


# ---------------------------------------------------------------------------------------------- resumed, or cut short


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """The folder of a run that kept all its checkpoints, and what was seen of it. Its numbers are numpy's, which a
    checkpoint cannot hold."""
    out = tmp_path_factory.mktemp("whole")
    rates, steps = rated(*numpy.array([1e-3, 2e-2]), numpy.int64(2)), numpy.int64(2)
    return out, trained(tiny(), out, steps, rates=rates, save_strategy="steps", save_steps=1)


class Cut(TrainerCallback):
    """Ends the run within an update, gradients in hand; nothing is tidied up."""

    def __init__(self, step):
        self.step = step

    def on_pre_optimizer_step(self, args, state, control, **kwargs):
        if state.global_step == self.step:
            raise InterruptedError


@pytest.mark.parametrize("step", [1, 2, 4])
def test_a_run_cut_short_in_either_stage_and_resumed_ends_with_the_same_bits(step, whole, tmp_path):
    """With another model and trainer, from its last checkpoint. What was cut left no parameter frozen."""
    model, how = tiny(), dict(rates=rated(), save_strategy="steps", save_steps=1)
    with pytest.raises(InterruptedError):
        trained(model, tmp_path, callbacks=[Cut(step)], **how)
    assert all(p.requires_grad for p in model.parameters())
    resumed = trained(tiny(seed=1), tmp_path, resume=True, **how)
    assert resumed.moved() == STAGES[step:]
    assert all(same(*pair) for pair in zip(resumed.seen[-1], whole[1].seen[-1], strict=True))


# ------------------------------------------------------------------------------------------------------------- refusals


def frozen():
    model = tiny()
    model.transformer.requires_grad_(False)
    return model


def headless():
    model = tiny()
    model.get_output_embeddings = lambda: None
    return model


def tied_by_storage():
    """lm_head's numbers are those of another parameter, though it is no longer the same object."""
    model = tiny()
    model.lm_head.weight = torch.nn.Parameter(model.transformer.wpe.weight.data[: END + 1])
    return model


def adagrad(model):
    optimizer = torch.optim.Adagrad(model.parameters())
    return optimizer, torch.optim.lr_scheduler.ConstantLR(optimizer)


REFUSED = {
    "tied": (lambda: tiny(tied=True), {}, "the classifier is tied to transformer.wte, which would move"),
    "one storage": (tied_by_storage, {}, "the classifier is tied to transformer.wpe, which"),
    "no classifier": (headless, {}, "GPT2LMHeadModel has no output embedding"),
    "frozen": (frozen, {}, "a parameter is frozen or unknown to the optimiser"),
    "frozen, two rates": (frozen, dict(rates=rated()), "a parameter is frozen or unknown to the optimiser"),
    "too long": (tiny, dict(classifier_steps=6), "classifier_steps=6 is more than max_steps=5"),
    "no whole number": (tiny, dict(classifier_steps=2.5), "must be a whole number of at least 0, not 2.5"),
    "negative": (tiny, dict(rates=rated(steps=-1)), "must be a whole number of at least 0, not -1"),
    "Adagrad": (tiny, dict(rates=adagrad), r"because it makes one at once \(Adagrad\)"),
    "other lr": (tiny, dict(resume=1, rates=rated(lr=1e-4)), "'lr': 0.001, .* with .*'lr': 0.0001"),
    "other steps": (tiny, dict(resume=3, rates=rated(), classifier_steps=4), "steps': 2.* with .*steps': 4"),
    "other arm": (tiny, dict(resume=3, rates=rated(), freeze=False), "'freeze': True.* with .*'freeze': False"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_work_is_refused_before_any_update(case, whole, tmp_path):
    make, how, message = REFUSED[case]
    how = how | {"resume": str(whole[0] / f"checkpoint-{how['resume']}")} if "resume" in how else how
    watch, model = Watch(), make()
    with pytest.raises(ValueError, match=message):
        trained(model, tmp_path, callbacks=[watch], **how)
    assert not watch.adam


def test_sharding_by_the_trainer_is_refused():
    """As the trainer would tell the callback: no shards are needed to see the sentence."""
    callback, model, args = ClassifierFirst(2), tiny(), SimpleNamespace(fsdp="full_shard", deepspeed=None)
    state = SimpleNamespace(max_steps=5, stateful_callbacks={"ClassifierFirst": callback.state()})
    with pytest.raises(ValueError, match="no fsdp, no deepspeed: shard by from_pretrained"):
        callback.on_train_begin(args, state, None, model, torch.optim.AdamW(model.parameters()))


def test_the_readme_s_block_runs_as_it_stands_and_a_second_train_is_refused(tmp_path, monkeypatch):
    """In a folder of its own. Its model is tied until the block's own line unties it."""
    monkeypatch.chdir(tmp_path)
    names = {}
    exec(USAGE, names)
    assert names["trainer"].state.global_step == 5 and names["first"].classifier_steps == 2
    with pytest.raises(ValueError, match=r"the optimiser has a state before the first update, from a train\(\) before"):
        names["trainer"].train()
    with pytest.raises(ValueError, match="the classifier is tied to model.embed_tokens"):
        exec(USAGE.replace("model.lm_head.weight =", "unused ="), {})


# -------------------------------------------------------------------------------------------------------- two processes


@pytest.fixture(scope="module")
def two_processes(tmp_path_factory):
    """What each rank of two saw, by torchrun on gloo, with DDP and with FSDP2: this file as a script."""
    seen = {}
    for how in ("ddp", "fsdp2"):
        out = tmp_path_factory.mktemp(how)
        tiny().save_pretrained(out / "model")
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", __file__]
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'tests'}"}
        done = subprocess.run([*command, how, str(out)], env=environment, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr[-2000:]
        seen[how] = [torch.load(out / f"rank-{rank}.pt") for rank in "01"]
    return seen


def run_as_one_of_two_processes(how, out):
    model, watch = tiny(), Watch()
    if how == "fsdp2":
        torch.distributed.init_process_group("gloo")
        plan = DistributedConfig(fsdp_size=2)
        model = GPT2LMHeadModel.from_pretrained(out / "model", distributed_config=plan)
    sharded = all(isinstance(p, DTensor) for p in model.parameters())
    callbacks = [ClassifierFirst(2), watch]
    trainer = trainer_of(model, out / "run", callbacks, per_device_train_batch_size=8, ddp_backend="gloo")
    tokens = torch.arange(8).expand(2, 8) + torch.tensor([[0], [3]])
    trainer.add_callback(Microscope(trainer, tokens, tokens > 3))
    trainer.train()
    history = [row for row in trainer.state.log_history if "microscope/entropy" in row]
    seen = [sum(parts, []) for parts in watch.seen]
    found = dict(seen=seen, history=history, moved=watch.moved(), adam=[*map(len, watch.adam)], sharded=sharded)
    torch.save(found, out / f"rank-{os.environ['RANK']}.pt")


@pytest.mark.parametrize("how", ["ddp", "fsdp2"])
def test_two_processes_agree_and_keep_the_stages(how, two_processes):
    """All weights after every update have the same bits on both ranks, and the body no state in the optimiser before
    stage 2. What the microscope logs says so too, and is the same but for rounding however they share the work."""
    first, second = two_processes[how]
    assert all(same(*pair) for pair in zip(first["seen"], second["seen"], strict=True))
    assert first["history"] == second["history"] and first["sharded"] == (how == "fsdp2")
    assert first["moved"] == STAGES and first["adam"] == [1, 1, 29, 29, 29]
    through_body = [row["microscope/entropy_by_body"] for row in first["history"]]
    assert through_body[:2] == [0, 0] and all(through_body[2:]) and len(through_body) == 5
    for row, plain in zip(first["history"], two_processes["ddp"][0]["history"], strict=True):
        for name in ("entropy", "entropy_change", "entropy_by_W", "entropy_by_body"):
            assert row[f"microscope/{name}"] == pytest.approx(plain[f"microscope/{name}"], abs=1e-4), name


# ----------------------------------------------------------------------------------------------------------- the bridge


class WordyAddition(Addition):
    """Rewards digits, so that even an untrained policy has something to learn."""

    def verify(self, prompt, response):
        return 0.1 * sum(character.isdigit() for character in response)


def test_trl_s_gradient_is_that_of_the_toy_s_loss(tmp_path):
    """(E3) on the responses that TRL sampled, with its advantages (E2): by the sample's std, plus 1e-4. To 1e-4 of the
    largest gradient: float32, and another order of additions. The bridge to TRL's policy also leads back."""
    task, rl, seen, theirs = WordyAddition(1), RLConfig((Stage(1),), prompts=4, samples=4), {}, {}
    gpt = tiny_gpt(0, task.vocab_size, task.block_size)
    hf, other = to_transformers(gpt), tiny_gpt(1, task.vocab_size, task.block_size)
    assert same(gpt.parameters(), from_transformers(hf, other).parameters())

    class Gradients(TrainerCallback):
        def on_pre_optimizer_step(self, args, state, control, model, **kwargs):
            theirs.update({name: p.grad.clone() for name, p in model.named_parameters()})

    trainer = trl_trainer(hf, task, rl, generator(0), tmp_path, [Gradients()])
    loss = trainer.compute_loss
    trainer.compute_loss = lambda model, inputs, **how: seen.update(inputs) or loss(model, inputs, **how)
    trainer.train()
    _, group = seen["prompt_ids"].unique(dim=0, return_inverse=True)  # TRL shuffles what it sampled
    for advantages in (seen["advantages"][group == i] for i in range(rl.prompts)):
        assert advantages.mean().item() == pytest.approx(0, abs=1e-5)
        assert advantages.std().item() == pytest.approx(float(advantages.any()), abs=5e-3)
    tokens = torch.cat((seen["prompt_ids"], seen["completion_ids"]), dim=1)
    mask = torch.cat((0 * seen["prompt_ids"], seen["completion_mask"]), dim=1).bool()
    policy_gradient_loss(sequence_logp(gpt, tokens), seen["advantages"], mask[:, 1:]).backward()
    for ours, name in (
        (gpt.classifier.weight, "lm_head.weight"),
        (gpt.body.token_embedding.weight, "transformer.wte.weight"),
        (gpt.body.blocks[0].mlp[0].bias, "transformer.h.0.mlp.c_fc.bias"),
    ):
        largest = ours.grad.abs().max().item()
        assert largest > 0
        torch.testing.assert_close(theirs[name], ours.grad, rtol=0, atol=1e-4 * largest)


if __name__ == "__main__":
    run_as_one_of_two_processes(sys.argv[1], Path(sys.argv[2]))
