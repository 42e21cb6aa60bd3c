"""The microscope as a callback: on four architectures, what it logs is what happened, and training does not notice."""

import copy
from types import SimpleNamespace

import pytest
import torch

pytest.importorskip("trl", reason='needs the extra: pip install -e ".[trl]"')

from datasets import Dataset  # noqa: E402  after the check that it is there
from test_trl_recipe import ALPHABET, END, config, float32, reward  # noqa: E402, F401  a fixture
from tiny import generator  # noqa: E402
from torch import nn  # noqa: E402
from transformers import (  # noqa: E402
    AutoModelForCausalLM,
    Gemma2Config,
    Gemma3nTextConfig,
    GPT2Config,
    GPTNeoXConfig,
    GraniteConfig,
    LlamaConfig,
    NanoChatConfig,
    PhiConfig,
    Qwen2Config,
    TrainerCallback,
)
from trl import GRPOTrainer  # noqa: E402
from trl_bridge import character_tokenizer  # noqa: E402

from experiments import trl_microscope  # noqa: E402
from experiments.trl_microscope import Microscope, check_linear  # noqa: E402
from experiments.trl_recipe import ClassifierFirst, two_rates  # noqa: E402
from model import confidence, entropy  # noqa: E402

pytestmark = pytest.mark.filterwarnings("ignore")
COMMON = dict(vocab_size=END + 1, bos_token_id=END, eos_token_id=END, tie_word_embeddings=False)
SIZES = dict(
    hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=64, max_position_embeddings=16
)
KINDS = {
    "gpt2": lambda: GPT2Config(n_embd=32, n_layer=2, n_head=4, n_positions=16, **COMMON),  # with its dropout of 0.1
    "neox": lambda: GPTNeoXConfig(**SIZES, **COMMON),
    "llama": lambda: LlamaConfig(**SIZES, **COMMON),
    "qwen2": lambda: Qwen2Config(num_key_value_heads=2, **SIZES, **COMMON),
}
TOKENS = torch.randint(END, (3, 8), generator=torch.Generator().manual_seed(0))
MASK = torch.arange(8).expand(3, 8) >= 3


def made(kind, attention="sdpa"):
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(KINDS[kind](), attn_implementation=attention)


class Copies(TrainerCallback):
    """The whole model before training and after every update."""

    def __init__(self):
        self.models = []

    def on_train_begin(self, args, state, control, model, **kwargs):
        self.models.append(copy.deepcopy(model))

    on_step_end = on_train_begin


def run(model, out, every=1, looks=True, resume=None, optimizers=(None, None), **changes):
    """(the rows logged by update, the models after every update) of three updates, the first in stage 1."""
    copies, prompts = Copies(), Dataset.from_list([{"prompt": f"{i % 10}+{i // 10}="} for i in range(100)])
    trainer = GRPOTrainer(
        model,
        reward,
        args=config(out, **{"steps": 3, "logging_strategy": "steps", "logging_steps": 1} | changes),
        train_dataset=prompts,
        processing_class=character_tokenizer(ALPHABET, END),
        callbacks=[ClassifierFirst(1), copies],
        optimizers=optimizers,
    )
    if looks:
        trainer.add_callback(Microscope(trainer, TOKENS, MASK, every))
    trainer.train(resume_from_checkpoint=resume)
    history = trainer.state.log_history
    rows = {row["step"]: row for row in history if "microscope/entropy" in row}
    assert all("microscope/entropy" not in row or "reward" not in row for row in history)
    assert sum("reward" in row for row in history) == trainer.state.global_step  # the trainer's own rows are whole
    return rows, copies.models


