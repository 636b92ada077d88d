"""Compilation for any CUDA architecture without a GPU: for reports and for virtual machines."""

import re
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.tools.tensor_descriptor import TensorDescriptor

from lora_kernels.impl.cuobjdump import cuobjdump
from lora_kernels.impl.triton.launch import Options

_ELEMENTS = {
    torch.bfloat16: "bf16",
    torch.float16: "fp16",
    torch.float32: "fp32",
    torch.float64: "fp64",
    torch.int8: "i8",
    torch.int32: "i32",
    torch.int64: "i64",
}
_ALIGNMENT = 16


class Resources(NamedTuple):
    """What ptxas reports of a compiled kernel."""

    registers: int
    spill_bytes: int  # a thread's stack frame, where instructions use it
    shared_bytes: int


def compile_for(
    target: int, kernel: Any, args: dict[str, Any], constants: dict[str, Any], how: Options
) -> Any:
    """Compile a kernel for sm_<target> as Triton's launcher would for these arguments.

    Args:
        target: 80, 90, 100, ...
        kernel: a Triton kernel, not an interpreted one.
        args: tensors on any device, descriptors, numbers or None, by name, in order.
        constants: values of the constexpr parameters.
        how: warps and stages.

    Returns:
        Triton's compiled kernel: `asm` (ptx, cubin, ttgir) and `metadata`.
    """
    return _compiled(target, variant(kernel, args, constants, how))


class Variant(NamedTuple):
    """What distinguishes one compilation of a kernel from another, the architecture aside."""

    kernel: Any
    signature: tuple[tuple[str, str], ...]
    constants: tuple[tuple[str, Any], ...]
    aligned: tuple[int, ...]  # positions of arguments known to be multiples of 16
    how: Options


def variant(kernel: Any, args: dict[str, Any], constants: dict[str, Any], how: Options) -> Variant:
    """Return the variant that a launch with these arguments needs; as `compile_for`."""
    given = passed(kernel, args)
    signature = {n: _type_of(v) if n in given else "constexpr" for n, v in args.items()}
    values = {name: value for name, value in args.items() if name not in given} | constants
    aligned = tuple(
        index
        for index, (name, value) in enumerate(args.items())
        if name in given and name not in kernel.do_not_specialize and _is_aligned(value)
    )
    signature |= dict.fromkeys(constants, "constexpr")
    return Variant(kernel, tuple(signature.items()), tuple(values.items()), aligned, how)


def passed(kernel: Any, args: dict[str, Any]) -> dict[str, Any]:
    """Return the arguments that are passed at run time: Triton compiles None and 1 in."""
    return {
        name: value
        for name, value in args.items()
        if value is not None
        and not (name not in kernel.do_not_specialize and isinstance(value, int) and value == 1)
    }


@cache
def _compiled(target: int, wanted: Variant) -> Any:
    aligned = {(index,): [["tt.divisibility", _ALIGNMENT]] for index in wanted.aligned}
    source = ASTSource(
        fn=wanted.kernel,
        signature=dict(wanted.signature),
        constexprs=dict(wanted.constants),
        attrs=aligned,
    )
    how = wanted.how
    options = {"num_warps": how.num_warps, "num_stages": how.num_stages, "enable_fp_fusion": True}
    return triton.compile(source, target=GPUTarget("cuda", target, 32), options=options)


def resources(compiled: Any, scratch: Path) -> Resources:
    """Return registers, spills and shared memory; `scratch` is a directory to write a cubin to."""
    cubin = scratch / f"{compiled.metadata.hash[:24]}.cubin"
    cubin.write_bytes(compiled.asm["cubin"])
    found = re.search(r"REG:(\d+) STACK:(\d+)", cuobjdump("-res-usage", cubin))
    if found is None:
        raise RuntimeError(f"cuobjdump: no registers in its report of {cubin.name}")
    registers, stack = int(found[1]), int(found[2])
    # ptxas reserves a frame now and then that no instruction touches.
    if stack and not re.search(r"\b(STL|LDL)\b", cuobjdump("-sass", cubin)):
        stack = 0
    return Resources(registers, stack, compiled.metadata.shared)


def _type_of(value: Any) -> str:
    if isinstance(value, TensorDescriptor):
        block = ",".join(map(str, value.block_shape))
        return f"tensordesc<{_ELEMENTS[value.base.dtype]}[{block}]>"
    if isinstance(value, Tensor):
        return f"*{_ELEMENTS[value.dtype]}"
    if isinstance(value, float):
        return "fp32"
    return "i32" if -(2**31) <= value < 2**31 else "i64"


def _is_aligned(value: Any) -> bool:
    if isinstance(value, Tensor):
        return value.data_ptr() % _ALIGNMENT == 0
    return isinstance(value, int) and value % _ALIGNMENT == 0
