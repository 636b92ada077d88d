"""What calls of kernels cost the CPU, on a stub of a driver whose launches do nothing.

    python -m bench.suites.host --gpu H100
    python -m bench.suites.host --gpu A100 --cuda FILE  # the CUDA part, built for the stub

Needs `cudastub` on PYTHONPATH, an optional outside tool. PEFT's layer stands beside, of 2x8x8 by
the CPU's own dispatcher: what its Python and torch's operators cost. Times are a thread's CPU time,
the smallest of many; ratios are formed round by round.
"""

import argparse
import sys
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch

import lora_kernels as lk
from bench.measure.timing import Meter, Spread
from bench.providers.calls import Call
from bench.providers.plans import Planned, Planner, one_launch
from bench.providers.registry import BY_NAME
from bench.shapes import SCALING, Case
from lora_kernels.impl.executor import using
from lora_kernels.impl.triton.launch import Gpu
from lora_kernels.impl.triton.plan.config import Problem
from lora_kernels.impl.triton.plan.device import Device
from lora_kernels.impl.triton.plan.plan import Plan, library_plan
from lora_kernels.native import LIBRARIES
from lora_kernels.operands.codebook import CodebookWeight

PEFT = Case("host", "peft", 2, 8, 8, 4, "fp32", "fp32", 0.0)
OURS = Case("host", "ours", 32, 128, 128, 16, "bf16", "bf16", 0.0)
CALLS = 20  # in one timing
FORWARD, TRAIN = "forward", "forward + backward"
LINE = "{:<34}{:<20}{:>8}{:>22}"


class Unmultiplied(Planned):
    """A named plan without the library's GEMM, which is left out of PEFT's calls, too."""

    @staticmethod
    def add_product(out: torch.Tensor, left: torch.Tensor, right: torch.Tensor) -> None:
        """Leave the product out: a CPU would compute it."""


def decoded_first(problem: Problem, device: Device) -> Plan:
    """Return the plan of Triton's own products with a W that was decoded to memory."""
    return one_launch(problem._replace(blocksize=0), device)


def layer(case: Case, provider: str, device: str, mode: str) -> Callable[[], Any]:
    """Return a call of PEFT's layer as a provider has it."""
    call = Call(BY_NAME[provider], case, case.inputs(device), 0.0)
    return call if mode == TRAIN else partial(call.layer, call.x)


def nested_nf4() -> CodebookWeight:
    """Return a weight in NF4 with nested scales, all of them zeros."""
    n, k = OURS.n, OURS.k
    codes, absmax = (
        torch.zeros(n * k // each, dtype=torch.uint8, device="cuda") for each in (2, 64)
    )
    code, code2, absmax2, offset = (torch.zeros(size, device="cuda") for size in (16, 256, 1, ()))
    return CodebookWeight("nf4", (n, k), 64, codes, (absmax, code, code2, absmax2, offset))


def function(
    mode: str, quantised: bool = False, impl: str = "triton", recorded: bool = True
) -> Callable[[], Any]:
    """Return a call of `lora_linear`; recorded: whether autograd wants gradients of it."""
    inputs = OURS.inputs("cuda")
    leaves = (inputs.x, inputs.lora_A, inputs.lora_B)
    x, a, b = (t.detach().requires_grad_(recorded) for t in leaves)
    weight = nested_nf4() if quantised else inputs.weight

    def forward() -> Any:
        return lk.lora_linear(x, weight, a, b, scaling=SCALING, impl=impl)

    def train() -> None:
        forward().backward(inputs.dy)
        x.grad = a.grad = b.grad = None

    return train if mode == TRAIN else forward


def _by(executor: Gpu | None, call: Callable[[], Any]) -> None:
    with using(executor):
        for _ in range(CALLS):
            call()


QUANTISED: dict[str, Planner] = {"NF4 first": decoded_first, "NF4 in the loop": one_launch}


def measure(seconds: float) -> Iterator[str]:
    """Yield a line for each call: the smallest time of one, and its ratio to PEFT's."""
    planners: dict[str, Planner] = {"one launch": one_launch, "library plan": library_plan}
    for mode in (FORWARD, TRAIN):
        calls = {"PEFT, CPU tensors": partial(_by, None, layer(PEFT, "peft", "cpu", mode))}
        for name, planner in planners.items():
            calls[f"lora_linear, {name}"] = partial(_by, Unmultiplied(planner), function(mode))
            patched = layer(OURS, "triton", "cuda", mode)
            calls[f"patched PEFT layer, {name}"] = partial(_by, Unmultiplied(planner), patched)
        for name, planner in QUANTISED.items():
            calls[f"lora_linear, {name}"] = partial(
                _by, Unmultiplied(planner), function(mode, True)
            )
        yield from _timed(calls, mode, seconds)


def measure_compiled(seconds: float) -> Iterator[str]:
    """Yield the same of the compiled CUDA part."""
    for mode in (FORWARD, TRAIN):
        calls = {
            "PEFT, CPU tensors": layer(PEFT, "peft", "cpu", mode),
            "lora_linear, CUDA C++": function(mode, impl="cuda"),
            "patched PEFT layer, CUDA C++": layer(OURS, "cuda", "cuda", mode),
        }
        if mode == FORWARD:
            calls["lora_linear, nothing recorded"] = function(mode, impl="cuda", recorded=False)
        by_turns = {name: partial(_by, None, call) for name, call in calls.items()}
        yield from _timed(by_turns, mode, seconds)


def _timed(calls: Mapping[str, Callable[[], Any]], mode: str, seconds: float) -> Iterator[str]:
    """Yield a line for each call; the first is whom others are compared with."""
    times, _ = Meter(seconds).rounds([list(calls.values())])
    columns = list(zip(*times, strict=True))
    for name, column in zip(calls, columns, strict=True):
        ratio = str(Spread.of_ratios(column, columns[0]))
        yield LINE.format(name, mode, f"{1e3 * min(column) / CALLS:.1f}", ratio)


def main(arguments: list[str] | None = None) -> int:
    """Install the stub, measure, print, and return an exit status."""
    parser = argparse.ArgumentParser(prog="python -m bench.suites.host", description=__doc__)
    parser.add_argument("--gpu", default="H100", help="whose plans; default: H100")
    parser.add_argument("--seconds", type=float, default=30.0, help="for each mode")
    parser.add_argument("--cuda", type=Path, help="time the CUDA part of this file instead")
    given = parser.parse_args(arguments)
    if find_spec("cudastub") is None:
        print("python -m bench.suites.host: error: needs the module cudastub", file=sys.stderr)
        return 2
    import cudastub

    cudastub.install(given.gpu, sms=0, noop=True, tensors=True)
    torch.set_num_threads(1)
    # Without a thread of its own backward has this one's executor, and its clock.
    with torch.autograd.set_multithreading_enabled(False):
        print(LINE.format("host time on a stub's " + given.gpu, "", "µs", "/ PEFT"))
        if given.cuda is not None:
            LIBRARIES["cuda"] = given.cuda
        for line in (measure if given.cuda is None else measure_compiled)(given.seconds):
            print(line, flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
