"""The examples in the docstrings of public names run as they stand; so do the documents' rules."""

import dataclasses
import doctest
import inspect
import re

import pytest
import torch

import lora_kernels as lk
from tests.support.paths import ROOT
from tests.support.public_api import PUBLIC

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
    for needed in ("peft", "safetensors", "transformers"):
        if needed in example.docstring:
            pytest.importorskip(needed)
    if any("bitsandbytes" in each.source for each in example.examples):
        pytest.importorskip("bitsandbytes")
    monkeypatch.chdir(tmp_path)
    failures = []
    example.globs = dict(NAMES)
    failed, run = doctest.DocTestRunner(verbose=False).run(example, out=failures.append)
    assert not failed, "".join(failures)
    assert run == len(example.examples)


def test_every_public_name_has_an_example():
    assert set(PUBLIC) <= {test.name for test in EXAMPLES}
    assert all(len(test.examples) <= 8 for test in EXAMPLES)


def _callables():
    for name, public in PUBLIC.items():
        if not inspect.isclass(public):
            yield name, public
        elif not dataclasses.is_dataclass(public):
            yield name, public
            own = inspect.getmembers(public, inspect.isroutine)
            # Of what torch and transformers call the arguments are theirs.
            theirs = ("_", "on_", "forward", "extra_repr")
            found = ((n, m) for n, m in own if n in vars(public) and not n.startswith(theirs))
            yield from ((f"{name}.{n}", m) for n, m in found)


CALLABLES = dict(_callables())


@pytest.mark.parametrize(("name", "public"), CALLABLES.items(), ids=CALLABLES)
def test_docstring_names_what_is_passed_returned_and_raised(name, public):
    text, signature = inspect.getdoc(public), inspect.signature(public)
    documented, _, _ = text.partition("Args:")[2].partition("Raises:")
    named = set(re.findall(r"\w+", " ".join(re.findall(r"^    ([\w, ]+):", documented, re.M))))
    # A catch-all only serves a message about what was misplaced.
    passed = {p.name for p in signature.parameters.values() if p.kind is not p.VAR_POSITIONAL}
    assert passed - {"self"} <= named
    returns = signature.return_annotation
    if not inspect.isclass(public) and returns not in (None, "LoRALinear", str | None):
        assert "Returns:" in text
    if signature.parameters.keys() - {"self"}:
        assert "Raises:" in text


@pytest.mark.parametrize("name", [n for n, c in PUBLIC.items() if dataclasses.is_dataclass(c)])
def test_docstring_names_every_field(name):
    text = inspect.getdoc(PUBLIC[name])
    for field in dataclasses.fields(PUBLIC[name]):
        assert re.search(rf"^    {field.name}: ", text, re.MULTILINE), field.name


def test_reference_lists_every_public_name():
    text = (ROOT / "docs" / "api.md").read_text()
    listed = set(re.findall(r"^\.\. auto(?:function|class):: (\w+)", text, re.MULTILINE))
    assert {*lk.__all__, "TrainerCallback"} == listed


def test_documents_hold_no_marks_of_a_merge():
    for path in (*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md")):
        assert not re.search(r"^(<{7}|={7}|>{7})( |$)", path.read_text(), re.MULTILINE), path
