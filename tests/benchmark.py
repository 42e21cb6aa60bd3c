"""What things cost, as medians: python tests/benchmark.py [--kernel] [--run] [--trl] [--real].

Times are CPU seconds of one thread, except the whole run's. Ratios compare work done in turn within one run, since
machines are noisy. The floor of a step is its floating-point operations over the matrix-product rate measured here.
With --kernel also the exact NTK, against PyTorch's own recipe for it (about five minutes, 6 GB), and with --run
`train_toy.py` with its defaults, three times. With --trl (which takes the extra `trl`) only the same runs by train_rl
and by TRL's trainer with the README's recipe: do they learn alike, and what does an update cost? With --real (which
takes the extras `trl` and `real`, and 12 GB) only the seconds of an update of SmolLM2-135M by each of the two. With
--rounding only how exact either way of feature_change is. This is no test: nothing here fails.
"""

import copy
import csv
import multiprocessing
import os
import statistics
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import numpy as np
import torch
from torch.func import functional_call, jacrev, vmap

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))

from experiments.arms import generator as draws_for  # noqa: E402
from experiments.report import markdown  # noqa: E402
from experiments.tables import over_seeds  # noqa: E402
from minicfrl import (  # noqa: E402
    SLICE,
    Addition,
    RLConfig,
    SFTConfig,
    Stage,
    classifier_gradient,
    policy_gradient_loss,
    rollout,
    sequence_logp,
    supervised_finetune,
    train_rl,
    two_stages,
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


def start_up():
    """Wall seconds until the command line answers, to what it is asked and to what it refuses: medians of three."""
    for flags in (["--help"], ["--lr", "nan"]):
        walls = []
        for _ in range(3):
            start = time.perf_counter()
            subprocess.run([sys.executable, ROOT / "train_toy.py", *flags], capture_output=True)
            walls.append(time.perf_counter() - start)
        print(f"python train_toy.py {' '.join(flags)}: {statistics.median(walls):.1f} s")


class Course:
    """What happens along a run: held-out accuracy every 20 updates, and seconds of each update but the first."""

    def __init__(self, task, seed):
        self.task, self.seed, self.accuracy, self.seconds = task, seed, [], []
        self.prompts = [task.prompt(a, b) for a, b in task.heldout_pairs[:256].tolist()]
        self.clock = time.perf_counter()

    def tick(self, step, model):
        if step > 1:
            self.seconds.append(time.perf_counter() - self.clock)
        if step % 20 == 0:
            draws = torch.Generator().manual_seed(self.seed)
            self.accuracy.append(rollout(model, self.task, self.prompts, 8, draws).rewards.mean().item())
        self.clock = time.perf_counter()


def by_train_rl(model, task, config, draws, course):
    for record in train_rl(model, task, config, draws):
        course.tick(record["step"], model)


def by_trl(model, task, config, draws, course):
    from trl_bridge import after_every_update, from_transformers, to_transformers, trl_trainer

    hf = to_transformers(model)
    watch = after_every_update(lambda step: course.tick(step, from_transformers(hf, model)))
    with tempfile.TemporaryDirectory() as out:
        trl_trainer(hf, task, config, draws, out, [watch]).train()


def learn_alike(seeds=5):
    """Plain RL and CF-RL from the same starting policies, by train_rl and by TRL."""
    task, courses = Addition(), {}
    for seed in range(seeds):
        start = GPT(GPTConfig(task.vocab_size, task.block_size), draws_for(seed, "init"))
        for _ in supervised_finetune(start, task, SFTConfig(), draws_for(seed, "sft")):
            pass
        for arm, config in {"rl": RLConfig(two_stages(classifier_steps=0)), "cf-rl": RLConfig()}.items():
            for name, engine in {"`train_rl`": by_train_rl, "TRL": by_trl}.items():
                course = Course(task, seed)
                engine(copy.deepcopy(start), task, config, draws_for(seed, "rl"), course)
                courses.setdefault(arm, {}).setdefault(name, []).append(course)
    rows = [["arm, trainer", *(f"update {step}" for step in (20, 40, 60, 80)), "sec"]]
    for arm, engines in courses.items():
        curves = {name: torch.tensor([course.accuracy for course in each]) for name, each in engines.items()}
        for name, each in engines.items():
            points = [over_seeds(values, ".3f") for values in curves[name].T.tolist()]
            median = statistics.median(seconds for course in each for seconds in course.seconds)
            rows.append([f"{arm}, {name}", *points, f"{median:.3f}"])
        differences = (curves["TRL"] - curves["`train_rl`"]).T.tolist()
        rows.append(["difference by seed", *(over_seeds(values, "+.3f") for values in differences), ""])
    print(markdown(*rows))


def stage_costs():
    """An update of either stage by TRL, without sampling: a policy of 6 layers and 256 features, 128 responses."""
    from trl_bridge import after_every_update, to_transformers, trl_trainer

    task, steps = Addition(), 8
    hf = to_transformers(GPT(GPTConfig(task.vocab_size, task.block_size, n_layer=6, n_embd=256)))
    for checkpointing in (False, True):
        medians_of = {1: [], 2: []}
        for stage in (1, 2) * 3:  # in turns
            times, config = [], RLConfig(two_stages(steps, steps * (stage == 1)), prompts=16)
            watch = after_every_update(lambda step, times=times: times.append(time.perf_counter()))
            with tempfile.TemporaryDirectory() as out:
                draws = torch.Generator().manual_seed(0)
                trainer = trl_trainer(hf, task, config, draws, out, [watch], gradient_checkpointing=checkpointing)
                sampling = without_sampling(trainer)
                trainer.train()
            spent = [b - a - s for a, b, s in zip(times, times[1:], sampling[1:], strict=False)]
            medians_of[stage].append(statistics.median(spent))
        first, second = (statistics.median(values) for values in medians_of.values())
        kind = "with gradient checkpointing" if checkpointing else "6 layers, 256 features"
        print(f"{kind}: stage 1 {first:.3f} s, stage 2 {second:.3f} s, ratio {first / second:.2f}")


def real_update():
    """Wall seconds of an update of the real model, sampling included, by train_rl and by TRL: either stage in turn."""
    import transformers
    from trl_bridge import after_every_update, trl_trainer

    from experiments.real_model import RealConfig, checkpoint, load

    folder, how = checkpoint(RealConfig())
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder, **how)
    tokenizer.pad_token = tokenizer.eos_token = tokenizer.convert_ids_to_tokens(tokenizer.encode("\n")[0])
    for stage in (1, 2):
        times, config = {"train_rl": [], "TRL": []}, RLConfig(two_stages(4, 4 * (stage == 1), lr=3e-5), prompts=16)
        model, task = load(RealConfig())
        times["train_rl"].append(time.perf_counter())
        for _ in train_rl(model, task, config, draws_for(0, "rl")):
            times["train_rl"].append(time.perf_counter())
        packaged = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, **how)
        settings = copy.deepcopy(packaged.config)
        settings.tie_word_embeddings = False
        lm = type(packaged)(settings)  # the trainer refuses what was loaded from a quantised file
        lm.load_state_dict(packaged.state_dict())
        watch = after_every_update(lambda step, times=times: times["TRL"].append(time.perf_counter()))
        with tempfile.TemporaryDirectory() as out:
            length = task.block_size - task.shared[-1]
            trainer = trl_trainer(
                lm, task, config, draws_for(0, "rl"), out, [watch], tokenizer, max_completion_length=length
            )
            times["TRL"].append(time.perf_counter())
            trainer.train()
        seconds = {name: statistics.median(np.diff(each)[1:]) for name, each in times.items()}
        print(f"stage {stage}: " + ", ".join(f"{name} {each:.1f} s" for name, each in seconds.items()), flush=True)


def without_sampling(trainer):
    """Seconds that the trainer spends on sampling and scoring, one number per update; fills up as it trains."""
    seconds, generate = [], trainer._generate_and_score_completions

    def timed(inputs):
        start = time.perf_counter()
        outputs = generate(inputs)
        seconds.append(time.perf_counter() - start)
        return outputs

    trainer._generate_and_score_completions = timed
    return seconds


if __name__ == "__main__":
    torch.set_num_threads(1)
    if "--trl" in sys.argv[1:]:
        learn_alike()
        stage_costs()
        sys.exit()
    if "--real" in sys.argv[1:]:
        real_update()
        sys.exit()
    step_costs()
    if "--kernel" in sys.argv[1:]:
        kernel_costs()
    if "--run" in sys.argv[1:]:
        start_up()
        whole_run()
