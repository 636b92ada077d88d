"""Codes by the compiled CPU part: bits of W, borders of panels, few rows, sizes that it checks."""

import pytest
import torch

import lora_kernels as lk
from lora_kernels.native import absence
from lora_kernels.registration import operators
from lora_kernels.testing import Case, assert_results, make_inputs, run
from tests.support.implementations import linear_call
from tests.support.memory import peak_bytes
from tests.support.quantised import FORMATS, bits, drawn, expected

ABSENT = absence("cpu")
pytestmark = [
    pytest.mark.skipif(ABSENT is not None, reason=f"compiled CPU part: {ABSENT}"),
    pytest.mark.filterwarnings("ignore:.*:RuntimeWarning"),  # of NumPy's NaN
]

FP32, BF16 = torch.float32, torch.bfloat16
CPU = operators("lora_linear", "cpu")
# Rows that end inside blocks and bytes; more columns than few rows decode at a time.
SHAPES = ((1, 1), (5, 33), (7, 129), (72, 88), (150, 140), (40, 1100))


def decoded(weight, dtype, rows):
    """Return columns of W by forward, and rows of it by backward, for so many rows of x and dy."""
    n, k = weight.shape
    a, b = torch.zeros(1, k, dtype=dtype), torch.zeros(n, 1, dtype=dtype)
    y = lk.lora_linear(torch.eye(rows, k, dtype=dtype), weight, a, b, impl="cpu")
    x = torch.zeros(rows, k, dtype=dtype, requires_grad=True)
    lk.lora_linear(x, weight, a, b, impl="cpu").backward(torch.eye(rows, n, dtype=dtype))
    return y.T, x.grad


def is_exact(weight, dtype, rows):
    wanted = expected(weight, dtype)
    columns, lines = decoded(weight, dtype, rows)
    return torch.equal(columns, wanted[:, :rows]) and torch.equal(lines, wanted[:rows])


@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize("dtype", [FP32, BF16], ids=str)
def test_bits_of_w_by_an_identity(name, dtype):
    """For one row, few rows and many; in blocks that rows cross and that cross rows."""
    for blocksize in (32, 64, 4096) if "4" in name else (64,):
        for n, k in SHAPES:
            weight = drawn(name, n, k, blocksize)
            for rows in {1, min(n, k, 5), min(n, k)}:
                assert is_exact(weight, dtype, rows), (blocksize, n, k, rows)


@pytest.mark.parametrize("dtype", [FP32, BF16], ids=str)
def test_many_rows_hold_no_w_and_no_result_in_float32(dtype):
    """A panel of W and its products beside y, dx and, without products of pairs, dy."""
    m, n, k = 1024, 2048, 2048
    weight, x = drawn("nf4-nested", n, k), torch.randn(m, k, dtype=dtype, requires_grad=True)
    a, b = torch.randn(4, k), torch.randn(n, 4)
    dy = torch.randn(m, n, dtype=dtype)
    results = (m * n + m * k) * dtype.itemsize
    in_float32 = m * max(n, k) * 4 if dtype == BF16 else 0
    peak = peak_bytes(lambda: lk.lora_linear(x, weight, a, b, impl="cpu").backward(dy))
    assert results < peak <= results + in_float32 + (4 << 20)


