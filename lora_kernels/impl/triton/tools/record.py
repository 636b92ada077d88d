"""The launches of a call, recorded instead of run: to compile, count and time them one by one."""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import torch

from lora_kernels.impl.executor import using
from lora_kernels.impl.triton import dora, linear
from lora_kernels.impl.triton.launch import Executor, Forgetful, Options
from lora_kernels.impl.triton.plan.config import AnyConfig, Problem
from lora_kernels.impl.triton.plan.device import Device
from lora_kernels.impl.triton.plan.plan import Plan, plan_of
from lora_kernels.impl.triton.plan.tuned import planned
from lora_kernels.impl.triton.workspace import Workspace
from lora_kernels.operands.call import Adapter, LinearCall, Wanted
from lora_kernels.operands.codebook import CodebookWeight
from lora_kernels.operands.dora import DoraCall, DoraWanted, Kept
from lora_kernels.operands.dropout import Dropout
from lora_kernels.operands.weight import Dense, Weight


class Launch(NamedTuple):
    """One launch of a call, as an executor gets it."""

    kernel: Any
    grid: int
    args: dict[str, Any]
    constants: dict[str, Any]
    how: Options

    @property
    def flags(self) -> torch.Tensor:
        """The flags of a forward or backward launch, one a row panel, and the ticket."""
        flags: torch.Tensor = (
            self.args["flags"] if "flags" in self.args else self.args["shared"].flags
        )
        return flags

    def play(self, executor: Executor) -> None:
        """Let an executor run it."""
        executor.run(*self)


class Product(NamedTuple):
    """A product by the library, as an executor gets it."""

    out: torch.Tensor
    left: torch.Tensor
    right: torch.Tensor

    def play(self, executor: Executor) -> None:
        """Let an executor compute it."""
        executor.add_product(*self)


class Recorder(Forgetful):
    """An executor that keeps launches and the library's products instead of running them."""

    impl = "triton"

    def __init__(self, device: Device, config: AnyConfig | None = None) -> None:
        self._device, self._config = device, config
        self.workspace = Workspace()
        self.calls: list[Launch | Product] = []

    @property
    def launches(self) -> list[Launch]:
        """The launches of Triton's kernels."""
        return [call for call in self.calls if isinstance(call, Launch)]

    def device(self, tensor: torch.Tensor) -> Device:  # noqa: ARG002  the protocol's
        """Return the GPU that is planned for."""
        return self._device

    def plan(self, problem: Problem, device: Device) -> Plan:
        """Return the plan that takes the configuration, legal or not; without one, as on a GPU."""
        if self._config is None:
            return planned(problem, device)
        return plan_of(self._config, problem, device)

    def programs(self, device: Device) -> int:
        """Return one program a multiprocessor."""
        return device.multiprocessors

    def run(
        self, kernel: Any, grid: int, args: dict[str, Any], constants: dict[str, Any], how: Options
    ) -> None:
        """Keep the launch."""
        self.calls.append(Launch(kernel, grid, args, constants, how))

    def add_product(self, out: torch.Tensor, left: torch.Tensor, right: torch.Tensor) -> None:
        """Keep the product."""
        self.calls.append(Product(out, left, right))


class Made(NamedTuple):
    """How a layer's tensors are made: by `fill` of sizes, a dtype and a device.

    dtype: of x, W and bias, of the problem's bits. adapters: of A and B; None: the same.
    memory: where they lie. bias: whether the layer has one; backward doesn't read it.
    """

    dtype: torch.dtype = torch.bfloat16
    adapters: torch.dtype | None = None
    memory: torch.device | str = "cpu"
    bias: bool = False
    fill: Callable[..., torch.Tensor] = torch.randn


def launches(
    problem: Problem,
    config: AnyConfig,
    device: Device,
    dtype: torch.dtype = torch.bfloat16,
    memory: torch.device | str = "cpu",
    bias: bool = False,
) -> list[Launch]:
    """Return the launches of Triton's kernels among `calls`."""
    recorded = calls(problem, config, device, dtype, memory, bias)
    return [call for call in recorded if isinstance(call, Launch)]


def calls(
    problem: Problem,
    config: AnyConfig,
    device: Device,
    dtype: torch.dtype = torch.bfloat16,
    memory: torch.device | str = "cpu",
    bias: bool = False,
) -> list[Launch | Product]:
    """Return what a layer's call with a configuration runs, on tensors of random numbers.

    Args:
        problem: sizes and mode, contiguous tensors; W has codes where it has a `blocksize`.
        config: the configuration, legal or not.
        device: the GPU that is planned for.
        dtype: of x, W, A and B, of `problem.bits` bits.
        memory: where the tensors lie.
        bias: whether the layer has one; backward doesn't read it.
    """
    return recorded(problem, config, device, Made(dtype, None, memory, bias))


def recorded(
    problem: Problem, config: AnyConfig, device: Device, made: Made
) -> list[Launch | Product]:
    """Return what a layer's call with a configuration runs, on tensors made as is said."""
    m, n, k, r = problem[:4]
    normal = partial(made.fill, device=made.memory, dtype=made.dtype)
    factor = partial(normal, dtype=made.adapters or made.dtype)
    dropout = Dropout(torch.tensor(0, device=made.memory), 6554) if problem.dropout else None
    adapter = Adapter(factor(r, k), factor(n, r), 1.5)
    call = LinearCall(_weight(problem, normal), adapter, normal(n) if made.bias else None, dropout)
    with using(Recorder(device, config)) as recorder:
        if problem.gain:
            _call_dora(problem, call, normal)
        elif problem.backward:
            xa, wanted = normal(m, r), Wanted(*problem.needs)
            linear.backward(normal(m, n), normal(m, k), xa, call, wanted)
        else:
            linear.forward(normal(m, k), call)
    return recorder.calls


def _call_dora(problem: Problem, call: LinearCall, normal: Callable[..., torch.Tensor]) -> None:
    m, n, k, r = problem[:4]
    asked = DoraCall(call, normal(n))
    if problem.backward:
        kept = Kept(normal(m, k), normal(m, r), normal(m, n), normal(n).float())
        dora.backward(normal(m, n), kept, asked, DoraWanted(*problem.needs, dm=True))
    else:
        dora.forward(normal(m, k), asked)


def _weight(problem: Problem, normal: Callable[..., torch.Tensor]) -> Weight:
    n, k, size = problem.n, problem.k, problem.blocksize
    if size == 0:
        return Dense(normal(n, k))
    like = normal(0)
    codes = torch.randint(0, 256, (n * k // 2,), dtype=torch.uint8, device=like.device)
    parts = (
        like.new_ones(n * k // size, dtype=torch.float32),
        like.new_ones(16, dtype=torch.float32),
    )
    return CodebookWeight(problem.form, (n, k), size, codes, parts)
