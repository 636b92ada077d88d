"""Command line: `python -m lora_kernels info`."""

import argparse

from lora_kernels.info import describe


def main() -> None:
    """Run one of the package's commands."""
    parser = argparse.ArgumentParser(prog="python -m lora_kernels")
    commands = parser.add_subparsers(dest="command", required=True)
    commands.add_parser("info", help="versions, devices, usable implementations")
    parser.parse_args()
    print(describe())


if __name__ == "__main__":
    main()
