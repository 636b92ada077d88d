"""Faults planted in the compiled CUDA kernels: each must turn the parity suite red.

A few small kernels are compiled to PTX from a changed copy of the sources and executed in the
virtual machine in place of the library's.
"""

import itertools
import shutil
import subprocess
from pathlib import Path

import pytest
import torch

from lora_kernels.impl import executor
from lora_kernels.impl.cuda.tools import machine
from lora_kernels.impl.cuda.tools.machine import Machine
from lora_kernels.impl.executor import using
from lora_kernels.testing import (
    Case,
    assert_parity,
    assert_results,
    float16_range_cases,
    make_inputs,
    run,
)
from tests.support.implementations import needs_compiled_machine
from tests.support.paths import ROOT

SOURCES = ROOT / "csrc" / "cuda"
pytestmark = [
    pytest.mark.many,
    needs_compiled_machine,
]
KERNELS = """
#define LORA_TYPE {type}
#define LORA_ELEMENT {element}
#define LORA_TABLE table
#define LORA_FORWARD(X) X({shape}, {ranks}, 1, 1)
#define LORA_BACKWARD(X) X({shape}, {ranks}, 1, 1)
#define LORA_FEW_ROWS(X) X()
#include "linear_sm80.cuh"
"""
HOPPER_KERNELS = """
#define LORA_TYPE bf16
#define LORA_ELEMENT __nv_bfloat16
#define LORA_TABLE table
#include "../host/shapes.h"
#undef LORA_EACH_HOPPER
#define LORA_EACH_HOPPER(X) X(Hopper, 16, 1)
#include "linear_sm90.cuh"
"""
BF16_KERNELS = KERNELS.format(type="bf16", element="__nv_bfloat16", shape="Small", ranks=16)
SLICED_KERNELS = KERNELS.format(type="bf16", element="__nv_bfloat16", shape="Small", ranks=64)
HOPPER_WIDE_KERNELS = HOPPER_KERNELS.replace("X(Hopper, ", "X(HopperWide, ")
WIDE_KERNELS = KERNELS.format(type="bf16", element="__nv_bfloat16", shape="Wide", ranks=16)
LONE_KERNELS = SLICED_KERNELS.replace("LORA_BACKWARD(X)", "LORA_BACKWARD(X) X(Tall, 64, 1, 1)")
HALF_KERNELS = KERNELS.format(type="half", element="__half", shape="Small", ranks=16)
TF32_KERNELS = KERNELS.format(type="tf32", element="Tf32", shape="SmallFloat", ranks=16)
HOPPER = {"arch": 90, "shared_bytes": 232448, "multiprocessors": 9}
DRAWN_FIRST = """
    for (; number < draws; number = numbers.next()) {
      numbers.take();
      pack_mask<S>(p.mask, layer, number, p.flags);
    }
  }
  for (; number < p.ticket.count; number = numbers.next()) {
    const int tile = number - draws;
"""
DRAWN_LAST = """
  }
  const int tiles = p.ticket.count - draws;
  for (; number < p.ticket.count; number = numbers.next()) {
    const int tile = number;
    if (tile >= tiles) {
      numbers.take();
      pack_mask<S>(p.mask, layer, tile - tiles, p.flags);
      continue;
    }
"""
# name: (file, text, what stands there instead)
TICKET_MUTANTS = {
    "ticket not taken at once": (
        "ptx.cuh",
        "@p atom.relaxed.gpu.global.add.s32 %0, [%1], 1; }",
        ".reg .s32 next; @p ld.relaxed.gpu.global.s32 %0, [%1]; add.s32 next, %0, 1; "
        "@p st.relaxed.gpu.global.s32 [%1], next; }",
    ),
    "ticket not reset": (
        "ptx.cuh",
        '%1; "\n      "@q st.relaxed.gpu.global.s32 [%0], 0; }',
        '%1; "\n      "}',
    ),
}
MUTANTS = {
    "nothing": ("forward.cuh", "layer.m, rank, layer.r", "layer.m, rank, layer.r"),
    "dxa published before the store": (
        "backward.cuh",
        "    store_dxa<T>(p,",
        "    publish(p.flags + panel);\n    store_dxa<T>(p,",
    ),
    "flag not waited for": ("order.cuh", "(acquire_load(flag) < arrivals)", "(false)"),
    "flag not reset": ("order.cuh", "count_out(flag, last, threadIdx.x == 0);", ""),
    **TICKET_MUTANTS,
    "number told before it is there": (
        "order.cuh",
        "== 0);\n    __syncthreads();\n    return broadcast",
        "== 0);\n    return broadcast",
    ),
    "a number for each thread": (
        "order.cuh",
        "take_number(ticket.next, kept_in_register(threadIdx.x) == 0)",
        "take_number(ticket.next, true)",
    ),
    "drawn after the tiles": ("forward.cuh", DRAWN_FIRST, DRAWN_LAST),
    "step not waited for": ("mainloop.cuh", "wait_for_copies<S::kStages - 2>()", "(void)0"),
    "stage refilled while it is read": (
        "mainloop.cuh",
        "next any more.\n    __syncthreads();",
        "next any more.\n",
    ),
    "wrong counter in the mask": ("mask.cuh", "(layer.k + 7) / 8", "(layer.k + 15) / 8"),
    "edge taken for the inside": ("tiles.cuh", "} else if (inside) {", "} else if (true) {"),
    "dropout forgotten in dA": ("sums.cuh", "    if (kDropout) {", "    if (false) {"),
    "mask read before it is drawn": (
        "backward.cuh",
        "? p.shrink.xa_columns + p.kinds.da_blocks : 0",
        "? 0 : 0",
    ),
    "words read before they are drawn": (
        "forward.cuh",
        "panel, p.mask.draws)",
        "panel, 0)",
    ),
    "words of the other row": (
        "mask.cuh",
        "permute<0xBB99>(first, first)",
        "permute<0xAA88>(first, first)",
    ),
    "words of another step": ("mask.cuh", "< steps ? 32 : 0", "< steps ? 0 : 0"),
    "bits of another row": ("sums.cuh", "byte_of(left, row + ", "byte_of(left, "),
    "bits of the other half": ("epilogue.cuh", "0x7362 : 0x5140", "0x6273 : 0x4051"),
    "factor of kept elements forgotten": (
        "backward.cuh",
        "scaling_of(layer) * keep_scale(layer)",
        "scaling_of(layer)",
    ),
}
# Of ranks in slices.
SLICED_MUTANTS = {
    "nothing": MUTANTS["nothing"],
    "a slice of other ranks": ("forward.cuh", "p.mask, rank}", "p.mask, 0}"),
    "a slice of other ranks of dxa": ("backward.cuh", "layer.n, {}, rank}", "layer.n, {}, 0}"),
    "other slices not waited for": (
        "forward.cuh",
        "arrivals = p.mask.draws + p.shrink.slices;",
        "arrivals = p.mask.draws + 1;",
    ),
    "number taken ahead of a wait": (
        "forward.cuh",
        "    if (!alone) wait(p.flags + panel, arrivals);\n    numbers.take();",
        "    numbers.take();\n    if (!alone) wait(p.flags + panel, arrivals);",
    ),
    "slices of a row panel far apart": (
        "order.cuh",
        "{index / xa_columns, index % xa_columns}",
        "{index % grid.panels, index / grid.panels}",
    ),
}
# Of tiles that make the shrink product alone.
LONE_MUTANTS = {
    "nothing": MUTANTS["nothing"],
    "dxa published before the store": MUTANTS["dxa published before the store"],
    "dxa not waited for": (
        "backward.cuh",
        "{ wait(p.flags + panel, p.shrink.slices); }",
        "{ (void)panel; }",
    ),
    "a slice of other ranks": ("order.cuh", "index % shrink.slices * kRanks", "0"),
    "tiles numbered as if there were none": ("order.cuh", "- shrink.alone - others", "- others"),
}
# Of the loop that loads fragments ahead.
WIDE_MUTANTS = {
    "nothing": MUTANTS["nothing"],
    "step not waited for": ("ahead.cuh", "wait_for_copies<S::kStages - 2>()", "(void)0"),
    "stage refilled while it is read": ("ahead.cuh", "__syncthreads();  // also", "// also"),
    "ahead of the wait": (
        "ahead.cuh",
        "      if (kNext == 0) await_next();\n      const uint32_t from = kNext ? stage : next;\n",
        "      const uint32_t from = kNext ? stage : next;\n",
    ),
    "slice of the stage before": ("ahead.cuh", "from = kNext ? stage : next", "from = stage"),
    "rows beyond the edge": ("streams.cuh", "i * kRowStep < rows_left_", "true"),
    "columns beyond the edge": ("streams.cuh", "columns_left_ > 0) ? 16 : 0", "true) ? 16 : 0"),
    "factor's words left behind": ("ahead.cuh", "    copies.finish(filled);", ""),
}
# Of float16's range.
HALF_MUTANTS = {
    "nothing": MUTANTS["nothing"],
    "sums left in another unit": (
        "units.cuh",
        "multiply(before * inverse_of(now))",
        "multiply(1.0f)",
    ),
    "unit forgotten in dA": ("units.cuh", "sums.multiply(now);", ";"),
    "unit forgotten in dx": ("backward.cuh", "units_of<T, S, kRanks>(p).at(of.row, rank)", "1.0f"),
    "unit of another row panel": ("units.cuh", "units + row / S::kRows * slices", "units"),
    "largest of one warp": ("units.cuh", "(shared + warp * 4)", "(shared)"),
}
TF32_MUTANTS = {
    "nothing": MUTANTS["nothing"],
    "fragment's parts in another order": (
        "tiles.cuh",
        "kRow = 8 * kSlice + 4 * (part / 2), kBits = 4 * (kColumn + 8 * (part % 2))",
        "kRow = 8 * kSlice + 4 * (part % 2), kBits = 4 * (kColumn + 8 * (part / 2))",
    ),
    "wrong bit of the mask": ("mask.cuh", "mine & 1 << 2 ? fragment[2]", "mine & 1 ? fragment[2]"),
    "bias's gradient of rounded numbers": ("sums.cuh", "b[j][i] = rest_of_tf32(b[j][i]);", ";"),
    "dropped bits": ("ptx.cuh", "? bits + 0x1000u : bits", "? bits : bits"),
}


