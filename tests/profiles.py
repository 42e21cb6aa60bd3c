"""How many examples a property draws: the profile `fast`, or another that HYPOTHESIS_PROFILE names.

A property that costs a lot is marked `@dear`, and draws a quarter of the profile's examples. A fixed number, such as 5,
would hold for `soak` too: it would draw 5 examples and not 250.
"""

import os
from pathlib import Path

from hypothesis import Phase, settings
from hypothesis.database import DirectoryBasedExampleDatabase

# The same examples everywhere, so that green for one is green for all; all phases, so that a failure is shrunk.
settings.register_profile("fast", max_examples=20, deadline=None, derandomize=True, database=None, print_blob=True)
# For whoever asks only whether a test falls, as tests/mutants.py does: to shrink takes most of the time of a failure.
settings.register_profile("falls", settings.get_profile("fast"), phases=(Phase.explicit, Phase.generate))
# Fresh examples on every run, even where hypothesis takes the machine for a CI's. What failed is kept in .hypothesis/
# and tried first the next time.
kept = DirectoryBasedExampleDatabase(Path(__file__).parent.parent / ".hypothesis" / "examples")
settings.register_profile("soak", max_examples=1000, deadline=None, derandomize=False, database=kept, print_blob=True)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "fast"))

dear = settings(max_examples=max(5, settings().max_examples // 4))
