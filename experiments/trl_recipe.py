"""CF-RL on a real model: the stage as a callback for TRL's GRPOTrainer. Needs the extra `trl`; see the README. The file
imports nothing else of this project, and can be copied into another.

- In stage 1 the body's gradients are dropped before each update: none at all, because zeros would let weight decay move
  it. Freezing would spare computing them (an update without its sampling costs 0.95 of a full one, and would cost
  0.34). But what is frozen stays so, unnoticed, if training is cut short; and clipping would go by the norm of W's
  gradient alone, so that the control would not be matched.
- Most small models tie the classifier to the token embedding; trained "alone" it would move the features: refused. So
  is what TRL would read, tied, from the model's folder: vLLM's policy, which stage 1 would not reach.
- Parameters frozen before train() never enter the optimiser, silently, and a second train() reuses it: both refused.
  With PEFT it is right that some are frozen: by LoraConfig(modules_to_save=["lm_head"], ...) and get_peft_model, called
  before two_rates, the head learns first, then the head and the adapters.
- There is one clock, the trainer's count of updates; one that fp16 skips is counted. So two_rates has no clock of its
  own, and takes no step without ClassifierFirst. A checkpoint without the optimiser starts Adam afresh, in its stage.
- Sharded parameters (FSDP2) are all right if the model is sharded as it is loaded, under torchrun, for N processes:
  from_pretrained(..., distributed_config=transformers.distributed.DistributedConfig(fsdp_size=N)). Refused: FSDP by
  GRPOConfig(fsdp=...), since the trainer then takes no optimizers, and ZeRO, which keeps gradients in its own buffers.
- Stage 2 starts the optimiser afresh: its state, and the numbers that it keeps in its groups (Prodigy's, for one).
- Without two_rates, a schedule that warms up has a learning rate of 0 at first: the classifier then rests too.
- A run is resumed with its own settings or refused: the trainer restores some of them and takes the rest as given.
- Resuming is exact within the first pass over the prompts, from a checkpoint at which new responses were due: TRL does
  not save those it still had to use (num_iterations, or steps_per_generation beyond the accumulation). GPT-NeoX
  (Pythia) loses its classifier on the way, with a warning in the log: load the model itself from the checkpoint too.
"""

from numbers import Integral, Real

import torch
from datasets import Dataset
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast, TrainerCallback
from transformers.trainer_callback import ExportableState


class ClassifierFirst(TrainerCallback, ExportableState):
    """CF-RL: for classifier_steps updates the output embedding alone learns, then everything. freeze=False is the
    matched control. At every update the trainer's own count of them decides what learns, and the rates of two_rates."""

    def __init__(self, classifier_steps, freeze=True):
        self.classifier_steps, self.freeze = whole(classifier_steps), freeze
        self.rates = self.start = None

    def state(self):
        """What a checkpoint remembers of the callback."""
        args = {"classifier_steps": self.classifier_steps, "freeze": self.freeze}
        return {"args": args, "attributes": {"rates": self.rates, "start": self.start}}

    def on_init_end(self, args, state, control, model, **kwargs):
        check_folder(args, model)

    def on_train_begin(self, args, state, control, model, optimizer, lr_scheduler=None, **kwargs):
        shards = "no fsdp, no deepspeed: shard by from_pretrained(distributed_config=...), as the recipe says"
        check(not args.fsdp and not args.deepspeed, shards)
        steps, update = self.classifier_steps, state.global_step
        self.rates = lr_scheduler.settings if isinstance(lr_scheduler, TwoRates) else None
        if update == 0:
            self.start = [numbers_of(group) for group in optimizer.param_groups]
        else:
            self.resume(args, update, state.stateful_callbacks.get(type(self).__name__), lr_scheduler)
        same = self.rates is None or self.rates["classifier_steps"] == steps
        check(same, f"ClassifierFirst has classifier_steps={steps} and two_rates has {self.rates}: make the two equal")
        check(steps <= state.max_steps, f"classifier_steps={steps} is more than max_steps={state.max_steps}")
        check_folder(args, model)
        check_classifier(model)
        check_optimizer(model, optimizer, update)

    def resume(self, args, update, saved, lr_scheduler):
        """The run must be the one that goes on, in all that this class decides."""
        given = (self.rates or {}) | self.state()["args"]
        before = (saved["attributes"].get("rates") or {}) | saved["args"] if saved else "no ClassifierFirst"
        check(before == given, f"the checkpoint is of a run with {before}, and cannot be resumed with {given}")
        self.start = saved["attributes"]["start"]
        right = self.rates or args.lr_scheduler_type == "constant" or getattr(lr_scheduler, "last_epoch", update) > 0
        check(right, f"training goes on at update {update}, and its schedule, which is not saved, at 0: take two_rates")

    def on_pre_optimizer_step(self, args, state, control, model, optimizer, lr_scheduler=None, **kwargs):
        if self.rates:
            lr_scheduler.set(state.global_step)
        if self.freeze and state.global_step < self.classifier_steps:
            classifier = set(classifier_of(model).parameters())
            for p in set(model.parameters()) - classifier:
                p.grad = None
        if state.global_step == self.classifier_steps:  # stage 2 starts afresh, as in minicfrl.py
            optimizer.state.clear()
            for group, start in zip(optimizer.param_groups, self.start, strict=True):
                for name in numbers_of(group):
                    del group[name]
                group.update(start)


