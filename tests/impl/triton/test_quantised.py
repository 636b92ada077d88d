"""A quantised W in Triton's kernels: its bits as the format defines them, calls in the budget."""

import pytest
import torch

import lora_kernels as lk
from lora_kernels.impl.triton.decode import decoded
from lora_kernels.impl.triton.plan.config import Problem, illegal, problem_of
from lora_kernels.impl.triton.plan.device import known
from lora_kernels.impl.triton.plan.plan import plan
from lora_kernels.operands.scaled import ScaledWeight
from lora_kernels.testing import Case, assert_results, make_inputs, run
from tests.impl.triton.test_mutations import mutated_kernels, running_mutant
from tests.support.executors import (
    INTERPRETED,
    Machine,
    executors,
    fixed_library,
    fixed_plan,
    needs_machine,
    own_plan,
    running,
)
from tests.support.quantised import FORMATS, bits, drawn, expected

pytestmark = pytest.mark.filterwarnings("ignore:.*:RuntimeWarning")  # of the interpreter
FP32, BF16, FP16 = torch.float32, torch.bfloat16, torch.float16
# Triton 3.8's interpreter rounds to bfloat16 by cutting off.
DTYPES = (FP32, FP16) if INTERPRETED else (FP32, BF16, FP16)
places = pytest.mark.parametrize("place", executors())
# Rows that end inside a block, a byte or a tile, one element, several programs.
SHAPES = ((1, 1), (5, 33), (3, 64), (64, 80), (130, 260))


@pytest.mark.many
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("name", FORMATS)
@places
def test_decoded_bits_are_the_definition(place, name, shape):
    number = FORMATS.index(name) + SHAPES.index(shape)
    weight = drawn(name, *shape, (32, 64, 256, 4096)[number % 4], place.memory)
    dtype = DTYPES[number % len(DTYPES)]
    kept = [t.clone() for t in (weight.stored, *weight.parts)]
    with running(place()):
        assert_same_bits(decoded(weight, dtype), expected(on("cpu", weight), dtype))
    for t, before in zip((weight.stored, *weight.parts), kept, strict=True):
        assert torch.equal(t.flatten().view(torch.uint8), before.flatten().view(torch.uint8))


def assert_same_bits(actual, wanted):
    assert actual.dtype == wanted.dtype
    assert torch.equal(bits(actual.cpu()), bits(wanted))


def on(memory, weight):
    parts = tuple(part.to(memory) for part in weight.parts)
    return type(weight).of_form(weight.form, weight.stored.to(memory), parts)


def with_all_codes(word, dtype=FP32):
    """Return a weight of all codes, NaN and subnormal ones too, in blocks inside a tile."""
    code = {"int8": torch.int8, "float8": torch.float8_e4m3fn}[word]
    codes = torch.arange(256, dtype=torch.uint8).view(code).expand(5, 256).contiguous()
    if dtype == torch.float8_e8m0fnu:
        scales = torch.tensor([0, 1, 100, 127, 130, 254, 255, 126, 3], dtype=torch.uint8)
        scales = scales.view(dtype)
    else:
        scales = (torch.rand(9) * 3).to(dtype)
    return ScaledWeight(word, (2, 100), codes, scales, 127 if word == "int8" else 1)


@pytest.mark.many
@pytest.mark.parametrize("dtype", [FP32, BF16, FP16, torch.float8_e8m0fnu], ids=str)
@pytest.mark.parametrize("word", ["int8", "float8"])
@places
def test_every_code_and_scale_of_eight_bits(place, word, dtype):
    weight = with_all_codes(word, dtype)
    with running(place()):
        assert_same_bits(decoded(on(place.memory, weight), FP32), expected(weight, FP32))


