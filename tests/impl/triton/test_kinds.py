"""Kinds of calls: calls of one kind share plans, constants and compiled kernels, others don't."""

import pytest
import torch

pytest.importorskip("triton")

from lora_kernels.impl import gpu
from lora_kernels.impl.executor import using
from lora_kernels.impl.triton import kinds, linear
from lora_kernels.impl.triton.launch import Gpu
from lora_kernels.impl.triton.operands import operands_of
from lora_kernels.impl.triton.plan.device import known
from lora_kernels.impl.triton.plan.plan import library_plan
from lora_kernels.impl.triton.tools.compiler import variant
from lora_kernels.impl.triton.tools.record import Launch, Product, Recorder
from lora_kernels.operands.call import Adapter, LinearCall, Wanted
from lora_kernels.operands.dropout import Dropout
from lora_kernels.operands.weight import Dense
from tests.support.executors import fixed_plan, needs_compiler, own_plan
from tests.support.quantised import drawn

BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
M, N, K, R = 40, 48, 64, 16
WANTED = Wanted(True, True, True, False)
pytestmark = needs_compiler


class Keeping(Recorder):
    """Records launches like a GPU's executor: what calls of a kind share is made once."""

    def __init__(self, plan):
        super().__init__(known("NVIDIA H100 80GB HBM3"))
        self.plan, self.kept = plan, {}

    def prepared(self, kind, make):
        if kind not in self.kept:
            self.kept[kind] = make()
        return self.kept[kind]

    def launcher(self, kernel, constants, how):
        """Fail where a launch needs another compilation than the first of its kind."""
        first = []

        def launch(grid, args):
            first.append(needed(Launch(kernel, grid, args, constants, how)))
            assert first[-1] == first[0], "another compilation within a kind"
            self.run(kernel, grid, args, constants, how)

        return launch


def needed(launch):
    """What Triton compiles for a launch, and for which device."""
    kernel, _, args, constants, how = launch
    return variant(kernel, args, constants, how), _device(args.values())


def _device(values):
    for value in values:
        if isinstance(value, torch.Tensor):
            return value.device
        if isinstance(value, tuple) and (found := _device(value)) is not None:
            return found
    return None


def lying(rows, columns, dtype=BF16, by=None, shift=0, device="cpu", transposed=False):
    """A matrix whose rows are `by` elements apart, `shift` elements into its memory."""
    if transposed:
        return lying(columns, rows, dtype, by, shift, device).t()
    by = by or columns
    memory = torch.zeros(rows * by + shift, dtype=dtype, device=device)
    return memory[shift:].as_strided((rows, columns), (by, 1))


def codes_of(n, k, name="nf4-nested", blocksize=64, moved=(), **lies):
    """A quantised weight; `moved`: tensors whose memory begins elsewhere, 0 the codes, then parts.

    lies: how codes of eight bits lie, and the dtype of their scales.
    """
    weight = drawn(name, n, k, blocksize)
    if "by" in lies:
        weight.stored = lying(n, k, torch.int8, lies["by"])
    if "scales" in lies:
        weight.parts = tuple(t.to(lies["scales"]) for t in weight.parts)
    tensors = [weight.stored, *weight.parts]
    for index in moved:
        t = tensors[index]
        shape = (1, t.numel()) if t.ndim < 2 else t.shape
        tensors[index] = lying(*shape, t.dtype, shift=1).view(t.shape)
    weight.stored, weight.parts = tensors[0], tuple(tensors[1:])
    return weight


def call(m=M, n=N, k=K, r=R, dtype=BF16, device="cpu", wanted=WANTED, **at):
    """Run forward and backward; `at` says of each tensor how it lies, of numbers what they are."""
    where = {"dtype": dtype, "device": device}
    x, dy = (lying(m, c, **(where | at.get(name, {}))) for name, c in (("x", k), ("dy", n)))
    coded = at.get("codes")
    weight = Dense(lying(n, k, **(where | at.get("w", {}))))
    weight = weight if coded is None else codes_of(n, k, **coded)
    a, b = lying(r, k, **(where | at.get("a", {}))), lying(n, r, **(where | at.get("b", {})))
    xa = lying(m, r, **(where | at.get("xa", {})))
    bias = at.get("bias")
    bias = None if bias is None else lying(1, n, **(where | bias))[0]
    seed = lying(1, 1, torch.int64, shift=at.get("seed_shift", 0), device=device)[0, 0]
    threshold = at.get("threshold", 0)
    dropout = Dropout(seed, threshold) if threshold else None
    scaling = at.get("scaling", 2.0)
    if isinstance(scaling, dict):
        scaling = lying(1, 1, **({"device": device} | scaling))[0, 0]
    given = LinearCall(weight, Adapter(a, b, scaling), bias, dropout)
    linear.forward(x, given)
    linear.backward(dy, x if wanted.da else None, xa if wanted.db else None, given, wanted)


