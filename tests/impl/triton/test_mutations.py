"""Kernels broken on purpose must turn the parity suite red, in every executor that can tell."""

import importlib.util
import sys
from dataclasses import replace
from itertools import product
from pathlib import Path

import pytest
import torch

from lora_kernels.testing import Case, assert_parity, float16_range_cases, make_inputs
from tests.support.executors import (
    INTERPRETED,
    Interpreter,
    Machine,
    check_same_bits,
    fix_plan,
    needs_machine,
    running,
)

CASE = Case((130,), 200, 136, 5, torch.float16, dropout_p=0.2)
SOURCES = ("tiles", "mask", "split_k", "shrink", "sums", "forward", "backward")

# name: (file, text, replacement, whether only several programs at once show it)
MUTANTS = {
    "xa published before the store": (
        "forward",
        "        store_factor(xa, made, rows, M, R, BLOCK_R)\n    publish(flag)\n",
        "        publish(flag)\n        store_factor(xa, made, rows, M, R, BLOCK_R)\n"
        "    if part < XA_COLUMNS - 1:\n        publish(flag)\n",
        True,
    ),
    "sums published before the store": (
        "forward",
        "            store_part(shrunk, high, low, panel, LOW)\n",
        "            publish(flag)\n            store_part(shrunk, high, low, panel, LOW)\n"
        "            tl.atomic_add(flag, -1)\n",
        True,
    ),
    "sums not waited for": ("forward", "wait(flag, part)", "wait(flag, 0)", True),
    "dxa published before the store": (
        "backward",
        "                    store_factor(dxa, shrunk, rows, M, R, BLOCK_R)\n"
        "                    publish(flags + panel)\n",
        "                    publish(flags + panel)\n"
        "                    store_factor(dxa, shrunk, rows, M, R, BLOCK_R)\n",
        True,
    ),
    "flag not waited for": ("tiles", "early, seen, $2;", "early, seen, 0;", True),
    "mask read before it is drawn": ("backward", "+ DA_BLOCKS if DRAWN else 1", "", True),
    "flag not reset": (
        "tiles",
        "@last st.relaxed.gpu.global.u32 [$1], 0;\n            mov",
        "mov",
        True,
    ),
    "ticket not reset": (
        "tiles",
        "@last st.relaxed.gpu.global.u32 [$1], 0;\n            bar",
        "bar",
        True,
    ),
    "number read before it is there": ("tiles", "taken;\n            bar.sync 0;", "taken;", True),
    "a number for each thread": ("tiles", "@first atom.relaxed", "atom.relaxed", True),
    "mask missing on a ragged edge": ("tiles", "elif LIMIT % COLUMNS == 0:", "elif True:", False),
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
        "load_part(high, low, panel,",
        "load_part(high, low, 0,",
        True,
    ),
    "sums of another part": ("forward", "begin = part * SHARE", "begin = 0 * part", True),
    "columns after K in another order": ("forward", "(step - LENGTH)", "(step - K)", True),
    "sums of sixteen bits": ("split_k", "pairs << (16 - LOW), MASK", "pairs, 0", True),
    "bits of another row": ("sums", "wide(start) * (4 * MASK_STRIDE)", "0", False),
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
        "inside = (rows >= first) & (rows < M)",
        "inside = rows < M",
        False,
    ),
}

# name: (file, text, replacement, which of `float16_range_cases`)
RANGE_MUTANTS = {
    "scaled B in float16": ("forward", "constexpr = dtype == tl.float16", "constexpr = False", 3),
    "sums left in another unit": ("sums", "product * (before * inverse_of(unit))", "product", 9),
    "unit forgotten in dA": ("sums", "        product *= unit\n", "", 4),
    "small unit forgotten in dx": ("backward", "* below).to(dtype)", "* 1.0).to(dtype)", 9),
    "large unit forgotten in dx": ("backward", "a_tile.to(tl.float32) * above", "a_tile", 7),
    "unit below what float16 needs": ("tiles", "- 1, 14)", "- 1, 18)", 7),
}


