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
    from transformers import GPT2Config, GPT2LMHeadModel, GPTNeoXConfig, GPTNeoXForCausalLM, TrainerCallback
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


@pytest.fixture(autouse=True, scope="module")
def float32():
    """As people train."""
    torch.set_default_dtype(torch.float32)
    yield
    torch.set_default_dtype(torch.float64)


def tiny(kind, tied=False, seed=0):
    torch.manual_seed(seed)
    common = dict(vocab_size=END + 1, bos_token_id=END, eos_token_id=END, tie_word_embeddings=tied)
    if kind == "gpt2":
        dropouts = dict.fromkeys(("resid_pdrop", "embd_pdrop", "attn_pdrop"), 0.0)
        return GPT2LMHeadModel(GPT2Config(n_layer=2, n_embd=32, n_head=4, n_positions=16, **dropouts, **common))
    sizes = dict(num_hidden_layers=2, hidden_size=32, num_attention_heads=4, intermediate_size=64)
    return GPTNeoXForCausalLM(GPTNeoXConfig(max_position_embeddings=16, **sizes, **common))


def reward(completions, **_):
    """Of many values, so that no group is flat and every update moves something."""
    return [sum(c in "0123456789" for c in text) + 0.01 * len(text) for text in completions]


def prompts():
    return Dataset.from_list([{"prompt": f"{i % 10}+{i // 10 % 10}="} for i in range(100)])


def config(out, steps=5, **changes):
    sizes = dict(per_device_train_batch_size=16, num_generations=4, max_completion_length=5)
    return GRPOConfig(str(out), max_steps=steps, learning_rate=1e-2, weight_decay=0.1, **PLAIN | sizes | changes)


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
    """The two halves of the model before training and after every update, the rates, and Adam's counts at the end."""

    def __init__(self):
        self.seen, self.rates, self.adam = [], [], []

    def on_train_begin(self, args, state, control, model, **kwargs):
        self.seen.append(halves(model))

    def on_step_end(self, args, state, control, model, optimizer, **kwargs):
        self.seen.append(halves(model))
        self.adam.append(len(optimizer.state))  # parameters that it remembers

    def on_train_end(self, args, state, control, optimizer, **kwargs):
        self.adam_steps = [int(each["step"]) for each in optimizer.state.values()]

    def on_pre_optimizer_step(self, args, state, control, optimizer, **kwargs):
        self.rates.append([group["lr"] for group in optimizer.param_groups])

    def moved(self):
        """For every update: did the classifier move, did the body?"""
        updates = zip(self.seen[:-1], self.seen[1:], strict=True)
        return [tuple(not same(*halves) for halves in zip(old, new, strict=True)) for old, new in updates]


def trained(
    model,
    out,
    classifier_steps=2,
    resume=None,
    freeze=True,
    optimizers=(None, None),
    callbacks=(),
    looks=False,
    **changes,
):
    watch = Watch()
    trainer = GRPOTrainer(
        model,
        reward,
        args=config(out, **changes),
        train_dataset=prompts(),
        processing_class=character_tokenizer(ALPHABET, END),
        callbacks=[ClassifierFirst(classifier_steps, freeze), watch, *callbacks],
        optimizers=optimizers,
    )
    if looks:
        tokens = torch.arange(8).expand(2, 8) + torch.tensor([[0], [3]])
        trainer.add_callback(Microscope(trainer, tokens, tokens > 3))
    trainer.train(resume_from_checkpoint=resume)
    watch.history = [row for row in trainer.state.log_history if "microscope/entropy" in row]
    return watch


STAGES = [(True, False)] * 2 + [(True, True)] * 3  # of five updates, two of them in stage 1


@pytest.mark.parametrize("kind", ["gpt2", "neox"])
def test_the_body_rests_bit_for_bit_in_stage_1_and_all_moves_afterwards(kind, tmp_path):
    """With weight decay, which moves whatever the optimiser touches. The two name their output embeddings otherwise."""
    assert trained(tiny(kind), tmp_path).moved() == STAGES