class TwoRates:
    """The rates of two_rates, as a schedule without a clock of its own: ClassifierFirst sets them at every update."""

    def __init__(self, optimizer, **settings):
        self.optimizer, self.settings, self.ready = optimizer, settings, False
        alone = "two_rates takes its rates from ClassifierFirst: give that to the trainer too, as one of its callbacks"
        optimizer.register_step_pre_hook(lambda *_: check(self.ready, alone))

    def set(self, update):
        """The rates of this update, before which so many were."""
        lr, classifier_lr = self.settings["lr"], self.settings["classifier_lr"]
        rates = (classifier_lr if update < self.settings["classifier_steps"] else lr, lr)
        for group, rate in zip(self.optimizer.param_groups, rates, strict=True):
            group["lr"] = rate
        self.ready = True

    def step(self):
        self.ready = False

    def get_last_lr(self):
        return [group["lr"] for group in self.optimizer.param_groups]

    def state_dict(self):
        return {}

    def load_state_dict(self, state_dict):
        pass


def two_rates(model, classifier_steps, lr, classifier_lr):
    """Optimiser and schedule that move the classifier at classifier_lr for classifier_steps updates, all else at lr."""
    classifier = list(classifier_of(model).parameters())
    body = [p for p in model.parameters() if all(p is not q for q in classifier)]
    settings = dict(classifier_steps=whole(classifier_steps), lr=float(lr), classifier_lr=float(classifier_lr))
    groups = [{"params": classifier, "lr": settings["classifier_lr"]}, {"params": body}]
    optimizer = torch.optim.AdamW(groups, settings["lr"], weight_decay=0.0)
    return optimizer, TwoRates(optimizer, **settings)


def character_tokenizer(alphabet, end_token):
    """One token per character, numbered as in `alphabet`, and an end token that also pads."""
    vocabulary = {character: token for token, character in enumerate(alphabet)} | {"<end>": end_token}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<end>"))
    tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizers.Split("", "isolated"), decoders.Fuse()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<end>", eos_token="<end>")


def untied(model, folder):
    """The model with a classifier of its own, read from the folder, as vLLM and a reference model are."""
    head = model.get_output_embeddings()
    head.weight = torch.nn.Parameter(head.weight.detach().clone())
    model.config.tie_word_embeddings = False
    model.save_pretrained(folder)
    return type(model).from_pretrained(folder)


