"""The microscope as a callback: what it logs is what happened, and training does not notice."""

import copy
from types import SimpleNamespace

import pytest
import torch
from test_trl_recipe import END, float32, rated, tiny, trainer_of  # noqa: F401  float32 is a fixture
from torch import nn
from transformers import TrainerCallback

from experiments import trl_microscope
from experiments.trl_microscope import Microscope, check_linear
from experiments.trl_recipe import ClassifierFirst
from model import confidence, entropy

pytestmark = pytest.mark.filterwarnings("ignore")
TOKENS = torch.randint(END, (3, 8), generator=torch.Generator().manual_seed(0))
MASK = torch.arange(8).expand(3, 8) >= 3
PADDED = nn.functional.pad(TOKENS, (2, 0), value=END), nn.functional.pad(MASK, (2, 0))
ATTENDED = (PADDED[0] != END).long()


def run(model, out, every=1, looks=(TOKENS, MASK), resume=None, rates=None, **changes):
    """(the rows logged by update, the models before and after every update) of three updates, the first in stage 1."""
    models, how = [copy.deepcopy(model)], {"max_steps": 3, "logging_strategy": "steps", "logging_steps": 1} | changes
    watch = TrainerCallback()
    watch.on_step_end = lambda args, state, control, **_: models.append(copy.deepcopy(model))
    trainer = trainer_of(model, out, [ClassifierFirst(1), watch], rates(model) if rates else (None, None), **how)
    if looks:
        trainer.add_callback(Microscope(trainer, *looks[:2], every, *looks[2:]))
    trainer.train(resume_from_checkpoint=resume)
    rows = trainer.state.log_history
    assert sum("reward" in row for row in rows) == trainer.state.global_step  # the trainer's own are whole
    ours = [{k: v for k, v in row.items() if k == "step" or "microscope/" in k} for row in rows]
    return {row["step"]: row for row in ours if len(row) > 1}, models


@torch.no_grad()
def by_hand(step, before, after):
    """The same numbers from two whole models, by swapping the classifiers."""
    phi = [model.eval().base_model(TOKENS).last_hidden_state[MASK] for model in (before, after)]
    W, row = [model.get_output_embeddings().weight for model in (before, after)], {"step": step}
    for name, measure in (("microscope/entropy", entropy), ("microscope/confidence", confidence)):
        old, body, head, new = (measure(features @ w.T).mean().item() for w in W for features in phi)
        row |= {name: new, f"{name}_change": new - old, f"{name}_residual": new + old - head - body}
        row |= {f"{name}_by_W": head - old, f"{name}_by_body": body - old}
    return row


SMALL = rated(1e-6, 2e-5, steps=1)  # the README's own: a pass in bfloat16 would round to some 1e-4
LOOKS = {  # with which tolerance
    "large updates": (2e-5, {}),
    "every second": (2e-5, dict(every=2, gradient_accumulation_steps=2)),
    "padded on the left": (2e-5, dict(looks=(*PADDED, ATTENDED))),
    "autocast": (1e-6, dict(rates=SMALL, bf16=True)),
    "bfloat16": (1e-6, dict(rates=SMALL)),
}


@pytest.mark.parametrize("kind", ["gpt2", "llama"])
@pytest.mark.parametrize("case", LOOKS)
def test_what_is_logged_is_what_happened_however_small_and_whatever_the_precision(kind, case, tmp_path):
    """Against float64, to a few roundings. Several updates are told as one; in stage 1 nothing goes through the body; a
    resumed run logs the same. Matrices are 5 times as large as at first, so that the policy is confident."""
    (tolerance, how), dtype = LOOKS[case], torch.bfloat16 if case == "bfloat16" else torch.float32
    make = lambda: tiny(kind).to(dtype)  # noqa: E731
    for p in (model := make()).parameters():
        p.data *= 5 if p.ndim > 1 else 1
    rows, models = run(model, tmp_path, max_steps=4, save_strategy="steps", save_steps=2, **how)
    assert [*rows] == [*range((every := how.get("every", 1)), 5, every)]
    for step, row in rows.items():
        assert row == pytest.approx(by_hand(step, models[step - every].double(), models[step].double()), abs=tolerance)
        assert step > 1 or row["microscope/entropy_by_body"] == 0
    again, _ = run(make(), tmp_path, max_steps=4, resume=str(tmp_path / "checkpoint-2"), **how)
    assert {step: row for step, row in again.items() if step > 2} == {s: row for s, row in rows.items() if s > 2}


