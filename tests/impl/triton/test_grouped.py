"""Groups' kernels: faults planted in them, schedules, what the host asks for, offsets that lie."""

from types import SimpleNamespace

import pytest
import torch

pytest.importorskip("triton")

import lora_kernels as lk
from lora_kernels.dispatch import preferred_of_groups
from lora_kernels.impl.eager import grouped_mm
from lora_kernels.impl.executor import using
from lora_kernels.impl.triton import grouped
from lora_kernels.impl.triton.plan.device import known
from lora_kernels.impl.triton.plan.grouped import GroupedProblem, grouped_config
from lora_kernels.impl.triton.tools.record import Recorder
from lora_kernels.operands.call import Adapter, Wanted
from lora_kernels.operands.grouped import GroupedCall
from lora_kernels.testing import GROUPED, GroupedCase
from tests.impl.triton.test_kinds import Keeping
from tests.impl.triton.test_mutations import Mutated, mutated_kernels
from tests.support.executors import Machine, needs_compiler, needs_machine, running

BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
H100 = known("NVIDIA H100 80GB HBM3")
# All that a call may name: rows, places, other adapters and weights, of which one has no rows; two
# columns of tiles.
CASE = GroupedCase(
    (5, 0, 33, 1, 20), 72, 72, 4, BF16, FP32, 0.2, scaling=(0.5, 1.0, 2.0), spare=3, tokens=30,
    scatter=True, stored=True, adapters=(2, 0, -1, 2, 1), weights=(1, 0, 1, 0, 2),
)  # fmt: skip
# By name: the file, its text, and what replaces that.
MUTANTS = {
    "group off by one": (
        "groups", "        return group\n", "        return (group + 1) % LIMIT\n"
    ),
    "the panel's group off by one": ("groups", "(firsts <= panel)", "(firsts < panel)"),
    "B read expert-slowest": ("groups", "stack.stride, stack.step)", "stack.stride, 1)"),
    "the first adapter's scaling": ("groups", "pointer + adapter * numbers.stride", "pointer"),
    "the first group of an adapter alone": ("groups", "every >= group)", "every >= 99 * group)"),
    "scatter ignored": (
        "groups", "named_rows(scatter, tl.minimum(rows, end - 1), count)",
        "tl.minimum(rows, end - 1)",
    ),
    "rows ignored": (
        "grouped_forward", "named_rows(groups.rows, near_rows, tokens)",
        "tl.minimum(near_rows, tokens - 1)",
    ),
    "the mask of sorted rows": (
        "grouped_sums", "named_rows(named.drawn, near, named.places)", "near"
    ),
    "rows without a group unwritten": (
        "grouped_forward", "if row < end:", "if (row < end) & (group < SHAPE.GROUPS):"
    ),
    "an empty group's dA unwritten": (
        "grouped_sums", "    store_da(", "    if tl.sum(product * product) > 0: store_da("
    ),
    "another panel's flag": (
        "grouped_forward", "publish(flags + panel)", "publish(flags + panel + 1)"
    ),
    "xa not waited for": (
        "grouped_forward", "if adapter >= 0:\n                            wait(flags + panel, 1)\n",
        "if adapter >= 0:\n",
    ),
    "dxa not waited for": ("grouped_sums", "wait(flags + panel, 1)", "pass"),
    "flags not left as found": ("grouped_sums", "leave(flags + panel, LAST_OUT)", "pass"),
}  # fmt: skip


def _runs(machine, case=CASE):
    with running(machine):
        GROUPED.assert_parity(case, GROUPED.inputs(case), "triton")
    assert not machine.workspace.zeros(1, torch.device("cpu")).any(), "flags not left as found"


def _case(name):
    """One whose groups have numbers of their own where that is what a fault breaks."""
    return GroupedCase((5, 0, 33, 3), 40, 48, 4, BF16, FP32) if "group off" in name else CASE


@needs_machine
@pytest.mark.many
@pytest.mark.parametrize("name", MUTANTS)
def test_planted_faults_are_found(name, tmp_path, monkeypatch):
    kernels = mutated_kernels(tmp_path, monkeypatch, *MUTANTS[name])
    machine = Mutated(80, 12, 1, kernels=kernels)
    with pytest.raises(Exception, match=r"budget|NaN|race|spin|blocked|flags|bounds"):
        _runs(machine, _case(name))


@needs_machine
@pytest.mark.slow
def test_any_schedule_gives_the_same_bits():
    """With weak memory too, and of the mask: y's rows are those of the same case unsorted."""
    inputs, results = GROUPED.inputs(CASE), []
    for resident, seed, weak in ((1, 0, 0), (12, 1, 1), (5, 2, 1)):
        machine = Machine(80, resident, seed, weak)
        with running(machine):
            results.append(GROUPED.call(CASE, inputs, "triton"))
    for other in results[1:]:
        for name, expected in results[0].items():
            assert torch.equal(other[name], expected), f"other bits of {name}"


