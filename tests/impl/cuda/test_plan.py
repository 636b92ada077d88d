"""Which compiled kernel serves a call, on which grid: a pure function, tested without a GPU."""

from itertools import product

import pytest
import torch

from lora_kernels.impl.gpu import MAX_RANK
from lora_kernels.native import absence

ABSENT = absence("cuda")
pytestmark = pytest.mark.skipif(ABSENT is not None, reason=f"compiled CUDA part: {ABSENT}")

# [arch, multiprocessors, bytes of shared memory that a program may have]
DEVICES = {
    "A100": [80, 108, 166912],
    "RTX 3090": [86, 82, 101376],
    "RTX 4090": [89, 128, 101376],
    "H100": [90, 132, 232448],
    "B200": [100, 148, 232448],
    "RTX 5090": [120, 170, 101376],
    "a newer one": [130, 64, 262144],
}
ROWS = (1, 15, 16, 17, 129, 736, 4096, 262145, 2**22)
LAYERS = ((1, 1, 1), (64, 7, 5), (4096, 4096, 16), (11008, 4096, 64), (4096, 14336, 256))
KINDS = BF16, FP16, FP32, TF32 = range(4)
TYPES = ("bf16", "half", "float", "tf32")
ALL, DX, DA, DB, DBIAS = (1, 1, 1, 1), (1, 0, 0, 0), (0, 1, 0, 0), (0, 0, 1, 0), (0, 0, 0, 1)


DENSE, FLAT, NESTED = range(3)  # how W is stored: itself, or codes and two kinds of scales


def plan(device, m, n, k, r, kind=BF16, dropout=0, chunks=1, wanted=None, store=DENSE):
    problem = [m, n, k, r, kind, dropout, chunks, wanted is not None, *(wanted or (0, 0, 0, 0))]
    problem.append(store)
    return torch.ops.lora_kernels.cuda_plan(problem, device)


@pytest.mark.parametrize("wanted", [None, ALL, DX, DA, DB, DBIAS], ids=str)
@pytest.mark.parametrize("device", DEVICES)
def test_launch_fits_the_device(device, wanted):
    _, multiprocessors, most = DEVICES[device]
    for m, (n, k, r), kind, dropout, chunks in product(ROWS, LAYERS, KINDS, (0, 1), (0, 1)):
        name, (grid, threads, shared, together) = plan(
            DEVICES[device], m, n, k, r, kind, dropout, chunks, wanted
        )
        direction = "forward" if wanted is None else "backward"
        if wanted is None and m <= 16 and not dropout and chunks:
            direction = "few_rows"
        assert direction in name
        # Enough to fill the device; more would only wait for their turn.
        assert 1 <= together <= grid <= multiprocessors
        assert together <= 16
        assert threads in (128, 256, 384)
        assert 0 < shared <= most
        assert TYPES[kind] in name.split("_")
        assert "_c1" not in name or chunks


def test_ranks_that_no_columns_can_take_have_tiles_of_their_own():
    """64 panels of 64 rows, each with so many slices of ranks, beside two columns of tiles."""
    for device in ([90, 1000, 232448], [80, 1000, 166912]):
        name, (grid, *_) = plan(device, 4096, 128, 4096, 256)
        assert (name, grid) == ("lora_forward_Small_bf16_r64_d0_c1", 64 * 4 + 64 * 2)
        # Of dA alone: two slices, and as many blocks of sums.
        name, (grid, *_) = plan(device, 4096, 4096, 128, 128, wanted=DA)
        assert (name, grid) == ("lora_backward_Small_bf16_r64_d0_c1", 64 * 2 + 2)
    # Fewer programs than slices: these would wait for each other for ever.
    name, (*_, together) = plan([90, 3, 232448], 4096, 4096, 4096, 256)
    assert (name, together) == ("lora_forward_Large_bf16_r64_d0_c1", 1)


def test_programs_that_must_run_together():
    """As many as columns of tiles make the shrink product together; elsewhere one goes on alone."""
    for device, kind, wanted in product(DEVICES.values(), (BF16, FP16), (None, ALL, DX)):
        for r, columns in ((16, 1), (64, 1), (65, 2), (256, 4)):
            assert plan(device, 8192, 4096, 4096, r, kind, wanted=wanted)[1][-1] == columns
    assert plan(DEVICES["H100"], 8192, 4096, 4096, 256, wanted=DA)[1][-1] == 1
    assert plan(DEVICES["H100"], 1, 4096, 4096, 256)[1][-1] == 1  # few rows


