"""Compilation for any CUDA architecture without a GPU: for reports and for virtual machines."""

import re
from functools import cache
from pathlib import Path as FilePath
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
    torch.uint8: "u8",
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
        args: tensors on any device, descriptors, numbers, None, tuples of these, by name, in order.
        constants: values of the constexpr parameters.
        how: warps and stages.

    Returns:
        Triton's compiled kernel: `asm` (ptx, cubin, ttgir) and `metadata`.
    """
    return _compiled(target, variant(kernel, args, constants, how))


# Where an argument is: its position in the kernel, then those in tuples of tuples.
Path = tuple[int, ...]


class Variant(NamedTuple):
    """What distinguishes one compilation of a kernel from another, the architecture aside."""

    kernel: Any
    signature: tuple[tuple[str, Any], ...]
    constants: tuple[tuple[Path, Any], ...]
    aligned: tuple[Path, ...]  # of arguments known to be multiples of 16
    how: Options


def variant(kernel: Any, args: dict[str, Any], constants: dict[str, Any], how: Options) -> Variant:
    """Return the variant that a launch with these arguments needs; as `compile_for`."""
    values: dict[Path, Any] = {}
    aligned: list[Path] = []

    def type_of(value: Any, path: Path, specialized: bool) -> Any:
        if isinstance(value, tuple):
            # Triton specialises what tuples hold even where it leaves numbers alone.
            types = [type_of(element, (*path, i), True) for i, element in enumerate(value)]
            return type(value)(*types) if hasattr(value, "_fields") else tuple(types)
        if not is_passed(value, specialized):
            values[path] = value
            return "constexpr"
        if specialized and _is_aligned(value):
            aligned.append(path)
        return _type_of(value)

    position = kernel.arg_names.index
    signature = {
        name: type_of(value, (position(name),), name not in kernel.do_not_specialize)
        for name, value in args.items()
    }
    for name, value in constants.items():
        values[position(name),] = value
        signature[name] = "constexpr"
    return Variant(kernel, tuple(signature.items()), tuple(values.items()), tuple(aligned), how)


def is_passed(value: Any, specialized: bool) -> bool:
    """Whether an argument is passed at run time: Triton compiles None and 1 in."""
    return value is not None and not (specialized and isinstance(value, int) and value == 1)


@cache
def _compiled(target: int, wanted: Variant) -> Any:
    aligned = {path: [["tt.divisibility", _ALIGNMENT]] for path in wanted.aligned}
    source = ASTSource(
        fn=wanted.kernel,
        signature=dict(wanted.signature),
        constexprs=dict(wanted.constants),
        attrs=aligned,
    )
    how = wanted.how
    options = {"num_warps": how.num_warps, "num_stages": how.num_stages, "enable_fp_fusion": True}
    return triton.compile(source, target=GPUTarget("cuda", target, 32), options=options)


def resources(compiled: Any, scratch: FilePath) -> Resources:
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
