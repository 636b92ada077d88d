"""Triton's front end over what calls launch, without compiling further: seconds for all kernels.

    PYTHONPATH=<the oldest Triton>:. python -m tests.support.front_end

names the kernels that it saw. A version's language is found to be narrower here; what its code
computes is not.
"""

import sys
from dataclasses import dataclass, field, fields
from typing import Any

import torch
from triton._C.libtriton import ir
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.compiler.compiler import make_backend

from lora_kernels import lora_linear
from lora_kernels.impl.triton.launch import Options
from lora_kernels.impl.triton.plan.device import Device, known
from lora_kernels.impl.triton.support import OPS
from lora_kernels.impl.triton.tools.compiler import Variant, variant
from lora_kernels.testing import SPECS
from tests.support.executors import PLANS, Interpreter, running
from tests.support.quantised import FORMATS, drawn
from tests.support.targets import MOST_RANKS

HOPPER = known("NVIDIA H100 80GB HBM3")  # whose kernels have descriptors, and pointers
ARCHITECTURE = 90
MOST_MULTIPLICATIONS = 3_000_000  # this executor computes the library plan's products


@dataclass
class FrontEnd(Interpreter):
    """An executor that launches nothing: what a launch would compile is read by the front end.

    seen: the kinds of variants that were; numbers compiled in don't tell them apart.
    """

    seen: set[Any] = field(default_factory=set)

    def device(self, tensor: torch.Tensor) -> Device:
        return HOPPER

    def programs(self, device: Device) -> int:
        return device.multiprocessors

    def run(self, kernel: Any, grid: int, args: Any, constants: Any, how: Options) -> None:
        self.read(variant(kernel, args, constants, how))

    def read(self, wanted: Variant) -> None:
        """Let the front end make Triton's IR of a variant, unless it has of its kind."""
        flags = [(p, v) for p, v in wanted.constants if isinstance(v, bool) or type(v) is not int]
        kind = wanted.kernel.__name__, wanted.signature, tuple(flags)
        if kind in self.seen:
            return
        self.seen.add(kind)
        source = ASTSource(
            fn=wanted.kernel, signature=dict(wanted.signature), constexprs=dict(wanted.constants),
            attrs={path: [["tt.divisibility", 16]] for path in wanted.aligned},
        )  # fmt: skip
        target = GPUTarget("cuda", ARCHITECTURE, 32)
        backend, context = make_backend(target), ir.context()
        options = backend.parse_options(wanted.how._asdict())
        ir.load_dialects(context)
        backend.load_dialects(context)
        functions = backend.get_codegen_implementation(options)
        source.make_ir(target, options, functions, backend.get_module_map(), context)


def every_kind() -> FrontEnd:
    """Return the executor that read what small calls of every op and format launch."""
    made = FrontEnd()
    for spec in SPECS:
        cases = [each for kind in spec.cases().values() for each in kind if _is_served(spec, each)]
        for case in {_kind(case): case for case in cases}.values():
            for made.plan in PLANS:
                with running(made):
                    spec.call(case, spec.inputs(case), "triton")
    for form in FORMATS:
        a, b, x = (torch.ones(s, dtype=torch.bfloat16) for s in ((8, 128), (64, 8), (70, 128)))
        for made.plan in PLANS:
            with running(made):
                y = lora_linear(x.requires_grad_(), drawn(form, 64, 128), a, b, impl="triton")
                y.sum().backward()
    return made


def _is_served(spec: Any, case: Any) -> bool:
    small = case.multiplications <= MOST_MULTIPLICATIONS and case.rank <= MOST_RANKS
    return spec.op in OPS and small and case.dtype != torch.float64


def _kind(case: Any) -> tuple[Any, ...]:
    """Return what of a case flags depend on: of numbers, whether there are any."""
    values = (getattr(case, field.name) for field in fields(case))
    return tuple(v if v is None or isinstance(v, torch.dtype) else bool(v) for v in values)


if __name__ == "__main__":
    sys.stdout.write(" ".join(sorted({kind[0] for kind in every_kind().seen})) + "\n")
