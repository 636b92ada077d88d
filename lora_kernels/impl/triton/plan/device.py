"""What the picker knows of a GPU: counts and rates, by name where known, by architecture else."""

from dataclasses import dataclass, replace
from functools import cache

import torch

from lora_kernels.impl.triton.plan.rates import Rates, rates_of


@dataclass(frozen=True)
class Device:
    """Properties of one GPU that a plan depends on; rates are the vendor's dense peaks."""

    name: str
    capability: tuple[int, int]
    multiprocessors: int
    shared_bytes: int  # per block, opted in
    bandwidth: float  # device memory, bytes / s
    flops_16: float  # 16-bit inputs, float32 sums, FLOP / s
    flops_32: float  # float32 on the plain cores, FLOP / s
    reached: Rates | None = None  # None: as rates.json has it

    @property
    def rates(self) -> Rates:
        """What the GPU reaches of its peaks, and the seconds of launches."""
        return self.reached or rates_of(self.name, self.capability)

    @property
    def target(self) -> int:
        """The architecture as compilers number it: 90 for compute capability 9.0."""
        return self.capability[0] * 10 + self.capability[1]

    @property
    def wgmma(self) -> bool:
        """Whether products are asynchronous ones of a warp group (sm_90)."""
        return self.capability[0] == 9

    @property
    def tensor_memory(self) -> bool:
        """Whether accumulators live in tensor memory (sm_100, sm_103)."""
        return self.capability[0] == 10

    @property
    def mma(self) -> str:
        """The kind of matrix instruction of 16-bit products: "mma", "wgmma" or "tcgen05"."""
        return "wgmma" if self.wgmma else "tcgen05" if self.tensor_memory else "mma"

    @property
    def descriptors(self) -> bool:
        """Whether tiles are copied by descriptors: where that is tried and saves registers."""
        return self.wgmma or self.tensor_memory


# Source: the vendor's data sheets; dense rates, SXM parts where there are several.
KNOWN = (
    Device("NVIDIA A100-SXM4-80GB", (8, 0), 108, 166912, 2.04e12, 312e12, 19.5e12),
    Device("NVIDIA A100-SXM4-40GB", (8, 0), 108, 166912, 1.56e12, 312e12, 19.5e12),
    Device("NVIDIA A10G", (8, 6), 80, 101376, 0.60e12, 70e12, 31e12),
    Device("NVIDIA L40S", (8, 9), 142, 101376, 0.864e12, 362e12, 91e12),
    Device("NVIDIA L4", (8, 9), 58, 101376, 0.30e12, 121e12, 30e12),
    Device("NVIDIA GeForce RTX 4090", (8, 9), 128, 101376, 1.01e12, 165e12, 82e12),
    Device("NVIDIA H100 80GB HBM3", (9, 0), 132, 232448, 3.35e12, 989e12, 67e12),
    Device("NVIDIA H100 PCIe", (9, 0), 114, 232448, 2.0e12, 756e12, 51e12),
    Device("NVIDIA H200", (9, 0), 132, 232448, 4.8e12, 989e12, 67e12),
    Device("NVIDIA B200", (10, 0), 148, 232448, 8.0e12, 2250e12, 75e12),
    Device("NVIDIA GeForce RTX 5090", (12, 0), 170, 101376, 1.79e12, 210e12, 105e12),
)
_BY_NAME = {device.name: device for device in KNOWN}

# Per multiprocessor, for GPUs not in the table: the slowest known part of the architecture.
_RATES = {8: (4e9, 0.9e12, 0.2e12), 9: (15e9, 6e12, 0.4e12), 10: (40e9, 14e12, 0.5e12)}
_SHARED = {(8, 0): 166912, (8, 7): 166912, (9, 0): 232448, (10, 0): 232448, (10, 3): 232448}
SMALLEST_SHARED = 101376


def known(name: str) -> Device:
    """Return the table's entry of that name.

    Raises:
        ValueError: the name is not in the table.
    """
    if name not in _BY_NAME:
        raise ValueError(f"name: expected one of {', '.join(_BY_NAME)}, got {name!r}")
    return _BY_NAME[name]


def estimated(name: str, capability: tuple[int, int], multiprocessors: int) -> Device:
    """Return careful estimates for a GPU that the table doesn't know, of any architecture."""
    bandwidth, flops_16, flops_32 = _RATES.get(capability[0], _RATES[8])
    return Device(
        name,
        capability,
        multiprocessors,
        _SHARED.get(capability, SMALLEST_SHARED),
        bandwidth * multiprocessors,
        flops_16 * multiprocessors,
        flops_32 * multiprocessors,
    )


@cache
def of_gpu(index: int, spared: int = 0) -> Device:
    """Return the properties of a CUDA device; asked of the driver once per device.

    spared: multiprocessors that are left to others, to communication for instance.
    """
    properties = torch.cuda.get_device_properties(index)
    # Programs wait for each other: there may be no more than this GPU itself can run.
    count = max(1, properties.multi_processor_count - spared)
    if properties.name in _BY_NAME:
        return replace(_BY_NAME[properties.name], multiprocessors=count)
    return estimated(properties.name, (properties.major, properties.minor), count)
