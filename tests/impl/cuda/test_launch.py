"""The seam between the compiled CUDA part and whoever runs its launches in a GPU's stead."""

import importlib.util
from dataclasses import dataclass, field
from threading import Barrier, Thread

import pytest
import torch

from lora_kernels.impl import executor
from lora_kernels.impl.cuda.tools.machine import Machine
from lora_kernels.native import absence
from lora_kernels.registration import operators
from lora_kernels.testing import Case, make_inputs, run
from tests.ops.test_dropout import check_that_nothing_is_dropped
from tests.support.implementations import linear_call

ABSENT = absence("cuda")
pytestmark = pytest.mark.skipif(ABSENT is not None, reason=f"compiled CUDA part: {ABSENT}")
CASE = Case((40,), 72, 136, 8, torch.bfloat16, dropout_p=0.1)
SMALL = Case((3,), 72, 136, 8, torch.bfloat16)


@dataclass
class Recorder:
    """Runs nothing: keeps launches, or is interrupted where told to."""

    impl = "cuda"
    fails: str = ""
    launches: list = field(default_factory=list)

    def _fail(self, name):
        if self.fails == name:
            raise KeyboardInterrupt(name)

    def device(self, x):
        self._fail("device")
        return [80, 4, 166912]

    def flags(self, like, count):
        self._fail("flags")
        return torch.zeros(count, dtype=torch.int32)

    def run(self, launch):
        self._fail("run")
        self.launches.append(launch)


def test_a_launch_is_all_that_a_call_hands_over():
    inputs = make_inputs(CASE)
    with executor.using(Recorder()) as recorder:
        actual = run(CASE, inputs, "cuda")
    forward, backward = recorder.launches
    assert forward.kernel == "lora_forward_Small_bf16_r16_d1_c1"
    assert backward.kernel == "lora_backward_Small_bf16_r16_d1_c1"
    assert forward[1:5] == (2, 128, forward.shared_bytes, 1)  # two tiles
    there = {t.data_ptr() for t in backward.memory}
    for t in (inputs.x, inputs.weight, inputs.lora_A, inputs.lora_B):
        assert t.data_ptr() in there
    # Nobody ran the kernels: what they should have written shows.
    assert actual["y"].isnan().all()
    assert actual["da"].isnan().all()


@pytest.mark.parametrize("name", ["device", "flags", "run"])
def test_what_an_executor_raises_comes_out_as_it_was(name):
    inputs = make_inputs(SMALL)
    with (
        executor.using(Recorder(fails=name)) as recorder,
        pytest.raises(KeyboardInterrupt, match=name),
    ):
        run(SMALL, inputs, "cuda")
    assert recorder.launches == []
    with executor.using(recorder := Recorder()):
        run(SMALL, inputs, "cuda", ("dx",))
    kernels = [launch.kernel for launch in recorder.launches]
    assert kernels == ["lora_few_rows_bf16", "lora_backward_Small_bf16_r16_d0_c1"]


def test_an_error_of_the_library_is_not_taken_for_the_executors():
    inputs = make_inputs(SMALL)
    call = linear_call(inputs.weight, inputs.lora_A, inputs.lora_B.double())
    with executor.using(Recorder()), pytest.raises(RuntimeError, match="expected lora_B's dtype"):
        operators("lora_linear", "cuda").forward(
            inputs.x, *call._replace(adapter=call.adapter._replace(a=inputs.lora_A.float())).flat()
        )


def test_threads_have_executors_of_their_own():
    together = Barrier(2)
    recorders = Recorder(), Recorder()

    def work(recorder, case):
        with executor.using(recorder):
            for _ in range(5):
                together.wait()
                run(case, make_inputs(case), "cuda")

    threads = [
        Thread(target=work, args=args) for args in zip(recorders, (CASE, SMALL), strict=True)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    kinds = [[launch.kernel.split("_")[1] for launch in r.launches] for r in recorders]
    assert kinds == [["forward", "backward"] * 5, ["few", "backward"] * 5]


def test_without_an_executor_tensors_of_a_cpu_are_refused():
    inputs = make_inputs(SMALL)
    call = linear_call(inputs.weight, inputs.lora_A, inputs.lora_B)
    refused = "impl: 'cuda' can't serve this call: needs a CUDA device, got cpu"
    with executor.using(Recorder()):
        operators("lora_linear", "cuda").forward(inputs.x, *call.flat())
    with pytest.raises(RuntimeError, match=refused):
        operators("lora_linear", "cuda").forward(inputs.x, *call.flat())
    with pytest.raises(ValueError, match=refused):
        run(SMALL, inputs, "cuda")


@pytest.mark.skipif(
    importlib.util.find_spec("ptxvm") is None or importlib.util.find_spec("triton") is None,
    reason="needs the PTX virtual machine (module ptxvm on PYTHONPATH) and Triton's cuobjdump",
)
def test_no_seed_or_no_threshold_is_no_dropout():
    with executor.using(Machine()):
        check_that_nothing_is_dropped("cuda")
