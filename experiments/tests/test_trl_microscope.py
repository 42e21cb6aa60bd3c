"""The microscope as a callback: what it logs is what happened, and training does not notice."""

import copy
from types import SimpleNamespace

import pytest
import torch

pytest.importorskip("trl", reason='needs the extra: pip install -e ".[trl]"')

from test_trl_recipe import END, float32, rated, tiny, trainer_of  # noqa: E402, F401  float32 is a fixture
from torch import nn  # noqa: E402
from transformers import TrainerCallback  # noqa: E402

from experiments import trl_microscope  # noqa: E402
from experiments.trl_microscope import Microscope, check_linear  # noqa: E402
from experiments.trl_recipe import ClassifierFirst  # noqa: E402
from model import confidence, entropy  # noqa: E402

pytestmark = pytest.mark.filterwarnings("ignore")
TOKENS = torch.randint(END, (3, 8), generator=torch.Generator().manual_seed(0))
MASK = torch.arange(8).expand(3, 8) >= 3


class Copies(TrainerCallback):
    """The whole model before training and after every update."""

    def __init__(self):
        self.models = []

    def on_train_begin(self, args, state, control, model, **kwargs):
        self.models.append(copy.deepcopy(model))

    on_step_end = on_train_begin


def run(model, out, every=1, looks=True, resume=None, rates=None, **changes):
    """(the rows logged by update, the models after every update) of three updates, the first in stage 1."""
    copies, how = Copies(), {"steps": 3, "logging_strategy": "steps", "logging_steps": 1} | changes
    trainer = trainer_of(model, out, [ClassifierFirst(1), copies], rates(model) if rates else (None, None), **how)
    if looks:
        trainer.add_callback(Microscope(trainer, TOKENS, MASK, every))
    trainer.train(resume_from_checkpoint=resume)
    history = trainer.state.log_history
    ours = [{k: v for k, v in row.items() if k == "step" or "microscope/" in k} for row in history]
    assert sum("reward" in row for row in history) == trainer.state.global_step  # the trainer's own rows are whole
    return {row["step"]: row for row in ours if len(row) > 1}, copies.models


@torch.no_grad()
def by_hand(before, after):
    """The same numbers from two whole models, by swapping the classifiers."""
    phi = [model.eval().base_model(TOKENS).last_hidden_state[MASK] for model in (before, after)]
    W = [model.get_output_embeddings().weight for model in (before, after)]
    old, new = (features @ classifier.T for features, classifier in zip(phi, W, strict=True))
    row = {"microscope/entropy": entropy(new).mean(), "microscope/confidence": confidence(new).mean()}
    for name, measure in (("entropy", entropy), ("confidence", confidence)):
        moves = {"change": new, "by_W": phi[0] @ W[1].T, "by_body": phi[1] @ W[0].T}
        change, *parts = ((measure(logits) - measure(old)).mean() for logits in moves.values())
        parts = zip(("change", "by_W", "by_body", "residual"), (change, *parts, change - sum(parts)), strict=True)
        row |= {f"microscope/{name}_{part}": value for part, value in parts}
    return {name: value.item() for name, value in row.items()}


@pytest.mark.parametrize("kind", ["gpt2", "llama"])
@pytest.mark.parametrize("every", [1, 2])
def test_what_is_logged_is_what_happened(kind, every, tmp_path):
    """Several updates are told as one. To 2e-5, a few roundings of float32 in entropies of 2.5 nats. In stage 1 nothing
    goes through the body. A resumed run logs the same rows."""
    how = dict(every=every, steps=4, gradient_accumulation_steps=every)
    rows, models = run(tiny(kind), tmp_path, save_strategy="steps", save_steps=2, **how)
    assert [*rows] == [*range(every, 5, every)]
    for step, row in rows.items():
        assert row == pytest.approx({"step": step} | by_hand(models[step - every], models[step]), abs=2e-5)
        assert (row["microscope/entropy_by_body"] == 0) == (step == 1)
    again, _ = run(tiny(kind), tmp_path, resume=str(tmp_path / "checkpoint-2"), **how)
    assert {step: row for step, row in again.items() if step > 2} == {s: row for s, row in rows.items() if s > 2}


@pytest.mark.parametrize("kind", ["gpt2", "llama"])
@pytest.mark.parametrize("precision", ["float32", "autocast", "bfloat16"])
def test_small_updates_are_seen_whatever_the_precision_of_training(kind, precision, tmp_path):
    """At the README's own rates, against float64: to 1e-6, a few roundings of float32. A pass in bfloat16 rounds to
    some 1e-4. Matrices are 5 times as large as at first, so that the policy is confident enough for this to matter."""
    model = tiny(kind)
    for p in model.parameters():
        p.data *= 5 if p.ndim > 1 else 1
    model = model.bfloat16() if precision == "bfloat16" else model
    rows, models = run(model, tmp_path, bf16=precision == "autocast", rates=rated(1e-6, 2e-5, steps=1))
    for step in (1, 2, 3):
        before, after = (each.double() for each in models[step - 1 : step + 1])
        assert rows[step] == pytest.approx({"step": step} | by_hand(before, after), abs=1e-6)