@pytest.mark.many
@pytest.mark.parametrize("storage", [BF16, FP16, FP32], ids=str)
@places
def test_codes_are_views_of_any_storage(place, storage):
    """Bytes that are NaN in their owner's dtype; codes, scales and rows that lie apart."""
    weight = drawn("nf4-nested", 16, 64, 64, place.memory)
    weight.stored = torch.full_like(weight.stored, 0xFF).view(storage).view(-1, 1)
    weight.stored = weight.stored.view(torch.uint8).view(-1)
    weight.parts = tuple(torch.stack((p, p), -1)[..., 0] for p in weight.parts)
    rows = drawn("int8", 16, 64, device=place.memory)
    rows.stored = torch.cat((rows.stored, rows.stored), 1)[:, :64]
    with running(place()):
        for each in (weight, rows):
            assert_same_bits(decoded(each, FP16), expected(on("cpu", each), FP16))


# Whatever decodes W, one launch computes with it or several do.
NAMED_PLANS = [(name, fixed_library()) for name in FORMATS] + [("nf4", own_plan)]


@pytest.mark.many
@pytest.mark.parametrize(("name", "planned"), NAMED_PLANS)
@places
def test_calls_are_within_the_budget(place, name, planned):
    number = FORMATS.index(name)
    dtype = DTYPES[number % len(DTYPES)]
    leading, n, k, r, p = (((5,), 9, 33, 3, 0.0), ((2, 33), 72, 136, 8, 0.1))[number % 2]
    case = Case(leading, n, k, r, dtype, FP32, p)
    inputs, weight = make_inputs(case, place.memory), drawn(name, n, k, device=place.memory)
    dense = expected(on("cpu", weight), dtype).to(place.memory)
    given, known_w = (type(inputs)(**{**vars(inputs), "weight": w}) for w in (weight, dense))
    with running(place(plan=planned)):
        assert_results(case, known_w, run(case, given, "triton"), "triton")


@pytest.mark.many
@pytest.mark.parametrize(("name", "planned"), NAMED_PLANS)
@places
def test_w_by_an_identity(place, name, planned):
    n, k, number = 72, 88, FORMATS.index(name)
    dtype = DTYPES[number % len(DTYPES)]
    weight = drawn(name, n, k, device=place.memory)
    wanted = expected(on("cpu", weight), dtype).to(place.memory)
    with running(place(plan=planned)):
        assert_w_by_an_identity(weight, wanted)


@places
def test_the_base_product_is_a_call_of_rank_0(place):
    weight = drawn("nf4", 8, 64, device=place.memory)
    w = expected(on("cpu", weight), FP32).to(place.memory)
    x = torch.randn(5, 64, device=place.memory, requires_grad=True)
    bias = torch.randn(8, device=place.memory, requires_grad=True)
    a, b = x.new_empty(0, 64), x.new_empty(8, 0)
    for given in (None, bias):
        with running(place()):
            y = lk.lora_linear(x, weight, a, b, given, impl="triton")
            leaves = [x] if given is None else [x, bias]
            grads = torch.autograd.grad(y.sum(), leaves)
        torch.testing.assert_close(y, torch.nn.functional.linear(x, w, given))
        torch.testing.assert_close(grads[0], w.sum(0).expand(5, 64))
        assert all(torch.equal(grad, torch.full_like(bias, 5.0)) for grad in grads[1:])


@needs_machine
def test_w_is_decoded_where_it_is_read():
    """Once in forward, once in backward, and not where dx isn't wanted."""
    weight, machine = drawn("nf4", 16, 64), Machine(80)
    a, b = torch.randn(4, 64, requires_grad=True), torch.randn(16, 4, requires_grad=True)
    counts = []
    run_kernel = machine.run

    def count(kernel, *others):
        counts[-1] += kernel.__name__ == "codebook_kernel"
        run_kernel(kernel, *others)

    machine.run = count
    with running(machine):
        for x in (torch.randn(3, 64, requires_grad=True), torch.randn(3, 64), torch.randn(0, 64)):
            counts.append(0)
            lk.lora_linear(x, weight, a, b, impl="triton").sum().backward()
    assert counts == [2, 1, 0]


