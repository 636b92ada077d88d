"""Kernels broken on purpose must turn the parity suite red, in every executor that can tell."""

import importlib.util
import sys
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch

from lora_kernels.impl.triton import kernels
from lora_kernels.impl.triton.workspace import Workspace
from lora_kernels.registration import operators
from lora_kernels.testing import (
    DORA,
    Case,
    DoraCase,
    assert_parity,
    float16_range_cases,
    make_inputs,
)
from lora_kernels.testing.dora import dora_call
from tests.support.executors import (
    INTERPRETED,
    Interpreter,
    Machine,
    check_same_bits,
    fixed_library,
    fixed_plan,
    needs_machine,
    running,
)

CASE = Case((130,), 200, 136, 5, torch.float16, dropout_p=0.2)
# What each imports of the others stands before it.
SOURCES = (
    "arguments", "memory", "products", "units", "flags", "order", "mask", "split_k", "weights",
    "mainloop", "epilogue", "sums", "shrink", "forward", "backward", "expand", "dy_pass", "x_pass",
    "decode", "norm", "gain", "groups", "grouped_sums", "grouped_forward", "grouped_backward",
)  # fmt: skip

# name: (file, text, replacement, whether only several programs at once show it)
MUTANTS = {
    "xa published before the store": (
        "forward",
        "        store_factor(out.xa, made, rows, m, R, BLOCK_R)\n    publish(part.flag)\n",
        "        publish(part.flag)\n        store_factor(out.xa, made, rows, m, R, BLOCK_R)\n"
        "    if part.index < SHAPE.XA_COLUMNS - 1:\n        publish(part.flag)\n",
        True,
    ),
    "sums published before the store": (
        "forward",
        "            store_part(shrunk, out.high, out.low, part.panel, LOW)\n",
        "            publish(part.flag)\n"
        "            store_part(shrunk, out.high, out.low, part.panel, LOW)\n"
        "            tl.atomic_add(part.flag, -1)\n",
        True,
    ),
    "sums not waited for": ("forward", "wait(part.flag, part.index)", "wait(part.flag, 0)", True),
    "dxa published before the store": (
        "backward",
        "                    store_factor(dxa.numbers, shrunk, rows, m, R, SHAPE.BLOCK_R)\n"
        "                    publish(flags + panel)\n",
        "                    publish(flags + panel)\n"
        "                    store_factor(dxa.numbers, shrunk, rows, m, R, SHAPE.BLOCK_R)\n",
        True,
    ),
    "flag not waited for": ("flags", "early, seen, $2;", "early, seen, 0;", True),
    "mask read before it is drawn": ("backward", "+ DA_BLOCKS if DRAWN else 1", "", True),
    "flag not reset": (
        "flags",
        "@last st.relaxed.gpu.global.u32 [$1], 0;\n            mov",
        "mov",
        True,
    ),
    "ticket not reset": (
        "order",
        "@first atom.relaxed.gpu.global.inc.u32 taken, [$1], $2;",
        "@first atom.relaxed.gpu.global.add.u32 taken, [$1], 1;",
        True,
    ),
    "number read before it is there": ("order", "taken;\n            bar.sync 0;", "taken;", True),
    "a number for each thread": ("order", "@first atom.relaxed", "atom.relaxed", True),
    "mask missing on a ragged edge": ("memory", "elif LIMIT % COLUMNS == 0:", "elif True:", False),
    "wrong counter in the mask": ("mask", "(K + 7) // 8", "(K + 15) // 8", False),
    "lanes in another order": (
        "mask",
        "[None, None, :] == 0, words,",
        "[None, None, :] == 1, words,",
        False,
    ),
    "bits in another order": (
        "mask",
        "words << (7 - place), words << (3 - place)",
        "words << (3 - place), words << (7 - place)",
        False,
    ),
    "sums of another panel": (
        "forward",
        "load_part(out.high, out.low, part.panel,",
        "load_part(out.high, out.low, 0,",
        True,
    ),
    "sums of another part": (
        "forward",
        "begin = part.index * SHARE",
        "begin = 0 * part.index",
        True,
    ),
    "columns after K in another order": ("mainloop", "(step - LENGTH)", "(step - SHAPE.K)", True),
    "sums of sixteen bits": ("split_k", "pairs << (16 - LOW), MASK", "pairs, 0", True),
    "bits of another row": ("sums", "wide(start) * MASK_BYTES", "0", False),
    "kept values not scaled": (
        "forward",
        "whole *= keep_scale(threshold)",
        "whole *= 1.0",
        False,
    ),
    "dropout forgotten in dA": (
        "sums",
        "kept = keep_where(masks, tile)",
        "kept = tile",
        False,
    ),
    "rows of dA counted twice": (
        "sums",
        "inside = (rows >= first) & (rows < at.m)",
        "inside = rows < at.m",
        False,
    ),
}