HOPPER_MUTANTS = {
    "mask read before it is drawn": MUTANTS["mask read before it is drawn"],
    "nothing": ("sm90/forward.cuh", "layer.m, tile.rank", "layer.m, tile.rank"),
    "words read before they are drawn": (
        "sm90/forward.cuh",
        "if (tile.shrinks && p.mask.draws)",
        "if (false)",
    ),
    "words of another step": ("sm90/pipeline.cuh", "words + 32 * step", "words"),
    **TICKET_MUTANTS,
    "number of another step": (
        "sm90/pipeline.cuh",
        "parity);\n    return broadcast_number(memory.number(at.stage))",
        "parity);\n    return broadcast_number(memory.number(0))",
    ),
    "number told before it is there": (
        "sm90/pipeline.cuh",
        "    synchronize<2, kHopperCopying>();\n    return broadcast_number",
        "    return broadcast_number",
    ),
    "dxa published before the store": (
        "sm90/backward.cuh",
        "        store_dxa<T>(p,",
        "        publish<S>(p.flags + tile.panel);\n        store_dxa<T>(p,",
    ),
    "dxa not waited for": (
        "sm90/backward.cuh",
        "[&](int panel) { side.wait(p.flags + panel, p.shrink.slices); }",
        "[](int) {}",
    ),
    "stage refilled while it is read": (
        "sm90/pipeline.cuh",
        "wait_for_phase(memory.read(at.stage), at.parity);",
        "",
    ),
    "step not waited for": (
        "sm90/backward.cuh",
        "wait_for_phase_in_time(side.memory.filled(stage), side.at.parity);",
        "",
    ),
    "products not waited for": ("sm90/pipeline.cuh", "    wait_for_products<0>();", ""),
    "factors overwritten while they are read": (
        "sm90/pipeline.cuh",
        "wait_for_phase(memory.factors_read(), ~slices++ & 1);",
        "++slices;",
    ),
    "a box for another": ("sm90/backward.cuh", "column / kHopperBox * M::Box::kBytes", "0"),
    "columns' distance of W": ("sm90/hopper.cuh", "(apart >> 4)", "(apart >> 5)"),
}
# Of its wide tiles.
HOPPER_WIDE_MUTANTS = {
    "nothing": HOPPER_MUTANTS["nothing"],
    "a box for another": (
        "sm90/pipeline.cuh",
        "further = i * kHopperBox",
        "further = i % 2 * kHopperBox",
    ),
    "columns' distance of W": HOPPER_MUTANTS["columns' distance of W"],
    "stage refilled while it is read": HOPPER_MUTANTS["stage refilled while it is read"],
    "products not waited for": HOPPER_MUTANTS["products not waited for"],
    "bits of another block": ("sm90/backward.cuh", "words[half][j / 8]", "words[half][0]"),
    "bits of another word": ("sm90/backward.cuh", "j / 2 % 4, 4)", "j % 4, 4)"),
    "bits beyond x": (
        "sm90/backward.cuh",
        "further < p.layer.k ? further : tile.column",
        "further",
    ),
    "a box stored for another": (
        "sm90/pipeline.cuh",
        "box_column = i / M::kLeftBoxes",
        "box_column = i % M::kLeftBoxes",
    ),
    "overwritten while it is stored": (
        "sm90/pipeline.cuh",
        "    await_boxes();\n    const Place<S> now;",
        "    const Place<S> now;",
    ),
    "stored without a fence": (
        "sm90/pipeline.cuh",
        "    fence_stores();\n    synchronize<S>();\n#pragma unroll",
        "    synchronize<S>();\n#pragma unroll",
    ),
    "stored before it is there": (
        "sm90/pipeline.cuh",
        "    fence_stores();\n    synchronize<S>();\n#pragma unroll",
        "    fence_stores();\n#pragma unroll",
    ),
    "bias of another quad": ("sm90/pipeline.cuh", "4 * (j % kQuads) + place.t", "place.t"),
    "bias of another block": ("sm90/pipeline.cuh", "pairs[j / kQuads]", "pairs[0]"),
}