@torch.no_grad()
def by_hand(before, after):
    """The same numbers from two whole models, by swapping the classifiers."""
    phi = [model.eval().base_model(TOKENS).last_hidden_state[MASK] for model in (before, after)]
    W = [model.get_output_embeddings().weight for model in (before, after)]
    old, new = (features @ classifier.T for features, classifier in zip(phi, W, strict=True))
    row = {"microscope/entropy": entropy(new).mean(), "microscope/confidence": confidence(new).mean()}
    for name, measure in (("entropy", entropy), ("confidence", confidence)):
        moves = {"change": new, "by_W": phi[0] @ W[1].T, "by_body": phi[1] @ W[0].T}
        row |= {f"microscope/{name}_{part}": (measure(f) - measure(old)).mean() for part, f in moves.items()}
    return row


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("kind", KINDS)
def test_what_is_logged_is_what_happened(kind, attention, tmp_path):
    """To 2e-5, a few roundings of float32 in entropies of 2.5 nats. In stage 1 nothing goes through the body."""
    rows, models = run(made(kind, attention), tmp_path)
    for step in (1, 2, 3):
        for name, value in by_hand(models[step - 1], models[step]).items():
            assert rows[step][name] == pytest.approx(value.item(), abs=2e-5), name
    assert rows[1]["microscope/entropy_by_body"] == 0 != rows[2]["microscope/entropy_by_body"]


def test_several_updates_are_told_as_one(tmp_path):
    """Also with gradients accumulated: an update is one of the optimiser's."""
    rows, models = run(made("llama"), tmp_path, every=2, steps=4, gradient_accumulation_steps=2)
    assert list(rows) == [2, 4]
    change = by_hand(models[2], models[4])["microscope/entropy_change"]
    assert rows[4]["microscope/entropy_change"] == pytest.approx(change.item(), abs=2e-5)


def largest(model):
    """With the weights of its matrices times 5, so that it is confident enough for rounding to matter."""
    with torch.no_grad():
        for p in model.parameters():
            p *= 5 if p.ndim > 1 else 1
    return model


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("precision", ["float32", "autocast", "bfloat16"])
def test_small_updates_are_seen_whatever_the_precision_of_training(kind, precision, tmp_path):
    """At the README's own rates, against float64: to 1e-6, a few roundings of float32 in 2.5 nats. A pass in bfloat16
    rounds to some 1e-4. Weights in bfloat16 hardly move at such rates, and that is what is said of them."""
    model = largest(made(kind))
    model = model.bfloat16() if precision == "bfloat16" else model
    rates = two_rates(model, classifier_steps=1, lr=1e-6, classifier_lr=2e-5)
    rows, models = run(model, tmp_path, bf16=precision == "autocast", optimizers=rates)
    for step in (1, 2, 3):
        for name, value in by_hand(*(each.double() for each in models[step - 1 : step + 1])).items():
            assert rows[step][name] == pytest.approx(value.item(), abs=1e-6), name


def test_a_bfloat16_model_with_trl_s_classifier_in_float32_is_looked_at(tmp_path):
    model = made("llama").bfloat16()
    rows, models = run(model, tmp_path, cast_lm_head_to_fp32=True)
    assert model.lm_head.weight.dtype == torch.float32 and model.model.norm.weight.dtype == torch.bfloat16
    for name, value in by_hand(*(each.float() for each in models[1:3])).items():
        assert rows[2][name] == pytest.approx(value.item(), abs=2e-5), name


def test_training_does_not_notice(tmp_path):
    """GPT-2 with its dropout: a look that drew a random number, or left the model in eval, would change every bit."""
    weights = [run(made("gpt2"), tmp_path, looks=looks)[1][-1].state_dict() for looks in (True, False)]
    assert all(torch.equal(x, y) for x, y in zip(*(each.values() for each in weights), strict=True))


