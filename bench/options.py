"""The command line of `python -m bench`: what is asked for, checked."""

import argparse
from collections.abc import Callable
from dataclasses import dataclass
from datetime import datetime, timezone
from pathlib import Path

import torch

from bench.providers.registry import BY_NAME
from bench.shapes import (
    DTYPES,
    GROWTH,
    LARGE,
    MODELS,
    MODES,
    PLANS,
    QLORA,
    QUICK_SWEEPS,
    SWEEPS,
    TARGETS,
    TWINS,
    Grid,
)

SUITES = ("layer", "step", "overhead", "memory", "kernels")
ARCHS = (80, 86, 89, 90, 100, 120)
TOKENS = {"cpu": [16, 512], "cuda": [16, 2048, 8192]}
QUICK_TOKENS = {"cpu": [128], "cuda": [2048]}
QUICK_SHAPES = {
    "cpu": [GROWTH, "minilm", "bert-base/q+k+v+o"],
    "cuda": [GROWTH, "minilm", "bert-base", "llama3-8b/k+v"],
}
SECONDS, QUICK_SECONDS = 4.0, 0.4
FOLDER = Path("bench_results")


@dataclass(frozen=True)
class Options:
    """What a run measures; `grid` is what each shape is measured with."""

    suites: list[str]
    quick: bool
    device: str
    threads: int
    shapes: list[str]
    providers: list[str]
    grid: Grid
    seconds: float
    graphs: bool
    archs: list[int]
    out: Path
    list_only: bool


def parse(arguments: list[str] | None) -> Options:
    """Read a command line; leaves with a message and status 2 where it can't be served."""
    parser = _parser()
    given = parser.parse_args(arguments)
    device = given.device or ("cuda" if torch.cuda.is_available() else "cpu")
    if device == "cuda" and not torch.cuda.is_available():
        parser.error("--device: expected cpu, torch finds no GPU, got cuda")
    if given.adapters not in ("same", *DTYPES):
        parser.error(f"--adapters: expected same or one of {', '.join(DTYPES)}")
    if given.seconds is not None and given.seconds <= 0:
        parser.error(f"--seconds: expected a positive number, got {given.seconds:g}")
    grid = Grid(
        tokens=given.tokens or (QUICK_TOKENS if given.quick else TOKENS)[device],
        ranks=given.ranks,
        dtypes=given.dtype or [_native_dtype(device)],
        dropouts=given.dropouts,
        modes=given.modes,
        adapters=given.adapters,
        sweeps=QUICK_SWEEPS if given.quick and device == "cpu" else SWEEPS,
    )
    stamp = datetime.now(timezone.utc).strftime("%Y-%m-%d-%H%M%S")
    return Options(
        suites=list(SUITES) if "all" in given.suite else given.suite,
        quick=given.quick,
        device=device,
        threads=given.threads,
        shapes=given.shapes or _default_shapes(device, given.quick),
        providers=given.providers or list(BY_NAME),
        grid=grid,
        seconds=given.seconds or (QUICK_SECONDS if given.quick else SECONDS),
        graphs=given.timer == "graph",
        archs=given.archs,
        out=given.out or FOLDER / stamp,
        list_only=given.list,
    )


def _default_shapes(device: str, quick: bool) -> list[str]:
    if quick:
        return QUICK_SHAPES[device]
    left_out = (*TWINS, *(LARGE if device == "cpu" else ()))
    return [TARGETS, GROWTH, *(model for model in MODELS if model not in left_out)]


def _native_dtype(device: str) -> str:
    """Return bf16, or fp32 on a CPU that has no products of bf16."""
    if device == "cuda" or torch.ops.mkldnn._is_mkldnn_bf16_supported():
        return "bf16"
    return "fp32"


def _list_of(convert: Callable[[str], object], *known: object) -> Callable[[str], list[object]]:
    """Return what reads a list with commas, of known values if there are such."""

    def read(text: str) -> list[object]:
        try:
            values = [convert(item) for item in text.split(",")]
        except ValueError as error:
            raise argparse.ArgumentTypeError(
                f"expected a list with commas, got {text!r}"
            ) from error
        for value in values:
            if known and value not in known:
                names = ", ".join(map(str, known))
                raise argparse.ArgumentTypeError(f"expected some of {names}, got {text!r}")
        return values

    return read


def _positive(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"expected a number of at least 1, got {text!r}")
    return int(text)


def _probability(text: str) -> float:
    if not 0 <= (number := float(text)) < 1:
        raise argparse.ArgumentTypeError(f"expected probabilities in [0, 1), got {text!r}")
    return number


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m bench",
        description="Time and count LoRA layers against what people would use instead.",
    )
    add, text = parser.add_argument, _list_of(str)
    suites = _list_of(str, *SUITES, "all")
    add("--suite", type=suites, default=["all"], help=f"{', '.join(SUITES)} or all")
    add("--quick", action="store_true", help="few points, little time for each: minutes in all")
    add("--device", choices=["cpu", "cuda"], help="default: cuda where there is one")
    add("--threads", type=_positive, default=1, help="on a CPU; 1 is timed by its own CPU time")
    add("--dtype", type=_list_of(str, *DTYPES), help=f"some of {', '.join(DTYPES)}")
    shapes = ", ".join((TARGETS, GROWTH, QLORA, PLANS, *MODELS))
    add("--shapes", type=text, help=f"some of {shapes}; model/projection is one layer")
    add("--providers", type=_list_of(str, *BY_NAME), help=f"some of {', '.join(BY_NAME)}")
    add("--tokens", type=_list_of(_positive), help="values of M")
    add("--ranks", type=_list_of(_positive), default=[16], help="default: 16")
    add("--dropouts", type=_list_of(_probability), default=[0.05, 0.0], help="default: 0.05,0")
    modes = list(MODES)
    add("--modes", type=_list_of(str, *modes), default=modes, help="train, infer or both")
    add("--adapters", default="fp32", help="dtype of A and B, or same; default: fp32, PEFT's own")
    add("--seconds", type=float, help=f"for a point; default: {SECONDS:g}, quick {QUICK_SECONDS}")
    add("--timer", choices=["graph", "events"], default="graph", help="on a GPU, of layers")
    archs = _list_of(int, *ARCHS)
    add("--archs", type=archs, default=[80, 90], help="of the kernels suite; default: 80,90")
    add("--out", type=Path, help=f"folder for results and report; default: in {FOLDER}")
    add("--list", action="store_true", help="say what would be measured, and leave")
    return parser
