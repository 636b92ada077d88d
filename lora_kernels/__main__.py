"""Command line: `python -m lora_kernels info`, `inspect`, `tune`."""

import argparse
import sys
from pathlib import Path


def main(argv: list[str] | None = None) -> int:
    """Run one of the package's commands and return its exit status."""
    parser = argparse.ArgumentParser(prog="python -m lora_kernels")
    commands = parser.add_subparsers(dest="command", required=True)
    commands.add_parser("info", help="versions, devices, usable implementations")
    _add_inspect(commands)
    _add_tune(commands)
    options = parser.parse_args(argv)
    # Each command imports what it needs: `info` works without Triton.
    if options.command == "inspect" and options.built:
        from lora_kernels._cuda.inspect import main as inspect_built

        return inspect_built(options.json)
    if options.command == "inspect":
        from lora_kernels._triton.inspect import main as inspect

        return inspect(options.arch, options.rank, options.only, options.json, options.dump)
    if options.command == "tune":
        from lora_kernels._triton.tune import main as tune

        return tune(options.shapes, options.dtype, options.out, options.most)
    from lora_kernels.info import describe

    print(describe())
    return 0


def _add_inspect(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    text = "compile every shipped Triton configuration without a GPU; status 1 if one has a fault"
    command = commands.add_parser("inspect", help=text, description=text)
    archs = (80, 86, 89, 90, 100, 120)
    command.add_argument("--arch", type=int, nargs="+", default=[80, 90, 100], choices=archs)
    command.add_argument("--rank", type=int, nargs="+", default=[16, 64, 256])
    command.add_argument("--only", default="", metavar="TEXT", help="rows whose config holds TEXT")
    command.add_argument(
        "--built", action="store_true", help="the kernels of the compiled CUDA part instead"
    )
    command.add_argument("--json", type=Path, metavar="F", help="write the table as JSON")
    command.add_argument("--dump", type=Path, metavar="DIR", help="keep PTX, cubin, manifest.json")


def _add_tune(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    text = "time the legal Triton configurations on this GPU and keep the fastest for later runs"
    command = commands.add_parser("tune", help=text, description=text)
    command.add_argument(
        "--shapes", nargs="+", required=True, metavar="MxNxKxR", help="tokens, out, in, rank"
    )
    command.add_argument("--dtype", default="bfloat16", choices=("bfloat16", "float16", "float32"))
    command.add_argument(
        "--most", type=_positive, metavar="N", help="time the N with the shortest predicted times"
    )
    command.add_argument("--out", type=Path, metavar="F", help="default: where the package reads")


def _positive(text: str) -> int:
    number = int(text)
    if number < 1:
        raise ValueError
    return number


if __name__ == "__main__":
    sys.exit(main())
