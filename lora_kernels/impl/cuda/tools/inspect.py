"""`python -m lora_kernels inspect --built`: what ptxas made of the compiled CUDA part's kernels."""

import json
import re
from collections import Counter
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

from lora_kernels.impl.cuobjdump import cuobjdump
from lora_kernels.native import LIBRARIES, absence

TABLE_HEAD = (
    "| arch | kernel | registers | spill bytes | matrix instructions | faults |\n"
    + "|---" * 6
    + "|"
)
_MATRIX = re.compile(r"\b(HMMA|HGMMA|UTC\w*MMA|FFMA)\b")


@dataclass(frozen=True)
class Report:
    """One kernel of one architecture; `matrix` counts matrix instructions, or float32's FFMA."""

    arch: str
    kernel: str
    registers: int
    spill_bytes: int
    matrix: str

    @property
    def fault(self) -> str | None:
        """What must not ship, or None."""
        if self.spill_bytes:
            return f"spills {self.spill_bytes} bytes"
        # What only decodes W multiplies no matrices; nor do tensor cores multiply float32.
        words = self.kernel.split("_")
        if not {"float", "decode"} & set(words) and "HMMA" not in self.matrix:
            return "no HMMA"
        return None


def reports(library: Path) -> list[Report]:
    """Return a report of each kernel of each architecture in a compiled library."""
    used = {
        (arch, kernel): (int(registers), int(stack))
        for arch, kernel, registers, stack in _resources(library)
    }
    counts = _matrix_instructions(library)
    return [
        Report(arch, kernel, registers, stack, _text(counts[arch, kernel]))
        for (arch, kernel), (registers, stack) in sorted(used.items())
    ]


def _text(counts: Counter[str]) -> str:
    # A kernel of matrix instructions scales with a few FFMA.
    kinds = [kind for kind in counts if kind != "FFMA"] or list(counts)
    return ", ".join(f"{counts[kind]} {kind}" for kind in kinds)


def _resources(library: Path) -> Iterator[tuple[str, str, str, str]]:
    text = cuobjdump("-res-usage", library)
    for part in text.split("arch = ")[1:]:
        arch = part.split(maxsplit=1)[0]
        for found in re.findall(r"Function (lora_\w+):\s+REG:(\d+) STACK:(\d+)", part):
            yield arch, *found


def _matrix_instructions(library: Path) -> dict[tuple[str, str], Counter[str]]:
    counts: dict[tuple[str, str], Counter[str]] = {}
    arch = kernel = ""
    for line in cuobjdump("-sass", library).splitlines():
        if "arch = " in line:
            arch = line.split("arch = ")[1].strip()
        elif "Function : " in line:
            kernel = line.split("Function : ")[1].strip()
            counts[arch, kernel] = Counter()
        elif found := _MATRIX.search(line):
            counts[arch, kernel][found[1]] += 1
    return counts


def main(json_file: Path | None) -> int:
    """Print the table; return 1 if a kernel has a fault or there is none, else 0."""
    reason = absence("cuda")
    if reason is not None:
        print(f"compiled CUDA part: {reason}")
        return 1
    found = reports(LIBRARIES["cuda"])
    print(TABLE_HEAD)
    for report in found:
        print(
            f"| {report.arch} | {report.kernel} | {report.registers} | {report.spill_bytes} "
            f"| {report.matrix} | {report.fault or ''} |"
        )
    faulty = sum(report.fault is not None for report in found)
    print(f"{len(found)} kernels, {faulty} with faults; compiled, not run on a GPU")
    if json_file is not None:
        json_file.write_text(json.dumps([asdict(report) for report in found], indent=1) + "\n")
    return 1 if faulty or not found else 0