def test_training_does_not_notice(tmp_path):
    """With dropout: a look that drew a random number, or left the model in eval, would change every bit."""
    weights = [run(tiny(dropout=0.1), tmp_path, looks=looks)[1][-1].parameters() for looks in ((TOKENS, MASK), ())]
    assert all(torch.equal(x, y) for x, y in zip(*weights, strict=True))


def test_what_cannot_be_looked_at_is_refused(monkeypatch, tmp_path):
    """No state, no interval, or padding unsaid; a head with more to learn; logits that are scaled only later, as by an
    adapter; coarse weights that are sharded, so that nothing widens them."""
    trainer = SimpleNamespace(model=(model := tiny()), processing_class=SimpleNamespace(pad_token_id=END))
    for (tokens, mask, *how), message in (
        ((TOKENS, MASK & False), "selects no state"),
        ((TOKENS, MASK, 0), "every must be a whole number of at least 1"),
        (PADDED, "tokens begin with the padding token: give their attention_mask"),
        ((*PADDED, 1, ATTENDED.flip(1)), "does not cover the states of mask"),
    ):
        with pytest.raises(ValueError, match=message):
            Microscope(trainer, tokens, mask, *how)
    model.lm_head.adapter = nn.Linear(32, 1)
    with pytest.raises(ValueError, match="not W phi: the classifier learns by more than W, as with an adapter"):
        Microscope(trainer, TOKENS, MASK).look()
    head = (model := tiny()).lm_head
    linear, start = head.forward, head.weight.detach().clone()
    head.forward = lambda phi: linear(phi) * (2 - torch.equal(head.weight, start))
    with pytest.raises(ValueError, match="logits of GPT2LMHeadModel are not W phi: the classifier does not multiply"):
        run(model, tmp_path)
    monkeypatch.setattr(trl_microscope, "DTensor", torch.Tensor)
    with pytest.raises(ValueError, match="LlamaForCausalLM is sharded in torch.bfloat16, too coarse to look at"):
        run(tiny("llama").bfloat16(), tmp_path)


WRONG = [
    (dict(leaves=lambda x: 30 * torch.tanh(x / 30)), "what leaves the classifier is changed"),
    (dict(leaves=lambda x: 2 * x), "what leaves the classifier is changed"),
    (dict(classifier=lambda x: 1.5 * x), "the classifier does not multiply by W alone"),
    (dict(enters=lambda x: x / 2), r"not the last hidden state, of shape \(4, 20, 576\)"),
    (dict(run=lambda: (torch.ones(2, 3, 576), torch.ones(2, 3, 300))), "the classifier does not multiply by W alone"),
    (dict(bias=True), "the classifier has a bias"),
]


@pytest.mark.parametrize("size", [1e-6, 1.0, 1e3])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, None])
def test_w_phi_is_known_in_any_precision_and_what_is_not_is_seen_whatever_its_size(dtype, size):
    """In logits too small to meet a cap, too. W phi may be computed under autocast (None), and widened afterwards. One
    of the wrong models does not even call its classifier."""
    linear = (head := nn.Linear(576, 300, bias=False, dtype=dtype)).forward
    phi = size * torch.randn(4, 20, 576, generator=torch.Generator().manual_seed(0)).to(head.weight.dtype)

    def ask(enters=lambda x: x, classifier=lambda x: x, leaves=lambda x: x, bias=False, run=None):
        head.bias = nn.Parameter(head.weight[:, 0].detach()) if bias else None
        head.forward = lambda x: classifier(linear(x))
        model = SimpleNamespace(get_output_embeddings=lambda: head)
        check_linear(model, run or (lambda: (phi, leaves(head(enters(phi))))))

    with torch.autocast("cpu", torch.bfloat16, enabled=dtype is None):
        ask(leaves=lambda x: x.float())
    for wrong, message in WRONG:
        with pytest.raises(ValueError, match=f"are not W phi: .*{message}"):
            ask(**wrong)
        assert not head._forward_hooks