def tiny_random():
    """Something to try it on: a random Llama, a tokenizer of characters, prompts such as 4+7=, and a reward."""
    characters = "0123456789+="
    sizes = dict(hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4)
    model = LlamaForCausalLM(LlamaConfig(vocab_size=len(characters) + 1, **sizes, tie_word_embeddings=True))
    tokenizer = character_tokenizer(characters, len(characters))
    prompts = Dataset.from_list([{"prompt": f"{i}+{j}="} for i in range(10) for j in range(10)])
    return model, tokenizer, prompts, lambda completions, **_: [float(len(set(text))) for text in completions]


def check(right, message):
    if not right:
        raise ValueError(message)


def whole(classifier_steps):
    """As an int, which a checkpoint can hold, whatever kind of whole number it is."""
    right = isinstance(classifier_steps, Integral) and classifier_steps >= 0
    check(right, f"classifier_steps must be a whole number of at least 0, not {classifier_steps!r}")
    return int(classifier_steps)


def numbers_of(group):
    """The numbers that an optimiser keeps in a group of parameters: settings and any counts, but not the rate."""
    return {name: x for name, x in group.items() if isinstance(x, Real) and type(x) is not bool and name != "lr"}


def classifier_of(model):
    """The layer that makes the logits; where PEFT trains a copy of it, by modules_to_save, the copy."""
    head = model.get_output_embeddings()
    check(head is not None, f"{type(model).__name__} has no output embedding, so no classifier to train first")
    return head.modules_to_save[head.active_adapters[0]] if hasattr(head, "modules_to_save") else head


def check_folder(args, model):
    """If TRL reads the model from its folder, it has one; untied for vLLM and sync_ref_model."""
    reader = next((name for name in ("use_vllm", "sync_ref_model", "beta") if getattr(args, name, False)), None)
    folder, adapters = getattr(model.config, "_name_or_path", ""), hasattr(model, "peft_config")
    todo = "save the untied model by save_pretrained, and load that"
    if reader and not (reader == "beta" and adapters):
        check(folder, f"{reader} takes the model from its folder, and it has none: {todo}")
    if reader in ("use_vllm", "sync_ref_model"):
        config = type(model.config).from_pretrained(folder)
        tied = config.tie_word_embeddings or config.get_text_config().tie_word_embeddings
        check(not tied, f"{reader} takes the model from {folder}, where the classifier is tied: {todo}")


def check_classifier(model):
    """It learns, and nothing else has its numbers, for that would move with it."""
    head = classifier_of(model)
    learns = head.weight.requires_grad or not hasattr(model, "peft_config")
    check(learns, "the classifier is frozen: beside adapters it learns by LoraConfig(modules_to_save=['lm_head'])")
    for name, module in model.named_modules():
        for p in module.parameters(recurse=False):
            check(
                module is head or p is not head.weight and place(p) != (place(head.weight) or None),
                f"the classifier is tied to {name}, which would move with it; to untie them, before any adapter: "
                "head = model.get_output_embeddings(); model.config.tie_word_embeddings = False; "
                "head.weight = torch.nn.Parameter(head.weight.detach().clone())",
            )


def check_optimizer(model, optimizer, update):
    """It has all that is to learn, and nothing yet of an earlier run."""
    known = {id(p) for group in optimizer.param_groups for p in group["params"]}
    right = all(id(p) in known if p.requires_grad else hasattr(model, "peft_config") for p in model.parameters())
    check(right, "a parameter is frozen or unknown to the optimiser: give the trainer all of them, unfrozen")
    tensors = {name for group in optimizer.param_groups for name, x in group.items() if isinstance(x, torch.Tensor)}
    check(
        tensors <= {"lr"},
        f"an optimiser whose groups hold tensors, {tensors}, cannot start stage 2 afresh: take another",
    )
    check(
        update > 0 or not optimizer.state,
        "the optimiser has a state before the first update, from a train() before this one or because it makes one at "
        "once (Adagrad): stage 2 starts without any, so make a new trainer or take another optimiser",
    )


def place(parameter):
    """Where its storage begins in memory, of a sharded one this process's; 0 if none is here."""
    local = parameter.to_local() if hasattr(parameter, "to_local") else parameter
    return local.untyped_storage().data_ptr()
