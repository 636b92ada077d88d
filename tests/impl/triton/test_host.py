"""The path of a GPU's calls on the host: Triton's own launcher, torch's device "cuda", a driver.

The driver is a stub, the optional outside tool `cudastub`, which checks launches as a driver does
and executes them in the virtual machine; it changes torch, so each test is a process of its own.
"""

import importlib.util
import os
import re
import subprocess
import sys
from functools import partial

import pytest

from lora_kernels.impl.triton import support
from tests.support.paths import ROOT

PARITY = [f"tests/impl/triton/test_{name}.py" for name in ("parity", "split_k")]
KERNELS = ROOT / "lora_kernels" / "impl" / "triton" / "kernels"
OLDEST = ROOT / "build" / "triton-3.6"
pytestmark = pytest.mark.skipif(
    any(importlib.util.find_spec(name) is None for name in ("cudastub", "ptxvm", "triton"))
    or os.environ.get("TRITON_INTERPRET") == "1",
    reason="needs Triton, the stub of a driver and the virtual machine (modules cudastub, ptxvm)",
)


@pytest.fixture(scope="session")
def python(shared_folder):
    """Runs an interpreter; tests share its compiled kernels, which no later run on a GPU finds."""
    cache = str(shared_folder / "triton")

    def run(*args, **environment):
        done = subprocess.run(
            [sys.executable, *args], cwd=ROOT, capture_output=True, text=True,
            env={**os.environ, "TRITON_CACHE_DIR": cache, **environment},
        )  # fmt: skip
        assert done.returncode == 0, (done.stdout + done.stderr)[-4000:]
        return done.stdout

    return run


@pytest.mark.parametrize(("gpu", "share"), [("A100", "1/9"), ("H100", "4/9"), ("B200", "7/9")])
def test_the_suites_cases_of_a_gpu(python, gpu, share):
    """A third of them in all."""
    suites = ["tests/ops/test_parity.py", *PARITY]
    options = ["-q", "-p", "cudastub_pytest", "-k", "gpu and triton", "--share", share]
    output = python("-m", "pytest", *options, *suites, CUDASTUB_GPU=gpu)
    assert " passed" in output
    assert "skipped" not in output


@pytest.fixture
def oldest(python):
    """Runs an interpreter with the oldest Triton, as torch 2.10 and 2.11 have it."""
    if not OLDEST.is_dir():
        pytest.skip(f"needs {OLDEST.name} in build (make test-host)")
    path = os.pathsep.join([str(OLDEST), os.environ.get("PYTHONPATH", "")])
    output = python("-c", "import triton; print(triton.__version__)", PYTHONPATH=path)
    assert output.startswith(".".join(map(str, support.OLDEST_TRITON)))
    return partial(python, PYTHONPATH=path)


def test_cases_of_a_gpu_by_the_oldest_triton(oldest):
    """A dozen."""
    options = ["-q", "-p", "cudastub_pytest", "-k", "gpu and triton", "--share", "5/12"]
    output = oldest("-m", "pytest", *options, "tests/ops/test_parity.py", CUDASTUB_GPU="H100")
    assert " passed" in output


@pytest.mark.slow
def test_every_kernel_is_read_by_the_oldest_triton(oldest):
    """Each kind that calls launch: what its language lacks is an error at the first call."""
    kernels = "".join(path.read_text() for path in KERNELS.glob("*.py"))
    seen = oldest("-m", "tests.support.front_end").split()
    assert set(seen) == set(re.findall(r"^def (\w+_kernel)\(", kernels, re.MULTILINE))


PREAMBLE = """
import threading
import torch, cudastub
cudastub.install("H100,A100", sms=20, tensors=True)
from lora_kernels import lora_linear
from lora_kernels.impl.triton import launch
from lora_kernels.testing import Case, assert_parity, make_inputs
from tests.support.executors import PlannedGpu, fixed_library, own_plan, running
case = Case((300,), 256, 136, 8, torch.bfloat16, torch.float32, 0.1)
launch.Gpu.plan = lambda self, problem, device: own_plan(problem, device)

def launched():
    made = [(call.name, call.device, call.cooperative) for call in cudastub.history()]
    cudastub.history().clear()
    return made
"""


def test_devices_and_threads(python):
    """Tensors of a device that isn't current run there; backward in autograd's own thread."""
    python("-c", PREAMBLE + """
threads = []
plain = launch.Gpu.launcher
def launcher(self, *args):
    made = plain(self, *args)
    def launched(*args):
        threads.append(threading.get_ident())
        made(*args)
    return launched
launch.Gpu.launcher = launcher

assert_parity(case, make_inputs(case, "cuda:0"), "triton")
assert launched() == [("forward_kernel", 0, False), ("backward_kernel", 0, False)]
assert len(set(threads)) == 2, "backward has a thread of its own"
assert_parity(case, make_inputs(case, "cuda:1"), "triton")
assert launched() == [("forward_kernel", 1, False), ("backward_kernel", 1, False)]
with running(PlannedGpu(fixed_library())):
    assert_parity(case, make_inputs(case, "cuda:1"), "triton")
names = ("shrink_kernel", "expand_kernel", "dy_pass_kernel", "x_pass_kernel")
assert launched() == [(name, 1, False) for name in names]
assert torch.cuda.current_device() == 0
errors = []
def other():
    try:
        with torch.cuda.device(1):
            assert_parity(case, make_inputs(case, "cuda:0"), "triton")
            assert torch.cuda.current_device() == 1
    except BaseException as error:
        errors.append(error)
thread = threading.Thread(target=other)
thread.start(); thread.join()
assert not errors, errors
assert launched() == [("forward_kernel", 0, False), ("backward_kernel", 0, False)]
flags = [launch.current().workspace.zeros(1, torch.device("cuda", i)) for i in range(2)]
assert flags[0].device != flags[1].device and not any(block.any() for block in flags)
""")  # fmt: skip


