"""The launches that plans lead to, recorded, against what drivers refuse."""

from dataclasses import replace
from itertools import product
from types import SimpleNamespace

import pytest
import torch

from lora_kernels import lora_linear
from lora_kernels.impl.triton.launch import Gpu, Options
from lora_kernels.impl.triton.plan.config import Problem, shared_bytes, shrink_config
from lora_kernels.impl.triton.plan.device import estimated, known, of_gpu
from lora_kernels.testing import Case, assert_parity, make_inputs
from tests.support.executors import (
    Machine,
    fixed_plan,
    needs_compiler,
    needs_machine,
    own_plan,
    running,
)

BF16 = torch.bfloat16

GPUS = [
    known("NVIDIA A100-SXM4-80GB"),
    known("NVIDIA H100 80GB HBM3"),
    known("NVIDIA B200"),
    known("NVIDIA L40S"),
    known("NVIDIA GeForce RTX 4090"),
    known("NVIDIA GeForce RTX 5090"),
    estimated("a GPU of tomorrow", (13, 1), 100),
    estimated("a small one", (8, 7), 16),
]
ROWS = (1, 300, 8192, 16384, 131072)
RANKS = (16, 64, 128, 256)
MOST_THREADS, MOST_REGISTERS = 1024, 255  # of a program; of a thread, where all are taken


def _launches(problem, device):
    """What a call launches by own products, and bytes of shared memory that each may need."""
    from lora_kernels.impl.triton.tools.record import launches

    config = own_plan(problem, device).config
    dtype = BF16 if problem.bits == 16 else torch.float32
    for launch in launches(problem, config, device, dtype, "meta"):
        if launch.kernel.__name__ == "shrink_kernel":
            shape = launch.constants["SHAPE"]
            step = (shape.BLOCK_M + shape.BLOCK_R) * shape.BLOCK_L
            yield launch, problem.bits // 8 * launch.how.num_stages * step
        else:
            yield launch, shared_bytes(config, problem, device)


@needs_compiler
@pytest.mark.parametrize("dropout", [False, True], ids=["p0", "p"])
@pytest.mark.parametrize("bits", [16, 32])
@pytest.mark.parametrize("device", GPUS, ids=lambda d: d.name)
def test_no_planned_launch_is_refused(device, bits, dropout):
    """By blocks, threads, shared memory, registers; nor needs it more programs at once than run."""
    from lora_kernels.impl.triton.tools.compiler import Resources
    from lora_kernels.impl.triton.tools.inspect import resident

    split = 0
    for m, r, backward in product(ROWS, RANKS, (False, True)):
        problem = Problem(m, 4096, 4096, r, bits, dropout, True, backward)
        for launch, shared in _launches(problem, device):
            fit = resident(Resources(MOST_REGISTERS, 0, shared), launch.how.num_warps, device)
            what = f"{problem}: {launch.kernel.__name__}, {launch.grid} programs, {launch.how}"
            assert 1 <= launch.grid < 1 << 31, what
            assert 32 * launch.how.num_warps <= MOST_THREADS, what
            assert shared <= device.shared_bytes, what
            assert fit >= 1, what
            split += launch.kernel.__name__ == "shrink_kernel"
            assert launch.grid <= 4 * device.multiprocessors, what
            assert launch.how.together <= device.multiprocessors, what
    assert split or (bits, dropout) == (16, False)  # for some rank xa is made by itself


@needs_compiler
@pytest.mark.parametrize("xa_columns", [0, 1, 2, 4])
def test_programs_that_must_run_together(xa_columns):
    """As many as columns of tiles make xa together; elsewhere one program goes on by itself."""
    from lora_kernels.impl.triton.plan.config import Config
    from lora_kernels.impl.triton.tools.record import launches

    config = Config(128, 128, 64, 8, 3, xa_columns)
    problem = Problem(512, 512, 512, 16, 16, True, True)
    *shrink, large = launches(problem, config, GPUS[0], memory="meta")
    assert large.how.together == max(xa_columns, 1)
    assert not any(launch.how.together > 1 for launch in shrink)
    (backward,) = launches(
        problem._replace(backward=True), replace(config, xa_columns=1), GPUS[0], memory="meta"
    )
    assert backward.how.together == 1


@pytest.mark.many
@needs_machine
@pytest.mark.parametrize("resident", [1, 2, 3, 17])
@pytest.mark.parametrize("target", [80, 90])
def test_any_number_of_running_programs_makes_progress(target, resident):
    """Of as many as the plan launches; on weak memory, by several schedules, on one workspace."""

    class Fewer(Machine):
        def programs(self, device):
            return 17

    machine = Fewer(target, resident, weak=1)
    for xa_columns in (1, 2, 4):
        if xa_columns > resident:
            continue
        machine.plan = fixed_plan(xa_columns=xa_columns, descriptors=target > 80)
        case = Case((300,), 264, 136, 16, BF16, dropout_p=0.1)
        for machine.seed in range(2):
            with running(machine):
                assert_parity(case, make_inputs(case), "triton")
        assert not machine.workspace.zeros(1, torch.device("cpu")).any()