# name: (file, text, replacement, which of `float16_range_cases`)
RANGE_MUTANTS = {
    "scaled B in float16": ("epilogue", "constexpr = dtype == tl.float16", "constexpr = False", 3),
    "sums left in another unit": ("sums", "product * (before * inverse_of(unit))", "product", 9),
    "unit forgotten in dA": ("sums", "        product *= unit\n", "", 4),
    "small unit forgotten in dx": ("epilogue", "* below).to(dtype)", "* 1.0).to(dtype)", 9),
    "large unit forgotten in dx": ("epilogue", "a_tile.to(tl.float32) * above", "a_tile", 7),
    "unit below what float16 needs": ("units", "- 1, 14)", "- 1, 18)", 7),
}

# Of the library plan, in three segments. name: (file, text, replacement)
LIBRARY_MUTANTS = {
    "bias forgotten": ("expand", "acc += load_bias", "load_bias"),
    "tile of y at another place": ("expand", "tile % COLUMNS", "tile * 0"),
    "kept values of dxa not scaled": ("dy_pass", "scale * keep_scale(threshold)", "scale"),
    "panels of the first segment alone": ("dy_pass", "part * panels + tile", "tile"),
    "rows of the first segment alone": ("sums", "Segment(part * segment,", "Segment(0 * part,"),
    "dropout forgotten in dx": ("x_pass", "result = keep_where(masks, result)", "pass"),
    "dropout forgotten in dA of x": ("x_pass", "x_tile = keep_where(masks, x_tile)", "pass"),
    "rows of dA counted twice": ("x_pass", "(rows >= first) & (rows < m)", "(rows < m)"),
    "one counter for all blocks of dA": ("x_pass", "counters + block", "counters"),
}
LIBRARY_RANGE_MUTANTS = {
    "unit of a step forgotten in dA": ("x_pass", "read(made, MODE) * unit", "read(made, MODE)", 9),
    "unit of a step forgotten in dx": ("x_pass", "result *= unit", "result *= 1.0", 7),
    "unit of one": ("x_pass", "unit = unit_of(factor)", "unit = unit_of(factor * 0 + 1)", 7),
}

# Of DoRA by the library plan. name: (file, text, replacement)
DORA_MUTANTS = {
    "scaling forgotten in the norm": ("norm", "read(update, MODE) * scale", "read(update, MODE)"),
    "last row without a norm": ("norm", "mask=rows < N)", "mask=rows < N - 1)"),
    "columns beyond K in the norm": ("norm", "other=0.0).to(tl", "other=1.0).to(tl"),
    "g without its sign": ("epilogue", "tl.div_rn(magnitude", "tl.div_rn(tl.abs(magnitude)"),
    "g on the bias": (
        "gain",
        "SHAPE).to(tl.float32)[None, :]",
        "SHAPE).to(tl.float32)[None, :] * g",
    ),
    "z forgotten": ("gain", "(g - 1.0) + z", "(g - 1.0)"),
    "D applied once": ("shrink", "            v_tile = keep_where(masks, v_tile)\n", ""),
    "kept values of x not scaled": ("shrink", "* keep_scale(draw.threshold)", "* 1.0"),
    "base forgotten in dx": ("x_pass", "if SHAPE.BASE:", "if False:"),
    "kept values of dw not scaled": ("gain", "1.0) * keep_scale(threshold)", "1.0) * 1.0"),
    "dm of y with the bias": ("gain", "tile * u_tile", "tile * (u_tile + 1.0)"),
    "dm not divided": ("gain", "tl.div_rn(tl.sum(products, 0), norm)", "tl.sum(products, 0)"),
    "last row of a segment skipped": ("gain", "(rows < end)", "(rows < end - 1)"),
}

# Of DoRA by own products. name: (file, text, replacement)
OWN_DORA_MUTANTS = {
    "g forgotten": ("forward", "acc *= gain[None, :]", "acc *= 1.0"),
    "g of other columns": ("forward", "(call.gain, columns,", "(call.gain, columns - column,"),
    "norms of a tile less": ("forward", "(N + NORM_ROWS - 1) // NORM_ROWS", "N // NORM_ROWS"),
    "scaling forgotten in its norms": ("forward", "tile, scale, SHAPE", "tile, 1.0, SHAPE"),
    "u stored with the bias": (
        "forward",
        "                store_tile(out.u, acc, rows,",
        "                acc += bias_row.to(tl.float32)[None, :]\n"
        "                store_tile(out.u, acc, rows,",
    ),
    "dz of a row less": ("gain", "(rows < end)", "(rows < end - 1)"),
}