def test_tiles_grow_with_the_call():
    for name in DEVICES:
        kernel, (grid, *_) = plan(DEVICES[name], 8192, 8192, 8192, 16)
        assert kernel.split("_")[2] in ("Wide", "HopperWide")
        assert grid == DEVICES[name][1]
        kernel, (grid, *_) = plan(DEVICES[name], 64, 512, 512, 16)
        assert kernel.split("_")[2] == "Small"
        assert grid == 8


def test_wide_tiles_take_whole_chunks_and_16_ranks():
    for r, n, k, wide in (
        (16, 4096, 4096, {None, ALL}),
        (17, 4096, 4096, set()),
        (16, 4096, 4100, set()),
        (16, 4100, 4096, {None}),
    ):
        for wanted, dropout in product((None, ALL), (0, 1)):
            kernel, _ = plan(DEVICES["A100"], 8192, n, k, r, BF16, dropout, 1, wanted)
            assert ("_Wide_" in kernel) == (wanted in wide), kernel
    # Who makes dxa alone would make dx too.
    for wanted in (DA, DB, DBIAS):
        assert "_Wide_" not in plan(DEVICES["A100"], 8192, 4096, 4096, 16, wanted=wanted)[0]


@pytest.mark.parametrize("wanted", [None, ALL, DX], ids=str)
@pytest.mark.parametrize("r", [1, 16, 24, 64, 128, 256])
def test_large_16_bit_calls_go_to_the_kernels_for_sm_90a(wanted, r):
    for kind, dropout in product((BF16, FP16), (0, 1)):
        kernel, _ = plan(DEVICES["H100"], 8192, 4096, 4096, r, kind, dropout, 1, wanted)
        assert kernel.split("_")[2] == ("HopperWide" if r <= 16 else "Hopper")
    for name in set(DEVICES) - {"H100"}:
        kernel, _ = plan(DEVICES[name], 8192, 4096, 4096, r, BF16, 0, 1, wanted)
        assert "_Hopper" not in kernel


@pytest.mark.parametrize(
    ("m", "columns", "shape"),
    [
        (16384, 128, "Hopper"),  # a wide tile would be half empty
        (16384, 384, "Hopper"),  # so would be every second one
        (8192, 1024, "HopperWide"),
        (2048, 4096, "HopperWide"),
        (1152, 4096, "Hopper"),  # 144 wide tiles: two rounds of 132; 288 others: three
        (1024, 4096, "HopperWide"),
    ],
)
def test_wide_tiles_of_sm_90a_where_they_pay(m, columns, shape):
    """Columns of y, or of dx."""
    for dropout in (0, 1):
        forward, _ = plan(DEVICES["H100"], m, columns, 4096, 16, BF16, dropout)
        backward, _ = plan(DEVICES["H100"], m, 4096, columns, 16, BF16, dropout, wanted=ALL)
        assert forward.split("_")[2] == backward.split("_")[2] == shape


def test_decoding_fills_the_device():
    """Every multiprocessor streams a part of W, in rounds that come out even."""
    for device, (n, k) in product(DEVICES.values(), ((4096, 4096), (14336, 4096), (4096, 14336))):
        _, (grid, *_) = plan(device, 1, n, k, 16)
        assert grid > 0.85 * device[1]


@pytest.mark.parametrize(("store", "word"), [(FLAT, "flat"), (NESTED, "nested")])
def test_decoding_of_codes_fills_the_device(store, word):
    """A quarter of the bytes: as many programs, whose rounds come out even; any K, no rank."""
    for device, (n, k) in product(DEVICES.values(), ((4096, 4096), (1024, 4096), (4096, 14336))):
        for kind, r in ((BF16, 16), (FP16, 0)):
            name, (grid, threads, shared, together) = plan(device, 1, n, k, r, kind, store=store)
            assert name == f"lora_few_rows_{word}_{TYPES[kind]}"
            assert grid > 0.7 * device[1]
            assert (threads, together) == (256, 1)
            assert 0 < shared <= device[2]
    assert plan(DEVICES["H100"], 16, 7, 33, 1, chunks=0, store=store)[1][0] == 2


def test_what_it_refuses():
    device = DEVICES["A100"]
    for r in (0, MAX_RANK + 1):
        with pytest.raises(ValueError, match="lora_A: expected a rank from 1 to 256"):
            plan(device, 64, 64, 64, r)
    with pytest.raises(ValueError, match="lora_A: expected a rank from 1 to 256"):
        plan(device, 16, 64, 64, MAX_RANK + 1, store=FLAT)
    with pytest.raises(ValueError, match="x: expected fewer rows"):
        plan(device, 2**31 - 1, 2**15, 4096, 8)
    with pytest.raises(ValueError, match="no kernel serves this call on this device"):
        plan([80, 108, 49152], 64, 64, 64, 8)
