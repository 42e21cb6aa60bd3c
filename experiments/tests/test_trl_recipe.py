"""The recipe for a real model on tiny models and TRL's own trainer, used as the README says. Offline, on a CPU."""

import os
import re
import shutil
import subprocess
import sys
import warnings
from pathlib import Path

import numpy
import pytest
import torch

from minicfrl import policy_gradient_loss
from model import token_logp

os.environ |= {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false", "TRANSFORMERS_VERBOSITY": "error"}
with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # theirs
    pytest.importorskip("trl", reason='needs the extra: pip install -e ".[trl]"')
    from datasets import Dataset
    from torch.distributed.tensor import DTensor
    from transformers import AutoConfig, AutoModelForCausalLM, TrainerCallback
    from transformers.distributed import DistributedConfig
    from trl import GRPOConfig, GRPOTrainer

    from experiments.trl_recipe import ClassifierFirst, character_tokenizer, classifier_of, two_rates

pytestmark = pytest.mark.filterwarnings("ignore")
ROOT = Path(__file__).parent.parent.parent
USAGE = re.search(r"```python\n(.*?)```", (ROOT / "README.md").read_text(encoding="utf-8"), re.DOTALL)[1]
ALPHABET, END = "0123456789+=", 12
STAGES = [(True, False)] * 2 + [(True, True)] * 3  # of five updates, two of them in stage 1: does W move, the body?
SAVED = dict(save_strategy="steps", save_steps=1)
# One process on a CPU, nothing but training: no files, no logs, no truncated sampling; and weight decay, which moves
# whatever the optimiser touches.
PLAIN = dict(use_cpu=True, bf16=False, gradient_checkpointing=False, report_to="none", disable_tqdm=True, beta=0.0)
PLAIN |= dict(top_k=0, lr_scheduler_type="constant", save_strategy="no", logging_strategy="no", max_grad_norm=0.0)
PLAIN |= dict(per_device_train_batch_size=16, num_generations=4, max_completion_length=5, max_steps=5)
PLAIN |= dict(learning_rate=1e-2, weight_decay=0.1)


@pytest.fixture(autouse=True, scope="module")
def float32():
    """As people train."""
    torch.set_default_dtype(torch.float32)
    yield
    torch.set_default_dtype(torch.float64)


def tiny(kind="gpt2", tied=False, dropout=0.0, seed=0):
    torch.manual_seed(seed)
    sizes = dict(vocab_size=END + 1, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=64)
    sizes |= dict(max_position_embeddings=16, bos_token_id=END, eos_token_id=END, tie_word_embeddings=tied)
    dropouts = dict.fromkeys(("resid_pdrop", "embd_pdrop", "attn_pdrop"), dropout)  # of GPT-2
    return AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **sizes, **dropouts))


def trainer_of(model, out, callbacks, optimizers=(None, None), **changes):
    """On rewards that leave no group flat."""
    config, tokenizer = GRPOConfig(str(out), **PLAIN | changes), character_tokenizer(ALPHABET, END)
    data = Dataset.from_list([{"prompt": f"{i % 10}+{i // 10}="} for i in range(100)])
    reward = lambda completions, **_: [sum(map(str.isdigit, text)) + len(text) / 100 for text in completions]  # noqa: E731
    return GRPOTrainer(model, reward, config, data, None, tokenizer, callbacks=callbacks, optimizers=optimizers)


def same(some, others):
    return all(torch.equal(a, b) for a, b in zip(some, others, strict=True))


class Watch(TrainerCallback):
    """Copies of the classifier's parameters and of the body's, at first and after every update; the rates; what the
    optimiser counts. `within` is called with (update, model) in the midst of an update."""

    def __init__(self, within=None):
        self.seen, self.rates, self.counts, self.within = [], [], [], within or (lambda update, model: None)

    def on_train_begin(self, args, state, control, model, optimizer, **kwargs):
        self.history = state.log_history
        classifier, parts = {id(p) for p in classifier_of(model).parameters()}, ([], [])
        for p in model.parameters():
            whole = p.full_tensor() if isinstance(p, DTensor) else p
            parts[id(p) not in classifier].append(whole.detach().clone())
        self.seen.append(parts)
        counting = [*optimizer.state.values(), *optimizer.param_groups]
        self.counts.append([int(each["step"]) for each in counting if "step" in each])

    on_step_end = on_train_begin

    def on_pre_optimizer_step(self, args, state, control, model, optimizer, **kwargs):
        self.rates.append([group["lr"] for group in optimizer.param_groups])
        self.within(state.global_step, model)

    def moved(self):
        updates = zip(self.seen[:-1], self.seen[1:], strict=True)
        return [tuple(not same(*halves) for halves in zip(old, new, strict=True)) for old, new in updates]


