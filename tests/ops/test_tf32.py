"""torch's switch of float32 products, in each form that torch has."""

import subprocess
import sys

import pytest

# Each in a process of its own: torch refuses some reads after forms were mixed.
FORMS = {
    "pass": False,
    "torch.set_float32_matmul_precision('highest')": False,
    "torch.set_float32_matmul_precision('high')": True,
    "torch.set_float32_matmul_precision('medium')": True,
    "torch.backends.cuda.matmul.allow_tf32 = True": True,
    "torch.backends.cuda.matmul.fp32_precision = 'tf32'": True,
    "torch.backends.cuda.matmul.fp32_precision = 'ieee'": False,
    "torch.backends.fp32_precision = 'tf32'": True,
}


@pytest.mark.parametrize("statement", FORMS)
def test_the_operator_knows_what_either_form_has_set(statement):
    code = f"import torch, lora_kernels; {statement}; print(torch.ops.lora_kernels.allows_tf32())"
    printed = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    )
    assert printed.stdout.strip() == str(FORMS[statement])
