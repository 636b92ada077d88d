"""One forward or one backward of ours, between the marks that a profiler starts and stops at.

ncu --profile-from-start off --set full -o FILE python -m bench.measure.profiled_call forward
"""

import argparse
import sys
from collections.abc import Iterator
from contextlib import contextmanager

import torch

from bench.providers.calls import make_slots
from bench.providers.registry import BY_NAME, OURS
from bench.shapes import Case

WARM_UPS = 2
CASE = Case("llama3-8b", "q+o", 8192, 4096, 4096, 16, "bf16", "fp32", 0.05)
SMALL = Case("minilm", "q+k+v+o", 256, 384, 384, 16, "bf16", "fp32", 0.05)


@contextmanager
def marked(device: str) -> Iterator[None]:
    """Mark what a profiler is to look at; on a CPU nothing marks it."""
    if device == "cpu":
        yield
        return
    torch.cuda.synchronize()
    torch.cuda.profiler.start()
    yield
    torch.cuda.synchronize()
    torch.cuda.profiler.stop()


def main(arguments: list[str] | None = None) -> int:
    """Warm up, run the marked pass and return an exit status."""
    parser = argparse.ArgumentParser(
        prog="python -m bench.measure.profiled_call", description=__doc__
    )
    parser.add_argument("direction", choices=["forward", "backward"])
    parser.add_argument("--provider", choices=OURS, default="triton")
    given = parser.parse_args(arguments)
    provider = BY_NAME[given.provider]
    device = "cuda" if torch.cuda.is_available() else "cpu"
    case = CASE if device == "cuda" else SMALL
    if (reason := provider.absence(device) or provider.refuse(case)) is not None:
        print(
            f"python -m bench.measure.profiled_call: error: {given.provider}: {reason}",
            file=sys.stderr,
        )
        return 2
    [[call]] = make_slots([provider], case, device, 1)
    for _ in range(WARM_UPS):
        call()
    if given.direction == "forward":
        with marked(device):
            call.forward()
    else:
        y = call.forward()
        with marked(device):
            y.backward(call.dy)
    print(f"{given.provider}, {given.direction}: {case}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