@pytest.mark.parametrize("error", [None, RuntimeError])
def test_a_look_leaves_every_module_as_it_was(error):
    """In training, in eval, and under autocast; also when the pass fails."""
    model = made("gpt2").train()
    model.transformer.h[0].eval()
    model._original_forward = model.forward  # as accelerate does it
    model.forward = forward = torch.autocast("cpu", torch.bfloat16)(model.forward)
    modes = [module.training for module in model.modules()]
    look = Microscope(SimpleNamespace(model=model, processing_class=None), TOKENS, MASK).look
    if error:
        model.lm_head.register_forward_hook(lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            look()
    else:
        assert look()[0].dtype == torch.float32
    assert [module.training for module in model.modules()] == modes and model.forward is forward


@pytest.mark.parametrize("kind", KINDS)
def test_padding_on_the_left_changes_nothing(kind):
    """With its attention_mask the states are those of the tokens alone; without, it is refused."""
    model, pad = made(kind), 2
    trainer = SimpleNamespace(model=model, processing_class=SimpleNamespace(pad_token_id=END))
    padded = torch.cat((torch.full((3, pad), END), TOKENS), dim=1)
    mask, attended = torch.cat((MASK[:, :pad] & False, MASK), dim=1), (padded != END).long()
    alone, _ = Microscope(trainer, TOKENS, MASK).look()
    torch.testing.assert_close(Microscope(trainer, padded, mask, attention_mask=attended).look()[0], alone)
    with pytest.raises(ValueError, match="tokens begin with the padding token: give their attention_mask"):
        Microscope(trainer, padded, mask)
    Microscope(trainer, padded, mask, attention_mask=torch.ones_like(padded)).look()  # it may be a word as well
    for wrong in (attended[0], attended.flip(1)):
        with pytest.raises(ValueError, match="does not cover the states of mask"):
            Microscope(trainer, padded, mask, attention_mask=wrong)


def test_weights_too_coarse_to_look_at_are_refused(monkeypatch, tmp_path):
    """As if they were sharded, which is when nothing widens them."""
    monkeypatch.setattr(trl_microscope, "DTensor", torch.Tensor)
    with pytest.raises(ValueError, match="LlamaForCausalLM is sharded in torch.bfloat16, too coarse to look at"):
        run(made("llama").bfloat16(), tmp_path)


def test_a_resumed_run_logs_the_same_rows(tmp_path):
    """The first of them tells of the update after the checkpoint, from the checkpoint's own policy."""
    whole, _ = run(made("llama"), tmp_path / "whole", save_strategy="steps", save_steps=1)
    resumed, _ = run(made("llama"), tmp_path / "resumed", resume=str(tmp_path / "whole" / "checkpoint-2"))
    assert {k: v for k, v in resumed[3].items() if "/" in k} == {k: v for k, v in whole[3].items() if "/" in k}


REFUSED = {
    "gemma2": (Gemma2Config(head_dim=8, num_key_value_heads=2, **SIZES, **COMMON), "a soft cap"),
    "nanochat": (NanoChatConfig(num_key_value_heads=2, **SIZES, **COMMON), "a soft cap"),
    "granite": (GraniteConfig(logits_scaling=8.0, num_key_value_heads=2, **SIZES, **COMMON), "a scale"),
    "phi": (PhiConfig(**SIZES, **COMMON), "has a bias"),
    "gemma3n": (
        Gemma3nTextConfig(
            head_dim=8, num_key_value_heads=2, num_kv_shared_layers=0, activation_sparsity_pattern=[0.0, 0.0],
            vocab_size_per_layer_input=END + 1, hidden_size_per_layer_input=8, laurel_rank=4, **SIZES, **COMMON,
        ),
        r"not the last hidden state, of shape \(4, 3, 8, 32\)",
    ),
}  # fmt: skip


@pytest.mark.parametrize("kind", REFUSED)
@pytest.mark.parametrize("precision", ["float32", "autocast", "bfloat16"])
@pytest.mark.parametrize("size", [1e-3, 1])
def test_a_model_whose_logits_are_not_w_phi_is_refused_before_any_update(kind, precision, size, tmp_path):
    """However small its logits are at the start."""
    config, fault = REFUSED[kind]
    model = AutoModelForCausalLM.from_config(config)
    model.lm_head.weight.data *= size
    model = model.bfloat16() if precision == "bfloat16" else model
    with pytest.raises(ValueError, match=f"the logits of {type(model).__name__} are not W phi: .*{fault}"):
        run(model, tmp_path, bf16=precision == "autocast")


def test_what_cannot_be_split_is_refused_before_any_update(tmp_path):
    """A model that scales its logits, for one; a mask without a state; a strange interval."""
    model = made("gpt2")
    head = model.lm_head.forward
    model.lm_head.forward = lambda phi: 3 * head(phi)
    with pytest.raises(ValueError, match="the logits of GPT2LMHeadModel are not W phi"):
        run(model, tmp_path)
    model = made("gpt2")
    model.lm_head.bias = torch.nn.Parameter(torch.zeros(END + 1))  # which does nothing yet
    with pytest.raises(ValueError, match="the logits of GPT2LMHeadModel are not W phi"):
        run(model, tmp_path)
    with pytest.raises(ValueError, match="selects no state"):
        Microscope(None, TOKENS, torch.zeros_like(MASK))
    with pytest.raises(ValueError, match="every must be a whole number of at least 1, not 0"):
        Microscope(None, TOKENS, MASK, every=0)


# ------------------------------------------------------------------------------------------------ are the logits W phi?


def drawn(seed, *shape, dtype=torch.float64):
    return torch.randn(*shape, generator=generator(seed), dtype=dtype)


class Language(nn.Module):
    """What check_linear sees of a language model: phi, W, and what may be wrong about them."""

    def __init__(self, bias=False, enters=lambda x: x, leaves=lambda x: x, classifier=lambda x: x, dtype=torch.float32):
        super().__init__()
        self.head = nn.Linear(576, 300, bias, dtype=dtype)
        self.enters, self.leaves, self.classifier = enters, leaves, classifier
        linear = self.head.forward
        self.head.forward = lambda x: classifier(linear(x))

    def get_output_embeddings(self):
        return self.head

    def run(self, size=1.0, cast=False):
        phi = (size * drawn(0, 4, 20, 576)).to(self.head.weight.dtype)
        with torch.autocast("cpu", torch.bfloat16, enabled=cast):
            return phi, self.leaves(self.head(self.enters(phi)))


@pytest.mark.parametrize("size", [1e-6, 1.0, 1e3])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, "autocast"])
def test_w_phi_is_known_in_any_precision(dtype, size):
    """Whatever the size of the logits, and also where they are widened afterwards."""
    model = Language(leaves=lambda x: x.float(), dtype=torch.float32 if dtype == "autocast" else dtype)
    check_linear(model, lambda: model.run(size, cast=dtype == "autocast"))
    assert not model.head._forward_hooks