def test_a_run_of_stage_1_alone_leaves_a_model_that_can_be_trained_on(tmp_path):
    """Nothing of the stage stays behind."""
    model = tiny("gpt2")
    assert trained(model, tmp_path, classifier_steps=5).moved() == [(True, False)] * 5
    assert trained(model, tmp_path, classifier_steps=0).moved() == [(True, True)] * 5


def test_the_stage_changes_between_updates_when_gradients_are_accumulated(tmp_path):
    assert trained(tiny("gpt2"), tmp_path, gradient_accumulation_steps=2).moved() == STAGES


def test_the_matched_control_freezes_nothing(tmp_path):
    assert trained(tiny("gpt2"), tmp_path, freeze=False).moved() == [(True, True)] * 5


def test_the_control_is_matched_also_where_trl_clips_gradients(tmp_path):
    """At its default of 1, by the norm of all gradients: the first update moves W by the same bits in both arms. With
    TRL's own gradient checkpointing too."""
    changes = dict(max_grad_norm=1.0, gradient_checkpointing=True)
    arms = [trained(tiny("gpt2"), tmp_path, freeze=freeze, **changes) for freeze in (True, False)]
    assert arms[0].moved() == STAGES
    assert same(*(watch.seen[1][0] for watch in arms)) and not same(*(watch.seen[1][1] for watch in arms))


def test_stage_2_starts_with_a_fresh_optimiser(tmp_path):
    """Adam counts its steps per parameter: after five updates, two of them in stage 1, every count is three."""
    model = tiny("gpt2")
    assert trained(model, tmp_path).adam_steps == [3] * len(list(model.parameters()))


@pytest.mark.parametrize("kind", ["gpt2", "neox"])
def test_a_run_resumed_in_either_stage_ends_with_the_same_bits(kind, tmp_path):
    """GPT-NeoX's checkpoints call the classifier otherwise than its model does, and a resumed Trainer passes it over:
    so the README has people load the model from the checkpoint too."""

    def run(model, out, **changes):
        optimizers = two_rates(model, classifier_steps=2, lr=1e-3, classifier_lr=2e-2)
        return trained(model, tmp_path / out, optimizers=optimizers, **changes)

    whole = run(tiny(kind), "whole", save_strategy="steps", save_steps=1)
    for step in (1, 2, 4):
        checkpoint = str(tmp_path / "whole" / f"checkpoint-{step}")
        model = tiny("gpt2", seed=1) if kind == "gpt2" else GPTNeoXForCausalLM.from_pretrained(checkpoint)
        resumed = run(model, "resumed", resume=checkpoint)
        assert all(same(*pair) for pair in zip(resumed.seen[-1], whole.seen[-1], strict=True))
        assert resumed.moved() == STAGES[step:]


@pytest.mark.parametrize("reused", [dict(num_iterations=2), dict(steps_per_generation=2)])
def test_resuming_is_exact_where_new_responses_are_due(reused, tmp_path):
    """Each of two batches of responses serves two updates, and a checkpoint between these does not hold it."""

    def run(out, **changes):
        return trained(tiny("gpt2"), tmp_path / out, steps=4, save_strategy="steps", save_steps=1, **reused, **changes)

    whole = run("whole")
    resumed = [run(f"from-{k}", resume=str(tmp_path / "whole" / f"checkpoint-{k}")) for k in (1, 2, 3)]
    exact = [all(same(*pair) for pair in zip(each.seen[-1], whole.seen[-1], strict=True)) for each in resumed]
    assert exact == [False, True, False]


class Cut(TrainerCallback):
    """Ends the run within an update, gradients in hand; nothing is tidied up."""

    class Short(Exception):
        pass

    def __init__(self, step):
        self.step = step

    def on_pre_optimizer_step(self, args, state, control, **kwargs):
        if state.global_step == self.step:
            raise self.Short


