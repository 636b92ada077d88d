"""Command line: `python -m lora_kernels info`, `inspect`, `tune`, `compile`."""

import argparse
import sys
from pathlib import Path
from typing import Any

import lora_kernels
from lora_kernels.impl.triton.plan.device import KNOWN
from lora_kernels.impl.triton.support import NO_TRITON
from lora_kernels.impl.triton.support import absence as triton_absence
from lora_kernels.native import absence


def main(argv: list[str] | None = None) -> int:
    """Run one of the package's commands and return its exit status."""
    parser = argparse.ArgumentParser(
        prog="python -m lora_kernels", description=lora_kernels.__doc__
    )
    parser.add_argument(
        "--version", action="version", version=f"lora_kernels {lora_kernels.__version__}"
    )
    commands = parser.add_subparsers(title="commands", metavar="COMMAND")
    _add_info(commands)
    _add_inspect(commands)
    _add_tune(commands)
    _add_compile(commands)
    options = parser.parse_args(argv)
    if "run" not in options:
        parser.print_help()
        return 0
    return int(options.run(options))


def _add_info(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    text = "versions, devices, usable implementations"
    command = commands.add_parser("info", help=text, description=text)
    command.add_argument(
        "--json", action="store_true", help="the same as JSON; null: there, usable"
    )
    command.set_defaults(run=_info)


def _add_inspect(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    text = "compile every shipped Triton configuration without a GPU; status 1 if one has a fault"
    command = commands.add_parser("inspect", help=text, description=text)
    archs = (80, 86, 89, 90, 100, 120)
    command.add_argument("--arch", type=int, nargs="+", default=[80, 90, 100], choices=archs)
    command.add_argument("--rank", type=_positive, nargs="+", default=[16, 64, 256])
    command.add_argument("--only", default="", metavar="TEXT", help="rows whose config holds TEXT")
    command.add_argument(
        "--built", action="store_true", help="the kernels of the compiled CUDA part instead"
    )
    command.add_argument("--json", type=Path, metavar="F", help="write the table as JSON")
    command.add_argument("--dump", type=Path, metavar="DIR", help="keep PTX, cubin, manifest.json")
    command.set_defaults(run=_inspect)


def _add_tune(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    text = "time the likely Triton configurations on this GPU and keep the fastest for later runs"
    command = commands.add_parser("tune", help=text, description=text)
    _add_layers(command)
    command.add_argument(
        "--most", type=_positive, default=3, metavar="N",
        help="time the library plan and the N with the shortest predicted times; default: 3",
    )  # fmt: skip
    command.add_argument("--out", type=Path, metavar="F", help="default: where the package reads")
    command.set_defaults(run=_tune)


def _add_compile(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    text = "fill Triton's cache with what calls launch on a GPU; none is needed"
    command = commands.add_parser("compile", help=text, description=text)
    names = ", ".join(device.name for device in KNOWN)
    command.add_argument("--gpu", required=True, metavar="NAME", help=f"one of {names}")
    _add_layers(command)
    command.add_argument("--bias", action="store_true", help="layers have a bias")
    command.set_defaults(run=_compile)


def _add_layers(command: argparse.ArgumentParser) -> None:
    """Add what says which calls are meant, and how their tensors are."""
    which = command.add_mutually_exclusive_group(required=True)
    which.add_argument("--shapes", nargs="+", metavar="MxNxKxR", help="tokens, out, in, rank")
    which.add_argument(
        "--model",
        type=Path,
        metavar="DIR",
        help="has a transformers config.json; with --target-modules",
    )
    command.add_argument(
        "--target-modules", nargs="+", default=[], metavar="NAME",
        help="layers of --model, as PEFT's target_modules name them",
    )  # fmt: skip
    command.add_argument("--rank", type=_positive, default=16, help="with --model; default: 16")
    command.add_argument(
        "--rows", type=_positive, default=8192, help="tokens, with --model; default: 8192"
    )
    dtypes = ("bfloat16", "float16", "float32")
    command.add_argument("--dtype", default="bfloat16", choices=dtypes)
    command.add_argument("--adapters", choices=dtypes, help="their dtype; default: as --dtype")
    command.add_argument("--processes", type=_positive, help="that compile; default: one a CPU")


# Each command imports what it needs: `info` works without Triton.


def _info(options: argparse.Namespace) -> int:
    from lora_kernels.info import as_json, describe

    print(as_json() if options.json else describe())
    return 0


def _inspect(options: argparse.Namespace) -> int:
    if options.built:
        # What it holds is read by a program of Triton's.
        if absence("cuda") is None and _lacks_triton():
            return 2
        from lora_kernels.impl.cuda.tools.inspect import main as inspect_built

        return inspect_built(options.json)
    if _lacks_triton():
        return 2
    import triton

    if triton.knobs.runtime.interpret:
        print("TRITON_INTERPRET is set: unset it, since nothing is compiled then", file=sys.stderr)
        return 2
    from lora_kernels.impl.triton.tools.inspect import main as inspect

    return inspect(options.arch, options.rank, options.only, options.json, options.dump)


def _tune(options: argparse.Namespace) -> int:
    if _lacks_triton():
        return 2
    from lora_kernels.impl.triton.tools.tune import main as tune

    shapes, dtypes = _shapes(options), _dtypes(options)
    if shapes is None:
        return 2
    from lora_kernels.impl.triton.tools.record import Made

    made = Made(*dtypes, "cuda")
    return tune(shapes, made, options.out, options.most, options.processes)


def _compile(options: argparse.Namespace) -> int:
    if _lacks_triton():
        return 2
    names = [device.name for device in KNOWN]
    if options.gpu not in names:
        print(f"--gpu: expected one of {', '.join(names)}, got {options.gpu!r}", file=sys.stderr)
        return 2
    from lora_kernels.impl.triton.tools.ahead import main as compile_ahead
    from lora_kernels.impl.triton.tools.record import Made

    shapes = _shapes(options)
    if shapes is None:
        return 2
    made = Made(*_dtypes(options), bias=options.bias)
    return compile_ahead(options.gpu, shapes, made, options.processes)


def _shapes(options: argparse.Namespace) -> list[str] | None:
    """Return the shapes that are meant, or None after a word on stderr."""
    if options.model is None:
        named: list[str] = options.shapes
        return named
    from lora_kernels.impl.triton.tools.layers import shapes_of_config

    try:
        return shapes_of_config(options.model, options.target_modules, options.rank, options.rows)
    except (ImportError, OSError, ValueError) as error:
        print(f"--model: {error}", file=sys.stderr)
        return None


def _dtypes(options: argparse.Namespace) -> tuple[Any, Any]:
    import torch

    adapters = options.adapters and getattr(torch, options.adapters)
    return getattr(torch, options.dtype), adapters


def _lacks_triton() -> bool:
    """Say on stderr why a command that needs Triton can't run, if so."""
    reason = triton_absence()
    if reason is not None:
        how = "" if reason == NO_TRITON else " --upgrade"
        print(f"{reason}: pip install{how} triton", file=sys.stderr)
    return reason is not None


def _positive(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"expected a number of at least 1, got {text!r}")
    return int(text)


if __name__ == "__main__":
    sys.exit(main())