def mutated_ptx(folder: Path, kernels: str, mutant: tuple[str, str, str], target: str) -> str:
    name, text, other = mutant
    shutil.copytree(SOURCES, folder / "cuda")
    faulty, few = folder / "cuda" / "device" / name, folder / "cuda" / "instances" / "few.cu"
    source = faulty.read_text()
    assert text in source
    faulty.write_text(source.replace(text, other))
    few.write_text(kernels)
    options = ["-std=c++20", "-O3", "--expt-relaxed-constexpr", f"-arch={target}", "-ptx", "-w"]
    command = ["nvcc", *options, "-o", str(folder / "few.ptx"), str(few)]
    subprocess.run(command, check=True, capture_output=True)
    return (folder / "few.ptx").read_text()


@pytest.fixture
def check(tmp_path, monkeypatch):
    """Runs the parity suite of a case on mutated kernels; all but "nothing" must turn it red.

    residents: numbers of running programs; tickets order tiles, so that not every fault meets each.
    """

    def check_one(name, case, kernels, mutants, residents, target="sm_80", **device):
        code = executor.load(mutated_ptx(tmp_path, kernels, mutants[name], target))
        monkeypatch.setattr(machine, "_code", lambda target: code)

        # Where no tile of dA draws the mask, those of dx wait for dxa alone; without dx other tiles
        # make it, instead of sm_90a's and of wide ones those of kernels that aren't compiled here.
        others = target == "sm_90a" or kernels == WIDE_KERNELS
        subsets = [("dx",)] if others else [("dx",), ("da", "db")]

        def suite():
            zeros = torch.zeros(256, dtype=torch.int32)
            for resident, seed in itertools.product(residents, range(3)):
                with using(Machine(resident=resident, seed=seed, zeros=zeros, **device)):
                    assert_parity(case, make_inputs(case), "cuda")
                    for wanted in subsets:
                        inputs = make_inputs(case)
                        assert_results(case, inputs, run(case, inputs, "cuda", wanted), "cuda")
                assert not zeros.any()

        if name == "nothing":
            suite()
        else:
            with pytest.raises((AssertionError, RuntimeError)) as found:
                suite()
            assert "no kernel named" not in str(found.value)

    return check_one


