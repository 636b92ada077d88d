"""Kernels compiled to PTX from a changed copy of the sources."""

import shutil
import subprocess
from pathlib import Path

from tests.support.paths import ROOT

SOURCES = ROOT / "csrc" / "cuda"
KERNELS = """
#define LORA_TYPE {type}
#define LORA_ELEMENT {element}
#define LORA_TABLE table
#define LORA_FORWARD(X) X({shape}, {ranks}, 1, 1)
#define LORA_BACKWARD(X) X({shape}, {ranks}, 1, 1)
#define LORA_FEW_ROWS(X) X()
#include "linear_sm80.cuh"
"""
HOPPER_KERNELS = """
#define LORA_TYPE bf16
#define LORA_ELEMENT __nv_bfloat16
#define LORA_TABLE table
#include "../host/shapes.h"
#undef LORA_EACH_HOPPER
#define LORA_EACH_HOPPER(X) X(Hopper, 16, 1)
#include "linear_sm90.cuh"
"""
BF16_KERNELS = KERNELS.format(type="bf16", element="__nv_bfloat16", shape="Small", ranks=16)
SLICED_KERNELS = KERNELS.format(type="bf16", element="__nv_bfloat16", shape="Small", ranks=64)
HOPPER_WIDE_KERNELS = HOPPER_KERNELS.replace("X(Hopper, ", "X(HopperWide, ")
WIDE_KERNELS = KERNELS.format(type="bf16", element="__nv_bfloat16", shape="Wide", ranks=16)
LONE_KERNELS = SLICED_KERNELS.replace("LORA_BACKWARD(X)", "LORA_BACKWARD(X) X(Tall, 64, 1, 1)")
HALF_KERNELS = KERNELS.format(type="half", element="__half", shape="Small", ranks=16)
TF32_KERNELS = KERNELS.format(type="tf32", element="Tf32", shape="SmallFloat", ranks=16)


def mutated_ptx(folder: Path, kernels: str, mutant: tuple[str, str, str], target: str) -> str:
    name, text, other = mutant
    shutil.copytree(SOURCES, folder / "cuda")
    faulty, few = folder / "cuda" / "device" / name, folder / "cuda" / "instances" / "few.cu"
    source = faulty.read_text()
    assert text in source
    faulty.write_text(source.replace(text, other))
    few.write_text(kernels)
    options = ["-std=c++20", "-O3", "--expt-relaxed-constexpr", f"-arch={target}", "-ptx", "-w"]
    command = ["nvcc", *options, "-o", str(folder / "few.ptx"), str(few)]
    subprocess.run(command, check=True, capture_output=True)
    return (folder / "few.ptx").read_text()
