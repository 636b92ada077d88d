"""torch's switch of float32 products, in each form that torch has."""

import os
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


CODE = """
import os, sys, torch, lora_kernels
for statement in sys.argv[1:]:
    if os.fork() == 0:
        exec(statement)
        print(torch.ops.lora_kernels.allows_tf32(), flush=True)
        os._exit(0)
    if os.wait()[1]:
        raise SystemExit(statement)
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs os.fork")
def test_the_operator_knows_what_each_form_has_set():
    command = [sys.executable, "-c", CODE, *FORMS]
    printed = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    assert dict(zip(FORMS, printed.split(), strict=True)) == {k: str(v) for k, v in FORMS.items()}
