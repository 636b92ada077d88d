"""Write the table of configurations that compile without spilling registers.

    python -m lora_kernels.impl.triton.tools.spill_free [--only TEXT] [--processes 2]

Compiles every configuration of plan/config.py for every padded rank and each of sm_80, sm_90 and
sm_100, some hours of two cores. With --only, rows that hold TEXT, such as
"90,descriptors,backward", are compiled again and the others kept. The layer has N = K = 1024.
"""

import argparse
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path

from tqdm import tqdm

from lora_kernels.impl.triton.plan import spill_free as table_module
from lora_kernels.impl.triton.plan.config import Config, compiled_as
from lora_kernels.impl.triton.plan.spill_free import Row, spill_free, write
from lora_kernels.impl.triton.tools.inspect import (
    Job,
    inspect_job,
    refusal,
    shipped_jobs,
    spill_limit,
)
from lora_kernels.impl.triton.tools.machine import GPUS

ARCHS = (80, 90, 100)
RANKS = (16, 32, 64, 128, 256)
# Fewer mean that ptxas gave the kernel up as too large for the machine.
LEAST_REGISTERS = 32
TABLE = Path(table_module.__file__).with_name(table_module.TABLE)


def jobs() -> Iterator[Job]:
    """Yield everything that only its registers may forbid."""
    for job in shipped_jobs(ARCHS, RANKS):
        reason = refusal(job)
        if reason is None or "spill" in reason:
            yield job


def fits(job: Job) -> bool | None:
    """Whether the job's large kernel spills no more than allowed; None if it can't be compiled."""
    try:
        used = inspect_job(job)[-1]
    except Exception as error:  # Triton raises many kinds where a kernel can't be compiled
        print(f"{row_of(job)} rank {job.problem.r}: {str(error)[:100]}")
        return None
    return used.registers >= LEAST_REGISTERS and used.spill_bytes <= spill_limit(job.arch)


def spill_free_ranks(of_a_row: list[Job]) -> tuple[list[int], bool]:
    """Return the ranks that fit, smallest first, and whether any rank could be compiled.

    After two that don't fit, larger ones aren't tried.
    """
    found: list[int] = []
    compiled, failures = False, 0
    for job in sorted(of_a_row, key=lambda job: job.problem.r):
        fitting = fits(job)
        compiled |= fitting is not None
        if fitting:
            found.append(job.problem.r)
            failures = 0
        elif (failures := failures + 1) == 2:
            break
    return found, compiled


def row_of(job: Job) -> Row:
    """Return the row of the table."""
    assert isinstance(job.config, Config)
    return compiled_as(job.config, job.problem, GPUS[job.arch])


def main() -> None:
    """Compile and write."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", default="")
    parser.add_argument("--processes", type=int, default=2)
    options = parser.parse_args()
    everything: dict[Row, list[Job]] = {}
    for job in jobs():
        everything.setdefault(row_of(job), []).append(job)
    table = {row: ranks for row, ranks in spill_free().items() if row in everything}
    todo = {row: jobs for row, jobs in everything.items() if options.only in str(row)}
    if not todo:
        parser.error(f"--only: expected a part of a row, got {options.only!r}")
    with ProcessPoolExecutor(options.processes, get_context("spawn")) as pool:
        found = tqdm(pool.map(spill_free_ranks, todo.values()), total=len(todo))
        ranks, compiled = zip(*found, strict=True)
    if not any(compiled):
        raise SystemExit(f"nothing could be compiled; {TABLE} stays as it is")
    table |= dict(zip(todo, ranks, strict=True))
    with TABLE.open("w") as file:
        write(file, {row: ranks for row, ranks in table.items() if ranks})


if __name__ == "__main__":
    main()
