"""Says what a build leaves out; everything static stands in pyproject.toml."""

import sys

from setuptools import setup

# pip shows this line with -v; `python -m lora_kernels info` says the same of an installed package.
print("lora_kernels: pure Python build, no compiled kernels in this version", file=sys.stderr)
setup()
