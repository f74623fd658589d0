"""The JSON file of a measurement: the results, and by which command, on which machine and when they were measured.

    {"command": "python bench/run.py --rounds 3", "date": "2026-11-28T19:56:40+00:00", "commit": "5265052",
     "machine": {"cpu": "AMD EPYC", "cores": 2, "gpus": []}, "versions": {"python": "3.11.2", ...}, "results": ...}
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import shlex
import subprocess
import sys
from collections.abc import Sequence
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
_PACKAGES = ("torch", "deepspeed", "ds-vshape")


def add_json_option(parser: argparse.ArgumentParser) -> None:
    """--json FILE, for `write`."""
    parser.add_argument("--json", type=_writable, metavar="FILE",
                        help="write all results to this file, with command, date, commit, machine and versions")


def _writable(text: str) -> Path:
    """Told before hours of measuring."""
    file = Path(text)
    if file.is_dir() or not os.access(file.parent, os.W_OK):
        raise argparse.ArgumentTypeError(f"{text}: must be a file in a folder that exists and can be written to")
    return file


def write(file: Path | None, results: Any) -> None:
    """Write `results` of this program to `file`, if the user has named one."""
    if file is not None:
        program = Path(sys.argv[0]).resolve()
        name = program.relative_to(ROOT) if program.is_relative_to(ROOT) else program
        file.write_text(json.dumps({**about([str(name), *sys.argv[1:]]), "results": results}, indent=1) + "\n")


def about(words: Sequence[str]) -> dict[str, Any]:
    """What a file says besides results, if `words` were given to Python; --json FILE is left out."""
    shown = [word for word in words if not word.startswith("--json=")]
    if "--json" in shown:
        place = shown.index("--json")
        del shown[place:place + 2]
    return {"command": shlex.join(["python", *shown]), "date": datetime.now(UTC).isoformat(timespec="seconds"),
            "commit": _commit(), "machine": {"cpu": _cpu(), "cores": len(os.sched_getaffinity(0)), "gpus": _gpus()},
            "versions": {"python": platform.python_version(), **{name: _version(name) for name in _PACKAGES}}}


def _commit() -> str | None:
    """The checkout's, with a "+" where files differ from it; None outside a checkout."""
    command = ["git", "-C", str(ROOT), "describe", "--always", "--exclude=*", "--dirty=+"]
    try:
        done = subprocess.run(command, capture_output=True, text=True)
    except OSError:
        return None
    return done.stdout.strip() or None


def _cpu() -> str:
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def _gpus() -> list[str]:
    """Of a program that has used them; others have no torch."""
    torch = sys.modules.get("torch")
    if torch is None or not torch.cuda.is_available():
        return []
    return [torch.cuda.get_device_name(number) for number in range(torch.cuda.device_count())]


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None