@needs_machine
def test_more_rows_than_the_first_launch_of_two_has_programs():
    """Of the shrink as many programs as are of use, each with several row panels."""
    machine = Machine(80, resident=1, plan=fixed_plan(xa_columns=0))
    case = Case((300,), 40, 72, 16, BF16, dropout_p=0.1)
    with running(machine):
        assert_parity(case, make_inputs(case), "triton")
    problem = Problem(300, 40, 72, 16, 16, True)
    panels = -(-300 // shrink_config(problem, machine.device(torch.empty(0))).block_m)
    assert panels > 4  # programs


@needs_machine
def test_the_machine_refuses_columns_that_it_can_not_run_together():
    case = Case((150,), 264, 136, 16, BF16)
    with (
        running(Machine(80, resident=2, plan=fixed_plan(xa_columns=3))),
        pytest.raises(RuntimeError, match="together: expected at most 2 programs, the resident"),
    ):
        assert_parity(case, make_inputs(case), "triton")


@needs_machine
@pytest.mark.parametrize("direction", ["forward", "backward"])
def test_a_wait_without_end_ends_by_an_error(direction):
    """A flag that a broken launch left behind is never reached; the clock counts instructions."""
    import ptxvm

    from lora_kernels.impl.triton.tools.record import Launch

    def load(ptx):
        assert ptx.count("late, now, 7;") > 0
        clocked = ptx.replace("%globaltimer_hi", "%globaltimer_lo")
        return ptxvm.load(clocked.replace("late, now, 7;", "late, now, 300000;"))

    inputs = make_inputs(Case((100,), 72, 72, 16, BF16))

    class Broken(Machine):
        def run(self, kernel, grid, args, constants, how):
            if kernel.__name__.startswith(direction):
                Launch(kernel, grid, args, constants, how).flags[0] = -9
            super().run(kernel, grid, args, constants, how)

    adapter = (inputs.weight, inputs.lora_A, inputs.lora_B)

    def call(x):
        return lora_linear(x, *adapter, dropout_p=0.1, training=True, impl="triton")

    with running(Broken(80, resident=2, plan=fixed_plan(), load=load)):
        if direction == "forward":
            with pytest.raises(Exception, match="trap executed"):
                call(inputs.x)
        else:
            y = call(inputs.x.requires_grad_())
            with pytest.raises(Exception, match="trap executed"):
                y.backward(inputs.dy)


def test_multiprocessors_that_torch_spares_are_left_alone(monkeypatch):
    """For communication beside."""
    name = "NVIDIA H100 80GB HBM3"
    found = SimpleNamespace(name=name, major=9, minor=0, multi_processor_count=132)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda index: found)
    tensor, gpu = SimpleNamespace(device=torch.device("cuda", 0)), Gpu()
    of_gpu.cache_clear()
    try:
        for spared, left in ((None, 132), (0, 132), (16, 116), (500, 1), (None, 132)):
            torch._C._set_sm_carveout_experimental(spared)
            device = gpu.device(tensor)
            assert device == replace(known(name), multiprocessors=left)
            assert gpu.programs(device) == left
    finally:
        torch._C._set_sm_carveout_experimental(None)
        of_gpu.cache_clear()


class _Kernel:
    """Notes what it is launched with; fails as a driver does if told to."""

    __name__ = "forward_kernel"

    def __init__(self, error=None):
        self.error, self.given = error, {}

    def __getitem__(self, grid):
        def launch(**given):
            self.given = {"grid": grid, **given}
            if self.error is not None:
                raise self.error

        return launch


def test_what_a_gpu_is_asked_for():
    """FP fusion by name: by default a later Triton leaves it out, and results change."""
    kernel = _Kernel()
    Gpu().run(kernel, 7, {"x": 1}, {"N": 2}, Options(4, 3, 2))
    assert kernel.given == {
        "grid": (7,), "x": 1, "N": 2, "num_warps": 4, "num_stages": 3, "enable_fp_fusion": True,
    }  # fmt: skip


def test_an_error_of_a_launch_names_the_kernel_and_what_to_try():
    kernel = _Kernel(RuntimeError("Triton Error [CUDA]: unspecified launch failure"))
    with pytest.raises(RuntimeError) as found:
        Gpu().run(kernel, 132, {}, {}, Options(8, 3))
    message = str(found.value)
    assert "forward_kernel: launch of 132 programs of 256 threads failed: " in message
    assert "unspecified launch failure" in message
    assert "impl='eager'" in message
    assert found.value.__cause__ is kernel.error