@pytest.mark.parametrize("dtype", [FP32, BF16], ids=str)
def test_every_code_by_every_kind_of_scale(dtype):
    """Also by scales that are tiny, infinite, and NaN of any bits.

    A processor's products of bfloat16 pairs take subnormal numbers for zero, a dense W's too.
    """
    odd = torch.tensor([0x7FFFFFFF, -1, 0x7FC00000, 0x7F800000, 1, 0x00800000, 0x7F7FFFFF])
    scales = torch.cat([odd.int().view(FP32), torch.tensor([1e-38, -2.5, 3e38])])
    n = scales.numel()
    nf4, float8 = drawn("nf4", n, 64), drawn("float8-rows", n, 256)
    nf4.stored.copy_(torch.arange(32 * n))
    float8.stored.copy_(
        torch.arange(256, dtype=torch.uint8).view(torch.float8_e4m3fn).expand(n, -1)
    )
    float8.stored[:, 0x7F::0x80] = 1  # a NaN, which makes whole rows NaN
    for weight in (nf4, float8):
        weight.parts[0].copy_(scales.view_as(weight.parts[0]))
        wanted = expected(weight, dtype)
        columns, _ = decoded(weight, dtype, weight.shape[1])
        finite = wanted.isfinite().all(1)
        by_library = (torch.eye(weight.shape[1], dtype=dtype) @ wanted.T).T
        subnormal = wanted.abs() < torch.finfo(dtype).tiny
        wanted = torch.where(subnormal, by_library, wanted)
        assert finite.sum() >= 4
        assert torch.equal(bits(columns[finite]), bits(wanted[finite]))
        assert not columns[~finite].isfinite().any()  # 0 · inf is a NaN


def test_nan_codes_of_float8_are_nan():
    weight = drawn("float8-rows", 8, 32)
    weight.stored.view(torch.uint8)[3, 5] = 0xFF
    assert decoded(weight, BF16, 8)[1].isnan().nonzero().tolist() == [[i, 5] for i in range(8)]


def swapped_halves(weight):
    weight.stored.copy_(weight.stored << 4 | weight.stored >> 4)


def shifted_table(weight):
    weight.parts[1].copy_(weight.parts[1].roll(1))


def scales_by_rows(weight):
    n, k = weight.shape
    blocks, flat = k // weight.blocksize, torch.arange(weight.parts[0].numel())
    weight.parts[0].copy_(weight.parts[0][flat.clamp(max=n * blocks - 1)].roll(1))


@pytest.mark.parametrize("fault", [swapped_halves, shifted_table, scales_by_rows])
def test_faults_in_decoding_are_seen(fault):
    weight = drawn("nf4", 72, 88)
    wanted = expected(weight, FP32)
    fault(weight)
    assert is_exact(weight, FP32, 72)
    assert not torch.equal(decoded(weight, FP32, 72)[0], wanted[:, :72])


@pytest.mark.parametrize(("name", "dtype"), [("nf4-nested", FP32), ("nf4", BF16), ("int8", FP32)])
def test_numbers_of_rows_and_borders_of_panels(name, dtype):
    """Few rows take products of their own; panels hold 2 MiB, and 64 rows or columns at least."""
    shapes = [(m, 43, 75) for m in (1, 3, 4, 16, 17, 33)]
    shapes += [(65, 150, 1100), (193, 43, 600)]  # beyond a matrix unit's few
    for m, n, k in (*shapes, (17, 70, 8200), (33, 8200, 70), (0, 8, 64)):
        case = Case((m,), n, k, 6, dtype, FP32, 0.1)
        inputs, weight = make_inputs(case), drawn(name, n, k)
        given = type(inputs)(**{**vars(inputs), "weight": weight})
        inputs.weight = expected(weight, dtype)
        assert_results(case, inputs, run(case, given, "cpu"), "cpu")


@pytest.mark.parametrize("dtype", [FP32, BF16], ids=str)
def test_an_infinite_number_is_multiplied_by_its_own_alone(dtype):
    """Not by the zeros that fill a last chunk of columns, which would make it a NaN."""
    weight = drawn("nf4", 40, 528)
    weight.stored.fill_(0xFF)  # ones
    weight.parts[0].fill_(1.0)[0] = float("inf")
    a, b = torch.zeros(1, 528, dtype=dtype), torch.zeros(40, 1, dtype=dtype)
    y = lk.lora_linear(torch.ones(3, 528, dtype=dtype), weight, a, b, impl="cpu")
    assert y[:, 0].isposinf().all()
    assert (y[:, 1:] == 528).all()


