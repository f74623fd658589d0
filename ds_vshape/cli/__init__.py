"""The command line: one module for each subcommand, none of which imports torch or deepspeed."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from ds_vshape.cli import plan


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the subcommand of `arguments` (sys.argv by default); its exit status, 2 after an error of the user's."""
    parser = argparse.ArgumentParser(prog="ds-vshape", description="V-shape pipeline schedules for DeepSpeed.")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    plan.add_parser(commands)
    parsed = parser.parse_args(arguments)
    try:
        return int(parsed.run(parsed))
    except ValueError as error:
        print(f"{parser.prog}: error: {error}", file=sys.stderr)
        return 2
