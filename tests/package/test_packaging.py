"""What is packed: types, metadata, version; and the types that a user's checker sees."""

import os
import re
import subprocess
import sys
import tarfile
import zipfile
from email.parser import Parser

import pytest

import lora_kernels
from lora_kernels.native import absence
from tests.support.paths import ROOT

# Every public name, as a script of a user who runs `mypy --strict` has it.
SCRIPT = """
import torch
from torch import Tensor, nn

import lora_kernels as lk
from lora_kernels.tensor_parallel import ColwiseLoRA, RowwiseLoRA


def patch(model: nn.Module) -> list[str]:
    report: lk.PatchReport = lk.patch_peft(model, impl="auto", prepack=True)
    packed: lk.PrepackReport | None = report.prepack
    cast: lk.CastReport = lk.cast_weights_(model, torch.bfloat16)
    use: lk.UsageReport = lk.report(model)
    layers: list[lk.LayerUse] = list(use.layers.values())
    assert packed is None or packed.nbytes >= 0
    assert lk.unpatch_peft(model) == len(layers)
    return report.patched + list(report.left.values())


def compute(x: Tensor, w: Tensor, a: Tensor, b: Tensor) -> Tensor:
    found: lk.Explanation = lk.explain(x, w, a, b, scaling=2.0)
    print(lk.tune(nn.Sequential(lk.LoRALinear(8, 8)), rows=64).name)
    mask: Tensor = lk.dropout_mask(x.shape, 0.1, seed=1)
    print(found.choice, found.reasons, mask.dtype)
    return lk.lora_linear(x, w, a, b, scaling=2.0, dropout_p=0.1, training=True, seed=1)


def mixed(model: nn.Module, x: Tensor) -> Tensor:
    with lk.adapter_batch(model, ["one", "other"]):
        y: Tensor = model(x)
    return y


def adapt(folder: str) -> Tensor:
    layer: lk.LoRALinear = lk.LoRALinear.from_linear(nn.Linear(8, 4), r=2, lora_alpha=4)
    layer.merge()
    layer.unmerge()
    model = nn.Sequential(layer, lk.LoRALinear(4, 4, r=2, dtype=torch.float32))
    lk.save_adapter(model, folder)
    lk.load_adapter(model, folder)
    print(lk.prepack_(model).left, lk.unprepack_(model), lk.__version__)
    y: Tensor = model(torch.ones(1, 8))
    return y


def others(x: Tensor, w: Tensor, a: Tensor, b: Tensor, ids: Tensor, m: Tensor) -> list[Tensor]:
    layers = (lk.LoRAConv1d(4, 4, 3), lk.LoRAConv2d(4, 4, 3), lk.LoRAConv3d(4, 4, 3))
    embedding: lk.LoRAEmbedding = lk.LoRAEmbedding.from_embedding(nn.Embedding(4, 8))
    experts: lk.LoRAExperts = lk.LoRAExperts.from_experts(nn.Linear(8, 4), r=2)
    quantized = lk.quantized_weight(nn.Linear(8, 4))
    print(layers, quantized.shape, experts.lora_A.keys())
    return [
        lk.lora_dora_linear(x, w, a, b, m),
        lk.grouped_lora_linear(x, w, a, b, ids, scaling=m, impl="eager"),
        lk.lora_embedding(ids, w, a, b),
        lk.lora_conv1d(x, w, a, b),
        lk.lora_conv2d(x, w, a, b, stride=2),
        lk.lora_conv3d(x, w, a, b, padding="same"),
        lk.lora_linear(x, quantized, a, b),
        embedding(ids),
    ]


STYLES = {"q_proj": ColwiseLoRA(), "o_proj": RowwiseLoRA(use_local_output=False)}
"""
WRONG = 'lk.lora_linear(1, 2, 3, 4, scale="2")'


