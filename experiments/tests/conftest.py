"""Finished runs, made once, that many tests look at."""

import pytest
from filelock import FileLock  # torch brings it
from tiny_runs import run

collect_ignore = ["trl_bridge.py"]  # needs the extra `trl`; test_trl_recipe.py skips itself without it


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
