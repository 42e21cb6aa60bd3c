"""CF-RL on a real model: the stage as a callback for TRL's GRPOTrainer. Needs the extra `trl`; see the README.

- In stage 1 the body's gradients are dropped before each update: none at all, for zeros would let Adam's momentum move
  it. Freezing would spare computing them (an update without its sampling costs 0.95 of a full one, and would cost
  0.34). But what is frozen stays so, unnoticed, if training is cut short; and clipping would go by the norm of W's
  gradient alone, so that the control would not be matched.
- Most small models tie the classifier to the token embedding; trained "alone" it would move the features: refused.
- Parameters frozen before train() never enter the optimiser, silently, and a second train() reuses it: both refused.
- Sharded parameters (FSDP2) are all right if the model is sharded as it is loaded, under torchrun, for N processes:
  from_pretrained(..., distributed_config=transformers.distributed.DistributedConfig(fsdp_size=N)). Refused: FSDP by
  GRPOConfig(fsdp=...), since the trainer then takes no optimizers, and ZeRO, which keeps gradients in its own buffers.
- Without two_rates, a schedule that warms up has a learning rate of 0 at first: the classifier then rests too.
- A run is resumed with its own settings or refused: the trainer restores some of them and takes the rest as given.
- Resuming is exact within the first pass over the prompts, from a checkpoint at which new responses were due: TRL does
  not save those it still had to use (num_iterations, or steps_per_generation beyond the accumulation). GPT-NeoX
  (Pythia) loses its classifier on the way, with a warning in the log: load the model itself from the checkpoint too.
"""

from numbers import Integral

import torch
from datasets import Dataset
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast, TrainerCallback
from transformers.trainer_callback import ExportableState


class ClassifierFirst(TrainerCallback, ExportableState):
    """CF-RL: for classifier_steps updates the output embedding alone learns, then everything. freeze=False is the
    matched control."""

    def __init__(self, classifier_steps, freeze=True):
        self.classifier_steps, self.freeze = whole(classifier_steps), freeze

    def state(self):
        """What a checkpoint remembers of the callback."""
        return {"args": {"classifier_steps": self.classifier_steps, "freeze": self.freeze}, "attributes": {}}

    def on_train_begin(self, args, state, control, model, optimizer, **kwargs):
        check_resumed(state.stateful_callbacks.get(type(self).__name__, {}).get("args"), self.state()["args"])
        head = model.get_output_embeddings()
        if head is None:
            raise ValueError(f"{type(model).__name__} has no output embedding, so no classifier to train first")
        for name, module in model.named_modules():
            for p in module.parameters(recurse=False):
                if module is not head and (p is head.weight or place(p) == place(head.weight) != 0):
                    raise ValueError(
                        f"the classifier is tied to {name}, which would move with it; to untie them: "
                        "head = model.get_output_embeddings(); model.config.tie_word_embeddings = False; "
                        "head.weight = torch.nn.Parameter(head.weight.detach().clone())"
                    )
        if self.classifier_steps > state.max_steps:
            raise ValueError(f"classifier_steps={self.classifier_steps} is more than max_steps={state.max_steps}")
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
            raise ValueError(
                "the optimiser has a state before the first update, from a train() before this one or because it makes "
                "one at once (Adagrad): stage 2 starts without any, so make a new trainer or take another optimiser"
            )

    def on_pre_optimizer_step(self, args, state, control, model, optimizer, **kwargs):
        if self.freeze and state.global_step < self.classifier_steps:
            classifier = set(model.get_output_embeddings().parameters())
            for p in set(model.parameters()) - classifier:
                p.grad = None
        if state.global_step == self.classifier_steps:
            optimizer.state.clear()  # stage 2 starts afresh, as in minicfrl.py


class TwoRates(torch.optim.lr_scheduler.LRScheduler):
    """The learning rates of two_rates. They are not its base rate times a factor, so that any of them may be 0."""

    def __init__(self, optimizer, **settings):
        self.settings = settings
        super().__init__(optimizer)

    def get_lr(self):
        stage_2 = self.last_epoch >= self.settings["classifier_steps"]
        return [self.settings["lr" if stage_2 else "classifier_lr"], self.settings["lr"]]

    def load_state_dict(self, state_dict):
        check_resumed(state_dict.get("settings"), self.settings)
        super().load_state_dict(state_dict)


def two_rates(model, classifier_steps, lr, classifier_lr):
    """Optimiser and schedule that move the classifier at classifier_lr for classifier_steps updates, all else at lr."""
    classifier = list(model.get_output_embeddings().parameters())
    body = [p for p in model.parameters() if all(p is not q for q in classifier)]
    optimizer = torch.optim.AdamW([{"params": classifier}, {"params": body}], weight_decay=0.0)
    settings = dict(classifier_steps=whole(classifier_steps), lr=float(lr), classifier_lr=float(classifier_lr))
    return optimizer, TwoRates(optimizer, **settings)


def character_tokenizer(alphabet, end_token):
    """One token per character, numbered as in `alphabet`, and an end token that also pads."""
    vocabulary = {character: token for token, character in enumerate(alphabet)} | {"<end>": end_token}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<end>"))
    tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizers.Split("", "isolated"), decoders.Fuse()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<end>", eos_token="<end>")


def tiny_random():
    """Something to try it on: a random Llama, a tokenizer of characters, prompts such as 4+7=, and a reward."""
    characters = "0123456789+="
    sizes = dict(
        vocab_size=len(characters) + 1, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4
    )
    model = LlamaForCausalLM(LlamaConfig(**sizes, tie_word_embeddings=True))
    tokenizer = character_tokenizer(characters, len(characters))
    prompts = Dataset.from_list([{"prompt": f"{i}+{j}="} for i in range(10) for j in range(10)])
    return model, tokenizer, prompts, lambda completions, **_: [float(len(set(text))) for text in completions]


def whole(classifier_steps):
    """As an int, which a checkpoint can hold, whatever kind of whole number it is."""
    if not isinstance(classifier_steps, Integral) or classifier_steps < 0:
        raise ValueError(f"classifier_steps must be a whole number of at least 0, not {classifier_steps!r}")
    return int(classifier_steps)


def check_resumed(saved, given):
    if saved != given:
        raise ValueError(f"the checkpoint is of a run with {saved}, and cannot be resumed with {given}")


def place(parameter):
    """Where its numbers begin in memory, of a sharded one this process's; 0 if it has none here."""
    local = parameter.to_local() if hasattr(parameter, "to_local") else parameter
    return local.untyped_storage().data_ptr()
