"""From the toy to TRL and back: its policy as a transformers GPT-2, its task as TRL's tokenizer, reward and prompts."""

import torch
from datasets import Dataset
from transformers import GPT2Config, GPT2LMHeadModel, PrinterCallback, TrainerCallback
from trl import GRPOConfig, GRPOTrainer

from experiments.trl_recipe import ClassifierFirst, character_tokenizer, two_rates

# One process on a CPU, nothing but training: no files, no logs, no truncated sampling.
PLAIN = dict(use_cpu=True, bf16=False, gradient_checkpointing=False, report_to="none", disable_tqdm=True)
PLAIN |= dict(beta=0.0, top_k=0, lr_scheduler_type="constant", save_strategy="no", logging_strategy="no")


def _pairs(gpt, hf):
    """(our parameter, theirs), for all. GPT-2's linear layers hold the transposes; q, k and v are laid out alike."""
    body, transformer = gpt.body, hf.transformer
    yield body.token_embedding.weight, transformer.wte.weight
    yield body.position_embedding.weight, transformer.wpe.weight
    yield gpt.classifier.weight, hf.lm_head.weight
    modules = [(body.norm, transformer.ln_f)]
    for ours, theirs in zip(body.blocks, transformer.h, strict=True):
        modules += [(ours.attention_norm, theirs.ln_1), (ours.mlp_norm, theirs.ln_2)]
        modules += [(ours.attention.qkv, theirs.attn.c_attn), (ours.attention.proj, theirs.attn.c_proj)]
        modules += [(ours.mlp[0], theirs.mlp.c_fc), (ours.mlp[2], theirs.mlp.c_proj)]
    for ours, theirs in modules:
        yield ours.weight.t(), theirs.weight  # of a vector t() is the vector
        yield ours.bias, theirs.bias


@torch.no_grad()
def to_transformers(gpt):
    """The toy's GPT as a GPT-2 with the same weights."""
    sizes = {"n_positions": gpt.config.block_size} | {k: v for k, v in vars(gpt.config).items() if k != "block_size"}
    dropouts = dict.fromkeys(("resid_pdrop", "embd_pdrop", "attn_pdrop"), 0.0)
    tokens = {"bos_token_id": None, "eos_token_id": gpt.config.vocab_size - 1}
    config = GPT2Config(**sizes, **dropouts, **tokens, activation_function="gelu", tie_word_embeddings=False)
    hf = GPT2LMHeadModel(config).to(gpt.classifier.weight.dtype)
    for ours, theirs in _pairs(gpt, hf):
        theirs.copy_(ours)
    return hf


@torch.no_grad()
def from_transformers(hf, gpt):
    """The weights of such a GPT-2, copied into `gpt`, which is returned."""
    for ours, theirs in _pairs(gpt, hf):
        ours.copy_(theirs)
    return gpt


def trl_trainer(hf, task, rl, draws, out, callbacks, tokenizer=None, **changes):
    """A GRPOTrainer that does what train_rl does in two_stages by Adam with the verifier, as closely as TRL can: its
    loss "dapo" is (E3). What differs: advantages are divided by the sample std + 1e-4 instead of the population std,
    and random numbers are others. Without a tokenizer, for the toy, one token is one character."""
    tokenizer = tokenizer or character_tokenizer(task.alphabet, task.end_token)
    steps, first = sum(stage.steps for stage in rl.stages), rl.stages[0]
    classifier_steps = first.steps if first.trains == "classifier" else 0
    classifier_lr = first.lr if first.classifier_lr is None else first.classifier_lr

    def reward(prompts, completion_ids, **_):
        ended = [ids[-1] == task.end_token for ids in completion_ids]
        texts = [task.decode(ids[: len(ids) - end]) for ids, end in zip(completion_ids, ended, strict=True)]
        return [task.verify(*pair) * end for *pair, end in zip(prompts, texts, ended, strict=True)]

    pairs = task.train_pairs[torch.randint(len(task.train_pairs), (steps * rl.prompts,), generator=draws)]
    config = GRPOConfig(
        str(out),
        max_steps=steps,
        per_device_train_batch_size=rl.prompts * rl.samples,
        num_generations=rl.samples,
        scale_rewards="group" if rl.baseline == "std" else "none",
        loss_type="dapo",
        max_grad_norm=0.0,
        shuffle_dataset=False,
        **PLAIN | {"max_completion_length": task.block_size - len(task.prompt(0, 0))} | changes,
    )
    trainer = GRPOTrainer(
        hf,
        reward,
        args=config,
        train_dataset=Dataset.from_list([{"prompt": task.prompt(a, b)} for a, b in pairs.tolist()]),
        processing_class=tokenizer,
        callbacks=[ClassifierFirst(classifier_steps), *callbacks],
        optimizers=two_rates(hf, classifier_steps, first.lr, classifier_lr),
    )
    trainer.remove_callback(PrinterCallback)
    return trainer


def after_every_update(function):
    """A callback that calls function(updates so far)."""

    class Watch(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            function(state.global_step)

    return Watch()
