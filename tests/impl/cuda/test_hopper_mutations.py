"""Faults planted in the kernels for sm_90a, as in test_mutations.py."""

import pytest
import torch

from lora_kernels.testing import Case
from tests.impl.cuda.test_mutations import MUTANTS, TICKET_MUTANTS
from tests.support.cuda_mutations import HOPPER_KERNELS, HOPPER_WIDE_KERNELS
from tests.support.implementations import needs_compiled_machine

pytestmark = [
    pytest.mark.many,
    needs_compiled_machine,
]
HOPPER = {"arch": 90, "shared_bytes": 232448, "multiprocessors": 9}
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
