"""The compiled CUDA kernels without a GPU: their PTX in a virtual machine, the optional `ptxvm`.

The library plans a call, allocates and fills in the kernels' parameters as for a GPU, on CPU
tensors; only the launches are made here.
"""

import struct
from dataclasses import dataclass, field
from functools import cache
from typing import Any

import torch
from torch import Tensor

from lora_kernels.impl import executor
from lora_kernels.impl.cuobjdump import cuobjdump
from lora_kernels.native import LIBRARIES, absence

# A tensor map in a kernel's parameters, and what the library writes there for a machine to encode.
_MAP_BYTES, _BOXES = 128, struct.Struct("<QqqqiI")
_MAPS = {"forward": 2, "backward": 3}  # that a kernel for sm_90a takes


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

    @property
    def device(self) -> list[int]:
        """The GPU in the form that the library takes."""
        return [self.arch, self.multiprocessors or self.resident, self.shared_bytes]

    def run(self, names: str, numbers: Tensor, params: Tensor, memory: list[Tensor]) -> None:
        """Execute recorded launches in order; `memory` is all that they may touch.

        Raises:
            RuntimeError: more programs must run at the same time than are resident.
        """
        first = 0
        for name, launch in zip(names.split(), numbers.view(-1, 5).tolist(), strict=True):
            grid, threads, shared, together, size = launch
            if together > self.resident:
                raise RuntimeError(
                    f"together: expected at most {self.resident} programs, the resident ones, "
                    f"got {together}"
                )
            sm_90a = "_Hopper_" in name
            maps = _MAPS[name.split("_")[1]] if sm_90a else 0
            given = bytes(params[first : first + size].tolist())
            stats = _code("sm_90a" if sm_90a else "sm_80").launch(
                name,
                (grid,),
                threads,
                (_with_maps(given, maps, memory),),
                shared_bytes=shared,
                resident_ctas=self.resident,
                seed=self.seed,
                weak=self.weak,
                extra_buffers=[t for t in memory if t.numel()],
            )
            first += size
            self.seed += 1
            self.stats.append((name, stats))
            stats.assert_clean()


def _with_maps(params: bytes, count: int, memory: list[Tensor]) -> bytes:
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
    said = cuobjdump("-ptx", LIBRARIES["cuda"]).split(".version")[1:]
    modules = [module for module in said if f".target {target}\n" in module]
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


def _machine() -> Machine:
    machine: Machine | None = executor.of("cuda")
    reason = absence("cuda")
    if machine is None or reason is not None:
        raise RuntimeError(f"impl: 'cuda' can't serve this call: {reason or 'needs a CUDA device'}")
    return machine


def lora_linear_forward(*args: Any) -> tuple[Tensor, Tensor]:
    """Return y and xa; arguments as the operator's."""
    machine = _machine()
    recorded = torch.ops.lora_kernels.cuda_forward_recorded
    y, xa, names, numbers, params, scratch = recorded(*args, machine.device, machine.zeros)
    machine.run(names, numbers, params, [*_tensors(args), *scratch, y, xa])
    return y, xa


def lora_linear_backward(*args: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return dx, da, db and dbias; arguments as the operator's."""
    machine = _machine()
    recorded = torch.ops.lora_kernels.cuda_backward_recorded
    *gradients, names, numbers, params, scratch = recorded(*args, machine.device, machine.zeros)
    machine.run(names, numbers, params, [*_tensors(args), *scratch, *gradients])
    dx, da, db, dbias = gradients
    lora_A, lora_B = args[6:8]
    return dx, da.to(lora_A.dtype), db.to(lora_B.dtype), dbias


def _tensors(args: tuple[Any, ...]) -> list[Tensor]:
    return [arg for arg in args if isinstance(arg, Tensor)]