def trained(model, out, steps=2, freeze=True, resume=None, rates=None, within=None, alter=id, **changes):
    """What was seen of it. `alter` is called with the trainer."""
    watch, optimizers = Watch(within), rates(model) if rates else (None, None)
    callbacks = [watch] if steps is None else [ClassifierFirst(steps, freeze), watch]
    alter(trainer := trainer_of(model, out, callbacks, optimizers, **changes))
    trainer.train(resume_from_checkpoint=resume and str(resume))
    return watch


def rated(lr=1e-3, classifier_lr=2e-2, steps=2):
    """With an optimiser that counts in its groups too, as Prodigy does."""

    def rates(model):
        optimizer, schedule = two_rates(model, steps, lr, classifier_lr)
        optimizer.register_step_post_hook(lambda x, *_: [g.update(step=g.get("step", 0) + 1) for g in x.param_groups])
        return optimizer, schedule

    return rates


CLIPPED, SCALER = dict(max_grad_norm=1.0, gradient_checkpointing=True), torch.amp.GradScaler("cpu")
SKIPPED = dict(within=lambda update, model: model.lm_head.weight.grad.mul_(float("inf") if update == 1 else 1))
SKIPPED |= dict(alter=lambda trainer: setattr(trainer.accelerator, "scaler", SCALER), rates=rated())
RUNS = {  # what is trained how, and what moves in which update
    "GPT-2": ("gpt2", {}, STAGES),
    "Llama, clipped": ("llama", CLIPPED, STAGES),
    "Llama, accumulated": ("llama", dict(gradient_accumulation_steps=2), STAGES),
    "control": ("gpt2", dict(rates=rated(), freeze=False), [(True, True)] * 5),
    "body at 0": ("gpt2", dict(rates=rated(lr=0.0), freeze=False), STAGES[:2] + [(False, False)] * 3),
    "W at 0": ("gpt2", dict(rates=rated(classifier_lr=0.0), freeze=False), [(False, True)] * 2 + STAGES[2:]),
    "a skipped update": ("gpt2", SKIPPED, [(True, False), (False, False), *STAGES[2:]]),
}


@pytest.mark.parametrize("case", RUNS)
def test_the_body_rests_bit_for_bit_in_stage_1_each_stage_has_its_rates_and_stage_2_starts_afresh(case, tmp_path):
    """After three updates of stage 2 the optimiser counts three. A skipped update, as fp16 has them where it overflows,
    counts for stages and rates alike. The clipped control's first update moves W to the same bits, not the body."""
    kind, how, moved = RUNS[case]
    watch = trained(tiny(kind), tmp_path, **how)
    assert watch.moved() == moved and set(watch.counts[-1]) == {3}
    if "rates" in how:
        classifier_lr, lr = (group["lr"] for group in how["rates"](tiny())[0].param_groups)
        assert watch.rates == [[classifier_lr, lr]] * 2 + [[lr, lr]] * 3
    elif how == CLIPPED:  # by the norm of all gradients, as is TRL's default
        control = trained(tiny(kind), tmp_path, freeze=False, **how)
        assert [same(*parts) for parts in zip(watch.seen[1], control.seen[1], strict=True)] == [True, False]


def adapted(head=("lm_head",), seed=0):
    """PEFT trains a copy of the head, which is untied where the model is tied."""
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(target_modules=["q_proj"], modules_to_save=head)
    return peft.get_peft_model(tiny("llama", tied=True), config)


