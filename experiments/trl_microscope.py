"""The microscope as a callback for TRL (or any Trainer of transformers): what each update moved, and through what.

trainer.add_callback(Microscope(trainer, tokens, mask))       # tokens (B, T) and the states to look at, (B, T) bool
"""

import torch
from torch.distributed.tensor import DTensor
from torch.func import functional_call
from transformers import Trainer, TrainerCallback

from model import check, check_counts, confidence, entropy
from ntk import exact_split, split_effect


class Microscope(TrainerCallback):
    """Logs, after every `every` updates, what they did on fixed states: entropy and top-1 probability, their change,
    and what the moves of W alone and of the body alone would have done (ntk.split_effect, by the exact split).

    It costs one forward pass of the body over `tokens` per row, one when training begins, and a copy of W and of the
    features: what was after the last row is before this one. A small update moves less than bfloat16 can tell, so the
    pass is in float32 also where training is not; weights in bfloat16 are widened for it, all at once. (Attention that
    knows no float32, such as flash_attention_2, will not do.) The weights and the random numbers of the training are
    not touched. The rows appear in log_history and wherever the trainer reports to. All processes look, also where
    FSDP2 shards the model, and what they see is the same; the trainer logs in one. ValueError if the model's logits are
    not W phi. Tokens padded on the left need their attention_mask (B, T).
    """

    def __init__(self, trainer, tokens, mask, every=1, attention_mask=None):
        check_counts(every=every)
        if tokens.shape != mask.shape or mask.dtype != torch.bool or not mask.any():
            raise ValueError(f"mask {tuple(mask.shape)} {mask.dtype} selects no state of tokens {tuple(tokens.shape)}")
        if attention_mask is not None:
            if attention_mask.shape != tokens.shape or (mask & (attention_mask == 0)).any():
                raise ValueError(f"attention_mask {tuple(attention_mask.shape)} does not cover the states of mask")
            # Padding goes to the right, where no state sees it, whatever the model does about positions.
            order = attention_mask.argsort(dim=1, descending=True, stable=True)
            tokens, mask = tokens.gather(1, order), mask.gather(1, order)
        elif getattr(trainer.processing_class, "pad_token_id", None) in tokens[:, 0].tolist():
            raise ValueError("tokens begin with the padding token: give their attention_mask, of ones if it is none")
        self.trainer, self.tokens, self.mask, self.every = trainer, tokens, mask, every

    @torch.no_grad()
    def passed(self, **how):
        """(features (B, T, d), logits) of the model, called from above so that what is sharded is there."""
        model, how["output_hidden_states"] = self.trainer.model, True
        weights = [*model.named_parameters(), *model.named_buffers()]
        coarse = (torch.bfloat16, torch.float16)
        wide = {name: x.float() for name, x in weights if x.dtype in coarse and not isinstance(x, DTensor)}
        modes = {module: module.training for module in model.modules()}
        mixed = vars(model).get("forward")  # accelerate's, with autocast around the model's own
        if mixed:
            model.forward = getattr(model, "_original_forward", mixed)
        model.eval()  # dropout would be noise, and draw random numbers that are not ours
        try:
            output = functional_call(model, wide, (self.tokens.to(model.device),), how)
        finally:
            if mixed:
                model.forward = mixed
            for module, training in modes.items():
                module.training = training
        return output.hidden_states[-1], output.logits

    def look(self):
        """The features (N, d) and the classifier (V, d) as they are now: after a pass FSDP2 leaves the latter whole. Is
        it still all that makes logits of features? An adapter starts at 0, and is seen later."""
        model = self.trainer.model
        phi, _ = check_linear(model, lambda: self.passed(logits_to_keep=1))  # logits where they are fewest
        W = model.get_output_embeddings().weight.detach()
        return phi[self.mask.to(phi.device)], W.to(phi.dtype, copy=True)

    def on_train_begin(self, args, state, control, model, **kwargs):
        self.before = phi, _ = self.look()
        coarse = torch.finfo(phi.dtype).bits < 32  # sharded weights have not been widened
        check(not coarse, f"{type(model).__name__} is sharded in {phi.dtype}, too coarse to look at: use float32")

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step % self.every:
            return
        (phi, W), self.before = self.before, self.look()
        parts = exact_split(phi, W, *self.before)
        logits = phi @ W.T
        now = logits + sum(parts)
        row = {"entropy": entropy(now).mean().item(), "confidence": confidence(now).mean().item()}
        row |= split_effect(logits, *parts)
        due = control.should_log
        # Not the trainer's own: GRPOTrainer.log would add, and forget, what it has gathered for its next row.
        Trainer.log(self.trainer, {f"microscope/{name}": value for name, value in row.items()})
        control.should_log = due  # every row calls that row off


@torch.no_grad()
def check_linear(model, run):
    """ValueError unless the logits of a language model of transformers are W phi and nothing more, whatever their size.

    `run()` passes some tokens through `model` and returns the last hidden states, phi, and the logits, of all positions
    or of the last ones. So does this. One pass tells, looked at where it meets W: is it phi that enters, does W phi
    leave, is nothing done afterwards, and does nothing but W learn there? Numbers of all sizes are put in the place of
    W phi, because a soft cap changes only the large ones, which training brings.
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
    last = phi[:, -entered.shape[1] :]
    same = entered.shape == last.shape and torch.equal(entered.to(phi.dtype), last)
    learning = [p for p in head.parameters() if p.requires_grad and p is not head.weight]
    for right, fault in (
        (getattr(head, "bias", None) is None, "the classifier has a bias"),
        (not learning, "the classifier learns by more than W, as with an adapter"),
        (linear, "the classifier does not multiply by W alone"),
        (same, f"what enters the classifier is not the last hidden state, of shape {tuple(phi.shape)}"),
        (torch.equal(instead.to(logits), logits), "what leaves the classifier is changed, as by a scale or a soft cap"),
    ):
        check(right, f"the logits of {type(model).__name__} are not W phi: {fault}")
    return phi, logits
