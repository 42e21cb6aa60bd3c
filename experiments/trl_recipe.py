"""CF-RL on a real model: the stage as a callback for TRL's GRPOTrainer. Needs the extra `trl`; see the README.

Why each refusal, and what else to know:
- Parameters frozen before train() never enter the optimiser, silently, and a second train() reuses it: both refused.
- Most small models tie the classifier to the token embedding; trained "alone" it would move the features: refused.
- Sharded parameters (FSDP2) are all right if the model is sharded as it is loaded, under torchrun, for N processes:
  from_pretrained(..., distributed_config=transformers.distributed.DistributedConfig(fsdp_size=N)). Refused: FSDP by
  GRPOConfig(fsdp=...), since the trainer then takes no optimizers, and ZeRO, which keeps gradients in its own buffers.
- TRL checkpoints gradients by default: then stage 1 still backpropagates through the body (an update costs 0.76 of a
  full one instead of 0.34), and DDP fails unless ddp_find_unused_parameters=True.
- TRL clips gradients by default, in stage 1 by the norm of W's alone: then the control is no longer matched.
- Without two_rates, a schedule that warms up has a learning rate of 0 at first: the classifier then rests too.
- Resuming is exact within the first pass over the prompts. GPT-NeoX (Pythia) loses its classifier on the way, with a
  warning in the log: load the model itself from the checkpoint as well.
"""

import torch
from transformers import TrainerCallback


class ClassifierFirst(TrainerCallback):
    """CF-RL: for k updates the output embedding alone learns, then everything. freeze=False is the matched control."""

    def __init__(self, k, freeze=True):
        self.k, self.freeze = k, freeze

    def on_train_begin(self, args, state, control, model, optimizer, **kwargs):
        classifier = model.get_output_embeddings()
        if classifier is None:
            raise ValueError(f"{type(model).__name__} has no output embedding, so no classifier to train first")
        if classifier.weight is model.get_input_embeddings().weight:
            raise ValueError("the classifier is tied to the token embedding: untie them, or the features move with it")
        if type(self.k) is not int or not 0 <= self.k <= state.max_steps:
            raise ValueError(f"k={self.k} is not between 0 and max_steps={state.max_steps}")
        if args.fsdp or args.deepspeed:
            raise ValueError(
                "no fsdp, no deepspeed: shard by from_pretrained(distributed_config=...), as the recipe says"
            )
        known = {id(p) for group in optimizer.param_groups for p in group["params"]}
        if any(id(p) not in known or not p.requires_grad for p in model.parameters()):
            raise ValueError(
                "a parameter is frozen or unknown to the optimiser: give the trainer all of them, unfrozen"
            )
        if state.global_step == 0 and optimizer.state:
            raise ValueError("a second train() goes on with the first one's optimiser: make a new trainer")

    def on_step_begin(self, args, state, control, model, optimizer, **kwargs):
        model.requires_grad_(state.global_step >= self.k or not self.freeze)
        model.get_output_embeddings().requires_grad_(True)
        if state.global_step == self.k:
            optimizer.state.clear()  # stage 2 starts afresh, as in minicfrl.py

    def on_train_end(self, args, state, control, model, **kwargs):
        model.requires_grad_(True)


def two_rates(model, k, lr, classifier_lr):
    """Optimiser and schedule that move the classifier at classifier_lr for k updates, and all else at lr."""
    classifier = list(model.get_output_embeddings().parameters())
    body = [p for p in model.parameters() if all(p is not q for q in classifier)]
    optimizer = torch.optim.AdamW([{"params": classifier}, {"params": body}], lr=lr, weight_decay=0.0)
    rates = [lambda step: classifier_lr / lr if step < k else 1.0, lambda step: 1.0]
    return optimizer, torch.optim.lr_scheduler.LambdaLR(optimizer, rates)
