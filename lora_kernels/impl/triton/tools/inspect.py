"""What ships, compiled without a GPU: registers, spills, shared memory, matrix instructions.

The compiled code is Triton's for an architecture; nothing here is executed.
"""

import json
import re
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from functools import partial
from itertools import chain, islice, product
from multiprocessing import get_context
from pathlib import Path
from typing import Any, NamedTuple

import torch

from lora_kernels._progress import Progress
from lora_kernels.impl.triton.launch import Options
from lora_kernels.impl.triton.plan.config import (
    AnyConfig,
    Config,
    LibraryConfig,
    Problem,
    illegal,
    library_config,
    shipped,
)
from lora_kernels.impl.triton.plan.device import Device
from lora_kernels.impl.triton.tools.compiler import Resources, compile_for, resources, variant
from lora_kernels.impl.triton.tools.machine import GPUS
from lora_kernels.impl.triton.tools.record import Launch, launches

N, K = 1024, 1024  # of the layer that is compiled for; they are constants of a kernel
# Rows of it: few, and as many as make the split path's shrink kernel take each of its tiles.
M, MORE = 256, (5000, 1 << 14)
DTYPES = {16: torch.bfloat16, 32: torch.float32}
REGISTERS, RESERVED_SHARED = 65536, 1024  # of a multiprocessor, and of each program on it
_BOTH = (False, True)
_MMA = re.compile(r"\b(wgmma\.mma_async|tcgen05\.mma|mma\.sync)\b")
# An asynchronous product whose first operand is a list of registers: `{sums}, {operand}, ...`.
_REGISTER_OPERAND = re.compile(r"wgmma\.mma_async[^;{]*\{[^}]*\},\s*\{", re.DOTALL)


@dataclass(frozen=True)
class Report:
    """One compiled kernel: what it was compiled from, what it takes, what is wrong with it.

    steps: matrix instructions in each innermost loop that has some, which is one step of it.
    resident: programs that fit on a multiprocessor together.
    """

    arch: int
    kernel: str
    config: str
    rank: int
    dropout: bool
    registers: int
    spill_bytes: int
    shared_bytes: int
    mma: str
    steps: list[int]
    resident: int
    faults: list[str]


class Job(NamedTuple):
    """A configuration to compile for an architecture."""

    arch: int
    problem: Problem
    config: AnyConfig


def shipped_jobs(archs: Iterable[int], ranks: Sequence[int]) -> Iterator[Job]:
    """Yield every configuration for each architecture, element size, mode and rank."""
    for problem, arch in _layers(archs, ranks):
        yield from (Job(arch, problem, config) for config in shipped(problem))
        codes = problem._replace(form="nf4", blocksize=64)
        if not problem.gain:
            yield from (Job(arch, codes, c) for c in shipped(codes) if c.codes)


def shrink_jobs(archs: Iterable[int], ranks: Sequence[int]) -> Iterator[Job]:
    """Yield a split configuration with more rows: the shrink kernel in its other tiles."""
    for (problem, arch), m in product(_layers(archs, ranks), MORE):
        jobs = (Job(arch, problem._replace(m=m), c) for c in shipped(problem) if c.xa_columns == 0)
        yield from islice((job for job in jobs if refusal(job) is None), 1)


def library_jobs(archs: Iterable[int], ranks: Sequence[int]) -> Iterator[Job]:
    """Yield the library plan's passes for each architecture, element size, mode and rank."""
    for problem, arch in _layers(archs, ranks):
        yield Job(arch, problem, library_config(problem))


def _layers(archs: Iterable[int], ranks: Sequence[int]) -> Iterator[tuple[Problem, int]]:
    for arch, bits, backward, dropout, r in product(archs, DTYPES, _BOTH, _BOTH, ranks):
        problem = Problem(M, N, K, r, bits, dropout, True, backward)
        yield problem, arch
        if not (backward or dropout):
            yield problem._replace(gain=True), arch


def refusal(job: Job) -> str | None:
    """Return why a configuration is never chosen for the job's layer, or None if it may be."""
    if isinstance(job.config, LibraryConfig):
        return None
    return illegal(job.config, job.problem, GPUS[job.arch])


def label(job: Job) -> str:
    """Return the configuration in words, as in the table."""
    c = job.config
    if isinstance(c, LibraryConfig):
        return f"{job.problem.bits}-bit library plan"
    copies = "descriptors" if c.descriptors else "pointers"
    copies += " codes" if c.codes else " DoRA" if job.problem.gain else ""
    path = f"{c.xa_columns} xa columns" if c.xa_columns else "split"
    return (
        f"{job.problem.bits}-bit {c.block_m}x{c.block_n}x{c.block_k} {c.num_warps} warps "
        f"{c.num_stages} stages {copies} {path}"
    )