# Each differs from {} in what a plan, a constant or compiled code may depend on.
CALLS = [
    {}, {"m": 1}, {"m": 15}, {"m": 16}, {"m": 17}, {"m": 63}, {"m": 64}, {"m": 1000}, {"m": 1024},
    {"n": 50}, {"n": 64}, {"k": 72}, {"k": 128}, {"r": 1}, {"r": 8}, {"r": 17}, {"r": 64},
    {"r": 8, "b": {"by": 16}, "xa": {"by": 16}},
    {"dtype": FP16}, {"dtype": FP32}, {"device": "meta"},
    {"x": {"shift": 1}}, {"x": {"by": 80}}, {"x": {"by": 72}}, {"x": {"by": 65}},
    {"dy": {"shift": 1}}, {"dy": {"by": 64}}, {"dy": {"by": 56}}, {"dy": {"by": 49}},
    {"w": {"shift": 1}}, {"w": {"by": 80}}, {"w": {"by": 66}}, {"w": {"transposed": True}},
    {"a": {"dtype": FP32}}, {"a": {"shift": 1}}, {"a": {"by": 80}}, {"a": {"by": 65}},
    {"b": {"dtype": FP32}}, {"b": {"shift": 1}}, {"b": {"by": 32}}, {"b": {"by": 17}},
    {"r": 1, "b": {"by": 3}}, {"a": {"transposed": True}}, {"xa": {"shift": 1}},
    {"bias": {}}, {"bias": {"shift": 1}}, {"threshold": 1}, {"threshold": 6554},
    {"threshold": 40000}, {"threshold": 6554, "seed_shift": 1},
    {"scaling": {"dtype": FP32}}, {"scaling": {"dtype": BF16}}, {"scaling": {"shift": 1}},
    {"scaling": 1.0}, {"wanted": Wanted(True, False, False, False)},
    {"wanted": Wanted(False, True, True, True)}, {"wanted": Wanted(False, False, True, False)},
]  # fmt: skip
# The same of quantised weights; K is a multiple of both block sizes.
CODED = [
    {"codes": codes, "k": 256, **others}
    for codes in (
        {}, {"name": "nf4"}, {"blocksize": 128}, {"blocksize": 32}, {"name": "int8"},
        {"name": "int8", "by": 272}, {"name": "int8", "by": 257}, {"name": "int8", "scales": BF16},
        {"name": "float8-rows"}, {"name": "float8-tiles"}, *({"moved": [i]} for i in range(6)),
        {"name": "nf4", "moved": [1]}, *({"name": "int8", "moved": [i]} for i in range(2)),
    )
    for others in ({}, {"r": 0})
]  # fmt: skip
CODED += [
    {"codes": {}, "k": 256, **others}
    for others in ({"n": 96, "k": 128}, {"m": 1}, {"dtype": FP16}, {"dtype": FP32}, {"r": 64},
                   {"wanted": Wanted(False, True, True, False)}, {"x": {"shift": 1}})
]  # fmt: skip


def first(problem, device):
    """Plan Triton's own products of a W that was decoded to memory."""
    return own_plan(problem._replace(blocksize=0), device)


def in_loop(problem, device):
    """Plan a loop that decodes W wherever one may."""
    may = problem.blocksize and problem.bits == 16
    return (fixed_plan(codes=True) if may else own_plan)(problem, device)


CODED_PLANS = [
    *(pytest.param(plan, id=plan.__name__) for plan in (first, in_loop)),
    pytest.param(library_plan, id="library"),
]
PLANS = [pytest.param(own_plan, id="one launch"), pytest.param(library_plan, id="library")]


def check(plan, calls=CALLS):
    """Calls launch after others what they launch alone; `Keeping` compares compilations."""
    keeping = Keeping(plan)
    for given in calls:
        alone = Keeping(plan)
        for executor in (alone, keeping):
            executor.calls.clear()
            with using(executor):
                call(**given)
        assert list(map(_shape, keeping.calls)) == list(map(_shape, alone.calls)), given
    return keeping


def _shape(made):
    if isinstance(made, Product):
        return [(t.shape, t.stride()) for t in made]
    return needed(made), made.grid, made.constants, made.how


@pytest.mark.parametrize("plan", PLANS)
def test_calls_of_one_kind_launch_the_same_compiled_kernels(plan):
    """Of any numbers of rows, addresses, strides, dtypes, in any order."""
    keeping = check(plan, [*CALLS, *reversed(CALLS)])
    assert len(keeping.kept) < 2 * len(CALLS)
    assert not any(
        isinstance(t, torch.Tensor) for made in keeping.kept.values() for t in held(made)
    )


def held(made):
    """All that an object holds, and what that holds."""
    values = vars(made).values() if hasattr(made, "__dict__") else made
    for value in values:
        yield value
        if hasattr(value, "__dict__") and type(value).__module__.startswith("lora_kernels"):
            yield from () if isinstance(value, Keeping) else held(value)


