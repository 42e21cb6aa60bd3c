"""The microscope as a callback: on four architectures, what it logs is what happened, and training does not notice."""

import copy

import pytest
import torch

pytest.importorskip("trl", reason='needs the extra: pip install -e ".[trl]"')

from datasets import Dataset  # noqa: E402  after the check that it is there
from test_trl_recipe import ALPHABET, END, config, float32, reward  # noqa: E402, F401  a fixture
from transformers import (  # noqa: E402
    AutoModelForCausalLM,
    GPT2Config,
    GPTNeoXConfig,
    LlamaConfig,
    Qwen2Config,
    TrainerCallback,
)
from trl import GRPOTrainer  # noqa: E402
from trl_bridge import character_tokenizer  # noqa: E402

from experiments.trl_microscope import Microscope  # noqa: E402
from experiments.trl_recipe import ClassifierFirst  # noqa: E402
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


def run(model, out, every=1, looks=True, resume=None, **changes):
    """(the rows logged by update, the models after every update) of three updates, the first in stage 1."""
    copies, prompts = Copies(), Dataset.from_list([{"prompt": f"{i % 10}+{i // 10}="} for i in range(100)])
    trainer = GRPOTrainer(
        model,
        reward,
        args=config(out, **{"steps": 3, "logging_strategy": "steps", "logging_steps": 1} | changes),
        train_dataset=prompts,
        processing_class=character_tokenizer(ALPHABET, END),
        callbacks=[ClassifierFirst(1), copies],
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


def test_in_bfloat16_the_rows_add_up(tmp_path):
    """What an update changed is the difference of two rows, to 1e-5: all is widened before anything is subtracted."""
    rows, _ = run(made("llama").bfloat16(), tmp_path)
    for name in ("microscope/entropy", "microscope/confidence"):
        assert rows[3][name] - rows[2][name] == pytest.approx(rows[3][f"{name}_change"], abs=1e-5)


def test_training_does_not_notice(tmp_path):
    """GPT-2 with its dropout: a look that drew a random number, or left the model in eval, would change every bit."""
    weights = [run(made("gpt2"), tmp_path, looks=looks)[1][-1].state_dict() for looks in (True, False)]
    assert all(torch.equal(x, y) for x, y in zip(*(each.values() for each in weights), strict=True))


def test_a_resumed_run_logs_the_same_rows(tmp_path):
    """The first of them tells of the update after the checkpoint, from the checkpoint's own policy."""
    whole, _ = run(made("llama"), tmp_path / "whole", save_strategy="steps", save_steps=1)
    resumed, _ = run(made("llama"), tmp_path / "resumed", resume=str(tmp_path / "whole" / "checkpoint-2"))
    assert {k: v for k, v in resumed[3].items() if "/" in k} == {k: v for k, v in whole[3].items() if "/" in k}


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
