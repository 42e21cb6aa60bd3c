"""The check that the logits of a model are W phi."""

import pytest
import torch
from tiny import generator
from torch import nn

from experiments.any_model import check_linear


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