# Of DoRA's norms, made beside the products, which only several programs at once show.
DORA_ORDER_MUTANTS = {
    "norms not waited for": ("forward", "wait(norms_flag, NORMS)", "pass"),
    "norms published before, too": (
        "forward",
        "                store_norms(",
        "                publish(norms_flag)\n                store_norms(",
    ),
    "norms never left": ("forward", "leave(norms_flag, NORMS + tiles - 1)", "pass"),
    "norms left too early": ("forward", "NORMS + tiles - 1)\n", "NORMS + tiles - 2)\n"),
}

# The interpreter's one program can't wait for others.
PLAN = fixed_plan(sum_columns=64, xa_columns=1 if INTERPRETED else 3)


class Broken:
    """An executor that runs other kernels, of the same names; `kernels` has them."""

    def run(self, kernel, grid, args, constants, how):
        super().run(self.kernels[kernel.__name__], grid, args, constants, how)


@dataclass
class Mutated(Broken, Machine):
    kernels: dict[str, Any] = field(default_factory=dict)


@dataclass
class Interpreted(Broken, Interpreter):
    kernels: dict[str, Any] = field(default_factory=dict)


def running_mutant(kernels, plan=PLAN):
    """Return what runs mutants that one program after the other shows."""
    if INTERPRETED:
        return Interpreted(plan=plan, kernels=kernels)
    pytest.importorskip("ptxvm", reason="needs the PTX virtual machine or TRITON_INTERPRET=1")
    return Mutated(80, plan=plan, kernels=kernels)


def mutated_kernels(tmp_path, monkeypatch, file, text, replacement):
    """Import a copy of the kernels with one piece of source replaced; return them by name."""
    package = f"mutant_{tmp_path.name}"
    folder = tmp_path / package
    folder.mkdir()
    origin = Path(kernels.__file__).parent
    assert {path.stem for path in origin.glob("*.py")} == {"__init__", *SOURCES}
    for name in SOURCES:
        source = (origin / f"{name}.py").read_text()
        if name == file:
            assert text in source, f"{file}.py no longer holds {text!r}"
            source = source.replace(text, replacement)
        for other in SOURCES:
            source = source.replace(
                f"lora_kernels.impl.triton.kernels.{other} ", f"{package}.{other} "
            )
        (folder / f"{name}.py").write_text(source)
    monkeypatch.syspath_prepend(tmp_path)
    found = {}
    for name in SOURCES:
        spec = importlib.util.spec_from_file_location(f"{package}.{name}", folder / f"{name}.py")
        assert spec is not None
        assert spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        monkeypatch.setitem(sys.modules, f"{package}.{name}", module)
        spec.loader.exec_module(module)
        found |= {each: v for each, v in vars(module).items() if each.endswith("_kernel")}
    assert len(found) == 14
    return found


def _runs(executor, case=CASE):
    """Two calls on one workspace, each against the oracle."""
    with running(executor):
        for _ in range(2):
            assert_parity(case, make_inputs(case), "triton")


@pytest.mark.many
@pytest.mark.parametrize("name", [n for n, m in MUTANTS.items() if not m[3]])
def test_wrong_values_are_caught(name, tmp_path, monkeypatch):
    executor = running_mutant(mutated_kernels(tmp_path, monkeypatch, *MUTANTS[name][:3]))
    with pytest.raises(Exception, match=r"budget|NaN|out-of-bounds|race"):
        _runs(executor)


@pytest.mark.many
@pytest.mark.parametrize("name", RANGE_MUTANTS)
def test_a_short_range_is_caught(name, tmp_path, monkeypatch):
    *mutant, index = RANGE_MUTANTS[name]
    executor = running_mutant(mutated_kernels(tmp_path, monkeypatch, *mutant))
    case = float16_range_cases((130,), 72, 136, 5)[index]
    with pytest.raises(AssertionError, match=r"budget|NaN"):
        _runs(executor, case)


@pytest.mark.many
@pytest.mark.parametrize("name", LIBRARY_MUTANTS)
def test_wrong_passes_are_caught(name, tmp_path, monkeypatch):
    kernels = mutated_kernels(tmp_path, monkeypatch, *LIBRARY_MUTANTS[name])
    with pytest.raises(Exception, match=r"budget|NaN|out-of-bounds|race"):
        _runs(running_mutant(kernels, fixed_library()))


