"""An executor without a GPU: compiled code in the PTX virtual machine `ptxvm`, an optional tool."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from typing import Any

import torch

from lora_kernels.impl import executor
from lora_kernels.impl.triton.launch import Forgetful, Options, add_product
from lora_kernels.impl.triton.plan.config import Problem
from lora_kernels.impl.triton.plan.device import Device, known
from lora_kernels.impl.triton.plan.plan import Plan
from lora_kernels.impl.triton.plan.tuned import planned
from lora_kernels.impl.triton.tools.compiler import compile_for, is_passed
from lora_kernels.impl.triton.workspace import Workspace

GPUS = {
    80: known("NVIDIA A100-SXM4-80GB"),
    86: known("NVIDIA A10G"),
    89: known("NVIDIA L40S"),
    90: known("NVIDIA H100 80GB HBM3"),
    100: known("NVIDIA B200"),
    120: known("NVIDIA GeForce RTX 5090"),
}


@dataclass
class Machine(Forgetful):
    """Compiles for an architecture and executes the PTX on CPU tensors.

    A race, an access out of bounds or a deadlock that the machine reports is an error.
    resident: programs at once; seed: of its scheduler, another one for each launch.
    weak: level of the machine's weak memory; None leaves it to its environment.
    plan: returns which tiles a call takes; load: makes PTX executable.
    stats: counts of each launch.
    """

    impl = "triton"

    target: int
    resident: int = 4
    seed: int = 0
    weak: int | None = None
    plan: Callable[[Problem, Device], Plan] = planned
    load: Callable[[str], Any] = executor.load
    workspace: Workspace = field(default_factory=Workspace)
    stats: list[Any] = field(default_factory=list)

    def device(self, tensor: torch.Tensor) -> Device:  # noqa: ARG002  the protocol's
        """Return a GPU of the architecture with as many multiprocessors as programs."""
        return replace(GPUS[self.target], multiprocessors=self.resident)

    def programs(self, device: Device) -> int:
        """Return one program a multiprocessor."""
        return device.multiprocessors

    def run(
        self, kernel: Any, grid: int, args: dict[str, Any], constants: dict[str, Any], how: Options
    ) -> None:
        """Compile, execute, and check that nothing was reported.

        Raises:
            RuntimeError: more programs must run at the same time than are resident.
        """
        if how.together > self.resident:
            raise RuntimeError(
                f"together: expected at most {self.resident} programs, the resident ones, "
                f"got {how.together}"
            )
        compiled = compile_for(self.target, kernel, args, constants, how)
        stats = self.load(compiled.asm["ptx"]).launch(
            compiled.metadata.name,
            (grid,),
            32 * compiled.metadata.num_warps,
            tuple(_parameters(compiled, kernel, args)),
            shared_bytes=compiled.metadata.shared,
            resident_ctas=self.resident,
            seed=self.seed,
            weak=self.weak,
        )
        self.seed += 1
        self.stats.append(stats)
        stats.assert_clean()

    add_product = staticmethod(add_product)


def _parameters(compiled: Any, kernel: Any, args: dict[str, Any]) -> Iterator[Any]:
    """Yield the kernel's parameters, tuples one by one; a descriptor is several of them."""
    import ptxvm

    described = iter(compiled.metadata.tensordesc_meta or ())

    def spelt_out(value: Any, specialized: bool) -> Iterator[Any]:
        if isinstance(value, tuple):
            for element in value:
                yield from spelt_out(element, True)
        elif hasattr(value, "block_shape"):
            yield from ptxvm.triton_descriptor(value.base, next(described))
        elif is_passed(value, specialized):
            yield value

    for name, value in args.items():
        yield from spelt_out(value, name not in kernel.do_not_specialize)
