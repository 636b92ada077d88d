"""Command line: `python -m lora_kernels info`, `inspect`, `tune`."""

import argparse
import sys
from pathlib import Path

import lora_kernels
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
    command.add_argument("--rank", type=int, nargs="+", default=[16, 64, 256])
    command.add_argument("--only", default="", metavar="TEXT", help="rows whose config holds TEXT")
    command.add_argument(
        "--built", action="store_true", help="the kernels of the compiled CUDA part instead"
    )
    command.add_argument("--json", type=Path, metavar="F", help="write the table as JSON")
    command.add_argument("--dump", type=Path, metavar="DIR", help="keep PTX, cubin, manifest.json")
    command.set_defaults(run=_inspect)


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
    command.set_defaults(run=_tune)


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

    return tune(options.shapes, options.dtype, options.out, options.most)


def _lacks_triton() -> bool:
    """Say on stderr why a command that needs Triton can't run, if so."""
    reason = triton_absence()
    if reason is not None:
        how = "" if reason == NO_TRITON else " --upgrade"
        print(f"{reason}: pip install{how} triton", file=sys.stderr)
    return reason is not None


def _positive(text: str) -> int:
    number = int(text)
    if number < 1:
        raise ValueError
    return number


if __name__ == "__main__":
    sys.exit(main())
