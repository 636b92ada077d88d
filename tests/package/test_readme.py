"""The Python blocks of pages with whole programs run as they stand, but for the hub's files."""

import re
from functools import partial

import pytest
import torch

from lora_kernels.dispatch import IMPLEMENTATIONS
from tests.support.paths import ROOT

PAGES = [
    ROOT / "README.md",
    *(ROOT / "docs" / f"{name}.md" for name in ("quickstart", "scale-out")),
]
BLOCKS = {
    f"{page.name}-{index}": block
    for page in PAGES
    for index, block in enumerate(
        re.findall(r"^```python\n(.*?)^```", page.read_text(), re.MULTILINE | re.DOTALL)
    )
}
HUB_MODEL = re.compile(r'"Qwen/[^"]+"')


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """Put texts in the place of a dataset of the hub; return a folder with a small model."""
    datasets = pytest.importorskip("datasets")
    trl = pytest.importorskip("trl")
    from tests.stacks.models import llama, texts, tokenizer

    corpus = texts(8)
    rows = datasets.Dataset.from_dict({"text": corpus})
    monkeypatch.setattr(datasets, "load_dataset", lambda name, split: rows)
    # Trainers ask for leave to train on a CPU.
    monkeypatch.setattr(trl, "SFTConfig", partial(trl.SFTConfig, use_cpu=True, report_to=[]))
    folder = tmp_path / "model"
    llama().save_pretrained(folder)
    tokenizer(corpus).save_pretrained(folder)
    return str(folder)


@pytest.fixture
def one_process(request):
    """Be what torchrun starts, where a block splits a model."""
    if "init_device_mesh" not in request.getfixturevalue("block"):
        yield
        return
    store = torch.distributed.HashStore()
    torch.distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


@pytest.mark.parametrize("block", BLOCKS.values(), ids=BLOCKS)
def test_block_runs(block, one_process, tmp_path, monkeypatch, capsys, request):
    monkeypatch.chdir(tmp_path)
    if HUB_MODEL.search(block):
        block = HUB_MODEL.sub(repr(request.getfixturevalue("hub")), block)
    exec(compile(block, "README.md", "exec"), {})
    printed = capsys.readouterr().out
    for expected in re.findall(r"print\(report\)  # (.*)", block):
        assert expected in printed
    if "SFTTrainer" in block:
        assert "14 LoRA layers patched, 0 left" in printed
        assert (tmp_path / "adapter" / "adapter_model.safetensors").exists()


def test_there_are_blocks():
    counts = [sum(name.startswith(page.name) for name in BLOCKS) for page in PAGES]
    assert counts[0] >= 2
    assert counts[1] >= 3
    assert counts[2] >= 1


def test_readme_is_short():
    assert len((ROOT / "README.md").read_text().splitlines()) <= 120


def test_the_table_of_ops_is_that_of_the_implementations():
    heads = " | ".join(f'`"{each.name}"`' for each in IMPLEMENTATIONS)
    lines = [f"| op, formats of W | {heads} |", "|---" * (1 + len(IMPLEMENTATIONS)) + "|"]
    for op in dict.fromkeys(op for each in IMPLEMENTATIONS for op in each.ops):
        formats = (", ".join(each.ops.get(op, ("-",))) for each in IMPLEMENTATIONS)
        lines.append(f"| `{op}` | {' | '.join(formats)} |")
    assert "\n".join(lines) in (ROOT / "README.md").read_text()