def test_training_does_not_notice(tmp_path):
    """With dropout: a look that drew a random number, or left the model in eval, would change every bit."""
    weights = [run(tiny(dropout=0.1), tmp_path, looks=looks)[1][-1].state_dict() for looks in (True, False)]
    assert all(torch.equal(x, y) for x, y in zip(*(each.values() for each in weights), strict=True))


@pytest.mark.parametrize("kind", ["gpt2", "llama"])
def test_padding_on_the_left_changes_nothing(kind):
    """With its attention_mask the states are those of the tokens alone; without, it is refused."""
    trainer = SimpleNamespace(model=tiny(kind), processing_class=SimpleNamespace(pad_token_id=END))
    padded = torch.cat((torch.full((3, 2), END), TOKENS), dim=1)
    mask, attended = torch.cat((MASK[:, :2] & False, MASK), dim=1), (padded != END).long()
    alone, _ = Microscope(trainer, TOKENS, MASK).look()
    torch.testing.assert_close(Microscope(trainer, padded, mask, attention_mask=attended).look()[0], alone)
    with pytest.raises(ValueError, match="tokens begin with the padding token: give their attention_mask"):
        Microscope(trainer, padded, mask)
    with pytest.raises(ValueError, match="does not cover the states of mask"):
        Microscope(trainer, padded, mask, attention_mask=attended.flip(1))


def test_what_cannot_be_looked_at_is_refused(monkeypatch, tmp_path):
    """A mask without a state, no interval, and coarse weights that are sharded, so that nothing widens them."""
    for mask, every, message in ((0 * MASK, 1, "selects no state"), (MASK, 0, "every must be a whole number of at")):
        with pytest.raises(ValueError, match=message):
            Microscope(None, TOKENS, mask.bool(), every)
    monkeypatch.setattr(trl_microscope, "DTensor", torch.Tensor)
    with pytest.raises(ValueError, match="LlamaForCausalLM is sharded in torch.bfloat16, too coarse to look at"):
        run(tiny("llama").bfloat16(), tmp_path)


# ------------------------------------------------------------------------------------------------ are the logits W phi?


class Language(nn.Module):
    """What check_linear sees of a language model: phi, W, and what may be wrong about them."""

    def __init__(self, dtype=None, bias=False, enters=lambda x: x, classifier=lambda x: x, leaves=lambda x: x):
        super().__init__()
        self.head, self.enters, self.leaves = nn.Linear(576, 300, bias, dtype=dtype), enters, leaves
        linear = self.head.forward
        self.head.forward = lambda x: classifier(linear(x))

    def get_output_embeddings(self):
        return self.head

    def run(self, size, cast=False):
        phi = size * torch.randn(4, 20, 576, generator=torch.Generator().manual_seed(0)).to(self.head.weight.dtype)
        with torch.autocast("cpu", torch.bfloat16, enabled=cast):
            return phi, self.leaves(self.head(self.enters(phi)))


WRONG = [
    (dict(leaves=lambda x: 30 * torch.tanh(x / 30)), "what leaves the classifier is changed"),
    (dict(leaves=lambda x: 2 * x), "what leaves the classifier is changed"),
    (dict(classifier=lambda x: 1.5 * x), "the classifier does not multiply by W alone"),
    (dict(enters=lambda x: x / 2), r"not the last hidden state, of shape \(4, 20, 576\)"),
    (dict(bias=True), "the classifier has a bias"),
]


@pytest.mark.parametrize("size", [1e-6, 1.0, 1e3])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, None])
def test_w_phi_is_known_in_any_precision_and_what_is_not_is_seen_whatever_its_size(dtype, size):
    """In logits too small to meet a cap, too. W phi may be computed under autocast (None), and widened afterwards."""
    model = Language(dtype, leaves=lambda x: x.float())
    check_linear(model, lambda: model.run(size, cast=dtype is None))
    for wrong, message in WRONG:
        model = Language(dtype, **wrong)
        with pytest.raises(ValueError, match=f"the logits of Language are not W phi: .*{message}"):
            check_linear(model, lambda model=model: model.run(size))
        assert not model.head._forward_hooks
    with pytest.raises(ValueError, match="the classifier does not multiply by W alone"):  # it is not even called
        check_linear(Language(), lambda: (torch.ones(2, 3, 576), torch.ones(2, 3, 300)))


def test_a_model_that_scales_its_logits_is_refused_before_any_update(tmp_path):
    model = tiny()
    head, before = model.lm_head.forward, model.lm_head.weight.detach().clone()
    model.lm_head.forward = lambda phi: 3 * head(phi)
    with pytest.raises(ValueError, match="the logits of GPT2LMHeadModel are not W phi"):
        run(model, tmp_path)
    assert torch.equal(model.lm_head.weight, before)
