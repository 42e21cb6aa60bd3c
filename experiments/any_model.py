"""A language model of transformers as model.py's policy is: body, and classifier W. And are its logits W phi?"""

from types import SimpleNamespace

import torch
from torch import nn


class Body(nn.Module):
    """A base model of transformers, called as model.py's Body is: tokens (B, T) -> phi (B, T, d)."""

    def __init__(self, base):
        super().__init__()
        self.base = base

    def forward(self, tokens):
        return self.base(tokens, use_cache=False).last_hidden_state


def untied(lm):
    """A classifier of the model's own weights that shares nothing with the embedding."""
    head = lm.get_output_embeddings()
    classifier = nn.Linear(head.in_features, head.out_features, bias=False)
    classifier.weight.data = head.weight.detach().clone()
    return classifier


class Policy(nn.Module):
    """Body and classifier, with the names that ntk.py asks for: ntk.influence(Policy(Body(lm.base_model), untied(lm)),
    ...) says who teaches whom in a language model."""

    def __init__(self, body, classifier):
        super().__init__()
        self.config = SimpleNamespace(vocab_size=classifier.out_features)
        self.body, self.classifier = body, classifier

    def features(self, tokens):
        """tokens (B, T) -> phi (B, T, d)."""
        return self.body(tokens)

    def forward(self, tokens):
        return self.classifier(self.features(tokens))


@torch.no_grad()
def check_linear(model, run) -> None:
    """ValueError unless the logits of a language model of transformers are W phi and nothing more, whatever their size.

    `run()` passes some tokens through `model` and returns the last hidden states, phi, and the logits. One pass tells,
    looked at where it meets W: is it phi that enters, does W phi leave, and is nothing done afterwards? To see that,
    numbers of all sizes are put in the place of W phi: a soft cap changes only the large ones, which training brings.
    """
    head, met = model.get_output_embeddings(), []

    def meet(head, inputs, output):
        wide = torch.promote_types(output.dtype, torch.float32)
        x, W, y = (each.detach().to(wide) for each in (inputs[0], head.weight, output))
        eps = max(torch.finfo(each.dtype).eps for each in (inputs[0], head.weight, output))
        # Rounding, with 576 features: up to 1.2 eps of |x| |W|^T in float32, .2 in bfloat16, .4 under autocast.
        linear = ((y - x @ W.T).abs() <= 10 * eps * (x.abs() @ W.abs().T)).all().item()
        instead = torch.linspace(-1e4, 1e4, output.numel(), device=output.device).view_as(output).to(output.dtype)
        met.append((inputs[0], linear, instead))
        return instead

    hook = head.register_forward_hook(meet)
    try:
        phi, logits = run()
    finally:
        hook.remove()
    entered, linear, instead = met[-1] if met else (phi, False, logits)
    if getattr(head, "bias", None) is not None:
        fault = "the classifier has a bias"
    elif not linear:
        fault = "the classifier does not multiply by W alone"
    elif entered.shape != phi.shape or not torch.equal(entered.to(phi.dtype), phi):
        fault = f"what enters the classifier is not the last hidden state, of shape {tuple(phi.shape)}"
    elif not torch.equal(instead.to(logits.dtype), logits):
        fault = "what leaves the classifier is changed, as by a scale or a soft cap"
    else:
        return
    raise ValueError(f"the logits of {type(model).__name__} are not W phi: {fault}")