def test_explain_says_where_codes_are_decoded():
    x, a, b = torch.randn(3, 64), torch.randn(4, 64), torch.randn(16, 4)
    with running(Machine(80)):
        for name in FORMATS:
            weight = drawn(name, 16, 64)
            found = lk.explain(x, weight, a, b)
            assert (found.choice, found.format) == ("triton", weight.format)
            for text in found.plans.values():
                assert text.startswith(f"W decoded from {weight.format} first, library plan; ")
    with running(Machine(80, resident=108)):
        weight = drawn("nf4", 4096, 4096)
        x, a, b = (torch.randn(s, dtype=BF16) for s in ((16, 4096), (16, 4096), (4096, 16)))
        forward = lk.explain(x, weight, a, b).plans["forward"]
        assert forward.startswith("W decoded from nf4 in the loop, ")
        assert lk.explain(x, weight, a[:0], b[:, :0]).plans == {}
        assert "decoded" not in str(lk.explain(x, torch.randn(4096, 4096, dtype=BF16), a, b))


def test_planned_as_what_it_is_decoded_to():
    device, a = known("NVIDIA H100 80GB HBM3"), torch.empty(16, 200)
    x = torch.empty(64, 200, dtype=BF16)
    for k in (200, 203, 208):
        x, w = torch.empty(64, k, dtype=BF16), torch.empty(48, k, dtype=BF16)
        weight = drawn("nf4", 48, k)
        assert problem_of(x, weight, a, False) == problem_of(x, w, a, False)._replace(form="nf4")
    for m in (1, 512, 8192):
        problem = Problem(m, 4096, 4096, 16, 16)
        dense, codes = plan(problem, device), plan(problem._replace(form="nf4"), device)
        assert codes.config == dense.config
        assert codes.seconds > dense.seconds
        # Without dx nothing is decoded.
        problem = problem._replace(backward=True, needs=(False, True, True, False))
        assert plan(problem._replace(form="nf4"), device).seconds == plan(problem, device).seconds


def in_loop(**fields):
    """Return a planner of one launch that decodes W's codes in its loop."""

    def plan(problem, device):
        how = {"sum_columns": 64, "descriptors": device.descriptors}
        return fixed_plan(codes=True, **how, **fields)(problem, device)

    return plan


# Sizes, blocks, dropout and tiles: chunks that are a row of the tile or less, rows and columns that
# end inside a tile, one launch and two.
LARGE = {"block_m": 128, "block_n": 128, "num_warps": 8}
IN_LOOP = {
    "a": ((70, 72, 128), "nf4", 64, 0.0, {"xa_columns": 0}),
    "b": ((70, 72, 192), "nf4-nested", 64, 0.1, {"xa_columns": 2}),
    "c": ((33, 40, 256), "fp4", 128, 0.0, LARGE),
    "d": ((33, 136, 192), "nf4", 64, 0.0, LARGE | {"xa_columns": 0}),
    "e": ((5, 24, 256), "nf4-nested", 256, 0.0, {"block_m": 16, "num_warps": 2}),
}
WIDE = tuple(dtype for dtype in DTYPES if dtype != FP32)


@pytest.mark.many
@pytest.mark.parametrize("key", IN_LOOP)
@places
def test_calls_that_decode_in_the_loop(place, key):
    (m, n, k), name, blocksize, p, tiles = IN_LOOP[key]
    dtype = WIDE[ord(key) % len(WIDE)]
    case = Case((m,), n, k, 8, dtype, FP32, p)
    weight = drawn(name, n, k, blocksize, place.memory)
    inputs = make_inputs(case, place.memory)
    wanted = expected(on("cpu", weight), dtype).to(place.memory)
    given, known_w = (type(inputs)(**{**vars(inputs), "weight": w}) for w in (weight, wanted))
    with running(place(plan=in_loop(**tiles))):
        assert_results(case, known_w, run(case, given, "triton"), "triton")
        assert_w_by_an_identity(weight, wanted)


