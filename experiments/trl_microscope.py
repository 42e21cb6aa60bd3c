"""The microscope as a callback for TRL (or any Trainer of transformers): what each update moved, and through what.

trainer.add_callback(Microscope(trainer, tokens, mask))       # tokens (B, T) and the states to look at, (B, T) bool
"""

import torch
from transformers import Trainer, TrainerCallback

from experiments.any_model import exact_split, split_effect
from model import check_counts, confidence, entropy


class Microscope(TrainerCallback):
    """Logs, after every `every` updates, what they did on fixed states: entropy and top-1 probability, their change,
    and what the moves of W alone and of the body alone would have done (any_model.split_effect, by the exact split).

    It costs one forward pass of the body over `tokens` per row, two when training begins, and a copy of W and of the
    features: what was after the last row is before this one. The weights and the random numbers of the training are not
    touched. The rows appear in log_history and wherever the trainer reports to. All processes look, also where FSDP2
    shards the model, and what they see is the same; the trainer logs in one. ValueError if the model's logits are not
    W phi.
    """

    def __init__(self, trainer, tokens, mask, every=1):
        check_counts(every=every)
        if tokens.shape != mask.shape or mask.dtype != torch.bool or not mask.any():
            raise ValueError(f"mask {tuple(mask.shape)} {mask.dtype} selects no state of tokens {tuple(tokens.shape)}")
        self.trainer, self.tokens, self.mask, self.every = trainer, tokens, mask, every

    @torch.no_grad()
    def passed(self, **how):
        """The whole model, called from above so that what is sharded is there, over `tokens`."""
        model = self.trainer.model
        training = model.training
        model.eval()  # dropout would be noise, and draw random numbers that are not ours
        output = model(self.tokens.to(model.device), output_hidden_states=True, **how)
        model.train(training)
        return output

    def look(self):
        """The features (N, d) and the classifier (V, d) as they are now: after a pass FSDP2 leaves the latter whole."""
        phi = self.passed(logits_to_keep=1).hidden_states[-1]  # (B, T, d), and logits where they are fewest
        return phi[self.mask.to(phi.device)], self.trainer.model.get_output_embeddings().weight.detach().clone()

    def on_train_begin(self, args, state, control, model, **kwargs):
        self.before = phi, W = self.look()
        logits = self.passed().logits[self.mask.to(phi.device)]
        bias = getattr(model.get_output_embeddings(), "bias", None)
        if bias is not None or not torch.allclose(phi @ W.T, logits, rtol=1e-2, atol=1e-2):
            raise ValueError(f"the logits of {type(model).__name__} are not W phi: it cannot be split")

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step % self.every:
            return
        (phi, W), self.before = self.before, self.look()
        parts = exact_split(phi, W, *self.before)
        logits = phi.to(parts[0].dtype) @ W.to(parts[0].dtype).T
        now = logits + sum(parts)
        row = {"entropy": entropy(now).mean().item(), "confidence": confidence(now).mean().item()}
        row |= split_effect(logits, *parts)
        due = control.should_log
        # Not the trainer's own: GRPOTrainer.log would add, and forget, what it has gathered for its next row.
        Trainer.log(self.trainer, {f"microscope/{name}": value for name, value in row.items()})
        control.should_log = due  # every row calls that row off
