"""What is watched from revision to revision: a few layers and a training step, by ours.

    python -m bench.compare.watched_calls

Reads names from standard input, one a line, and answers each with the milliseconds of a call, or
NaN where there is no such call here: for `revisions`, which asks two of them in turn.
"""

import sys
import time
from collections.abc import Callable
from functools import lru_cache
from typing import Any

import torch

from bench.measure.correctness import Gate
from bench.providers.calls import make_slots
from bench.providers.registry import BY_NAME
from bench.shapes import Case
from bench.suites import step
from bench.suites.overhead import TINY

NAMES = ("cpu", "packed", "eager")
CASES: dict[str, Case | step.StepCase] = {
    "tiny": TINY,
    "dropout": Case("bert-base", "q+k+v+o", 256, 768, 768, 16, "bf16", "fp32", 0.05),
    "fp32": Case("bert-base", "q+k+v+o", 256, 768, 768, 16, "fp32", "fp32", 0.0),
    "few rows": Case("targets", "square", 16, 2048, 2048, 16, "bf16", "bf16", 0.0),
    "step": step.StepCase(step.QUICK, "bf16", "bf16", 0.05),
}
SECONDS = 0.01  # of calls in one answer


class AbsentError(RuntimeError):
    """A provider can't serve a case on this machine."""


def call_of(what: str, name: str) -> Callable[[], Any]:
    """Return a case's call by a provider, which the gate has passed.

    Raises:
        AbsentError: the provider can't serve the case here.
        RuntimeError: it is wrong.
    """
    case, provider = CASES[what], BY_NAME[name]
    asked = case if isinstance(case, Case) else TINY
    if (reason := provider.absence("cpu") or provider.refuse(asked)) is not None:
        raise AbsentError(f"{what}, {name}: {reason}")
    if (fault := Gate(asked, "cpu").fault(provider)) is not None:
        raise RuntimeError(f"{what}, {name}: {fault}")
    if isinstance(case, Case):
        return make_slots([provider], case, "cpu", 1)[0][0]
    return step.Step(case, provider, "cpu")


@lru_cache(maxsize=1)
def _ready(what: str, name: str) -> tuple[Callable[[], Any], int]:
    """Return a warm call, and how often it is made for one answer."""
    call = call_of(what, name)
    call()
    return call, max(1, int(SECONDS / (_seconds(call, 1) + 1e-9)))


def _seconds(call: Callable[[], Any], count: int) -> float:
    call()  # the other revision has used the cache meanwhile
    start = time.thread_time()
    for _ in range(count):
        call()
    return (time.thread_time() - start) / count


def main() -> None:
    """Answer until standard input ends."""
    torch.set_num_threads(1)
    for line in sys.stdin:
        what, name = line.strip().split("/")
        try:
            print(1e3 * _seconds(*_ready(what, name)), flush=True)
        except RuntimeError as error:
            print(f"left out: {error}", file=sys.stderr)
            print("nan", flush=True)


if __name__ == "__main__":
    main()
