"""Faults planted in the compiled CUDA kernels: each must turn the parity suite red.

A few small kernels are compiled to PTX from a changed copy of the sources and executed in the
virtual machine in place of the library's.
"""

import pytest
import torch

from lora_kernels.testing import Case, float16_range_cases
from tests.support.cuda_mutations import (
    BF16_KERNELS,
    HALF_KERNELS,
    LONE_KERNELS,
    SLICED_KERNELS,
    TF32_KERNELS,
    WIDE_KERNELS,
)
from tests.support.implementations import needs_compiled_machine

pytestmark = [
    pytest.mark.many,
    needs_compiled_machine,
]
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
        "@p atom.relaxed.gpu.global.inc.u32 %0, [%1], %2; }",
        ".reg .s32 next; @p ld.relaxed.gpu.global.s32 %0, [%1]; add.s32 next, %0, 1; "
        "@p st.relaxed.gpu.global.s32 [%1], next; }",
    ),
    "ticket not reset": (
        "ptx.cuh",
        "@p atom.relaxed.gpu.global.inc.u32 %0, [%1], %2; }",
        "@p atom.relaxed.gpu.global.add.u32 %0, [%1], 1; }",
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
        "take_number(ticket.next, ticket.last, kept_in_register(threadIdx.x) == 0)",
        "take_number(ticket.next, ticket.last, true)",
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
