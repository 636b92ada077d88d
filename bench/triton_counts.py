"""Count what the Triton kernels execute, in a PTX virtual machine, beside a plain product.

    PYTHONPATH=<directory of ptxvm> python bench/triton_counts.py [--arch 80 90] [--out FILE.md]

bf16, M = 512, N = K = 1024, R = 16, tiles 128x128x64, 8 warps, 3 stages, 16 programs. Counts, not
times: caches, latencies and occupancy are not modelled, and nothing here ran on a GPU. The floor is
`plain_gemm` of the same tiles, with run-time sizes.
"""

import argparse
import subprocess
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import torch
from plain_gemm import plain_gemm

from lora_kernels._triton.config import Config, Layer
from lora_kernels._triton.launch import Options
from lora_kernels._triton.machine import GPUS, Machine
from lora_kernels._triton.record import Launch, launches

M, N, K, R = 512, 1024, 1024, 16
PROGRAMS = 16
TILE = Config(128, 128, 64, 8, 3)
HEAD = "| arch | call | copies | producers | unique bytes | requested bytes | MMA flops |" + (
    " instructions | k instr. | bank conflicts | producing / plain tile |"
)


class Counts(NamedTuple):
    """What one call executed, all of its launches together."""

    instructions: int
    flops: int
    unique: int
    requested: int
    conflicts: int


def executed(arch: int, calls: Iterable[Launch], programs: int) -> Counts:
    """Run launches in the virtual machine and add up their counts; any report is an error."""
    machine = Machine(arch, programs)
    for call in calls:
        machine.run(*call)
    counts = [0] * len(Counts._fields)
    for data in (stats.data for stats in machine.stats):
        unique = sum(b["read"] + b["written"] for b in data["buffers"].values())
        requested = data["global_load_bytes"] + data["global_store_bytes"]
        of_launch = (
            data["warp_instructions"], data["mma_flops"], unique, requested,
            data["shared_bank_conflicts"],
        )  # fmt: skip
        counts = [total + new for total, new in zip(counts, of_launch, strict=True)]
    return Counts(*counts)


def floor(arch: int, backward: bool) -> Counts:
    """Count the plain product: x Wᵀ forward, dy W backward."""
    u, v = (torch.randn(s, s2, dtype=torch.bfloat16) for s, s2 in ((M, K), (N, K)))
    strides = {"stride_vn": 1, "stride_vk": K} if backward else {"stride_vn": K, "stride_vk": 1}
    args = {"u": u, "v": v, "out": torch.empty(M, N, dtype=torch.bfloat16), "M": M, "N": N, "K": K}
    args |= {"stride_u": K, **strides, "stride_out": N}
    constants = {"BLOCK_M": TILE.rows, "BLOCK_N": TILE.columns, "BLOCK_K": TILE.depth, "GROUP": 8}
    grid = (M // TILE.rows) * (N // TILE.columns)
    launch = Launch(plain_gemm, grid, args, constants, Options(TILE.warps, TILE.stages))
    return executed(arch, [launch], PROGRAMS)


def of_call(arch: int, layer: Layer, config: Config, programs: int = PROGRAMS) -> Counts:
    """Count a call of ours on a GPU of so many multiprocessors."""
    device = replace(GPUS[arch], multiprocessors=programs)
    return executed(arch, launches(layer, config, device), programs)


def producing_ratio(arch: int, layer: Layer, config: Config) -> float:
    """Return the instructions of a tile that makes xa (dxa) over those of one that doesn't.

    What one more row panel of producing tiles adds to a call, over what one more column adds.
    """

    def count(panels: int, columns: int) -> int:
        width = columns * config.columns
        part = layer._replace(m=panels * config.rows, needs=(True, False, False, False))
        part = part._replace(k=width) if layer.backward else part._replace(n=width)
        return of_call(arch, part, config, config.producers).instructions

    alone = count(1, config.producers)
    producing = (count(2, config.producers) - alone) / config.producers
    return producing / (count(1, config.producers + 1) - alone)


def row(arch: int, layer: Layer, config: Config, base: Counts) -> str:
    """Return a line of the table: our counts over the floor's."""
    ours = of_call(arch, layer, config)
    call = f"{'backward' if layer.backward else 'forward'}, p = {'0.1' if layer.dropout else '0'}"
    return (
        f"| sm_{arch} | {call} | {'descriptors' if config.descriptors else 'pointers'} "
        f"| {config.producers} | {ours.unique / base.unique:.3f} "
        f"| {ours.requested / base.requested:.3f} | {ours.flops / base.flops:.3f} "
        f"| {ours.instructions / base.instructions:.2f} | {ours.instructions / 1e3:,.0f} "
        f"| {ours.conflicts} | {producing_ratio(arch, layer, config):.2f} |"
    )


def table(archs: Iterable[int]) -> Iterable[str]:
    """Yield the table line by line."""
    yield HEAD
    yield "|---" * (HEAD.count("|") - 1) + "|"
    for arch in archs:
        for backward in (False, True):
            base = floor(arch, backward)
            name = "backward" if backward else "forward"
            floor_row = f"| sm_{arch} | plain product, {name} | pointers | | 1 | 1 | 1 | 1 "
            yield f"{floor_row}| {base.instructions / 1e3:,.0f} | {base.conflicts} | |"
            for dropout in (False, True):
                layer = Layer(M, N, K, R, 16, dropout, True, backward)
                for producers in (1,) if backward else (1, 2):
                    for descriptors in (False, True) if GPUS[arch].descriptors else (False,):
                        config = replace(TILE, producers=producers, descriptors=descriptors)
                        yield row(arch, layer, config, base)


def main() -> None:
    """Print the table; with --out also keep it, with the revision it was taken at."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--arch", type=int, nargs="+", default=[80, 90])
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    torch.manual_seed(0)
    lines = []
    for line in table(options.arch):
        print(line, flush=True)
        lines.append(line)
    if options.out:
        show = ["git", "describe", "--always", "--dirty"]
        revision = subprocess.run(show, capture_output=True, text=True, check=True).stdout.strip()
        archs = " ".join(map(str, options.arch))
        head = f"`python bench/triton_counts.py --arch {archs}` at {revision}.\n{__doc__}\n"
        options.out.write_text("\n".join([head, *lines]) + "\n")


if __name__ == "__main__":
    main()
