"""What a run's microscope says moved a policy is what did."""

import math

import pytest
import torch
from hypothesis import given, settings
from test_one_update import logits_at, moved
from tiny import generator, seeds, states, tiny_gpt

from experiments.measures import Microscope
from model import confidence, entropy
from ntk import confidence_change, entropy_change, logit_change


@given(seed=seeds)
@settings(max_examples=10)
def test_a_run_s_microscope_sees_what_an_update_did_and_theory_predicts_it_to_first_order(seed):
    """Each component is what its own parameters do alone, exactly; (E8) and (E9) say the same up to the square of the
    update. The agreement is the mean cosine of W's part and the whole, less their means, over the rows' first states
    and over the others."""
    model = tiny_gpt(seed)
    tokens, mask = states(model, 3, 6, seed)
    update = {name: 1e-4 * torch.randn(p.shape, generator=generator(seed)) for name, p in model.named_parameters()}
    logits = logits_at(model, tokens, mask)

    def measured(measure, part=""):
        return (measure(logits_at(moved(model, update, part=part), tokens, mask)) - measure(logits)).mean().item()

    view = Microscope(model, tokens, mask)
    view.model = moved(model, update)
    seen = view.moved()
    predicted = logit_change(model, tokens, mask, update)
    for name, measure, change in (("entropy", entropy, entropy_change), ("confidence", confidence, confidence_change)):
        by_W, by_body, residual = (seen[f"{name}_{part}"] for part in ("by_W", "by_body", "residual"))
        assert by_W + by_body + residual == pytest.approx(seen[f"{name}_change"], abs=1e-14)
        assert seen[f"{name}_change"] == pytest.approx(measured(measure), abs=1e-14)
        assert by_W == pytest.approx(measured(measure, "classifier"), abs=1e-14)
        assert by_body == pytest.approx(measured(measure, "body"), abs=1e-14)
        if (logits.topk(2).values.diff() < -1e-2).all():  # nowhere does the update make another token the likeliest
            for part, df in zip((by_W, by_body), predicted, strict=True):
                assert part == pytest.approx(change(logits, df).mean().item(), abs=1e-5)  # it moves logits by 1e-3

    f = logits_at(moved(model, update), tokens, mask)
    by_W, whole = logits_at(moved(model, update, part="classifier"), tokens, mask) - logits, f - logits
    for kind in ("prompt", "continuation"):
        cosines = []
        for n, (i, t) in enumerate(mask.nonzero().tolist()):
            if (kind == "prompt") == (not mask[i, :t].any()):
                a, b = by_W[n] - by_W[n].mean(), whole[n] - whole[n].mean()
                cosines.append((a @ b / a.norm() / b.norm()).item())
        expected = sum(cosines) / len(cosines) if cosines else math.nan
        assert seen[f"agreement_{kind}"] == pytest.approx(expected, nan_ok=True)