@pytest.mark.parametrize("name", MUTANTS)
def test_planted_fault_is_found(name, check):
    case = Case((130,), 72, 360, 8, torch.bfloat16, dropout_p=0.1)
    check(name, case, BF16_KERNELS, MUTANTS, (8,), multiprocessors=18)


@pytest.mark.parametrize("name", SLICED_MUTANTS)
def test_planted_fault_is_found_of_slices(name, check):
    case = Case((130,), 136, 360, 72, torch.bfloat16, dropout_p=0.1)
    check(name, case, SLICED_KERNELS, SLICED_MUTANTS, (2, 3))


@pytest.mark.parametrize("name", WIDE_MUTANTS)
def test_planted_fault_is_found_of_wide_tiles(name, check):
    """Adapters whose rows don't start at multiples of 16 bytes: they go by registers."""
    case = Case((130,), 248, 232, 5, torch.bfloat16, dropout_p=0.1)
    check(name, case, WIDE_KERNELS, WIDE_MUTANTS, (2,), multiprocessors=1)


@pytest.mark.parametrize("name", LONE_MUTANTS)
def test_planted_fault_is_found_of_lone_shrink_products(name, check):
    """Three slices of ranks, two columns of tiles forward and backward."""
    case = Case((130,), 72, 104, 136, torch.bfloat16, dropout_p=0.1)
    check(name, case, LONE_KERNELS, LONE_MUTANTS, (4, 9))