@pytest.mark.parametrize("name", ["nf4", "int8"])
@pytest.mark.parametrize("m", [2, 40])
def test_bits_do_not_depend_on_the_number_of_threads(name, m):
    case = Case((m,), 384, 2100, 8, FP32)
    inputs = make_inputs(case)
    inputs.weight = drawn(name, case.n, case.k)
    panel = inputs.weight.decode(FP32)[:192]  # 2 MiB
    results = []
    for threads in (1, 2):
        torch.set_num_threads(threads)
        try:
            results.append(run(case, inputs, "cpu") | {"library": inputs.x @ panel.T})
        finally:
            torch.set_num_threads(1)
    alone, together = results
    apart = {name for name, t in alone.items() if not torch.equal(t, together[name])}
    if m == 40 and apart == {"library", "y"}:
        pytest.skip("this library's own product depends on the number of threads")
    assert not apart


def test_tensors_with_gaps_are_read_as_they_are():
    weight = drawn("nf4-nested", 24, 40)
    wanted = expected(weight, FP32)
    weight.stored = torch.stack([weight.stored, weight.stored + 1], 1)[:, 0]
    weight.parts = tuple(torch.stack([t, t + 1], -1)[..., 0] for t in weight.parts)
    assert torch.equal(decoded(weight, FP32, 24)[1], wanted)


# What somebody may have done to a weight since Python looked at it: the part, and its other tensor.
CHANGED = {
    "weight: expected 256 elements, got 255": ("nf4", None, lambda t: t[1:]),
    "weight: expected the dtype of its format": ("nf4", None, lambda t: t.view(torch.int8)),
    "absmax: expected 8 elements, got 7": ("nf4", 0, lambda t: t[1:]),
    "absmax: expected the dtype of its format": ("nf4", 0, lambda t: t.double()),
    "absmax: expected memory for shape": ("nf4", 0, "emptied"),
    "code: expected 16 elements, got 15": ("nf4", 1, lambda t: t[1:]),
    "nested code: expected 256 elements": ("nf4-nested", 2, lambda t: t[1:]),
    "nested absmax: expected 1 elements, got 0": ("nf4-nested", 3, lambda t: t[1:]),
    "nested offset: expected 1 elements, got 2": ("nf4-nested", 4, lambda t: t.expand(2)),
    "scales: expected 8 elements, got 7": ("int8", 0, lambda t: t[1:]),
    "scales: expected float32": ("int8", 0, lambda t: t.long()),
    "lora_A: expected shape .R, K.": ("int8", None, lambda t: t[:, 1:]),
}


@pytest.mark.parametrize("message", CHANGED)
def test_sizes_are_checked_where_memory_is_read(message):
    name, part, change = CHANGED[message]
    weight = drawn(name, 8, 64)
    codes, parts = weight.stored, list(weight.parts)
    if change == "emptied":
        parts[part].untyped_storage().resize_(0)
    elif part is None:
        codes = change(codes)
    else:
        parts[part] = change(parts[part])
    flat = list(linear_call(weight.decode() if change != "emptied" else torch.zeros(8, 64),
                            torch.randn(2, 64), torch.randn(8, 2)).flat())  # fmt: skip
    flat[:3] = codes, parts, weight.form
    with pytest.raises(RuntimeError, match=message):
        CPU.forward(torch.randn(3, 64), *flat)


@pytest.mark.parametrize(
    "form", ["nf4", "nf4:64", "nf4:64:8:x", "nf4:0:8:64", "nf4:48:8:64", "nf4:64:8:64:1", "nf5:1"]
)
def test_bad_forms_are_named(form):
    weight = drawn("nf4", 8, 64)
    flat = list(linear_call(weight.decode(), torch.randn(2, 64), torch.randn(8, 2)).flat())
    flat[:3] = weight.stored, list(weight.parts), form
    with pytest.raises(RuntimeError, match=r"(format|weight): expected"):
        CPU.forward(torch.randn(3, 64), *flat)
