"""Float64 and one thread for every test, hypothesis's profile (tests/profiles.py), and up to four processes."""

import profiles  # noqa: F401  loads the profile
import pytest
import torch

torch.set_num_threads(1)
collect_ignore = ["experiments/trl_recipe.py"]  # it needs the extra `trl`


@pytest.hookimpl(tryfirst=True)
def pytest_cmdline_main(config):
    """`-n auto --maxprocesses 4 --dist worksteal`, where there is xdist and no `-n` says otherwise. In pyproject.toml
    these flags would end pytest without xdist. A worker is itself no place for more workers."""
    options = config.option
    if hasattr(options, "numprocesses") and options.numprocesses is None and not hasattr(config, "workerinput"):
        options.numprocesses, options.maxprocesses = "auto", options.maxprocesses or 4
        options.dist = "worksteal" if options.dist == "no" else options.dist


@pytest.fixture(autouse=True, scope="session")
def float64():
    torch.set_default_dtype(torch.float64)