@pytest.mark.parametrize("name", HALF_MUTANTS)
def test_planted_fault_is_found_of_float16(name, check):
    # dy grows from 1e-8 to 1: from panel to panel, or from warp to warp of one.
    rows = 64 if name == "largest of one warp" else 130
    case = float16_range_cases((rows,), 72, 360, 8)[9]
    check(name, case, HALF_KERNELS, HALF_MUTANTS, (8,), multiprocessors=18)


@pytest.mark.parametrize("name", TF32_MUTANTS)
def test_planted_fault_is_found_of_tf32(name, check, float32_precision):
    float32_precision("high")
    case = Case((130,), 72, 104, 8, dropout_p=0.1)
    check(name, case, TF32_KERNELS, TF32_MUTANTS, (8,))


@pytest.mark.parametrize("name", HOPPER_MUTANTS)
def test_planted_fault_is_found_of_sm_90a(name, check):
    case = Case((400,), 256, 520, 8, torch.bfloat16, dropout_p=0.1)
    check(name, case, HOPPER_KERNELS, HOPPER_MUTANTS, (5, 9), "sm_90a", **HOPPER)


@pytest.mark.parametrize("name", HOPPER_WIDE_MUTANTS)
def test_planted_fault_is_found_of_wide_tiles_of_sm_90a(name, check):
    """A tile's second block of columns of the mask isn't there where K ends."""
    case = Case((300,), 520, 632, 8, torch.bfloat16, dropout_p=0.1, bias=True)
    weak = {**HOPPER, "weak": 2}
    check(name, case, HOPPER_WIDE_KERNELS, HOPPER_WIDE_MUTANTS, (2, 9), "sm_90a", **weak)
