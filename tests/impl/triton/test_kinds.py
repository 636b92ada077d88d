"""Kinds of calls: calls of one kind share plans, constants and compiled kernels, others don't."""

import pytest
import torch

pytest.importorskip("triton")

from lora_kernels.impl import gpu
from lora_kernels.impl.executor import using
from lora_kernels.impl.triton import kinds, linear
from lora_kernels.impl.triton.kernels.arguments import Codes
from lora_kernels.impl.triton.launch import Gpu
from lora_kernels.impl.triton.operands import operands_of
from lora_kernels.impl.triton.plan.device import known
from lora_kernels.impl.triton.plan.plan import library_plan
from lora_kernels.impl.triton.tools.compiler import variant
from lora_kernels.impl.triton.tools.record import Launch, Product, Recorder
from lora_kernels.operands.call import Adapter, LinearCall, Wanted
from lora_kernels.operands.dropout import Dropout
from lora_kernels.operands.weight import Dense
from tests.support.executors import needs_compiler, own_plan

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


def call(m=M, n=N, k=K, r=R, dtype=BF16, device="cpu", wanted=WANTED, **at):
    """Run forward and backward; `at` says of each tensor how it lies, of numbers what they are."""
    where = {"dtype": dtype, "device": device}
    x, dy = (lying(m, c, **(where | at.get(name, {}))) for name, c in (("x", k), ("dy", n)))
    w = lying(n, k, **(where | at.get("w", {})))
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
    given = LinearCall(Dense(w), Adapter(a, b, scaling), bias, dropout)
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


SWITCHES = (6, 7)  # how many multiprocessors torch spares, TF32: tests of their own


@pytest.mark.slow
@pytest.mark.parametrize("left_out", [i for i in range(_parts()) if i not in SWITCHES])
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


def test_codes_decoded_in_the_loop_are_a_kind_of_their_own():
    """By blocks of each size; where W is decoded first, the kind is a dense W's."""
    keys = []
    for blocksize in (None, 64, 128):
        w = torch.empty(N, 128, device="meta", dtype=BF16)
        adapter = Adapter(lying(R, 128), lying(N, R), 1.0)
        operands = operands_of(LinearCall(Dense(w), adapter, None, None), w)
        if blocksize:
            codes = Codes(*(torch.empty(8, dtype=t) for t in (torch.uint8, FP32, FP32)))
            operands = operands._replace(codes=codes, blocksize=blocksize)
        keys.append(kinds.key_of(lying(M, 128), operands, None))
    assert len(set(keys)) == 3


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
