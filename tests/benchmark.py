"""What things cost, as medians: python tests/benchmark.py [--run]. Not a test: nothing here passes or fails.

Times are CPU seconds of one thread, except the whole run's. Ratios compare work done in turn within one run, since
machines are noisy. The floor of a step is its floating-point operations over the matrix-product rate measured here.
With --run it also starts `train_toy.py` with its defaults, three times.
"""

import csv
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))

from minicfrl import (  # noqa: E402
    SLICE,
    Addition,
    SFTConfig,
    classifier_gradient,
    policy_gradient_loss,
    rollout,
    sequence_logp,
    supervised_finetune,
)
from model import GPT, GPTConfig, sample  # noqa: E402

PROMPTS, SAMPLES, ROUNDS = 32, 8, 15


def medians(**functions):
    """CPU seconds of each function, the median of ROUNDS; the functions take turns, after two rounds to warm up."""
    times = {name: [] for name in functions}
    for _ in range(ROUNDS + 2):
        for name, function in functions.items():
            start = time.process_time()
            function()
            times[name].append(time.process_time() - start)
    return {name: statistics.median(values[2:]) for name, values in times.items()}


@torch.no_grad()
def sample_without_cache(model, prompts, max_new_tokens, generator):
    """The sampler with one full forward per token: what the key-value cache saves."""
    tokens = prompts
    for _ in range(max_new_tokens):
        choice = model(tokens)[:, -1].softmax(dim=-1).multinomial(1, generator=generator)
        tokens = torch.cat((tokens, choice), dim=1)
    return tokens


def step_costs():
    """One RL step of 32 prompts x 8 samples at the default model, from a policy after 200 updates of fine-tuning."""
    task, generator = Addition(), torch.Generator().manual_seed(0)
    model = GPT(GPTConfig(task.vocab_size, task.block_size), generator)
    list(supervised_finetune(model, task, SFTConfig(steps=200), generator))
    prompts = [task.prompt(a, b) for a, b in task.train_pairs[:: len(task.train_pairs) // PROMPTS][:PROMPTS].tolist()]
    start = torch.tensor([task.encode(prompt) for prompt in prompts])
    new_tokens = task.block_size - start.size(1)
    optimizer = torch.optim.Adam(model.parameters(), lr=0.0)
    stage_1_optimizer = torch.optim.Adam(model.classifier.parameters(), lr=0.0)
    advantages = torch.randn(PROMPTS * SAMPLES, generator=generator)  # no group is flat: every row is scored again
    batch = rollout(model, task, prompts, SAMPLES, generator)
    matrix = torch.randn(1024, 1024)

    def gradient():
        optimizer.zero_grad()
        for rows in torch.arange(len(advantages)).split(SLICE):
            logp, count = sequence_logp(model, batch.tokens[rows]), int(batch.mask.sum())
            policy_gradient_loss(logp, advantages[rows], batch.mask[rows, 1:], count).backward()
        optimizer.step()

    @torch.no_grad()
    def stage_1_gradient():
        features = model.features(batch.tokens)[:, :-1]
        logits, actions = model.classifier(features), batch.tokens[:, 1:]
        model.classifier.weight.grad = classifier_gradient(features, logits, actions, advantages, batch.mask[:, 1:])
        stage_1_optimizer.step()

    cost = medians(
        sample=lambda: sample(model, start, new_tokens, task.end_token, generator, SAMPLES),
        without_cache=lambda: sample_without_cache(
            model, start.repeat_interleave(SAMPLES, dim=0), new_tokens, generator
        ),
        rollout=lambda: rollout(model, task, prompts, SAMPLES, generator),
        gradient=gradient,
        stage_1_gradient=stage_1_gradient,
        matrix=lambda: matrix @ matrix,
    )
    # A product of an (n, k) and a (k, m) matrix takes 2nkm operations: 2 per weight and position forwards, 4 backwards.
    size, positions = sum(p.numel() for p in model.parameters()), batch.tokens.numel()
    operations = 2 * size * positions + 6 * size * positions
    rate = 2 * 1024**3 / cost["matrix"]
    step = cost["rollout"] + cost["gradient"]
    print(f"model: {size} parameters; {PROMPTS} prompts x {SAMPLES} samples of up to {new_tokens} tokens; one thread")
    print(
        f"  sample                {1e3 * cost['sample']:6.1f} ms   without the cache "
        f"x {cost['without_cache'] / cost['sample']:.1f}"
    )
    print(f"  decode and verify     {1e3 * (cost['rollout'] - cost['sample']):6.1f} ms")
    print(f"  gradient and step     {1e3 * cost['gradient']:6.1f} ms")
    print(
        f"  one RL step           {1e3 * step:6.1f} ms   {step * rate / operations:.1f} x the floor of "
        f"{1e3 * operations / rate:.0f} ms ({operations / 1e9:.1f} GFlop at {rate / 1e9:.0f} GFlop/s)"
    )
    stage_1 = cost["rollout"] + cost["stage_1_gradient"]
    print(f"  one stage-1 step      {1e3 * stage_1:6.1f} ms   {stage_1 / step:.2f} of a full one")


def whole_run():
    """`train_toy.py` with its defaults: wall seconds, the largest process, and where the processes' time goes."""
    import resource  # POSIX only

    walls, shares = [], []
    for _ in range(3):
        with tempfile.TemporaryDirectory() as folder:
            out = Path(folder) / "run"
            start = time.perf_counter()
            subprocess.run([sys.executable, ROOT / "train_toy.py", "--out", out], check=True, capture_output=True)
            walls.append(time.perf_counter() - start)
            with open(out / "metrics.csv", newline="", encoding="utf-8") as file:
                last = {row["arm"]: row for row in csv.DictReader(file)}
        training = {arm: float(row["train_seconds"]) for arm, row in last.items()}
        shares.append(
            (training.pop("sft"), sum(training.values()), sum(float(r["eval_seconds"]) for r in last.values()))
        )
    sft, rl, evaluation = (statistics.median(values) for values in zip(*shares, strict=True))
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    unit = 1 if sys.platform == "darwin" else 1024
    cpu = (used.ru_utime + used.ru_stime) / 3
    print(
        f"python train_toy.py: {statistics.median(walls):.1f} s wall ({min(walls):.1f} to {max(walls):.1f}), "
        f"{cpu:.1f} s CPU, largest of its processes {used.ru_maxrss * unit / 2**20:.0f} MiB; {os.cpu_count()} cores"
    )
    print(
        f"  of it: fine-tuning {sft:.1f} s; in two processes, RL {rl:.1f} s and evaluation {evaluation:.1f} s; "
        f"the rest start-up"
    )


if __name__ == "__main__":
    torch.set_num_threads(1)
    step_costs()
    if "--run" in sys.argv[1:]:
        whole_run()
