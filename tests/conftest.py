"""Float64 and one thread for every test; hypothesis profile `fast`, or HYPOTHESIS_PROFILE=soak."""

import os

import pytest
import torch
from filelock import FileLock  # torch brings it
from hypothesis import Phase, settings
from tiny_runs import run

collect_ignore = ["trl_bridge.py"]  # needs the extra `trl`; test_trl_recipe.py skips itself without it
torch.set_num_threads(1)
settings.register_profile(
    "fast",
    max_examples=10,
    deadline=None,
    derandomize=True,
    database=None,
    print_blob=True,
    phases=(Phase.explicit, Phase.generate),  # shrinking a random seed teaches nothing
)
# Fresh examples on every run, even where hypothesis takes the machine for a CI's; a failure says how to repeat it.
settings.register_profile("soak", max_examples=1000, deadline=None, derandomize=False, print_blob=True)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "fast"))


@pytest.fixture(autouse=True, scope="session")
def float64():
    torch.set_default_dtype(torch.float64)


def made_once(tmp_path_factory, worker_id, name, *flags):
    """The folder of a finished tiny run that all processes of the suite look at: the first to ask makes it."""
    shared = tmp_path_factory.getbasetemp() if worker_id == "master" else tmp_path_factory.getbasetemp().parent
    out = shared / name
    with FileLock(f"{out}.lock"):
        if not (out / "summary.json").exists():
            assert run(out, *flags) == 0
    return out


@pytest.fixture(scope="session")
def finished(tmp_path_factory, worker_id, float64):
    """One finished tiny run, to look at. Tests do not change it."""
    return made_once(tmp_path_factory, worker_id, "finished")


@pytest.fixture(scope="session")
def only_stage_1(tmp_path_factory, worker_id, float64):
    """A run in which nothing moves but the classifier in stage 1."""
    arms = "cf-rl,random-w,lp-ft,random-reward-sgd,sft-rl-sgd,classifier-last-1x2"
    return made_once(tmp_path_factory, worker_id, "only-stage-1", "--arms", arms, "--lr", "0", "--sgd-lr", "0")
