"""What the laboratory's runs cost, as medians: python experiments/tests/benchmark_lab.py --run | --trl | --real.

With --run `python -m experiments run plain`, three times. With --trl (which takes the extra `trl`) the same runs by
train_rl and by TRL's trainer with the README's recipe: do they learn alike, and what does an update cost? With --real
(which takes the extras `trl` and `real`, and 12 GB) the seconds of an update of SmolLM2-135M by each of the two. This
is no test: nothing here fails.
"""

import copy
import csv
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import torch

ROOT = Path(__file__).parent.parent.parent
sys.path.insert(0, str(ROOT))

from experiments.arms import two_stages  # noqa: E402
from experiments.report import markdown  # noqa: E402
from experiments.tables import over_seeds  # noqa: E402
from minicfrl import Addition, RLConfig, SFTConfig, rollout, supervised_finetune, train_rl  # noqa: E402
from model import GPT, GPTConfig  # noqa: E402
from train_toy import stream  # noqa: E402

COMMAND = [sys.executable, "-m", "experiments", "run", "plain"]


def whole_run():
    """The default run: wall seconds, the largest process, and where the processes' time goes."""
    import resource  # POSIX only

    walls, shares = [], []
    for _ in range(3):
        with tempfile.TemporaryDirectory() as folder:
            out = Path(folder) / "run"
            start = time.perf_counter()
            subprocess.run([*COMMAND, "--out", out], cwd=ROOT, check=True, capture_output=True)
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
        f"the default run: {statistics.median(walls):.1f} s wall ({min(walls):.1f} to {max(walls):.1f}), "
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
            subprocess.run([*COMMAND, *flags], cwd=ROOT, capture_output=True)
            walls.append(time.perf_counter() - start)
        print(f"python -m experiments run plain {' '.join(flags)}: {statistics.median(walls):.1f} s")


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
        start = GPT(GPTConfig(task.vocab_size, task.block_size), stream(seed, "init"))
        for _ in supervised_finetune(start, task, SFTConfig(), stream(seed, "sft")):
            pass
        for arm, config in {"rl": RLConfig(two_stages(classifier_steps=0)), "cf-rl": RLConfig(two_stages())}.items():
            for name, engine in {"`train_rl`": by_train_rl, "TRL": by_trl}.items():
                course = Course(task, seed)
                engine(copy.deepcopy(start), task, config, stream(seed, "rl"), course)
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
        for _ in train_rl(model, task, config, stream(0, "rl")):
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
                lm, task, config, stream(0, "rl"), out, [watch], tokenizer, max_completion_length=length
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
    if "--run" in sys.argv[1:]:
        start_up()
        whole_run()
    if "--trl" in sys.argv[1:]:
        learn_alike()
        stage_costs()
    if "--real" in sys.argv[1:]:
        real_update()