def test_few_rows_of_a_patched_layer_with_16_bit_adapters_are_pefts(python):
    python("-c", PREAMBLE + """
import peft, lora_kernels as lk
layer = torch.nn.Sequential(torch.nn.Linear(64, 32)).to("cuda", torch.bfloat16)
config = peft.LoraConfig(r=8, target_modules=["0"], init_lora_weights=False)
model = peft.get_peft_model(layer, config, autocast_adapter_dtype=False)
lk.patch_peft(model)
for rows, fused, left in ((512, 0, 1), (513, 1, 1)):
    with torch.no_grad():
        model(torch.ones(rows, 64, device="cuda", dtype=torch.bfloat16))
    assert f"calls so far: {fused} fused, {left} left" in str(lk.report(model)), lk.report(model)
assert launched() == [("forward_kernel", 0, False)]
""")  # fmt: skip


def test_what_a_driver_refuses_is_an_error_and_the_next_call_works(python):
    """At each launch of a step in turn; it is asked for a grid that must be resident whole."""
    python("-c", PREAMBLE + """
inputs = make_inputs(case, "cuda:0")
assert_parity(case, inputs, "triton")
class Cooperative:
    def __init__(self, kernel):
        self.kernel, self.__name__ = kernel, kernel.__name__
    def __getitem__(self, grid):
        return lambda **given: self.kernel[(4000,)](**given, launch_cooperative_grid=True)
class Refused(PlannedGpu):
    def launcher(self, kernel, constants, how):
        return super().launcher(Cooperative(kernel), constants, how)
def refused(call, kernel):
    try:
        with running(Refused(own_plan)):
            call()
        raise SystemExit(f"{kernel} was not refused")
    except RuntimeError as error:
        message = str(error)
    assert message.startswith(f"{kernel}: launch of ") and "impl='eager'" in message, message
    assert "too many blocks in cooperative launch" in message, message
    assert not launch.current().workspace.zeros(1, torch.device("cuda", 0)).any()
    assert_parity(case, inputs, "triton")
x = inputs.x.requires_grad_()
forward = lambda: lora_linear(x, inputs.weight, inputs.lora_A, inputs.lora_B, impl="triton")
refused(forward, "forward_kernel")
y = forward()
refused(lambda: y.backward(inputs.dy), "backward_kernel")
""")  # fmt: skip


def test_more_rows_than_programs_in_two_launches(python):
    """Neither launch has to be resident whole."""
    python("-c", PREAMBLE + """
from tests.support.executors import fixed_plan
cudastub.library().cudastub_set_sms(0, 1)
case = Case((300,), 40, 72, 16, torch.bfloat16, dropout_p=0.1)
with running(PlannedGpu(fixed_plan(xa_columns=0))):
    assert_parity(case, make_inputs(case, "cuda:0"), "triton")
assert launched() == [
    ("shrink_kernel", 0, False), ("forward_kernel", 0, False),
    ("shrink_kernel", 0, False), ("backward_kernel", 0, False),
]
""")  # fmt: skip


COUNTED = (
    PREAMBLE
    + """
from triton.runtime.jit import JITFunction
from lora_kernels.testing import run
by_triton = []
plain = JITFunction.run
def counted(self, *args, **given):
    if not given["warmup"]:
        by_triton.append(self.__name__)
    return plain(self, *args, **given)
JITFunction.run = counted

def step(device="cuda:0"):
    assert_parity(case, make_inputs(case, device), "triton")
    made = by_triton.copy(), [name for name, _, _ in launched()]
    by_triton.clear()
    return made
both = ["forward_kernel", "backward_kernel"]
"""
)


@pytest.mark.slow
def test_triton_launches_what_is_new_or_watched_and_nothing_else(python):
    """Hooks, as profilers have them, see each launch while they are set; each GPU has its own."""
    python("-c", COUNTED + """
import triton
runtime, seen = triton.knobs.runtime, []
hook = lambda metadata: seen.append(metadata.get()["name"])
assert step() == (both, both)
for _ in range(2):
    assert step() == ([], both)
runtime.launch_enter_hook.add(hook)
assert step() == (both, both) and seen == both
runtime.launch_enter_hook.remove(hook)
assert step() == ([], both) and seen == both
chain, runtime.launch_exit_hook = runtime.launch_exit_hook, hook
assert step() == (both, both)
runtime.launch_exit_hook = None
assert step() == ([], both)
runtime.launch_exit_hook = chain
assert step(device="cuda:1") == (both, both)
assert step(device="cuda:1") == step() == ([], both)
# The machine has no assertions, which debugging adds.
cudastub.set_noop(True)
runtime.debug = True
run(case, make_inputs(case, "cuda:0"), "triton")
assert by_triton == both
""")  # fmt: skip


