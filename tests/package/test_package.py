"""Import hygiene, command line, layout rules: what keeps the package small and importable."""

import ast
import subprocess
import sys

import pytest

from tests.support.paths import ROOT

PACKAGE = ROOT / "lora_kernels"
SOURCES = sorted(PACKAGE.rglob("*.py"))
# From top to bottom, folders and single modules: what is in one may import what stands in the same
# or further on, never before. A module belongs to the longest name that begins its own.
FLOW = (
    "__main__", "info", "testing", "__init__", "integrations", "tuning", "adapter_files",
    "adapter_layout", "adapter_layers", "adapter_experts", "batches", "patching", "_peft", "nn",
    "experts", "norms", "quantized", "merging", "explanation", "ops", "tensor_parallel",
    "sharding", "serving", "copies", "casting", "prepack", "bypass", "usage", "summary",
    "dispatch", "registration", "transforms", "impl.cuda.tools", "impl.cuda",
    "impl.triton.tools", "impl.triton", "impl.triton.kernels", "impl.triton.plan", "impl.cpu",
    "impl.eager", "impl.reference", "impl", "_progress", "_version", "native", "wrappers",
    "checks", "operands",
)  # fmt: skip

# torch comes before it: from 2.15 on it asks itself whether Triton is there.
FORBID = """
import sys, torch
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
        "import lora_kernels as lk\n"
        "from lora_kernels import native\n"
        "from lora_kernels.impl.triton.plan import rates\n"
        "assert native.absence.cache_info().currsize == 0, 'loaded at import'\n"
        "assert rates.shipped.cache_info().currsize == 0, 'read at import'\n"
        "native.LIBRARIES.update(cpu=Path('forbidden'), cuda=Path('forbidden'))\n"
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
    code = FORBID + "import lora_kernels as lk; lk.patch_peft(torch.nn.Linear(2, 2))"
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
    """Yield each name of the package that a module imports, by whichever form of import."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: a relative import"
            names = [f"{node.module}.{alias.name}" for alias in node.names]
        elif isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        else:
            continue
        yield from (
            name.removeprefix("lora_kernels").removeprefix(".") or "__init__"
            for name in names
            if name.split(".")[0] == "lora_kernels"
        )


def _place(name):
    """Return the entry of FLOW that a module, or a name in it, belongs to."""
    while name and name not in FLOW:
        name = name.rpartition(".")[0]
    return name or "__init__"


def test_every_module_has_its_place_in_the_flow():
    places = {_place(_module(path)) for path in SOURCES}
    assert places == set(FLOW)
    assert [path for path in SOURCES if _place(_module(path)) == "__init__"] == [
        PACKAGE / "__init__.py"
    ]


@pytest.mark.parametrize("path", SOURCES, ids=_module)
def test_imports_point_downward(path):
    own = _place(_module(path))
    for name in _imports(path):
        assert FLOW.index(_place(name)) >= FLOW.index(own), f"{_module(path)} imports {name}"


@pytest.mark.parametrize("path", [p for p in SOURCES if "impl" in p.parts], ids=_module)
def test_no_implementation_imports_another(path):
    own = path.relative_to(PACKAGE / "impl").parts[0]
    for name in _imports(path):
        parts = name.split(".")
        if parts[0] == "impl" and (PACKAGE / "impl" / parts[1]).is_dir():
            assert parts[1] == own, f"{_module(path)} imports {name}"


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


KERNELS = sorted((PACKAGE / "impl" / "triton" / "kernels").glob("*.py"))


@pytest.mark.parametrize("path", KERNELS, ids=_module)
def test_device_functions_take_few_arguments_and_name_their_flags(path):
    """Ten of a device function; of a kernel, whose numbers can't be in tuples, fifteen."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.FunctionDef):
            most = 15 if node.name.endswith("_kernel") else 10
            assert len(node.args.args) <= most, f"{path}: {node.name}"
        elif isinstance(node, ast.Call):
            flags = [a for a in node.args if isinstance(a, ast.Constant) and type(a.value) is bool]
            assert not flags, f"{path}:{node.lineno}: a flag without its name"


def test_public_names_have_docstrings():
    import lora_kernels

    for name in lora_kernels.__all__:
        assert getattr(lora_kernels, name).__doc__, name