@pytest.mark.many
@pytest.mark.parametrize("name", [*DORA_MUTANTS, *OWN_DORA_MUTANTS])
def test_wrong_kernels_of_dora_are_caught(name, tmp_path, monkeypatch):
    own = name in OWN_DORA_MUTANTS
    mutant = OWN_DORA_MUTANTS[name] if own else DORA_MUTANTS[name]
    kernels = mutated_kernels(tmp_path, monkeypatch, *mutant)
    executor = running_mutant(kernels, fixed_plan() if own else fixed_library())
    with running(executor), pytest.raises(Exception, match=r"budget|NaN|out-of-bounds|race"):
        _check_dora(own)


def _check_dora(own):
    for p in (0.0,) if own else (0.0, 0.2):
        case = DoraCase((130,), 72, 136, 5, torch.float16, dropout_p=p)
        DORA.assert_parity(case, DORA.inputs(case), "triton")


@pytest.mark.parametrize("name", LIBRARY_RANGE_MUTANTS)
def test_a_short_range_of_passes_is_caught(name, tmp_path, monkeypatch):
    *mutant, index = LIBRARY_RANGE_MUTANTS[name]
    executor = running_mutant(mutated_kernels(tmp_path, monkeypatch, *mutant), fixed_library())
    case = float16_range_cases((130,), 72, 136, 5)[index]
    with pytest.raises(AssertionError, match=r"budget|NaN"):
        _runs(executor, case)


@pytest.mark.many
@needs_machine
@pytest.mark.parametrize("name", [n for n, m in MUTANTS.items() if m[3]])
def test_wrong_order_is_caught(name, tmp_path, monkeypatch):
    kernels = mutated_kernels(tmp_path, monkeypatch, *MUTANTS[name][:3])
    # Many programs at once and several schedules: an order that is wrong need not fail at once.
    with pytest.raises(Exception, match=r"budget|NaN|race|spin|blocked|flags|bounds"):
        _run_schedules(kernels)


@pytest.mark.many
@needs_machine
@pytest.mark.parametrize("name", DORA_ORDER_MUTANTS)
def test_a_wrong_order_of_norms_is_caught(name, tmp_path, monkeypatch):
    kernels = mutated_kernels(tmp_path, monkeypatch, *DORA_ORDER_MUTANTS[name])
    with pytest.raises(Exception, match=r"budget|NaN|race|spin|blocked|flags|bounds"):
        _run_norms(kernels)


def _run_norms(kernels):
    case = DoraCase((130,), 72, 136, 5, torch.float16)
    inputs = DORA.inputs(case)
    for seed in range(2):
        machine = Mutated(80, 24, seed, weak=1, plan=fixed_plan(), kernels=kernels)
        with running(machine):
            call = dora_call(case, inputs).flat()
            y = operators("lora_dora_linear", "triton").forward(inputs.x, *call)[0]
        _check_flags(machine)
        DORA.assert_results(case, inputs, {"y": y}, "triton")


def _run_schedules(kernels):
    workspace = Workspace()
    # Without dropout tiles of dx wait for nothing but dxa.
    for seed, case in product(range(3), (CASE, replace(CASE, dropout_p=0.0))):
        machine = Mutated(80, 24, seed, plan=PLAN, workspace=workspace, kernels=kernels)
        _runs(machine, case)
        _check_flags(machine)


def _check_flags(machine):
    assert not machine.workspace.zeros(1, torch.device("cpu")).any(), "flags not left as found"


@pytest.mark.slow
@needs_machine
def test_sums_in_order_of_arrival_are_caught(tmp_path, monkeypatch):
    kernels = mutated_kernels(
        tmp_path, monkeypatch, "sums", "space + i * SIZE", "space + (part + i) % parts * SIZE"
    )
    case = Case((300,), 136, 136, 8, torch.float16, torch.float32)
    with pytest.raises(AssertionError, match="other bits"):
        check_same_bits(case, partial(Mutated, 80, kernels=kernels))


@needs_machine
def test_the_kernels_themselves_pass(tmp_path, monkeypatch):
    kernels = mutated_kernels(tmp_path, monkeypatch, "flags", "def publish", "def publish")
    machine = Mutated(80, 24, plan=PLAN, kernels=kernels)
    _runs(machine)
    _check_flags(machine)
    _run_norms(kernels)


@needs_machine
def test_a_wrong_comparison_of_pairs_is_caught(tmp_path, monkeypatch):
    """Lanes that read as NaN are kept."""
    kernels = mutated_kernels(tmp_path, monkeypatch, "mask", "set.ltu.u32", "set.lt.u32")
    with pytest.raises(AssertionError, match="budget"):
        _runs(Mutated(90, plan=PLAN, kernels=kernels))
