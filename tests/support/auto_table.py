"""What "auto" takes on which device, by the rules themselves: a table of docs/compatibility.md.

    python -m tests.support.auto_table

writes it anew. No GPU is asked: rules get a compute capability, the planner its table of GPUs.
"""

import re
from collections.abc import Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import NamedTuple
from unittest import mock

import torch

from lora_kernels.dispatch import (
    IMPLEMENTATIONS,
    passed_over,
    preferred,
    preferred_of_groups,
    slower_than_peft,
)
from lora_kernels.impl.eager import grouped_mm
from lora_kernels.impl.triton.plan.config import LibraryConfig, Problem, library_alone
from lora_kernels.impl.triton.plan.device import Device, known
from lora_kernels.impl.triton.plan.plan import Plan, dora_plan, plan
from lora_kernels.operands.call import Adapter
from lora_kernels.operands.grouped import GroupedCall, Groups
from lora_kernels.operands.request import Request
from tests.support.paths import ROOT

PAGE = ROOT / "docs" / "compatibility.md"
BLOCK = re.compile(r"(?<=<!-- auto: by the rules -->\n).*?(?=<!-- auto ends -->)", re.DOTALL)
SIZE, FEW, MANY, RANK, GROUPS = 4096, 16, 8192, 16, 8
FIRST_INDEX = 100  # of devices that there are not: answers of real ones are kept by theirs
PREDICTED = "predicted to be the faster one"


class Machine(NamedTuple):
    """A device of the table; planned: None where no kernel of Triton's runs."""

    name: str
    device: torch.device
    capability: tuple[int, int] | None
    planned: Device | None


class Call(NamedTuple):
    """A column of the table: a bfloat16 call, but for what it says."""

    title: str
    m: int = MANY
    op: str = "lora_linear"
    dtype: torch.dtype = torch.bfloat16
    dropout: bool = False
    form: str = "dense"


class Cell(NamedTuple):
    """What serves a call, and why: (of what, reason), ..."""

    text: str
    reasons: list[tuple[str, str]]


_GPUS = (
    ("T4", (7, 5), None),
    ("A100", (8, 0), "NVIDIA A100-SXM4-80GB"),
    ("L40S", (8, 9), "NVIDIA L40S"),
    ("RTX 4090", (8, 9), "NVIDIA GeForce RTX 4090"),
    ("H100", (9, 0), "NVIDIA H100 80GB HBM3"),
    ("H200", (9, 0), "NVIDIA H200"),
    ("B200", (10, 0), "NVIDIA B200"),
    ("RTX 5090", (12, 0), "NVIDIA GeForce RTX 5090"),
)
MACHINES = (
    Machine("CPU", torch.device("cpu"), None, None),
    *(
        Machine(name, torch.device("cuda", FIRST_INDEX + i), capability, gpu and known(gpu))
        for i, (name, capability, gpu) in enumerate(_GPUS)
    ),
)
CALLS = (
    Call(f"{FEW} rows", FEW),
    Call(f"{MANY:,} rows"),
    Call("dropout", dropout=True),
    Call("float32", dtype=torch.float32),
    Call("NF4", form="nf4"),
    Call(f"{FEW} rows of NF4", FEW, form="nf4"),
    Call("DoRA", op="lora_dora_linear"),
    Call("groups", op="grouped_lora_linear"),
)


@contextmanager
def _capabilities() -> Iterator[None]:
    """Let torch know the GPUs of the table; who asks keeps the answers by their indices."""
    of = {machine.device: machine.capability for machine in MACHINES}
    with mock.patch.object(torch.cuda, "get_device_capability", of.__getitem__):
        yield


def cells() -> dict[tuple[Machine, Call], Cell]:
    """Return the table."""
    with _capabilities():
        return {(machine, call): _cell(machine, call) for machine in MACHINES for call in CALLS}


def _cell(machine: Machine, call: Call) -> Cell:
    request = Request(call.op, machine.device, call.dtype, RANK, call.dropout, call.form)
    refused = passed_over(request)
    first = _first(machine, call)
    order = [first, *(each.name for each in IMPLEMENTATIONS)]
    choice = next(name for name in order if name != "auto" and name not in refused)
    before = [name for name in order[1 : order.index(choice, 1)] if _could(name, request)]
    reasons = [(name, refused[name]) for name in before if name in refused]
    if (peft := slower_than_peft(request)) is not None:
        return Cell("PEFT", [("PEFT", peft.partition(" (")[0]), *reasons])
    if choice == "eager" == first:
        return Cell("grouped_mm", [("grouped_mm", "one kernel of torch's for all groups")])
    if choice == "triton" and call.op != "grouped_lora_linear":
        assert machine.planned is not None
        return _planned(machine.planned, call)
    return Cell(choice, reasons)


