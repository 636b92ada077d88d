"""A quantised W in Triton's kernels: its bits as the format defines them, calls in the budget."""

import pytest
import torch

import lora_kernels as lk
from lora_kernels.impl.triton.decode import decoded
from lora_kernels.impl.triton.plan.config import Problem, problem_of
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
    """Forward and backward multiply by the very numbers that the format means."""
    n, k, number = 72, 88, FORMATS.index(name)
    dtype = DTYPES[number % len(DTYPES)]
    weight = drawn(name, n, k, device=place.memory)
    wanted = expected(on("cpu", weight), dtype).to(place.memory)
    a, b = wanted.new_zeros(1, k), wanted.new_zeros(n, 1)
    x = torch.eye(k, dtype=dtype, device=place.memory).requires_grad_()
    with running(place(plan=planned)):
        y = lk.lora_linear(x, weight, a, b, impl="triton")
        assert torch.equal(y.T, wanted)
        x = wanted.new_zeros(n, k, requires_grad=True)
        dy = torch.eye(n, dtype=dtype, device=place.memory)
        lk.lora_linear(x, weight, a, b, impl="triton").backward(dy)
        assert torch.equal(x.grad, wanted)


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
        torch.testing.assert_close(grads[1:], (torch.full((8,), 5.0),) * len(grads[1:]))


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


def test_explained():
    x, a, b = torch.randn(3, 64), torch.randn(4, 64), torch.randn(16, 4)
    with running(Machine(80)):
        for name in FORMATS:
            weight = drawn(name, 16, 64)
            found = lk.explain(x, weight, a, b)
            assert (found.choice, found.format) == ("triton", weight.format)
            for text in found.plans.values():
                assert text.startswith(f"W decoded from {weight.format} first, ")
        assert lk.explain(x, weight, a[:0], b[:, :0]).plans == {}
        assert "decoded" not in str(lk.explain(x, torch.randn(16, 64), a, b))


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