def test_a_run_cut_short_in_stage_1_and_again_in_stage_2_ends_with_the_same_bits(tmp_path):
    """Within its second update, then within its fourth, each time with a new model and trainer, from the last of its
    own checkpoints; and with one for every other update, so that the start of stage 2 is done twice."""

    def run(out, **changes):
        model = tiny("gpt2")
        optimizers = two_rates(model, classifier_steps=2, lr=1e-3, classifier_lr=2e-2)
        return trained(model, tmp_path / out, optimizers=optimizers, save_strategy="steps", **changes)

    whole = run("whole", save_steps=5)
    for every in (1, 2):
        out = f"every-{every}"
        for step, resume in ((1, None), (3, None if every > 1 else True)):
            with pytest.raises(Cut.Short):
                run(out, save_steps=every, resume=resume, callbacks=[Cut(step)])
        resumed = run(out, save_steps=every, resume=True)
        assert resumed.moved() == STAGES[3 if every == 1 else 2 :]
        assert all(same(*pair) for pair in zip(resumed.seen[-1], whole.seen[-1], strict=True))


def test_the_classifier_can_have_its_own_learning_rate(tmp_path):
    """Group 0 is the classifier's."""
    model = tiny("gpt2")
    optimizers = two_rates(model, classifier_steps=2, lr=1e-3, classifier_lr=2e-2)
    watch = trained(model, tmp_path, optimizers=optimizers)
    assert all(group["weight_decay"] == 0 for group in optimizers[0].param_groups)
    assert watch.rates == [pytest.approx([2e-2, 1e-3])] * 2 + [pytest.approx([1e-3, 1e-3])] * 3
    assert watch.moved() == STAGES


def test_the_readme_s_block_runs_as_it_stands_and_a_second_train_is_refused(tmp_path, monkeypatch):
    """To the letter, in a folder of its own; its model is tied until the block's own line unties it."""
    monkeypatch.chdir(tmp_path)
    names = {}
    exec(USAGE, names)
    assert names["trainer"].state.global_step == 5 and names["first"].classifier_steps == 2
    with pytest.raises(ValueError, match=r"the optimiser has a state before the first update, from a train\(\) before"):
        names["trainer"].train()
    with pytest.raises(ValueError, match="the classifier is tied to model.embed_tokens"):
        exec(USAGE.replace("model.lm_head.weight =", "unused ="), {})


def without_output_embeddings(model):
    model.get_output_embeddings = lambda: None
    return model


def frozen(model):
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name.startswith("lm_head"))
    return model


def tied_by_storage(name):
    """lm_head's numbers are those of another parameter, though it is no longer the same object."""
    model = tiny("gpt2")
    model.lm_head.weight = torch.nn.Parameter(model.get_parameter(name).data[: END + 1])
    return model


@pytest.mark.parametrize(
    "make, message",
    [
        (lambda: tiny("gpt2", tied=True), "the classifier is tied to transformer.wte, which would move"),
        (lambda: tiny("neox", tied=True), "the classifier is tied to gpt_neox.embed_in, which would move"),
        (lambda: tied_by_storage("transformer.wte.weight"), "the classifier is tied to transformer.wte, which"),
        (lambda: tied_by_storage("transformer.wpe.weight"), "the classifier is tied to transformer.wpe, which"),
        (lambda: without_output_embeddings(tiny("gpt2")), "GPT2LMHeadModel has no output embedding"),
        (lambda: frozen(tiny("gpt2")), "a parameter is frozen or unknown to the optimiser"),
    ],
)
def test_what_cannot_work_is_refused_before_any_update(make, message, tmp_path):
    model = make()
    before = [p.detach().clone() for p in model.parameters()]
    with pytest.raises(ValueError, match=message):
        trained(model, tmp_path)
    assert same(before, model.parameters())


@pytest.mark.parametrize("steps, said", [(-1, "-1"), (2.5, "2.5"), ("2", "'2'"), (None, "None")])
def test_a_length_that_is_no_whole_number_is_refused_at_once(steps, said):
    model = tiny("gpt2")
    for make in (ClassifierFirst, lambda steps: two_rates(model, steps, 1e-3, 2e-2)):
        with pytest.raises(ValueError, match=f"classifier_steps must be a whole number of at least 0, not {said}"):
            make(steps)


def test_a_stage_1_longer_than_the_run_is_refused(tmp_path):
    with pytest.raises(ValueError, match="classifier_steps=6 is more than max_steps=5"):
        trained(tiny("gpt2"), tmp_path, classifier_steps=6)


