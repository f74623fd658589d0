"""The command line; nothing here imports torch or deepspeed.

    plan.py            `ds-vshape plan`
    options.py         what to plan: from options, and from a ds_config.json for those not given
    giving_back.py     the options for recomputation and offload
    layer_costs.py     the file of costs of layers
    partition.py       what the config's "partition" says of layers and stages
    outcome.py         one planned schedule with its figures
    report.py          what the planner prints
    curve.py           bubble against memory limit
    curve_picture.py   that curve as a picture
    jobs.py            `ds-vshape layouts` and `ds-vshape dry-run`
    progress.py        a progress bar
    extras.py          the check that an optional package is installed
    files.py           writing the output files
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from contextlib import suppress

from ds_vshape.cli import jobs, plan


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the subcommand of `arguments` (sys.argv by default). Returns its exit status: 2 for wrong input."""
    parser = argparse.ArgumentParser(prog="ds-vshape", description="V-shape pipeline schedules for DeepSpeed.")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    plan.add_parser(commands)
    jobs.add_parsers(commands)
    parsed, rest = parser.parse_known_args(arguments)
    if rest and (not hasattr(parsed, "overrides") or any(word.startswith("-") for word in rest)):
        parser.error(f"unrecognized arguments: {' '.join(rest)}")
    if rest:  # overrides after an option that itself follows overrides: argparse doesn't take these
        parsed.overrides += rest
    try:
        status = int(parsed.run(parsed))
        sys.stdout.flush()
        return status
    except (ValueError, OSError) as error:
        if isinstance(error, OSError):
            # Standard output is closed by its reader, or full: what is still buffered must not fail again at exit.
            with suppress(OSError, ValueError):
                os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            if isinstance(error, BrokenPipeError):
                return 1
        print(f"{parser.prog}: error: {error}", file=sys.stderr)
        return 2