def _shrink_label(launch: Launch) -> str:
    shape = launch.constants["SHAPE"]
    tile = f"{shape.BLOCK_M}x{shape.BLOCK_L}"
    bits = launch.args["v"].pointer.element_size() * 8
    return f"{bits}-bit {tile} {launch.how.num_warps} warps {launch.how.num_stages} stages"


def inspect_job(job: Job, dump: Path | None = None) -> list[Report]:
    """Compile the launches of a job and return a report of each; `dump` also keeps the code."""
    reports = []
    dtype = DTYPES[job.problem.bits]
    for launch in launches(job.problem, job.config, GPUS[job.arch], dtype, bias=True):
        compiled = compile_for(job.arch, *code_of(launch))
        with tempfile.TemporaryDirectory() as scratch:
            used = resources(compiled, Path(scratch))
        reports.append(_report(job, launch, compiled, used))
        if dump is not None:
            _dump(dump, job, launch, compiled)
    return reports


def code_of(launch: Launch) -> tuple[Any, dict[str, Any], dict[str, Any], Options]:
    """Return what of a launch decides its code."""
    return launch.kernel, launch.args, launch.constants, launch.how


def _report(job: Job, launch: Launch, compiled: Any, used: Resources) -> Report:
    ptx, device = compiled.asm["ptx"], GPUS[job.arch]
    kind, steps = matrix_instructions(ptx)
    return Report(
        arch=job.arch,
        kernel=launch.kernel.__name__,
        config=_shrink_label(launch) if launch.kernel.__name__ == "shrink_kernel" else label(job),
        rank=job.problem.r,
        dropout=job.problem.dropout,
        registers=used.registers,
        spill_bytes=used.spill_bytes,
        shared_bytes=used.shared_bytes,
        mma=kind,
        steps=steps,
        resident=resident(used, launch.how.num_warps, device),
        faults=list(faults(job, launch, used, ptx)),
    )


def faults(job: Job, launch: Launch, used: Resources, ptx: str) -> Iterator[str]:
    """Yield what must not ship: spills, too much shared memory, products known to go wrong."""
    device = GPUS[job.arch]
    large = launch.kernel.__name__ in ("forward_kernel", "backward_kernel")
    if used.spill_bytes > spill_limit(job.arch):
        yield f"spills {used.spill_bytes} bytes"
    if used.shared_bytes > device.shared_bytes:
        yield f"{used.shared_bytes} bytes of shared memory of {device.shared_bytes}"
    if job.problem.bits == 16 and large:
        wanted = expected_instruction(job)
        if wanted not in ptx:
            yield f"no {wanted}"
    if any(_REGISTER_OPERAND.search(loop) for loop in loops(ptx)):
        yield "an asynchronous product takes registers in a loop (Triton issue 9433)"
    if reads_before_wait(ptx):
        yield "reads what tensor memory brings before it waits for it"
    descriptors = isinstance(job.config, Config) and job.config.descriptors
    if device.tensor_memory and job.problem.bits == 32 and descriptors:
        yield "float32 by descriptors, which Triton 3.8 compiles wrongly"


def reads_before_wait(ptx: str) -> bool:
    """Whether a register that `tcgen05.ld` fills is named before the next `tcgen05.wait::ld`."""
    pending: set[str] = set()
    for line in ptx.splitlines():
        registers = set(re.findall(r"%r\d+", line))
        if "tcgen05.ld." in line:
            pending |= set(re.findall(r"%r\d+", line.split("}")[0]))
        elif "tcgen05.wait::ld" in line:
            pending = set()
        elif pending & registers:
            return True
    return False


def spill_limit(arch: int) -> int:
    """Return the bytes that a kernel may spill: some on sm_80, nothing where MMAs need few."""
    return 0 if arch in (90, 100) else 64


def expected_instruction(job: Job) -> str:
    """Return the matrix instruction that a configuration's large product should use."""
    device = GPUS[job.arch]
    assert isinstance(job.config, Config)
    if job.config.block_m >= 64 and job.config.num_warps >= 4:
        if device.wgmma:
            return "wgmma.mma_async"
        if device.tensor_memory:
            return "tcgen05.mma"
    return "mma.sync"


def matrix_instructions(ptx: str) -> tuple[str, list[int]]:
    """Return the kinds of matrix instruction in a kernel, and their number in each loop."""
    kinds = sorted(set(_MMA.findall(ptx)))
    counts = [len(_MMA.findall(loop)) for loop in loops(ptx)]
    return " ".join(kinds) or "fma", [count for count in counts if count]


def loops(ptx: str) -> list[str]:
    """Return the text of each innermost loop: from a label to the last jump back to it."""
    lines, labels, spans = ptx.splitlines(), {}, {}
    for number, line in enumerate(lines):
        if found := re.match(r"(\$\w+):", line):
            labels[found[1]] = number
        elif (found := re.search(r"\bbra(?:\.uni)?\s+(\$\w+);", line)) and found[1] in labels:
            spans[labels[found[1]]] = number
    inner = [
        (first, last)
        for first, last in spans.items()
        if not any(first < other and end <= last for other, end in spans.items())
    ]
    return ["\n".join(lines[first : last + 1]) for first, last in inner]


