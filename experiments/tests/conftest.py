"""What pytest must know of this folder."""

collect_ignore = ["trl_bridge.py"]  # needs the extra `trl`; test_trl_recipe.py skips itself without it