def assert_w_by_an_identity(weight, wanted):
    """Check that forward and backward multiply by the very numbers that the format means.

    With an adapter of zeros, of the other calls' rank: their compiled kernels serve.
    """
    n, k = wanted.shape
    a, b = wanted.new_zeros(8, k, dtype=FP32), wanted.new_zeros(n, 8, dtype=FP32)
    bias = wanted.new_zeros(n).requires_grad_()
    leaves = a.requires_grad_(), b.requires_grad_(), bias
    x = torch.eye(k, dtype=wanted.dtype, device=wanted.device).requires_grad_()
    y = lk.lora_linear(x, weight, *leaves, impl="triton")
    assert torch.equal(y.T, wanted)
    x = wanted.new_zeros(n, k, requires_grad=True)
    dy = torch.eye(n, dtype=wanted.dtype, device=wanted.device)
    lk.lora_linear(x, weight, *leaves, impl="triton").backward(dy)
    assert torch.equal(x.grad, wanted)


@pytest.mark.slow
@needs_machine
@pytest.mark.parametrize("target", [80, 90])
def test_codes_are_read_packed_and_once(target):
    """One row panel asks for each byte of codes and scales once, and no W is anywhere."""
    weight, machine = drawn("nf4-nested", 256, 512), Machine(target, plan=in_loop(xa_columns=0))
    x, a, b = torch.randn(33, 512).half(), torch.randn(4, 512), torch.randn(256, 4)
    with running(machine):
        lk.lora_linear(x.requires_grad_(), weight, a, b, impl="triton").sum().backward()
    packed, scales = 256 * 512 // 2, 256 * 512 // 64 * 4
    # Columns of tiles copy x or dy each, on sm_90 by descriptors.
    others = 64 * 512 * 2 * 4 if target == 80 else 0
    for _, _, stats in (machine.stats[:3], machine.stats[3:]):
        sizes = [each["size"] for each in stats.buffers.values()]
        assert max(sizes) == packed
        assert [each["read"] for each in stats.buffers.values()].count(packed) == 1
        assert stats.cp_async_bytes == packed + scales + others


def test_which_codes_a_loop_may_decode():
    x, a = torch.empty(64, 256, dtype=BF16), torch.empty(16, 256)
    for name, blocksize, size in (
        ("nf4", 64, 64), ("fp4", 256, 256), ("nf4-nested", 128, 128), ("nf4", 32, 0),
        ("nf4", 512, 0), ("int8", 64, 0), ("float8-tiles", 64, 0),
    ):  # fmt: skip
        weight = drawn(name, 48, 256, blocksize)
        assert problem_of(x, weight, a, False).blocksize == size
    assert problem_of(x, drawn("nf4", 48, 192, 128), a, False).blocksize == 0
    weight = drawn("nf4", 48, 256)
    weight.stored = torch.cat((weight.stored[:1], weight.stored))[1:]
    assert problem_of(x, weight, a, False).blocksize == 0


@pytest.mark.parametrize("name", ["NVIDIA A100-SXM4-80GB", "NVIDIA H100 80GB HBM3", "NVIDIA B200"])
def test_few_rows_decode_in_the_loop_and_many_first(name):
    device = known(name)
    for backward in (False, True)[: 1 if "B200" in name else 2]:
        layer = Problem(1, 14336, 4096, 16, 16, backward=backward, form="nf4", blocksize=64)
        few, more, many = (plan(layer._replace(m=m), device) for m in (16, 64, 16384))
        for chosen in (few, more):
            assert chosen.config.codes
            assert illegal(chosen.config, layer._replace(blocksize=0), device) is not None
            assert str(chosen).startswith("W decoded from nf4 in the loop, ")
        assert str(many).startswith("W decoded from nf4 first, ")
        # Products of float32 are the library's; ranks that no table has leave W to memory too.
        for other in (layer._replace(bits=32), layer._replace(r=128)):
            assert "first" in str(plan(other, device))


