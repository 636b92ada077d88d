"""`python -m lora_kernels.impl.cuda.tools.loops FILE [TEXT]`: what a turn of each main loop takes.

FILE is a cubin or a library, of ours or of another project, and TEXT a part of kernels' names.
"""

import re
import sys
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from lora_kernels.impl.cuobjdump import cuobjdump

TABLE_HEAD = (
    "| arch | kernel | instructions | matrix | a matrix one | LDSM | wavefronts a matrix one "
    "| LDGSTS | bytes a warp copies | barriers | branches | the rest |\n" + "|---" * 12 + "|"
)
_INSTRUCTION = re.compile(r"\s+/\*([0-9a-f]{4,})\*/\s+(?:@!?U?P\w+ )?\s*([A-Z][\w.]*)([^;]*);")
_MATRIX = ("HMMA", "HGMMA", "IMMA")
# 32 lanes of 16 bytes, which shared memory takes in so many cycles of 128 bytes.
_WAVEFRONTS = {"LDSM": 4, "LDGSTS": 4}
_COPY_BYTES = 512


@dataclass(frozen=True)
class Instruction:
    """One of a kernel: its address, its name without what follows a dot, and its operands."""

    address: int
    name: str
    operands: str


@dataclass(frozen=True)
class Loop:
    """An innermost of the loops with matrix instructions, counted as it lies in memory.

    Code behind a branch in it counts too, whether it is executed or not.
    """

    arch: str
    kernel: str
    counts: Counter[str]

    @property
    def matrix(self) -> int:
        """Matrix instructions of a turn."""
        return sum(self.counts[name] for name in _MATRIX)

    @property
    def wavefronts(self) -> int:
        """Cycles of shared memory that a warp's matrix loads and copies take, without conflicts."""
        return sum(self.counts[name] * each for name, each in _WAVEFRONTS.items())

    def row(self) -> str:
        """Return its row of the table."""
        c, every = self.counts, self.counts.total()
        named = self.matrix + c["LDSM"] + c["LDGSTS"] + c["BAR"] + c["BRA"]
        numbers = (
            every, self.matrix, f"{every / self.matrix:.3f}", c["LDSM"],
            f"{self.wavefronts / self.matrix:.3f}", c["LDGSTS"], c["LDGSTS"] * _COPY_BYTES,
            c["BAR"], c["BRA"], every - named,
        )  # fmt: skip
        return f"| {self.arch} | {self.kernel} | " + " | ".join(map(str, numbers)) + " |"


def kernels(sass: str) -> Iterator[tuple[str, str, list[Instruction]]]:
    """Give the architecture, name and instructions of each kernel of cuobjdump's text."""
    for part in sass.split("code for ")[1:]:
        for text in part.split("Function : ")[1:]:
            found = (_INSTRUCTION.match(line) for line in text.splitlines())
            yield (
                part.split(maxsplit=1)[0],
                text.split(maxsplit=1)[0],
                [Instruction(int(m[1], 16), m[2].split(".")[0], m[3]) for m in found if m],
            )


def loops(sass: str) -> list[Loop]:
    """Return the main loops of a text, by kernel, in the order of their addresses."""
    found = []
    for arch, kernel, instructions in kernels(sass):
        ends = sorted(
            (int(to[1], 16), one.address)
            for one in instructions
            if one.name == "BRA"
            and (to := re.search(r"0x([0-9a-f]+)", one.operands))
            and int(to[1], 16) < one.address
        )
        bodies = {
            (first, last): Counter(i.name for i in instructions if first <= i.address <= last)
            for first, last in ends
        }
        # What waits for a barrier of sm_90's is a loop too, without matrix instructions.
        products = [ends for ends, body in bodies.items() if any(body[name] for name in _MATRIX)]
        for first, last in products:
            if not any(first <= b <= last and (a, b) != (first, last) for a, b in products):
                found.append(Loop(arch, kernel, bodies[first, last]))
    return found


def main(arguments: Sequence[str]) -> int:
    """Print the table; return 1 if there is no loop."""
    file, text = Path(arguments[0]), "".join(arguments[1:2])
    found = [loop for loop in loops(cuobjdump("-sass", file)) if text in loop.kernel]
    print(TABLE_HEAD)
    for loop in found:
        print(loop.row())
    return 0 if found else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