def _mutated_kernels(tmp_path, monkeypatch, file, text, replacement):
    """Import a copy of the kernels with one piece of source replaced; return its modules."""
    package = f"mutant_{tmp_path.name}"
    folder = tmp_path / package
    folder.mkdir()
    from lora_kernels.impl.triton import linear

    origin = Path(linear.__file__).parent / "kernels"
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
    for name in SOURCES:
        spec = importlib.util.spec_from_file_location(f"{package}.{name}", folder / f"{name}.py")
        assert spec is not None
        assert spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        monkeypatch.setitem(sys.modules, f"{package}.{name}", module)
        spec.loader.exec_module(module)
        kernel = f"{name}_kernel"
        if hasattr(module, kernel):
            monkeypatch.setattr(linear, kernel, getattr(module, kernel))
    monkeypatch.setattr(linear, "_WORKSPACE", linear.Workspace())
    # The interpreter's one program can't wait for others.
    fix_plan(monkeypatch, sum_columns=64, xa_columns=1 if INTERPRETED else 3)


def _runs(executor, case=CASE):
    """Two calls on one workspace, each against the oracle."""
    with running(executor):
        for _ in range(2):
            assert_parity(case, make_inputs(case), "triton")


@pytest.mark.parametrize("name", [n for n, m in MUTANTS.items() if not m[3]])
def test_wrong_values_are_caught(name, tmp_path, monkeypatch):
    if INTERPRETED:
        executor = Interpreter()
    else:
        pytest.importorskip("ptxvm", reason="needs the PTX virtual machine or TRITON_INTERPRET=1")
        executor = Machine(80)
    _mutated_kernels(tmp_path, monkeypatch, *MUTANTS[name][:3])
    with pytest.raises(Exception, match=r"budget|NaN|out-of-bounds|race"):
        _runs(executor)


@pytest.mark.parametrize("name", RANGE_MUTANTS)
def test_a_short_range_is_caught(name, tmp_path, monkeypatch):
    if not INTERPRETED:
        pytest.importorskip("ptxvm", reason="needs the PTX virtual machine or TRITON_INTERPRET=1")
    *mutant, index = RANGE_MUTANTS[name]
    _mutated_kernels(tmp_path, monkeypatch, *mutant)
    case = float16_range_cases((130,), 72, 136, 5)[index]
    with pytest.raises(AssertionError, match=r"budget|NaN"):
        _runs(Interpreter() if INTERPRETED else Machine(80), case)


@needs_machine
@pytest.mark.parametrize("name", [n for n, m in MUTANTS.items() if m[3]])
def test_wrong_order_is_caught(name, tmp_path, monkeypatch):
    _mutated_kernels(tmp_path, monkeypatch, *MUTANTS[name][:3])
    # Many programs at once and several schedules: an order that is wrong need not fail at once.
    with pytest.raises(Exception, match=r"budget|NaN|race|spin|blocked|flags|bounds"):
        _run_schedules()


def _run_schedules():
    # Without dropout tiles of dx wait for nothing but dxa.
    for seed, case in product(range(3), (CASE, replace(CASE, dropout_p=0.0))):
        _runs(Machine(80, resident=24, seed=seed), case)
        _check_flags()


def _check_flags():
    from lora_kernels.impl.triton import linear

    zeros = linear._WORKSPACE.zeros(1, torch.device("cpu"))
    assert not zeros.any(), "flags not left as found"


@needs_machine
def test_sums_in_order_of_arrival_are_caught(tmp_path, monkeypatch):
    _mutated_kernels(
        tmp_path, monkeypatch, "sums", "space + i * SIZE", "space + (part + i) % parts * SIZE"
    )
    case = Case((300,), 136, 136, 8, torch.float16, torch.float32)
    with pytest.raises(AssertionError, match="other bits"):
        check_same_bits(case, 80, monkeypatch)


@needs_machine
def test_the_kernels_themselves_pass(tmp_path, monkeypatch):
    _mutated_kernels(tmp_path, monkeypatch, "tiles", "def publish", "def publish")
    _runs(Machine(80, resident=24))
    _check_flags()


@needs_machine
def test_a_wrong_comparison_of_pairs_is_caught(tmp_path, monkeypatch):
    """Lanes that read as NaN are kept."""
    _mutated_kernels(tmp_path, monkeypatch, "mask", "set.ltu.u32", "set.lt.u32")
    with pytest.raises(AssertionError, match="budget"):
        _runs(Machine(90))