@pytest.mark.slow
def test_what_is_launched_directly_is_what_triton_would_launch(python):
    """Of arguments that lie in many ways, by both plans; Triton is asked at each launch."""
    python("-c", COUNTED + """
from tests.impl.triton.test_kinds import call
from lora_kernels.impl.triton.plan.plan import library_plan
cudastub.set_noop(True)
asked = []
class Checked(PlannedGpu):
    def launcher(self, kernel, constants, how):
        made = super().launcher(kernel, constants, how)
        def launched(grid, args):
            direct = made.compiled
            made(grid, args)
            options = dict(how._asdict(), enable_fp_fusion=True)
            del options["together"]
            own = kernel.run(grid=(grid,), warmup=True, **args, **constants, **options)
            assert made.compiled is own and direct in (None, own)
            asked.append(direct is own)
        return launched
calls = [
    {}, {"m": 1}, {"x": {"shift": 1}}, {"a": {"by": 65}, "b": {"shift": 1}}, {"bias": {}},
    {"scaling": {"dtype": torch.float32}, "threshold": 6554},
]
for plan in (own_plan, library_plan):
    with running(Checked(plan)):
        for given in (*calls, *calls):
            call(device="cuda:0", **given)
# What the bias is has no part in backward.
assert (asked.count(False), asked.count(True)) == (11 + 22, 13 + 26), asked
""")  # fmt: skip


DORA = (
    COUNTED
    + """
from lora_kernels.testing import DORA, DoraCase

def step(device, *sizes, p=0.0):
    case = DoraCase(*sizes, torch.bfloat16, torch.float32, p)
    DORA.assert_parity(case, DORA.inputs(case, device), "triton")
    return [name.removesuffix("_kernel") for name, _, _ in launched()]
"""
)


def test_dora_by_own_products(python):
    """One launch forward, which makes norms; of one kind of calls the second goes directly."""
    python("-c", DORA + """
for rows in (70, 100):
    assert step("cuda:0", (rows,), 136, 72, 8) == ["forward", "dz_pass", "backward"]
assert by_triton == ["forward_kernel", "dz_pass_kernel", "backward_kernel"], by_triton
block = launch.current().workspace.zeros(1, torch.device("cuda", 0))
assert not block.any(), "flags not left as found"
""")  # fmt: skip


def test_dora_with_dropout(python):
    """The library's plan, of whatever is planned for the linear layer."""
    python("-c", DORA + """
assert step("cuda:1", (33,), 40, 72, 5, p=0.1) == [
    "norm", "shrink", "expand", "rescale", "dz_pass", "dy_pass", "x_pass"
]
""")  # fmt: skip


@pytest.mark.slow
def test_host_times_are_measured(python):
    output = python("-m", "bench.suites.host", "--seconds", "0.1")
    heading, *lines = output.splitlines()
    assert heading.startswith("host time on a stub's H100")
    assert len(lines) == 14


@pytest.mark.slow
def test_what_is_compiled_ahead_is_what_launches_look_for(tmp_path, python):
    """Under the very keys of Triton's own cache, of a call with a bias and float32 adapters."""
    script = tmp_path / "script.py"  # whose processes import it again
    script.write_text("""
import os
from pathlib import Path
import torch, cudastub

def kernels():
    found = Path(os.environ["TRITON_CACHE_DIR"]).glob("*/*_kernel.json")
    return {path for path in found if "__grp__" not in path.name}

def made(*sizes, dtype=torch.bfloat16, grad=False):
    return torch.randn(*sizes, dtype=dtype, device="cuda", requires_grad=grad)

if __name__ == "__main__":
    cudastub.install("H100", sms=0, noop=True, tensors=True)
    from lora_kernels import lora_linear
    from lora_kernels.__main__ import main
    from lora_kernels.impl.triton.plan.device import of_gpu
    given = ["compile", "--gpu", of_gpu(0).name, "--shapes", "300x256x256x16"]
    assert main([*given, "--adapters", "float32", "--bias", "--processes", "1"]) == 0
    compiled = kernels()
    assert compiled
    x, w, bias = made(300, 256, grad=True), made(256, 256), made(256)
    a, b = (made(*sizes, dtype=torch.float32, grad=True) for sizes in ((16, 256), (256, 16)))
    for p in (0.0, 0.1):
        y = lora_linear(x, w, a, b, bias, scaling=2.0, dropout_p=p, training=True, impl="triton")
        y.backward(made(300, 256))
    assert kernels() == compiled, kernels() ^ compiled
""")
    path = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
    python(str(script), PYTHONPATH=path, TRITON_CACHE_DIR=str(tmp_path / "triton"))
