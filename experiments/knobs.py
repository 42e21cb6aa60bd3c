"""Two knobs of a policy that leave what it says as it is, and change how fast RL moves it: see results.md.

scale     W -> a W, and the gain and bias of the final norm by 1/a: the same function. A step of SGD at rate e is one
          on the old policy with W at e/a^2, the final norm at a^2 e, all else at e. Adam, its epsilon 0: e/a and a e.
constant  one more feature, which is always s, with weights of 0: the logits and G stay, R gains s^2, and all features
          become alike. SGD at rate e moves the new weights as a bias of the logits at rate s^2 e; Adam at rate s e.

Proofs, as tests: experiments/tests/test_knobs.py. Our derivation.
"""

import torch
import torch.nn.functional as F
from torch import nn

from minicfrl import rollout
from model import check


@torch.no_grad()
def turn(model, task, knob, draws):
    """Turn a knob at a policy, in place: ("a", a) scales W; ("s", s) adds a constant feature of s times the length of
    the features (root mean square) in a few responses. ValueError for any other knob."""
    match knob:
        case "a", a:
            scale(model, a)
        case "s", s:
            prompts = [task.prompt(a, b) for a, b in task.train_pairs[:: len(task.train_pairs) // 32][:32].tolist()]
            batch = rollout(model, task, prompts, 1, draws)
            phi = model.features(batch.tokens)[batch.state_mask]  # (N, d)
            add_constant(model, s * phi.square().sum(dim=1).mean().sqrt().item())
        case _:
            raise ValueError(f"there is no knob {knob!r}: only ('a', scale) and ('s', size)")


def scale(model, a):
    """Turn a policy, in place, into the same function with an `a` times larger W."""
    check(0 < a < float("inf"), f"the scale must be finite and positive, not {a}")
    with torch.no_grad():
        model.classifier.weight *= a
        model.body.norm.weight /= a
        model.body.norm.bias /= a


class Constant(nn.Module):
    """The final norm, and beside its features one that is always `size`."""

    def __init__(self, norm, size):
        super().__init__()
        self.norm = norm
        self.register_buffer("size", torch.tensor(size, dtype=norm.weight.dtype))

    def forward(self, x):
        phi = self.norm(x)  # (B, T, d)
        return torch.cat((phi, self.size.expand(*phi.shape[:-1], 1)), dim=-1)  # (B, T, d + 1)


def add_constant(model, size):
    """Give a policy, in place, one more feature that is always `size`, and that it does not use yet."""
    check(0 <= size < float("inf"), f"the constant feature must be finite and not negative, not {size}")
    W = F.pad(model.classifier.weight.detach(), (0, 1))  # (V, d + 1), the new column 0
    model.body.norm = Constant(model.body.norm, size)
    model.classifier = nn.Linear(W.size(1), W.size(0), bias=False, dtype=W.dtype)
    model.classifier.weight = nn.Parameter(W)
