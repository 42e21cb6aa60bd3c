"""What things cost, as medians: python tests/benchmark.py [--kernel].

Times are CPU seconds of one thread. Ratios compare work done in turn within one run, since machines are noisy. The
floor of a step is its floating-point operations over the matrix-product rate measured here. With --kernel also the
exact NTK, against PyTorch's own recipe for it (about five minutes, 6 GB). This is no test: nothing here fails.
"""

import multiprocessing
import statistics
import sys
import time
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import numpy as np
import torch
from torch.func import functional_call, jacrev, vmap

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))

from minicfrl import (  # noqa: E402
    SLICE,
    Addition,
    SFTConfig,
    Stage,
    classifier_gradient,
    policy_gradient_loss,
    rollout,
    sequence_logp,
    supervised_finetune,
)
from model import GPT, GPTConfig, sample  # noqa: E402
from ntk import empirical_ntk, logit_change  # noqa: E402

PROMPTS, SAMPLES, ROUNDS = 32, 8, 15


def medians(rounds=ROUNDS, **functions):
    """CPU seconds of each function, the median of some rounds; the functions take turns, after two to warm up."""
    times = {name: [] for name in functions}
    for _ in range(rounds + 2):
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
    list(supervised_finetune(model, task, SFTConfig((Stage(200, lr=3e-3),)), generator))
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


def jacobian_contraction(model, tokens):
    """The gradient component by the recipe of PyTorch's tutorial on neural tangent kernels: one Jacobian per sample, by
    vmap over jacrev, and one einsum per parameter. For a kernel with itself it takes one Jacobian here, not two."""
    theta = {name: parameter.detach() for name, parameter in model.body.named_parameters()}

    def logits(theta, row):
        return model.classifier(functional_call(model.body, theta, (row[None],))[0, -1])

    jacobian = [J.flatten(2) for J in vmap(jacrev(logits), (None, 0))(theta, tokens).values()]
    return torch.stack([torch.einsum("nvp,mwp->nvmw", J, J) for J in jacobian]).sum(dim=0)


def last_positions(tokens):
    mask = torch.zeros_like(tokens, dtype=torch.bool)
    mask[:, -1] = True
    return mask


def exact_kernel(model, tokens):
    return empirical_ntk(model, tokens, last_positions(tokens)).gradient


def kernel_problem(N=16, V=64, d=64, layers=2, T=16, dtype=torch.float32):
    """A random policy, and N rows whose last states the kernel is between."""
    generator = torch.Generator().manual_seed(0)
    model = GPT(GPTConfig(V, T, n_layer=layers, n_embd=d), generator).to(dtype)
    return model, torch.randint(V, (N, T), generator=generator)


def cost_in_a_new_process(function, N):
    """CPU seconds of one kernel, and the MiB it needs at its peak above what the process held before."""
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
        return pool.submit(_cost, function, N).result()


def _memory(name):
    """MiB of this process: VmRSS, held now, or VmHWM, the most ever held. Linux only."""
    status = Path("/proc/self/status").read_text(encoding="utf-8")
    return int(status.split(f"{name}:")[1].split()[0]) / 2**10


def _cost(function, N):
    torch.set_num_threads(1)
    model, tokens = kernel_problem(N)
    function(*kernel_problem(2))  # imports, caches
    before, start = _memory("VmRSS"), time.process_time()
    function(model, tokens)
    return time.process_time() - start, _memory("VmHWM") - before


def kernel_costs():
    """empirical_ntk against the recipe above, its growth with each size, and logit_change against forward passes."""
    for dtype in (torch.float64, torch.float32):
        model, tokens = kernel_problem(8, dtype=dtype)
        expected = jacobian_contraction(*(kernel_problem(8, dtype=torch.float64)))
        error = (exact_kernel(model, tokens) - expected).abs().max() / expected.abs().max()
        print(f"exact kernel, {dtype}: relative error {error:.0e}")
    print("V = d = 64, 2 layers, T = 16, one state per row, float32; medians of 3 new processes each")
    for N in (16, 32, 64):
        costs = [[cost_in_a_new_process(f, N) for f in (exact_kernel, jacobian_contraction)] for _ in range(3)]
        (fast, fast_memory), (slow, slow_memory) = np.median(costs, axis=0)
        print(
            f"  N = {N}: {fast:5.2f} s, {fast_memory:4.0f} MiB; by Jacobian contraction {slow:5.2f} s, "
            f"{slow_memory:4.0f} MiB: x {slow / fast:.1f} in time, x {slow_memory / fast_memory:.1f} in memory"
        )
    print(
        "exponents of growth: measured, and those of the multiplications that the docstring counts, at the same sizes"
    )
    for name, sizes in {"N": (8, 16, 32, 64), "V": (8, 16, 32, 64), "d": (32, 64, 128), "layers": (1, 2, 4)}.items():
        problems = {size: kernel_problem(**({"N": 24, "V": 32} | {name: size})) for size in sizes}
        times = medians(3, **{str(size): lambda p=problem: exact_kernel(*p) for size, problem in problems.items()})
        counts = [multiplications(**({"N": 24, "V": 32} | {name: size})) for size in sizes]
        slopes = [np.polyfit(np.log(sizes), np.log(values), 1)[0] for values in (list(times.values()), counts)]
        print(f"  {name:6} {sizes}: {slopes[0]:.1f} and {slopes[1]:.1f}")
    model, tokens = kernel_problem(256, V=17)
    update = {name: 1e-3 * torch.randn_like(parameter) for name, parameter in model.named_parameters()}
    everywhere = torch.ones_like(tokens, dtype=torch.bool)
    with torch.no_grad():
        cost = medians(forward=lambda: model(tokens), change=lambda: logit_change(model, tokens, everywhere, update))
    print(
        f"logit_change, 256 rows: {1e3 * cost['change']:.0f} ms, {cost['change'] / cost['forward']:.1f} forward passes"
    )


def multiplications(N=16, V=64, d=64, layers=2, T=16):
    """Of empirical_ntk: half of N^2 U T (T + U) O for each layer, with T = 1 past the last attention, and backprops."""
    U = min(V, d)
    everywhere = 2 * d + (layers - 1) * (3 + 1 + 4 + 1) * d + 3 * d  # outputs O: embeddings, whole blocks, the last qkv
    contraction = N**2 / 2 * U * (T * (T + U) * everywhere + (1 + U) * (1 + 4 + 1) * d)
    return contraction + N * U * T * layers * 12 * d**2


if __name__ == "__main__":
    torch.set_num_threads(1)
    step_costs()
    if "--kernel" in sys.argv[1:]:
        kernel_costs()