def _could(name: str, request: Request) -> bool:
    """Whether an implementation has the call at all, as README's table says, for such a device."""
    [ops] = (each.ops for each in IMPLEMENTATIONS if each.name == name)
    return (name == "cpu") == (request.device.type == "cpu") and (
        request.format in ops.get(request.op, ())
    )


def _first(machine: Machine, call: Call) -> str:
    """Return what "auto" prefers to the order of implementations, as the ops ask for it."""
    x = SimpleNamespace(
        device=machine.device, dtype=call.dtype, element_size=lambda: call.dtype.itemsize,
        is_cuda=machine.device.type == "cuda", is_cpu=machine.device.type == "cpu", is_meta=False,
    )  # fmt: skip
    if call.op == "lora_linear":
        return preferred(x, torch.empty(SIZE, SIZE, device="meta"), call.dropout)
    if call.op != "grouped_lora_linear":
        return "auto"
    weight = torch.empty(GROUPS, SIZE, SIZE, dtype=call.dtype, device="meta")
    factors = Adapter(weight[:, :RANK], weight[:, :, :RANK], 1.0)
    grouped = GroupedCall(weight, factors, None, Groups(weight[:, 0, 0]), None, call.m)
    if grouped_mm.serves(x, grouped):
        return "eager"
    return preferred_of_groups(x, RANK, call.dropout)


def _planned(gpu: Device, call: Call) -> Cell:
    """Return the plans of "triton", forward and backward."""
    codes = call.form != "dense"
    problem = Problem(
        call.m, SIZE, SIZE, RANK, call.dtype.itemsize * 8, call.dropout, form=call.form,
        blocksize=64 if codes else 0, gain=call.op == "lora_dora_linear",
    )  # fmt: skip
    texts, reasons = [], []
    for each in (problem, problem._replace(backward=True)):
        chosen = plan(each, gpu)
        chosen = dora_plan(chosen, each, gpu) if each.gain else chosen
        texts.append(_text(chosen))
        library = isinstance(chosen.config, LibraryConfig)
        alone = library_alone(each, gpu) if library else None
        reasons.append((_text(chosen), alone or PREDICTED))
    forward, backward = texts
    return Cell(forward if forward == backward else f"{forward} / {backward}", reasons)


def _text(chosen: Plan) -> str:
    if isinstance(chosen.config, LibraryConfig):
        return "library"
    return "one launch, in the loop" if chosen.config.codes else "one launch"


def block() -> str:
    """Return the table and the reasons, in Markdown."""
    found = cells()
    lines = ["| | " + " | ".join(call.title for call in CALLS) + " |"]
    lines.append("|---" * (1 + len(CALLS)) + "|")
    for machine in MACHINES:
        texts = (found[machine, call].text for call in CALLS)
        lines.append(f"| {machine.name} | {' | '.join(texts)} |")
    lines += ["", "| what | why | where |", "|---|---|---|"]
    for (what, why), places in _by_reason(found).items():
        lines.append(f"| {what} | {why} | {'; '.join(places)} |")
    return "\n".join(lines) + "\n"


def _by_reason(found: dict[tuple[Machine, Call], Cell]) -> dict[tuple[str, str], list[str]]:
    """Return what each reason is given for, by machines that have it for the same calls."""
    by_machine: dict[tuple[str, str], dict[str, list[str]]] = {}
    for (machine, call), cell in found.items():
        for reason in dict.fromkeys(cell.reasons):
            by_machine.setdefault(reason, {}).setdefault(machine.name, []).append(call.title)
    return {reason: _merged(machines) for reason, machines in by_machine.items()}


def _merged(machines: dict[str, list[str]]) -> list[str]:
    alike: dict[tuple[str, ...], list[str]] = {}
    for name, titles in machines.items():
        alike.setdefault(tuple(titles), []).append(name)
    return [
        ", ".join(names) + ("" if len(titles) == len(CALLS) else f": {', '.join(titles)}")
        for titles, names in alike.items()
    ]


def with_block(text: str) -> str:
    """Return the page's text with the table.

    Raises:
        ValueError: the text has no place for it.
    """
    if not BLOCK.search(text):
        raise ValueError(f"docs/compatibility.md: expected {BLOCK.pattern!r}, got none")
    return BLOCK.sub(lambda _: block(), text, count=1)


if __name__ == "__main__":
    PAGE.write_text(with_block(PAGE.read_text()))
