"""The benchmark suite: `python -m bench --help`, from the repository's root."""