@pytest.fixture(scope="module")
def packed(tmp_path_factory):
    """A wheel and a source distribution, without compiled parts."""
    folder = tmp_path_factory.mktemp("packed")
    environment = {**os.environ, "LORA_KERNELS_CPU": "0", "LORA_KERNELS_CUDA": "0"}
    source = folder / "source"
    tracked = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True).stdout
    if not tracked:
        pytest.skip("no checkout")
    for name in tracked.splitlines():
        if (ROOT / name).exists():
            (source / name).parent.mkdir(parents=True, exist_ok=True)
            (source / name).write_bytes((ROOT / name).read_bytes())
    done = subprocess.run(
        [sys.executable, "setup.py", "-q", "sdist", "-d", folder, "bdist_wheel", "-d", folder],
        cwd=source, env=environment, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    [wheel], [sdist] = folder.glob("*.whl"), folder.glob("*.tar.gz")
    return wheel, sdist


def test_wheel_and_sdist_hold_what_they_should(packed):
    wheel, sdist = packed
    with zipfile.ZipFile(wheel) as archive:
        files = set(archive.namelist())
    plan = "lora_kernels/impl/triton/plan"
    data = {"lora_kernels/py.typed", f"{plan}/spill_free.csv", f"{plan}/rates.json"}
    assert data <= files
    with tarfile.open(sdist) as archive:
        inside = {name.partition("/")[2] for name in archive.getnames()}
    wanted = {*data, "CHANGELOG.md", "LICENSE", "README.md", "setup.py"}
    documents = {str(path.relative_to(ROOT)) for path in (ROOT / "docs").rglob("*.md")}
    files_of_part = (ROOT / "csrc" / "cpu").rglob("*.*")
    sources = {str(path.relative_to(ROOT)) for path in files_of_part if path.suffix != ".pyc"}
    assert not (wanted | documents | sources) - inside


def test_metadata_is_complete(packed):
    wheel, _ = packed
    with zipfile.ZipFile(wheel) as archive:
        [name] = [n for n in archive.namelist() if n.endswith(".dist-info/METADATA")]
        metadata = Parser().parsestr(archive.read(name).decode())
    for field in ("Summary", "Author", "Maintainer", "Keywords", "License-Expression"):
        assert metadata[field], field
    assert metadata["Version"] == lora_kernels.__version__
    kinds = {classifier.split(" :: ")[0] for classifier in metadata.get_all("Classifier")}
    assert {"Development Status", "Intended Audience", "Programming Language", "Topic"} <= kinds
    urls = {url.split(",")[0] for url in metadata.get_all("Project-URL")}
    assert {"Homepage", "Documentation", "Source", "Issues", "Changelog"} <= urls


def test_version_is_the_changelogs_head():
    [head] = re.findall(r"^## (\S+),", (ROOT / "CHANGELOG.md").read_text(), re.MULTILINE)[:1]
    assert head == lora_kernels.__version__


@pytest.mark.slow
def test_a_users_script_passes_strict_mypy(packed, tmp_path):
    pytest.importorskip("mypy")
    with zipfile.ZipFile(packed[0]) as archive:
        archive.extractall(tmp_path / "site")
    (tmp_path / "script.py").write_text(SCRIPT)
    (tmp_path / "wrong.py").write_text(f"import lora_kernels as lk\n\n{WRONG}\n")
    # First on the path, as if installed: mypy asks for the marker of what isn't on its own path.
    path = os.pathsep.join([str(tmp_path / "site"), *filter(None, sys.path[1:])])
    done = subprocess.run(
        [sys.executable, "-m", "mypy", "--strict", "script.py", "wrong.py"],
        cwd=tmp_path, env={**os.environ, "PYTHONPATH": path}, capture_output=True, text=True,
    )  # fmt: skip
    errors = [line for line in done.stdout.splitlines() if ": error:" in line]
    assert errors, done.stdout + done.stderr
    assert all(line.startswith("wrong.py:3:") for line in errors), done.stdout
    assert any("call-arg" in line or "arg-type" in line for line in errors)


def test_the_script_has_every_public_name():
    names = {name for name in lora_kernels.__all__ if not re.search(rf"\blk\.{name}\b", SCRIPT)}
    assert not names


@pytest.mark.slow
def test_the_check_of_an_installed_package_passes():
    if (reason := absence("cpu")) is not None:
        pytest.skip(f"compiled CPU part {reason}")
    done = subprocess.run(
        [sys.executable, "tests/installed.py"],
        cwd=ROOT, env={**os.environ, "PYTHONPATH": str(ROOT)}, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "24 cases within the budget" in done.stdout
