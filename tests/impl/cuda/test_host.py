"""The host side of the compiled CUDA part on a GPU's tensors, with the stub of a driver.

The stub is the optional outside tool `cudastub`. All but the kernels is the part's own; of these a
few, since nvcc takes minutes for all.
"""

import importlib.util
import os
import shutil
import subprocess
import sys

import pytest

from tests.impl.cuda.test_quantised import KERNELS
from tests.support.cuda_mutations import BF16_KERNELS, HOPPER_KERNELS
from tests.support.paths import ROOT

pytestmark = pytest.mark.skipif(
    any(importlib.util.find_spec(name) is None for name in ("cudastub", "ptxvm", "triton"))
    or shutil.which("nvcc") is None,
    reason="needs nvcc, the stub of a driver and the virtual machine (modules cudastub, ptxvm)",
)
NONE = """
#include "../host/kernels.h"
namespace lora_kernels {
Kernels %s() { return {nullptr, 0}; }
}
"""
CODES = (
    KERNELS
    + """
#include "../host/kernels.h"
namespace lora_kernels {
extern "C" __global__ void lora_decode_flat_bf16(const __grid_constant__ DecodeParams p) {
  decode<__nv_bfloat16, false>(p);
}
#define LORA_ENTRY(name) {#name, reinterpret_cast<const void*>(&name)}
Kernels codes_kernels() {
  static const Kernel kernels[] = {
      LORA_ENTRY(lora_few_rows_flat_bf16), LORA_ENTRY(lora_decode_flat_bf16)};
  return {kernels, 2};
}
}
"""
)
SOURCES = {
    "linear_sm80_bf16.cu": BF16_KERNELS.replace("LORA_TABLE table", "LORA_TABLE bf16_kernels"),
    "linear_sm80_half.cu": NONE % "half_kernels",
    "linear_sm80_float.cu": NONE % "float_kernels",
    "linear_sm80_tf32.cu": NONE % "tf32_kernels",
    "codes_sm80.cu": CODES,
    "linear_sm90_bf16.cu": HOPPER_KERNELS.replace("TABLE table", "TABLE bf16_kernels_sm90"),
    "linear_sm90_half.cu": NONE % "half_kernels_sm90",
}
PROGRAM = """
import pathlib, sys
import torch, cudastub
cudastub.install("H100,A100", sms=8, tensors=True, triton=False)
driver = cudastub.library()
driver.cudastub_set_sms(0, 9)
from lora_kernels import lora_linear, native
native.LIBRARIES["cuda"] = pathlib.Path(sys.argv[1])
from lora_kernels.testing import Case, assert_parity, assert_results, make_inputs, run
from tests.support.quantised import drawn

def launched():
    made = [(call.name, call.device, call.cooperative) for call in cudastub.history()]
    cudastub.history().clear()
    return made

def grids(case, device):
    assert_parity(case, make_inputs(case, device), "cuda")
    made = [call.grid[0] for call in cudastub.history()]
    cudastub.history().clear()
    return made

hopper = Case((400,), 256, 520, 8, torch.bfloat16, dropout_p=0.1)
assert_parity(hopper, make_inputs(hopper, "cuda:0"), "cuda")
assert launched() == [(f"lora_{kind}_Hopper_bf16_r16_d1_c1", 0, False)
                      for kind in ("forward", "backward")]
small = Case((100,), 136, 104, 8, torch.bfloat16, dropout_p=0.1)
assert_parity(small, make_inputs(small, "cuda:1"), "cuda")  # not the current device
assert launched() == [(f"lora_{kind}_Small_bf16_r16_d1_c1", 1, False)
                      for kind in ("forward", "backward")]
assert torch.cuda.current_device() == 0

weight = drawn("nf4", 136, 104, device="cuda:1")
given, known = make_inputs(small, "cuda:1"), make_inputs(small, "cuda:1")
vars(known).update(vars(given), weight=weight.decode(torch.bfloat16))
given.weight = weight
assert_results(small, known, run(small, given, "cuda"), "cuda")
assert launched() == [(f"lora_{name}", 1, False) for name in (
    "decode_flat_bf16", "forward_Small_bf16_r16_d1_c1",
    "decode_flat_bf16", "backward_Small_bf16_r16_d1_c1")]
few = given.x[:8], given.lora_A, given.lora_B
y = lora_linear(few[0], weight, *few[1:], impl="cuda")
wanted = lora_linear(few[0], known.weight, *few[1:], impl="eager")
assert (y - wanted).abs().max().item() < 0.05
assert launched() == [("lora_few_rows_flat_bf16", 1, False)]

given = make_inputs(Case((8,), 512, 2048, 16, torch.bfloat16, scaling=1.0), "cuda:1")
adapter = given.weight, given.lora_A, given.lora_B
of_few_rows = lora_linear(given.x, *adapter, impl="cuda")
inputs = make_inputs(small, "cuda:1")
driver.cudastub_set_runner(None)
try:
    assert_parity(small, inputs, "cuda")
    raise SystemExit("was not refused")
except RuntimeError as error:
    message = str(error)
assert "lora_forward_Small_bf16_r16_d1_c1: launch of " in message, message
assert "impl='eager'" in message, message
driver.cudastub_set_runner(driver._runner)
assert_parity(small, inputs, "cuda")
assert torch.equal(lora_linear(given.x, *adapter, impl="cuda"), of_few_rows)

cudastub.history().clear()
driver.cudastub_set_sms(1, 1)  # the others have something else to run
assert grids(small, "cuda:1") == [6, 7]
assert torch.equal(lora_linear(given.x, *adapter, impl="cuda"), of_few_rows)
cudastub.history().clear()
for spared, left in ((3, [5, 5]), (4, [4, 4]), (None, [6, 7])):
    torch._C._set_sm_carveout_experimental(spared)
    assert grids(small, "cuda:1") == left
torch._C._set_sm_carveout_experimental(500)
lora_linear(given.x, *adapter, impl="cuda")
assert cudastub.history()[-1].grid[0] == 1
"""


def test_calls_of_two_gpus(tmp_path):
    """torch's CUDA library is loaded locally, as torch loads it: the stream is found there."""
    checkout = tmp_path / "checkout"
    for folder in ("cuda", "common"):
        shutil.copytree(ROOT / "csrc" / folder, checkout / "csrc" / folder)
    sources = checkout / "csrc" / "cuda"
    for name, text in SOURCES.items():
        (sources / "instances" / name).write_text(text)
    # The stub compiles what lies in csrc/cuda itself.
    for path in [*sources.glob("*/*.cu"), *sources.glob("*/*.cpp")]:
        (sources / path.name).write_text(f'#include "{path.relative_to(sources)}"\n')
    library = tmp_path / "_cuda.so"
    code = f"import cudastub; cudastub.build_lora_cuda({str(checkout)!r}, {str(library)!r})"
    for command in (["-c", code], ["-c", PROGRAM, str(library)]):
        done = subprocess.run(
            [sys.executable, *command], cwd=ROOT, capture_output=True, text=True, env=os.environ
        )
        assert done.returncode == 0, (done.stdout + done.stderr)[-4000:]