def test_other_numbers_are_no_other_kind():
    """Rows up to the next power of two, scaling, p and the seed's number."""
    keeping = check(own_plan, [{"m": 33}, {"m": 64}, {"m": 50, "scaling": 0.5}])
    assert len(keeping.kept) == 2
    keeping = check(own_plan, [{"threshold": 6554}, {"threshold": 3277}])
    assert len(keeping.kept) == 2


def _parts():
    """How many elements a key has that may be left out: of forward's, and of what follows it."""
    made = []
    real = kinds.key_of

    def key_of(*args):
        made.append(real(*args))
        return made[-1]

    with pytest.MonkeyPatch.context() as patch, using(Keeping(own_plan)):
        patch.setattr(linear, "key_of", key_of)
        call()
    return max(map(len, made))


# How many multiprocessors torch spares, TF32, the form of codes: tests of their own.
ELSEWHERE = (6, 7, 14)


@pytest.mark.slow
@pytest.mark.parametrize("left_out", [i for i in range(_parts()) if i not in ELSEWHERE])
def test_each_element_of_a_key_is_needed(left_out, monkeypatch):
    """Without it some call launches what was made for another."""
    real = kinds.key_of

    def less(*args):
        key = real(*args)
        return (*key[:left_out], *key[left_out + 1 :])

    def check_pairs():
        for plan in (own_plan, library_plan):
            for given in CALLS:
                check(plan, [{}, given, {}])
                check(plan, [{"threshold": 6554}, {"threshold": 6554, **given}])

    monkeypatch.setattr(linear, "key_of", less)
    with pytest.raises(AssertionError):
        check_pairs()


def test_switches_of_torch_make_another_kind(monkeypatch):
    """TF32, and how many multiprocessors are left to others."""
    x, w = lying(M, K, FP32), lying(N, K, FP32)
    adapter = Adapter(lying(R, K, FP32), lying(N, R, FP32), 1.0)
    operands = operands_of(LinearCall(Dense(w), adapter, None, None), w)
    keys = [kinds.key_of(x, operands, None)]
    monkeypatch.setattr(gpu, "tf32_allowed", lambda: True)
    keys.append(kinds.key_of(x, operands, None))
    torch._C._set_sm_carveout_experimental(7)
    try:
        keys.append(kinds.key_of(x, operands, None))
    finally:
        torch._C._set_sm_carveout_experimental(None)
    assert len(set(keys)) == 3


@pytest.mark.parametrize("plan", CODED_PLANS)
def test_calls_with_codes_of_one_kind_launch_the_same_compiled_kernels(plan):
    """What decodes W is kept too, and no tensor with it."""
    keeping = check(plan, [{}, *CODED, *reversed(CODED), {}])
    assert not any(
        isinstance(t, torch.Tensor) for made in keeping.kept.values() for t in held(made)
    )


@pytest.mark.parametrize("plan", CODED_PLANS)
@pytest.mark.parametrize("r", [R, 0])
def test_a_call_with_codes_plans_once(plan, r):
    """Another of its kind makes no plan, no constants and no launcher."""
    keeping = Keeping(plan)
    with using(keeping):
        call(codes={}, k=256, r=r)
        launches = list(map(_kernel, keeping.calls))
        keeping.calls.clear()
        keeping.plan = keeping.launcher = None
        call(codes={}, k=256, r=r, m=M + 1)
    assert list(map(_kernel, keeping.calls)) == launches
    decoding = "absmax_kernel" if plan is in_loop and r else "codebook_kernel"
    assert launches.count(decoding) == 2  # forward and backward


def _kernel(made):
    return "product" if isinstance(made, Product) else made.kernel.__name__


LIE_OF_CODES, FORM = 9, 14


@pytest.mark.slow
@pytest.mark.parametrize("left_out", [LIE_OF_CODES, FORM, *range(-5, 0)])
def test_each_element_of_a_key_of_codes_is_needed(left_out, monkeypatch):
    """How they lie, their form, and how each part of W lies."""
    real = kinds.key_of

    def less(*args):
        key = list(real(*args))
        del key[left_out]
        return tuple(key)

    def check_pairs():
        for plan in (first, in_loop):
            for given in CODED:
                check(plan, [{"codes": {}, "k": 256}, given])

    monkeypatch.setattr(linear, "key_of", less)
    with pytest.raises(AssertionError):
        check_pairs()


def test_a_gpu_keeps_a_bounded_number_of_kinds():
    executor = Gpu()
    assert [executor.prepared("kind", lambda made=made: made) for made in (1, 2)] == [1, 1]
    for number in range(10_000):
        assert executor.prepared(number, lambda number=number: number + 1) == number + 1
    assert executor.prepared("kind", lambda: 3) == 3  # it was forgotten


@pytest.mark.parametrize("plan", PLANS)
def test_arguments_come_in_the_kernels_order(plan):
    """What was compiled is launched by position."""
    keeping = Keeping(plan)
    with using(keeping):
        call(threshold=6554, bias={})
    assert len(keeping.launches) >= 2
    for launch in keeping.launches:
        assert [*launch.args, *launch.constants] == launch.kernel.arg_names