@pytest.mark.parametrize("size", [1e-6, 1.0, 1e3])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    "wrong, message",
    [
        (dict(leaves=lambda x: 30 * torch.tanh(x / 30)), "what leaves the classifier is changed"),
        (dict(leaves=lambda x: x.clamp(-1000, 1000)), "what leaves the classifier is changed"),
        (dict(leaves=lambda x: 2 * x), "what leaves the classifier is changed"),
        (dict(leaves=lambda x: x + 0.01), "what leaves the classifier is changed"),
        (dict(classifier=lambda x: 1.5 * x), "the classifier does not multiply by W alone"),
        (dict(enters=lambda x: x / 2), r"not the last hidden state, of shape \(4, 20, 576\)"),
        (dict(enters=lambda x: x[:, -1:]), "not the last hidden state"),
        (dict(bias=True), "the classifier has a bias"),
    ],
)
def test_what_is_not_w_phi_is_seen_whatever_its_size(wrong, message, dtype, size):
    """In logits too small to meet a cap, too."""
    model = Language(dtype=dtype, **wrong)
    with pytest.raises(ValueError, match=f"the logits of Language are not W phi: .*{message}"):
        check_linear(model, lambda: model.run(size))
    assert not model.head._forward_hooks


def test_a_classifier_that_is_not_called_is_not_taken_for_w():
    model = Language()
    with pytest.raises(ValueError, match="the classifier does not multiply by W alone"):
        check_linear(model, lambda: (torch.ones(2, 3, 576), torch.ones(2, 3, 300)))
