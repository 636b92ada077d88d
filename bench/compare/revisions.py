"""Compare two revisions call by call, in turn, and print the ratios of their times.

    python -m bench.compare.revisions REV [--rounds 25]

REV is taken out of git and built beside the working tree. Two processes, one for each, make the
calls of `watched_calls` alternately, so that both meet the same moments of a machine.
"""

import argparse
import math
import os
import shutil
import subprocess
import sys
import tarfile
import tempfile
from collections.abc import Iterator
from itertools import product
from pathlib import Path

from tqdm import tqdm

from bench.compare.watched_calls import CASES, NAMES
from bench.measure.timing import Spread
from lora_kernels.native import BUILT

ROOT = Path(__file__).parents[2]
NOISE = 0.05  # what two runs of one revision may be apart


class Side:
    """A process that makes calls of one revision."""

    def __init__(self, package: Path, folder: Path) -> None:
        # The working tree's benchmarks run both packages.
        shutil.copytree(ROOT / "bench", folder / "bench", ignore=shutil.ignore_patterns("results"))
        (folder / "lora_kernels").symlink_to(package)
        self._process = subprocess.Popen(
            [sys.executable, "-m", "bench.compare.watched_calls"], cwd=folder, text=True,
            stdin=subprocess.PIPE, stdout=subprocess.PIPE,
        )  # fmt: skip

    def ms(self, what: str) -> float:
        """Return the time of a call, NaN for one that the revision can't make.

        Raises:
            RuntimeError: the process ended instead; it has said why.
        """
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        print(what, file=self._process.stdin, flush=True)
        if not (answer := self._process.stdout.readline()):
            raise RuntimeError(f"no answer to {what!r}")
        return float(answer)

    def close(self) -> None:
        """End the process."""
        self._process.communicate()


def checked_out(revision: str, scratch: Path) -> Path:
    """Return a folder with a revision's files and its compiled part."""
    archive, folder = scratch / "revision.tar", scratch / "revision"
    _run(["git", "archive", "--output", str(archive), revision], ROOT)
    with tarfile.open(archive) as files:
        files.extractall(folder, filter="data")
    _run([sys.executable, "setup.py", "-q", "build_ext", "--inplace"], folder)
    return folder


def _run(command: list[str], folder: Path) -> None:
    # Without the part that the working tree has, there would be nothing to compare it with.
    parts = {"LORA_KERNELS_CPU": "1" if BUILT["cpu"] else "0", "LORA_KERNELS_CUDA": "0"}
    environment = {**os.environ, **parts}
    subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, check=True)


def ratios(new: Side, old: Side, rounds: int) -> Iterator[tuple[str, Spread]]:
    """Yield each call that both can make, with the new revision's times over the old one's.

    Raises:
        RuntimeError: the new one can't make a call that the old one can.
    """
    watched = [f"{what}/{name}" for what, name in product(CASES, NAMES)]
    for what in tqdm(watched, unit="call", leave=False):
        if math.isnan(old.ms(what)):
            continue
        if math.isnan(new.ms(what)):
            raise RuntimeError(f"{what}: the working tree can't make this call any more")
        times: dict[Side, list[float]] = {old: [], new: []}
        for turn in range(rounds):
            for side in (old, new) if turn % 2 else (new, old):
                times[side].append(side.ms(what))
        yield what, Spread.of_ratios(times[new], times[old])


def line(what: str, ratio: Spread) -> str:
    """Return a line of the table, marked where the revisions differ."""
    return f"{what:<20}{ratio!s:>20}{' *' if abs(ratio.median - 1) > NOISE else ''}"


def main(arguments: list[str] | None = None) -> int:
    """Compare, print, and return an exit status."""
    parser = argparse.ArgumentParser(prog="python -m bench.compare.revisions", description=__doc__)
    parser.add_argument("revision", metavar="REV")
    parser.add_argument("--rounds", type=int, default=25)
    given = parser.parse_args(arguments)
    if given.rounds < 2:
        parser.error(f"--rounds: expected at least 2, got {given.rounds}")
    with tempfile.TemporaryDirectory() as scratch:
        try:
            taken = checked_out(given.revision, Path(scratch))
        except subprocess.CalledProcessError as error:
            print(f"{' '.join(error.cmd)}:\n{error.stderr}", file=sys.stderr)
            return 2
        new = Side(ROOT / "lora_kernels", Path(scratch) / "new")
        old = Side(taken / "lora_kernels", Path(scratch) / "old")
        try:
            print(f"time over {given.revision}'s; * more than {NOISE:.0%} apart")
            compared = 0
            for what, ratio in ratios(new, old, given.rounds):
                tqdm.write(line(what, ratio))
                compared += 1
            if not compared:
                raise RuntimeError("no call that both revisions can make")
        except RuntimeError as error:
            print(f"python -m bench.compare.revisions: error: {error}", file=sys.stderr)
            return 2
        finally:
            new.close()
            old.close()
    return 0


if __name__ == "__main__":
    sys.exit(main())