# name: (text, replacement), of decode.py; W is [100, 200] in blocks of 64.
BY_ROWS = "(pieces * SHAPE.PIECE // 200 * 3 + pieces * SHAPE.PIECE % 200 // 64)"
MUTANTS = {
    "low nibble first": ("tl.join(early, late)", "tl.join(late, early)"),
    "absmax by rows": ("pieces * SHAPE.PIECE // SHAPE.BLOCKSIZE", BY_ROWS),
    "table shifted": ("(packed & 15).to(tl.int32)", "(packed + 1 & 15).to(tl.int32)"),
    "code in bfloat16": (
        "tl.load(code + (packed >> 4).to(tl.int32))",
        "tl.load(code + (packed >> 4).to(tl.int32)).to(tl.bfloat16).to(tl.float32)",
    ),
    "nested scales of the next": ("blocks // NESTED_BLOCK", "(blocks + 1) // NESTED_BLOCK"),
    "offset forgotten": ("+ tl.load(absmax.offset)", ""),
    "nested rounded once": (
        "apart(own, scales) + tl.load(absmax.offset)",
        "tl.fma(own, scales, tl.load(absmax.offset))",
    ),
}


@pytest.mark.parametrize("name", MUTANTS)
def test_a_wrong_decode_is_caught(name, tmp_path, monkeypatch):
    if INTERPRETED and "once" in name:
        pytest.skip("the interpreter rounds the product of a fused multiply-add")
    kernels = mutated_kernels(tmp_path, monkeypatch, "decode", *MUTANTS[name])
    weight = drawn("nf4-nested", 100, 200)
    with running(running_mutant(kernels)), pytest.raises(AssertionError):
        assert_same_bits(decoded(weight, FP32), expected(weight, FP32))


WIDE_MUTANTS = {
    "no NaN": ("== 0x7F,", "== 0x80,"),
    "exponents one off": ("2.0**120", "2.0**121"),
    "divisor forgotten": ("SHAPE.DIVISOR != 1", "SHAPE.DIVISOR == 0"),
    "scales of other columns": ("own += (columns // SHAPE.COLUMNS)", "own += (columns * 0)"),
    "scales of other rows": ("rows // SHAPE.ROWS", "rows * 0"),
}


@pytest.mark.parametrize("name", WIDE_MUTANTS)
def test_a_wrong_decode_of_eight_bits_is_caught(name, tmp_path, monkeypatch):
    kernels = mutated_kernels(tmp_path, monkeypatch, "decode", *WIDE_MUTANTS[name])
    weights = [with_all_codes(word) for word in ("int8", "float8")]
    with running(running_mutant(kernels)):
        found = [torch.equal(bits(decoded(w, FP32)), bits(expected(w, FP32))) for w in weights]
    assert not all(found)


LOOP_MUTANTS = {
    "low nibble first": ("tl.join(early, late)", "tl.join(late, early)"),
    "scales of another row": ("start // SHAPE.BLOCKSIZE", "(start // SHAPE.BLOCKSIZE + 1)"),
    "scales of the first step": ("scales += ahead // SHAPE.BLOCKSIZE", "scales += 0"),
    "table shifted": ("(codes & 15)", "(codes + 1 & 15)"),
    "code in bfloat16": ("code[None, :] *", "code[None, :].to(tl.bfloat16).to(tl.float32) *"),
    "rows of W one off": ("first + row", "first + row + 1"),
}


@pytest.mark.many
@needs_machine  # which stops at what lies outside of W
@pytest.mark.parametrize("name", LOOP_MUTANTS)
def test_a_wrong_decode_in_the_loop_is_caught(name, tmp_path, monkeypatch):
    kernels = mutated_kernels(tmp_path, monkeypatch, "weights", *LOOP_MUTANTS[name])
    weight = drawn("nf4", 40, 192)
    executor = running_mutant(kernels, in_loop())
    with running(executor), pytest.raises(Exception, match=r"torch\.equal|bounds"):
        assert_w_by_an_identity(weight, expected(weight, FP16))