@pytest.mark.parametrize("make, step", [(tiny, 1), (tiny, 2), (tiny, 4), (adapted, 1), (adapted, 4)])
def test_a_run_cut_short_in_either_stage_and_resumed_ends_with_the_same_bits(make, step, tmp_path):
    """By another trainer. Cut within an update, it left frozen what was so before. Without its optimiser and schedule a
    checkpoint keeps the stages and their rates. None can hold numpy's numbers."""
    how, saved = dict(rates=rated(*numpy.array([1e-3, 2e-2]), numpy.int64(2)), **SAVED), tmp_path / f"checkpoint-{step}"
    whole, model = trained(make(), tmp_path / "whole", numpy.int64(2), **how), make()
    with pytest.raises(ZeroDivisionError):
        trained(model, tmp_path, within=lambda update, _: 1 / (update - step), **how)
    assert [p.requires_grad for p in model.parameters()] == [p.requires_grad for p in make().parameters()]
    resumed = trained(make(seed=1), tmp_path, resume=saved, **how)
    assert all(same(*pair) for pair in zip(resumed.seen[-1], whole.seen[-1], strict=True))
    (saved / "scheduler.pt").unlink()
    again = trained(make(), tmp_path, resume=saved, **how)
    assert whole.moved()[step:] == resumed.moved() == again.moved() == STAGES[step:]
    assert again.rates == whole.rates[step:] and set(resumed.counts[-1]) == {3}


share = lambda m: setattr(m.lm_head.weight, "data", m.transformer.wpe.weight.data[: END + 1])  # noqa: E731
adagrad = lambda m: (torch.optim.Adagrad(m.parameters()), None)  # noqa: E731
tensor = lambda m: (torch.optim.AdamW([{"params": [*m.parameters()], "d": torch.ones(1)}]), None)  # noqa: E731
fsdp = dict(alter=lambda trainer: setattr(trainer.args, "fsdp", "full_shard"))
as_is = lambda m: None  # noqa: E731
frozen = lambda m: setattr(m.lm_head.weight, "requires_grad", False)  # noqa: E731
REFUSED = {
    "tied": (lambda m: setattr(m.lm_head, "weight", m.transformer.wte.weight), {}, "is tied to transformer.wte, which"),
    "one storage": (share, {}, "the classifier is tied to transformer.wpe, which"),
    "no classifier": (lambda m: setattr(m, "get_output_embeddings", lambda: None), {}, "has no output embedding"),
    "frozen head": (lambda m: adapted(None), {}, r"is frozen: .* LoraConfig\(modules_to_save=\['lm_head'\]\)"),
    "frozen": (frozen, {}, "is frozen or unknown to the optimiser"),
    "too long": (as_is, dict(steps=6), "classifier_steps=6 is more than max_steps=5"),
    "no whole number": (as_is, dict(steps=2.5), "must be a whole number of at least 0, not 2.5"),
    "negative": (as_is, dict(rates=rated(steps=-1)), "must be a whole number of at least 0, not -1"),
    "Adagrad": (as_is, dict(rates=adagrad), r"because it makes one at once \(Adagrad\)"),
    "tensors": (as_is, dict(rates=tensor), "whose groups hold tensors, {'d'}, cannot start stage 2 afresh"),
    "two clocks": (as_is, dict(rates=rated(steps=4)), "First has classifier_steps=2 and two_rates has .*_steps': 4"),
    "no callback": (as_is, dict(rates=rated(), steps=None), "two_rates takes its rates from ClassifierFirst"),
    "other lr": (as_is, dict(resume=1, rates=rated(lr=1e-4)), "'lr': 0.001, .* with .*'lr': 0.0001"),
    "other steps": (as_is, dict(resume=3, rates=rated(), steps=4), "steps': 2.* with .*steps': 4"),
    "other arm": (as_is, dict(resume=3, rates=rated(), freeze=False), "'freeze': True.* with .*'freeze': False"),
    "no schedule": (as_is, dict(resume=4, lr_scheduler_type="linear"), "update 4, and its schedule, which is not"),
    "no folder": (as_is, dict(beta=0.1), "beta takes the model from its folder, and it has none: save the untied"),
    "vLLM": (as_is, dict(use_vllm=True), "use_vllm takes the model from tied, where the classifier is tied: save"),
    "synced": (as_is, dict(sync_ref_model=True, beta=0.1), "sync_ref_model takes the model from tied, where the cl"),
    "FSDP": (as_is, fsdp, "no fsdp, no deepspeed: shard by from_pretrained"),
}


@pytest.mark.parametrize("change, how, message", REFUSED.values(), ids=REFUSED)
def test_what_cannot_work_is_refused_before_any_update(change, how, message, tmp_path, monkeypatch):
    """Also from a checkpoint that holds the model alone."""
    monkeypatch.chdir(tmp_path)
    tiny(tied=True).save_pretrained("tied")
    (model := tiny()).config._name_or_path = "tied" if how.keys() & {"use_vllm", "sync_ref_model"} else ""
    if step := how.get("resume"):
        trained(tiny(), tmp_path, rates=how.get("rates") and rated(), save_only_model=True, **SAVED)
        how = how | {"resume": tmp_path / f"checkpoint-{step}"}
    monkeypatch.setattr(Watch, "on_step_end", lambda *_, **__: pytest.fail("an update"))
    with pytest.raises(ValueError, match=message):
        trained(change(model) or model, tmp_path, **how)


