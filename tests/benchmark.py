"""What things cost, as medians: python tests/benchmark.py

Times are CPU seconds of one thread. Ratios compare work done in turn within one run, because machines are noisy. This
is no test: nothing here fails.
"""

import statistics
import sys
import time
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parent.parent))

from minicfrl import Addition, RLConfig, SFTConfig, Stage, rollout, supervised_finetune, train_rl  # noqa: E402
from model import GPT, GPTConfig, sample  # noqa: E402
from ntk import empirical_ntk, gradient_by_definition  # noqa: E402


def medians(rounds, **functions):
    """CPU seconds of each function, the median of some rounds; the functions take turns, after one to warm up."""
    times = {name: [] for name in functions}
    for _ in range(rounds + 1):
        for name, function in functions.items():
            start = time.process_time()
            function()
            times[name].append(time.process_time() - start)
    return {name: statistics.median(values[1:]) for name, values in times.items()}


@torch.no_grad()
def sample_without_cache(model, tokens, max_new_tokens, generator):
    """The sampler with one full forward per token: what the key-value cache saves."""
    for _ in range(max_new_tokens):
        choice = model(tokens)[:, -1].softmax(dim=-1).multinomial(1, generator=generator)
        tokens = torch.cat((tokens, choice), dim=1)


def update_costs(prompts=32, samples=8):
    """An update of RL at the default model, from a policy after 200 updates of fine-tuning. With coin flips as the
    reward no group is flat, so that every row is scored again."""
    task, draws = Addition(), torch.Generator().manual_seed(0)
    model = GPT(GPTConfig(task.vocab_size, task.block_size), draws)
    list(supervised_finetune(model, task, SFTConfig((Stage(200, lr=3e-3),)), draws))
    questions = [task.prompt(*pair) for pair in task.train_pairs[::90][:prompts].tolist()]
    start = torch.tensor([task.encode(question) for question in questions])
    room, rows = task.block_size - start.size(1), start.repeat_interleave(samples, dim=0)

    def update(trains):
        reward = lambda batch, draws: torch.randint(2, batch.rewards.shape, generator=draws)  # noqa: E731
        config = RLConfig((Stage(1, trains, lr=0.0),), prompts, samples, reward=reward)
        return lambda: next(train_rl(model, task, config, draws))

    matrix = torch.randn(1024, 1024)
    cost = medians(
        15,
        sample=lambda: sample(model, start, room, task.end_token, draws, samples),
        without_cache=lambda: sample_without_cache(model, rows, room, draws),
        everything=update("all"),
        W_alone=update("classifier"),
        matrix=lambda: matrix @ matrix,
    )
    # A product of an (n, k) and a (k, m) matrix takes 2nkm operations: 2 per weight and position forwards, 4 backwards.
    tokens = rollout(model, task, questions, samples, draws).tokens.numel()
    floor = 8 * sum(p.numel() for p in model.parameters()) * tokens * cost["matrix"] / (2 * 1024**3)
    print(f"an update of {prompts} x {samples} samples: {1e3 * cost['everything']:.0f} ms,", end=" ")
    print(f"{cost['everything'] / floor:.1f} x its matrix products alone; of W alone {1e3 * cost['W_alone']:.0f} ms")
    print(f"  sampling {1e3 * cost['sample']:.0f} ms, without the cache x {cost['without_cache'] / cost['sample']:.1f}")


def kernel_costs():
    """The exact kernel against its definition, both in float32."""
    draws = torch.Generator().manual_seed(0)
    for N in (4, 8):
        model = GPT(GPTConfig(64, 16, n_layer=2, n_embd=64), draws)
        tokens, mask = torch.randint(64, (N, 16), generator=draws), torch.arange(16).expand(N, 16) == 15
        cost = medians(
            3,
            fast=lambda model=model, probe=(tokens, mask): empirical_ntk(model, *probe),
            definition=lambda model=model, probe=(tokens, mask): gradient_by_definition(model, *probe, *probe),
        )
        print(f"the kernel of {N} states, V = d = 64: {cost['fast']:.2f} s, by its definition", end=" ")
        print(f"{cost['definition']:.2f} s, x {cost['definition'] / cost['fast']:.1f}")


if __name__ == "__main__":
    torch.set_num_threads(1)
    update_costs()
    kernel_costs()
