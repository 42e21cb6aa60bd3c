"""Float64 and one thread for every test; hypothesis profile `fast`, or HYPOTHESIS_PROFILE=soak."""

import os

import pytest
import torch
from hypothesis import Phase, settings

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
