"""The compiled CUDA kernels without a GPU: their PTX in the virtual machine `ptxvm`, optional."""

import struct
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cache
from typing import Any

import torch
from torch import Tensor

from lora_kernels.impl import executor
from lora_kernels.impl.cuda.launch import Launch
from lora_kernels.impl.cuobjdump import cuobjdump
from lora_kernels.native import LIBRARIES

# A tensor map in a kernel's parameters, and what the library writes there for a machine to encode.
_MAP_BYTES, _BOXES = 128, struct.Struct("<QqqqiI")
_MAPS = {"forward": 3, "backward": 4}  # that a kernel for sm_90a takes


@dataclass
class Machine:
    """Executes the library's PTX; a race, an access out of bounds or a deadlock raises.

    arch, multiprocessors, shared_bytes: of the GPU that is planned for; as many multiprocessors as
    programs run at once where none are given.
    resident: programs at once; seed: of the scheduler, another one for each launch.
    zeros: flags that calls share; None gives each call its own.
    weak: level of the machine's weak memory; None leaves it to its environment.
    stats: counts of each launch, with its kernel's name.
    """

    impl = "cuda"

    arch: int = 80
    resident: int = 4
    seed: int = 0
    shared_bytes: int = 166912
    zeros: Tensor | None = None
    weak: int | None = None
    multiprocessors: int | None = None
    stats: list[tuple[str, Any]] = field(default_factory=list)

    def device(self, x: Tensor) -> Sequence[int]:  # noqa: ARG002  the protocol's
        """Return the GPU to plan for."""
        return self.arch, self.multiprocessors or self.resident, self.shared_bytes

    def flags(self, like: Tensor, count: int) -> Tensor:
        """Return the flags that calls share, or this call's own.

        Raises:
            RuntimeError: those that calls share are too few.
        """
        if self.zeros is None:
            return torch.zeros(count, dtype=torch.int32, device=like.device)
        if self.zeros.numel() < count:
            raise RuntimeError(f"zeros: expected at least {count}, got {self.zeros.numel()}")
        return self.zeros

    def run(self, launch: Launch) -> None:
        """Execute a launch, and check that nothing was reported.

        Raises:
            RuntimeError: more programs must run at the same time than are resident.
        """
        if launch.together > self.resident:
            raise RuntimeError(
                f"together: expected at most {self.resident} programs, the resident ones, "
                f"got {launch.together}"
            )
        name, memory = launch.kernel, [t for t in launch.memory if t.numel()]
        sm_90a = "_Hopper" in name
        maps = _MAPS[name.split("_")[1]] if sm_90a else 0
        stats = _code("sm_90a" if sm_90a else "sm_80").launch(
            name,
            (launch.programs,),
            launch.threads,
            (_with_maps(launch.params, maps, memory),),
            shared_bytes=launch.shared_bytes,
            resident_ctas=self.resident,
            seed=self.seed,
            weak=self.weak,
            extra_buffers=memory,
        )
        self.seed += 1
        self.stats.append((name, stats))
        stats.assert_clean()


def _with_maps(params: bytes, count: int, memory: Sequence[Tensor]) -> bytes:
    """Return parameters whose first maps the machine understands; see `Boxes` in params.h."""
    import ptxvm

    maps = []
    for at in range(0, count * _MAP_BYTES, _MAP_BYTES):
        data, rows, columns, stride, box, _ = _BOXES.unpack_from(params, at)
        tensor = next(t for t in memory if t.data_ptr() == data)
        matrix = tensor.as_strided((rows, columns), (stride, 1))
        maps.append(bytes(ptxvm.tensor_map(matrix, (box, box), 128).descriptor))
    return b"".join([*maps, params[count * _MAP_BYTES :]])


@cache
def _code(target: str) -> Any:
    return executor.load(ptx(target))


def ptx(target: str) -> str:
    """Return the PTX that the library holds for a target, such as "sm_80".

    Raises:
        RuntimeError: there is none; it is kept where an architecture was built with "+PTX".
    """
    listed = cuobjdump("-ptx", LIBRARIES["cuda"]).split(".version")[1:]
    modules = [module for module in listed if f".target {target}\n" in module]
    if not modules:
        raise RuntimeError(
            f"{LIBRARIES['cuda'].name} holds no PTX for {target}: build with an arch like 8.0+PTX"
        )
    # One module of all: the heads are alike, and names are distinct.
    texts = [".version" + module.split("\nFatbin")[0] for module in modules]
    head, *_ = texts[0].partition(".address_size 64")
    return (
        head + ".address_size 64\n" + "\n".join(t.partition(".address_size 64")[2] for t in texts)
    )