def test_a_whole_number_of_numpy_s_is_one_also_in_a_checkpoint(tmp_path):
    def run(out, **changes):
        model = tiny("gpt2")
        optimizers = two_rates(model, numpy.int64(2), numpy.float64(1e-3), numpy.float64(2e-2))
        return trained(model, tmp_path, numpy.int64(2), optimizers=optimizers, save_strategy="steps", **changes)

    assert run(tmp_path, save_steps=1).moved() == STAGES
    assert run(tmp_path, save_steps=1, resume=str(tmp_path / "checkpoint-1")).moved() == STAGES[1:]


def test_an_optimiser_that_cannot_start_afresh_is_refused(tmp_path):
    """Adagrad makes its state when it is made, and fails without."""
    model = tiny("gpt2")
    adagrad = torch.optim.Adagrad(model.parameters())
    with pytest.raises(ValueError, match=r"because it makes one at once \(Adagrad\)"):
        trained(model, tmp_path, optimizers=(adagrad, torch.optim.lr_scheduler.ConstantLR(adagrad)))


@pytest.mark.parametrize("kind", ["gpt2", "neox"])
def test_a_tied_model_trains_once_untied_as_the_refusal_says(kind, tmp_path):
    """And stays untied in a checkpoint, also in one of before the two differ."""
    model = tiny(kind, tied=True)
    with pytest.raises(ValueError) as refusal:
        trained(model, tmp_path)
    exec(str(refusal.value).partition("to untie them: ")[2], {"model": model, "torch": torch})
    model.save_pretrained(tmp_path / "start")
    start = type(model).from_pretrained(tmp_path / "start")
    assert start.get_output_embeddings().weight is not start.get_input_embeddings().weight
    assert trained(model, tmp_path, save_strategy="steps", save_steps=5).moved() == STAGES
    back = type(model).from_pretrained(tmp_path / "checkpoint-5")
    assert all(same(*pair) for pair in zip(halves(back), halves(model), strict=True))


@pytest.fixture(scope="module")
def saved_run(tmp_path_factory):
    """A function that resumes one run after an update, with something changed."""
    out = tmp_path_factory.mktemp("saved")

    def run(resume=None, freeze=True, callback_steps=2, **changes):
        model = tiny("gpt2")
        optimizers = two_rates(model, **dict(classifier_steps=2, lr=1e-3, classifier_lr=2e-2) | changes)
        resume = resume and str(out / f"checkpoint-{resume}")
        saving = dict(optimizers=optimizers, save_strategy="steps", save_steps=1)
        return trained(model, out, callback_steps, resume, freeze, **saving)

    run()
    return run


@pytest.mark.parametrize("step", [1, 3])
@pytest.mark.parametrize(
    "changes, message",
    [
        (dict(lr=1e-4), "'lr': 0.001, .* with .*'lr': 0.0001"),
        (dict(classifier_lr=1e-2), "'classifier_lr': 0.02.* with .*'classifier_lr': 0.01"),
        (dict(classifier_steps=4), "'classifier_steps': 2.* with .*'classifier_steps': 4"),
        (dict(callback_steps=4), "'classifier_steps': 2.* with .*'classifier_steps': 4"),
        (dict(freeze=False), "'freeze': True.* with .*'freeze': False"),
    ],
)
def test_a_run_is_not_resumed_with_other_settings(saved_run, step, changes, message):
    """In stage 1 and in stage 2, be it the callback's settings that changed or those of the rates."""
    with pytest.raises(ValueError, match=message):
        saved_run(resume=step, **changes)


def test_a_run_without_the_stage_is_not_resumed_with_it(tmp_path):
    GRPOTrainer(
        tiny("gpt2"),
        reward,
        config(tmp_path, save_strategy="steps", save_steps=1),
        prompts(),
        None,
        character_tokenizer(ALPHABET, END),
    ).train()
    with pytest.raises(ValueError, match="the checkpoint is of a run with None, and cannot be resumed with"):
        trained(tiny("gpt2"), tmp_path, resume=str(tmp_path / "checkpoint-1"))


