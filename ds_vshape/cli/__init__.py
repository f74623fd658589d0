"""The command line; nothing here imports torch or deepspeed.

    plan.py            `ds-vshape plan`
    options.py         what to plan: options where there are any, a ds_config.json elsewhere
    outcome.py         one planned schedule with its figures
    report.py          what the planner prints
    curve.py           bubble against memory limit
    curve_picture.py   that curve as a picture
    jobs.py            `ds-vshape layouts` and `ds-vshape dry-run`
    progress.py        progress of what takes seconds
    extras.py          packages that only some commands need
    files.py           the files that are written
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from contextlib import suppress

from ds_vshape.cli import jobs, plan


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the subcommand of `arguments` (sys.argv by default); its exit status, 2 after an error of the user's."""
    parser = argparse.ArgumentParser(prog="ds-vshape", description="V-shape pipeline schedules for DeepSpeed.")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    plan.add_parser(commands)
    jobs.add_parsers(commands)
    parsed, rest = parser.parse_known_args(arguments)
    if rest and (not hasattr(parsed, "overrides") or any(word.startswith("-") for word in rest)):
        parser.error(f"unrecognized arguments: {' '.join(rest)}")
    if rest:  # overrides after an option that follows overrides, which argparse leaves over
        parsed.overrides += rest
    try:
        status = int(parsed.run(parsed))
        sys.stdout.flush()
        return status
    except (ValueError, OSError) as error:
        if isinstance(error, OSError):
            # Of standard output: closed by its reader, or full. What is left must not fail again at the end.
            with suppress(OSError, ValueError):
                os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            if isinstance(error, BrokenPipeError):
                return 1
        print(f"{parser.prog}: error: {error}", file=sys.stderr)
        return 2