@needs_machine
@pytest.mark.parametrize("ends", [(9, 70, 50, 45), (-7, 5, 1 << 30, 40)], ids=str)
def test_offsets_that_lie_name_no_other_memory(ends):
    """The machine reports an access outside of tensors; nobody on the host has read them."""
    call, x, _ = _call(GroupedCase((20, 0, 5, 15), 24, 24, 4, BF16))
    offsets = torch.tensor(ends, dtype=torch.int32)
    with using(Machine(80, 3)):
        grouped.forward(x, call._replace(groups=call.groups._replace(offsets=offsets)))


def _call(case):
    inputs = GROUPED.inputs(case)
    adapter = Adapter(inputs.lora_A, inputs.lora_B, inputs.scaling)
    call = GroupedCall(inputs.weight, adapter, inputs.bias, inputs.groups, None, len(inputs.x))
    return call, inputs.x, inputs.dy


@needs_compiler
@pytest.mark.parametrize("adapter", [BF16, FP32], ids=str)
def test_one_launch_each_way_whatever_the_groups(adapter):
    case = GroupedCase((64,) * 8, 96, 64, 16, BF16, adapter, stored=True)
    call, x, dy = _call(case)
    with using(Recorder(H100)) as recorder:
        _, xa = grouped.forward(x, call)
        grouped.backward(dy, x, xa, call, Wanted(True, True, True, True))
    names = [launch.kernel.__name__ for launch in recorder.launches]
    assert names == ["grouped_forward_kernel", "grouped_backward_kernel"]
    given = recorder.launches[0].args
    assert given["call"].b.pointer.data_ptr() == call.adapter.b.data_ptr(), "B was copied"
    assert given["call"].w.pointer.data_ptr() == call.weight.data_ptr(), "W was copied"
    b = recorder.launches[1].args["call"].b
    assert (b.pointer.dtype, b.stride, b.step) == (BF16, 16, 1)
    assert b.pointer.equal(call.adapter.b.to(BF16))


@needs_compiler
def test_calls_of_one_kind_need_one_compilation():
    executor = Keeping(None)
    for sizes in ((64,) * 8, (60, 0, 70, 64, 64, 64, 64, 64), (512, *(0,) * 7)):
        call, x, dy = _call(GroupedCase(sizes, 96, 64, 16, BF16, FP32))
        with using(executor):
            _, xa = grouped.forward(x, call)
            grouped.backward(dy, x, xa, call, Wanted(True, True, True, False))
    assert len(executor.kept) == 2


@needs_compiler
def test_auto_takes_triton_unless_grouped_mm_is_one_kernel(monkeypatch):
    call, x, _ = _call(GroupedCase((3, 4), 24, 24, 4, BF16, bias=False))
    given = (x, call.weight, call.adapter.a, call.adapter.b, call.groups.offsets)
    with using(Recorder(H100)) as recorder:
        assert lk.explain(lk.grouped_lora_linear, *given).choice == "triton"
        lk.grouped_lora_linear(*given)
        assert len(recorder.launches) == 1
        monkeypatch.setattr(grouped_mm, "serves", lambda *_: True)
        assert lk.explain(lk.grouped_lora_linear, *given).choice == "eager"
        lk.grouped_lora_linear(*given)
        assert len(recorder.launches) == 1


def test_auto_leaves_what_was_once_wrong_on_a_gpu():
    """Of linear layers: one launch with dropout, or with a rank that tiles pad."""
    on_gpu = SimpleNamespace(device=torch.device("cuda"))
    for rank, dropout, expected in ((16, False, "auto"), (16, True, "eager"), (24, False, "eager")):
        assert preferred_of_groups(on_gpu, rank, dropout) == expected
        assert preferred_of_groups(torch.ones(1), rank, dropout) == "auto"


@pytest.mark.parametrize(
    ("rows", "r", "bits", "expected"),
    [(2, 8, 16, 16), (40, 8, 16, 16), (100, 8, 16, 64), (4000, 16, 16, 128), (4000, 96, 16, 64),
     (2, 8, 32, 16), (500, 8, 32, 64), (500, 96, 32, 16)],
)  # fmt: skip
def test_tiles_are_as_high_as_groups(rows, r, bits, expected):
    problem = GroupedProblem(rows * 64, 64, 768, 2048, r, bits)
    assert grouped_config(problem, H100).block_m == expected