class Break(TrainerCallback):
    """Fails, or is interrupted, within the pass of the second update, before or after its backward."""

    def __init__(self, error, when):
        self.error, self.when = error, when

    def on_step_begin(self, args, state, control, model, **kwargs):
        if state.global_step == 1 and self.when == "forward":
            self.hook = model.lm_head.register_forward_hook(self.fail)

    def on_pre_optimizer_step(self, args, state, control, **kwargs):
        if state.global_step == 1:
            raise self.error

    def fail(self, *_):
        self.hook.remove()
        raise self.error


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
@pytest.mark.parametrize("when", ["forward", "backward"])
@pytest.mark.parametrize("stage", [True, False])
def test_a_run_that_fails_in_stage_1_leaves_no_parameter_frozen(error, when, stage, tmp_path):
    """The next trainer, with the stage or without, finds the model as if it had never been in one."""
    model = tiny("gpt2")
    with pytest.raises(error):
        trained(model, tmp_path, callbacks=[Break(error, when)])
    steps, expected = (2, STAGES) if stage else (0, [(True, True)] * 5)
    assert trained(model, tmp_path, classifier_steps=steps).moved() == expected


@pytest.mark.parametrize("lr, classifier_lr", [(0.0, 2e-2), (1e-3, 0.0)])
def test_either_rate_may_be_0(lr, classifier_lr, tmp_path):
    """What has a rate of 0 rests."""
    model = tiny("gpt2")
    watch = trained(model, tmp_path, freeze=False, optimizers=two_rates(model, 2, lr, classifier_lr))
    assert watch.moved() == [(classifier_lr > 0, lr > 0)] * 2 + [(lr > 0, lr > 0)] * 3


def test_what_two_rates_would_unfreeze_is_refused(tmp_path):
    """Its optimiser knows every parameter, frozen ones too."""
    model = frozen(tiny("gpt2"))
    with pytest.raises(ValueError, match="a parameter is frozen"):
        trained(model, tmp_path, optimizers=two_rates(model, classifier_steps=2, lr=1e-3, classifier_lr=2e-2))


def test_sharding_by_the_trainer_is_refused(tmp_path):
    """As if the run had asked the trainer for FSDP: none is needed to see the sentence."""
    callback, model = ClassifierFirst(2), tiny("gpt2")
    args = SimpleNamespace(fsdp="full_shard", deepspeed=None)
    state = SimpleNamespace(max_steps=5, global_step=0, stateful_callbacks={"ClassifierFirst": callback.state()})
    with pytest.raises(ValueError, match="no fsdp, no deepspeed: shard by from_pretrained"):
        callback.on_train_begin(args, state, None, model, torch.optim.AdamW(model.parameters()))