def test_the_readme_s_block_runs_as_it_stands_with_the_one_file_in_another_project(tmp_path):
    """It imports nothing else of ours. A second train() is refused, and so is the block if it does not untie. To import
    it changes nothing of the process."""
    (tmp_path / "experiments").mkdir()
    shutil.copy(ROOT / "experiments" / "trl_recipe.py", tmp_path / "experiments")
    script = f"""import os, signal, sys, torch, transformers.trainer
state = lambda: (dict(os.environ), torch.get_num_threads(), [signal.getsignal(s) for s in signal.valid_signals()])
before = state()
import experiments.trl_recipe
assert state() == before
def refused(run):
    try: run()
    except ValueError as error: return str(error)
exec(usage := {USAGE!r})
assert trainer.state.global_step == 5 and not set(sys.modules) & {{*{[path.stem for path in ROOT.glob("*.py")]}}}
assert "a state before the first update, from a train() before" in refused(trainer.train)
tied = usage.replace('untied(model, "runs/untied")', "model")
assert "the classifier is tied to model.embed_tokens" in refused(lambda: exec(tied, {{}}))"""
    ran = subprocess.run([sys.executable, "-c", script], cwd=tmp_path, capture_output=True, text=True)
    assert ran.returncode == 0, ran.stderr


def run_as_one_of_two_processes(how, out):
    """By torchrun on gloo, with this file as a script."""
    if how == "fsdp2":
        torch.distributed.init_process_group("gloo")
    plan = DistributedConfig(fsdp_size=2) if how == "fsdp2" else None
    model = AutoModelForCausalLM.from_pretrained(out / "model", distributed_config=plan)
    found = dict(sharded=isinstance(model.lm_head.weight, DTensor))
    watch = trained(model, out / "run", per_device_train_batch_size=8, ddp_backend="gloo")
    found |= dict(seen=[sum(parts, []) for parts in watch.seen], moved=watch.moved(), counts=[*map(len, watch.counts)])
    torch.save(found, out / f"rank-{os.environ['RANK']}.pt")


def test_two_processes_agree_and_keep_the_stages(tmp_path):
    """With DDP and with FSDP2. All weights after every update have the same bits on both ranks, and the body no state
    in the optimiser before stage 2."""
    for how in ("ddp", "fsdp2"):
        tiny().save_pretrained((out := tmp_path / how) / "model")
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", __file__]
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'tests'}"}
        done = subprocess.run([*command, how, str(out)], env=environment, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr[-2000:]
        first, second = (torch.load(out / f"rank-{rank}.pt") for rank in "01")
        assert all(same(*pair) for pair in zip(first["seen"], second["seen"], strict=True))
        assert first["sharded"] == (how == "fsdp2")
        assert first["moved"] == STAGES and first["counts"] == [0, 1, 1, 29, 29, 29]


def test_trl_s_gradient_is_that_of_e3(tmp_path):
    """On the responses that TRL sampled, with its advantages."""
    twin, seen = tiny(), {}

    def listen(trainer):
        loss = trainer.compute_loss
        trainer.compute_loss = lambda model, inputs, **how: seen.update(inputs) or loss(model, inputs, **how)

    keep = lambda _, model: seen.update(gradients=[p.grad.clone() for p in model.parameters()])  # noqa: E731
    trained(tiny(), tmp_path, steps=None, within=keep, alter=listen, max_steps=1)
    tokens = torch.cat((seen["prompt_ids"], seen["completion_ids"]), dim=1)
    mask = torch.cat((0 * seen["prompt_ids"], seen["completion_mask"]), dim=1).bool()
    logp = token_logp(twin(tokens).logits[:, :-1], tokens[:, 1:])
    policy_gradient_loss(logp, seen["advantages"], mask[:, 1:]).backward()
    for p, gradient in zip(twin.parameters(), seen["gradients"], strict=True):
        torch.testing.assert_close(gradient, p.grad, rtol=0, atol=1e-4 * p.grad.abs().max().item())


if __name__ == "__main__":
    run_as_one_of_two_processes(sys.argv[1], Path(sys.argv[2]))