def resident(used: Resources, warps: int, device: Device) -> int:
    """Return how many programs of a kernel fit on a multiprocessor together."""
    most_warps = 64 if device.capability in ((8, 0), (9, 0), (10, 0), (10, 3)) else 48
    by_registers = REGISTERS // (-(-used.registers * 32 // 256) * 256 * warps)
    shared = device.shared_bytes + RESERVED_SHARED
    by_shared = shared // (used.shared_bytes + RESERVED_SHARED)
    return min(by_registers, by_shared, most_warps // warps)


def _dump(folder: Path, job: Job, launch: Launch, compiled: Any) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    stem = f"sm_{job.arch}-{compiled.metadata.hash[:16]}"
    (folder / f"{stem}.ptx").write_text(compiled.asm["ptx"])
    (folder / f"{stem}.cubin").write_bytes(compiled.asm["cubin"])
    wanted = variant(*code_of(launch))
    entry = {
        "arch": job.arch, "kernel": launch.kernel.__name__, "config": label(job),
        "rank": job.problem.r, "dropout": job.problem.dropout, "entry": compiled.metadata.name,
        "parameters": [{"name": n, "type": t} for n, t in _parameters(wanted.signature)],
        "constexprs": {name: value._asdict() for name, value in launch.constants.items()},
        "num_warps": launch.how.num_warps,
        "shared_bytes": compiled.metadata.shared, "ptx": f"{stem}.ptx", "cubin": f"{stem}.cubin",
    }  # fmt: skip
    (folder / f"{stem}.json").write_text(json.dumps(entry))


def _parameters(signature: Iterable[tuple[str, Any]]) -> Iterator[tuple[str, str]]:
    """Yield the name and type of each parameter that is passed, tuples' fields one by one."""
    for name, kind in signature:
        if hasattr(kind, "_asdict"):
            yield from _parameters((f"{name}.{field}", k) for field, k in kind._asdict().items())
        elif kind != "constexpr":
            yield name, kind


def gather_manifest(folder: Path) -> None:
    """Write manifest.json of a dump from the entries beside it, which it replaces."""
    entries = [json.loads(path.read_text()) for path in sorted(folder.glob("sm_*.json"))]
    (folder / "manifest.json").write_text(json.dumps(entries, indent=1) + "\n")
    for path in folder.glob("sm_*.json"):
        path.unlink()


def inspect_jobs(
    jobs: list[Job], dump: Path | None = None, processes: int | None = None
) -> Iterator[list[Report]]:
    """Yield the reports of each job in order; compiled by several processes at once."""
    with ProcessPoolExecutor(processes, get_context("spawn")) as pool:
        yield from pool.map(partial(inspect_job, dump=dump), jobs)


def table_row(report: Report) -> str:
    """Return one line of the table."""
    steps = "+".join(map(str, report.steps)) or "-"
    return (
        f"sm_{report.arch:<4}{report.kernel:<16}{report.config:<60}{report.rank:>4}"
        f"{'yes' if report.dropout else 'no':>8}{report.registers:>5}{report.spill_bytes:>6}"
        f"{report.shared_bytes:>8}  {report.mma:<16}{steps:>8}{report.resident:>4}"
        f"  {'; '.join(report.faults)}"
    ).rstrip()


TABLE_HEAD = (
    f"{'arch':<7}{'kernel':<16}{'config':<60}{'R':>4}{'dropout':>8}{'regs':>5}{'spill':>6}"
    f"{'shared':>8}  {'MMA':<16}{'a step':>8}{'CTAs':>4}"
)


def main(
    archs: list[int], ranks: list[int], only: str, json_file: Path | None, dump: Path | None
) -> int:
    """Print the table; return 1 if a kernel has a fault or there is none, else 0."""
    everything = chain(
        shipped_jobs(archs, ranks), shrink_jobs(archs, ranks), library_jobs(archs, ranks)
    )
    jobs = [j for j in everything if refusal(j) is None and only in label(j)]
    print(TABLE_HEAD)
    reports: list[Report] = []
    seen = set()
    with Progress(len(jobs), "configuration") as progress:
        for found in inspect_jobs(jobs, dump):
            progress.advance()
            for report in found:
                row = table_row(report)
                if row not in seen:
                    seen.add(row)
                    reports.append(report)
                    progress.say(row)
    faulty = sum(bool(report.faults) for report in reports)
    print(f"{len(reports)} kernels, {faulty} with faults; compiled, not run on a GPU")
    if json_file is not None:
        json_file.write_text(json.dumps([asdict(r) for r in reports], indent=1) + "\n")
    if dump is not None:
        gather_manifest(dump)
    return 1 if faulty or not reports else 0