@pytest.fixture(scope="module")
def two_processes(tmp_path_factory):
    """What each rank of two saw, by torchrun on gloo, with DDP and with FSDP2: this file as a script."""
    seen = {}
    for how in ("ddp", "fsdp2"):
        out = tmp_path_factory.mktemp(how)
        tiny("gpt2").save_pretrained(out / "model")
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", __file__]
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'tests'}"}
        done = subprocess.run([*command, how, str(out)], env=environment, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr[-2000:]
        seen[how] = [torch.load(out / f"rank-{rank}.pt") for rank in "01"]
    return seen


@pytest.mark.parametrize("how", ["ddp", "fsdp2"])
def test_two_processes_agree_and_keep_the_stages(how, two_processes):
    """All weights after every update have the same bits on both ranks; the body rests bit for bit for two updates, has
    no state in the optimiser until then, and moves from the third on. What the microscope logs says so too."""
    first, second = two_processes[how]
    assert all(
        same(*halves) for pair in zip(first["seen"], second["seen"], strict=True) for halves in zip(*pair, strict=True)
    )
    assert first["history"] == second["history"] and first["sharded"] == (how == "fsdp2")
    assert first["moved"] == STAGES and first["adam"] == [1, 1, 29, 29, 29]
    through_body = [row["microscope/entropy_by_body"] for row in first["history"]]
    assert through_body[:2] == [0, 0] and all(through_body[2:]) and len(through_body) == 5


def test_sharding_changes_nothing_but_rounding(two_processes):
    """DDP's and FSDP2's updates have the same entropies to 1e-4: float32, in another order of additions."""
    for plain, sharded in zip(*(ranks[0]["history"] for ranks in two_processes.values()), strict=True):
        for name in ("entropy", "entropy_change", "entropy_by_W", "entropy_by_body"):
            assert sharded[f"microscope/{name}"] == pytest.approx(plain[f"microscope/{name}"], abs=1e-4), name


def run_as_one_of_two_processes(how, out):
    model, rank = tiny("gpt2"), os.environ["RANK"]
    if how == "fsdp2":
        torch.distributed.init_process_group("gloo")
        plan = DistributedConfig(fsdp_size=2)
        model = GPT2LMHeadModel.from_pretrained(out / "model", distributed_config=plan)
    sharded = all(isinstance(p, DTensor) for p in model.parameters())
    watch = trained(model, out / "run", looks=True, per_device_train_batch_size=8, ddp_backend="gloo")
    found = {name: getattr(watch, name) for name in ("seen", "history", "adam")}
    found |= {"moved": watch.moved(), "sharded": sharded}
    torch.save(found, out / f"rank-{rank}.pt")


# ----------------------------------------------------------------------------------------------------------- the bridge


def test_the_toy_s_policy_is_a_gpt_2_of_the_same_shape():
    """Random weights, biases and norms included: logits equal to 1e-5 in float32, and all weights come back."""
    gpt = tiny_gpt(0, vocab_size=17, block_size=16, n_embd=32, n_head=4)
    tokens = torch.randint(17, (4, 16), generator=generator(0))
    hf = to_transformers(gpt)
    torch.testing.assert_close(hf.eval()(tokens).logits, gpt(tokens), rtol=0, atol=1e-5)
    back = from_transformers(hf, tiny_gpt(1, vocab_size=17, block_size=16, n_embd=32, n_head=4))
    assert same(gpt.parameters(), back.parameters())


class WordyAddition(Addition):
    """Rewards digits, so that even an untrained policy has something to learn; keeps what was sampled."""

    def __init__(self):
        super().__init__(digits=1)
        self.rows = []

    def verify(self, prompt, response):
        self.rows.append((prompt, response))
        return 0.1 * sum(character.isdigit() for character in response)


def test_trl_s_gradient_is_that_of_the_toy_s_loss(tmp_path):
    """(E3) on the responses that TRL sampled, with its own advantages (E2): the sample's std, plus 1e-4. 1e-4 of the
    largest gradient: float32, and another order of additions."""
    task, rl, theirs = WordyAddition(), RLConfig((Stage(1),), prompts=4, samples=4), {}
    gpt = tiny_gpt(0, task.vocab_size, task.block_size)
    hf = to_transformers(gpt)

    class Gradients(TrainerCallback):
        def on_pre_optimizer_step(self, args, state, control, model, **kwargs):
            theirs.update({name: p.grad.clone() for name, p in model.named_parameters()})

    trl_trainer(hf, task, rl, generator(0), tmp_path, [Gradients()]).train()
    longest = task.block_size - len(task.prompt(0, 0))
    ended = [len(response) < longest for _, response in task.rows]
    texts = [prompt + response for prompt, response in task.rows]
    rows = [task.encode(text) + [task.end_token] * end for text, end in zip(texts, ended, strict=True)]
    lengths = torch.tensor([len(row) for row in rows])
    tokens = torch.tensor([row + [task.end_token] * (task.block_size - len(row)) for row in rows])
    position = torch.arange(task.block_size)
    mask = (position >= len(task.prompt(0, 0))) & (position < lengths[:, None])
    digits = torch.tensor([sum(c.isdigit() for c in response) for _, response in task.rows])
    rewards = 0.1 * (digits * torch.tensor(ended)).view(rl.prompts, rl.samples)
    advantages = (rewards - rewards.mean(dim=1, keepdim=True)) / (rewards.std(dim=1, keepdim=True) + 1e-4)
    policy_gradient_loss(sequence_logp(gpt, tokens), advantages.flatten(), mask[:, 1:]).backward()
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
