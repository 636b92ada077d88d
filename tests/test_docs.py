"""The examples in the docstrings of public names run as they stand; so do the documents' rules."""

import doctest
from pathlib import Path

import pytest
import torch

import lora_kernels as lk
from lora_kernels import tensor_parallel

ROOT = Path(__file__).parent.parent
PUBLIC = {name: getattr(lk, name) for name in lk.__all__}
PUBLIC |= {name: getattr(tensor_parallel, name) for name in ("ColwiseLoRA", "RowwiseLoRA")}
# What docs/api.md says that an example finds.
NAMES = {"torch": torch, "nn": torch.nn, "lk": lk}
EXAMPLES = [
    test
    for name, public in PUBLIC.items()
    for test in doctest.DocTestFinder(exclude_empty=True).find(public, name, globs={})
    if test.examples
]


@pytest.fixture
def process_group():
    store = torch.distributed.HashStore()
    torch.distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


@pytest.mark.parametrize("example", EXAMPLES, ids=lambda test: test.name)
def test_example_runs(example, process_group, tmp_path, monkeypatch):
    for needed in ("peft", "safetensors"):
        if needed in example.docstring:
            pytest.importorskip(needed)
    monkeypatch.chdir(tmp_path)
    said = []
    example.globs = dict(NAMES)
    failed, run = doctest.DocTestRunner(verbose=False).run(example, out=said.append)
    assert not failed, "".join(said)
    assert run == len(example.examples)


def test_every_public_name_has_an_example():
    assert set(PUBLIC) <= {test.name for test in EXAMPLES}
    assert all(len(test.examples) <= 8 for test in EXAMPLES)
