"""Import hygiene, command line, layout rules: what keeps the package small and importable."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "lora_kernels"
SOURCES = sorted(PACKAGE.rglob("*.py"))
# From top to bottom: a module may import what stands to the right of it, never to the left.
FLOW = (
    "__main__", "info", "testing", "__init__",
    "integrations.auto", "integrations.axolotl", "integrations.transformers", "integrations",
    "adapter_files", "adapter_layout", "patching",
    "prepack", "serving", "_peft_layer", "nn", "merging", "bypass", "explanation",
    "functional", "tensor_parallel",
    "sharding", "packing", "usage", "summary", "dispatch", "ops", "autograd", "transforms",
    "_triton.inspect", "_triton.tune", "_triton.record", "_triton.linear", "_triton.machine",
    "_triton.compiler",
    "_triton.forward", "_triton.backward", "_triton.thin", "_triton.sums", "_triton.handing",
    "_triton.philox", "_triton.tiles",
    "_triton.tuned", "_triton.plan", "_triton.cost", "_triton.config", "_triton.launch",
    "_triton.workspace", "_triton.device", "_triton",
    "_cuda.inspect", "_cuda.machine", "_cuda", "_cuobjdump", "_ptxvm",
    "_progress", "_eager", "_onednn", "_tf32", "_pools", "reference", "_philox", "_native",
    "wrappers", "checks", "dropout",
)  # fmt: skip

FORBID = """
import sys
class Forbidden:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in {"triton", "peft", "transformers", "safetensors"}:
            raise ImportError(f"{name} is forbidden here")
sys.meta_path.insert(0, Forbidden())
"""


def run_python(code, *args):
    return subprocess.run(
        [sys.executable, *args, "-c", code], capture_output=True, text=True, timeout=120, cwd=ROOT
    )


def test_import_and_use_with_torch_alone():
    code = FORBID + (
        "from pathlib import Path\n"
        "import torch, lora_kernels as lk\n"
        "from lora_kernels import _native\n"
        "assert _native.absence.cache_info().currsize == 0, 'loaded at import'\n"
        "_native.LIBRARIES.update(cpu=Path('forbidden'), cuda=Path('forbidden'))\n"
        "layer = lk.LoRALinear(8, 6, r=2, lora_dropout=0.1)\n"
        "layer(torch.randn(3, 8)).sum().backward()\n"
        "assert not torch.cuda.is_initialized()\n"
        "from lora_kernels.info import describe; print(describe())\n"
    )
    done = run_python(code)
    assert done.returncode == 0, done.stderr
    assert "eager" in done.stdout
    assert "not built" in done.stdout


def test_missing_peft_is_named():
    code = FORBID + "import torch, lora_kernels as lk; lk.patch_peft(torch.nn.Linear(2, 2))"
    done = run_python(code)
    assert "ImportError: peft" in done.stderr


def test_import_draws_no_random_numbers_and_changes_no_settings():
    code = (
        "import torch\n"
        "before = torch.get_rng_state(), torch.get_num_threads(), torch.get_default_dtype()\n"
        "import lora_kernels\n"
        "after = torch.get_rng_state(), torch.get_num_threads(), torch.get_default_dtype()\n"
        "assert torch.equal(before[0], after[0]) and before[1:] == after[1:]\n"
    )
    assert run_python(code).returncode == 0


def _module(path):
    parts = path.relative_to(PACKAGE).with_suffix("").parts
    return ".".join(parts[:-1] if len(parts) > 1 and parts[-1] == "__init__" else parts)


def _imports(path):
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.module and "lora_kernels" in node.module:
            package = node.module.removeprefix("lora_kernels").removeprefix(".")
            if package in ("", "_triton", "_cuda"):
                names = (alias.name for alias in node.names)
                yield from (f"{package}.{name}".removeprefix(".") for name in names)
            else:
                yield package


def test_every_module_has_its_place_in_the_flow():
    assert sorted(map(_module, SOURCES)) == sorted(FLOW)


@pytest.mark.parametrize("path", SOURCES, ids=_module)
def test_imports_point_downward(path):
    own = _module(path)
    for name in _imports(path):
        assert FLOW.index(name) > FLOW.index(own), f"{own} imports {name}"


def _functions(path):
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.FunctionDef):
            body = node.body[1:] if ast.get_docstring(node) else node.body
            first = body[0].lineno if body else node.lineno
            device = any("jit" in ast.unparse(decorator) for decorator in node.decorator_list)
            yield node.name, (node.end_lineno or first) - first + 1, 120 if device else 50


def test_files_and_functions_stay_within_the_budget():
    checked = [*SOURCES, *(ROOT / "bench").rglob("*.py"), *(ROOT / "examples").rglob("*.py")]
    for path in [*checked, *(ROOT / "tests").rglob("*.py")]:
        assert len(path.read_text().splitlines()) <= 400, path
    for path in checked:
        for name, lines, most in _functions(path):
            assert lines <= most, f"{path}: {name} has {lines} lines"
    assert len((ROOT / "setup.py").read_text().splitlines()) <= 100


def test_public_names_have_docstrings():
    import lora_kernels

    for name in lora_kernels.__all__:
        assert getattr(lora_kernels, name).__doc__, name
