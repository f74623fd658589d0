"""Plans on disk, each under the hash of all that it depends on.

A file holds one schedule as JSON; its figures are computed again when it is read. A file that can't be read, or whose
schedule isn't one for the problem that runs to its end within the limits, counts as missing: a line in the log says
why, and the next plan takes its place.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import stat
import tempfile
import warnings
from dataclasses import asdict
from pathlib import Path

from pydantic import TypeAdapter
from typing_extensions import TypedDict

from ds_vshape.schedule.adaptive.problem import Problem
from ds_vshape.schedule.adaptive.seeds import within
from ds_vshape.schedule.lowering import lower
from ds_vshape.schedule.proofs import deadlock
from ds_vshape.schedule.proofs.rendezvous import DeadlockError
from ds_vshape.schedule.schedule import Schedule, check
from ds_vshape.schedule.serial import JsonSchedule, most_bytes, read_json, schedule_to_json
from ds_vshape.schedule.timeline import Times

logger = logging.getLogger(__name__)

# To be raised whenever the planner gives other plans: older files are then no longer found.
VERSION = 12


class _Kept(TypedDict):
    schedule: JsonSchedule


_KEPT = TypeAdapter(_Kept)


def path_of(cache: Path, problem: Problem, time_limit: float, compiled: bool) -> Path:
    """Where the plan of `problem` is; `compiled` tells whether numba was there to make it."""
    content = {"version": VERSION, "problem": asdict(problem), "time_limit": float(time_limit), "compiled": compiled}
    digest = hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()
    return cache / f"plan-{digest[:32]}.json"


def folder() -> Path | None:
    """Where plans are kept: $XDG_CACHE_HOME/ds_vshape, ~/.cache/ds_vshape without it; None where there is no home."""
    base = os.environ.get("XDG_CACHE_HOME")
    try:
        return Path(base or Path.home() / ".cache") / "ds_vshape"
    except RuntimeError:  # as for a user who isn't in the table of users
        return None


def read(path: Path, problem: Problem) -> Schedule | None:
    """The schedule in `path`, or None."""
    try:
        text = _content(path, most_bytes(problem.placement, problem.micro_batches, problem.max_pieces))
        schedule = read_json(text, _KEPT)["schedule"]
        _check(schedule, problem)
    except FileNotFoundError:
        return None
    except (OSError, ValueError, DeadlockError) as error:
        logger.warning("%s counts as missing, and is planned again: %s", path, error)
        return None
    return schedule


def _content(path: Path, most: int) -> bytes:
    """What is in a file of up to `most` bytes; OSError for what isn't a file or can't be read, ValueError for more."""
    # Opening a FIFO would wait for a writer.
    handle = os.open(path, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0))
    try:
        if not stat.S_ISREG(os.fstat(handle).st_mode):
            raise OSError("it is not a regular file")
        with open(handle, "rb", closefd=False) as file:
            text = file.read(most + 1)
    finally:
        os.close(handle)
    if len(text) > most:
        raise ValueError(f"it has more than {most} bytes")
    return text


def _check(schedule: Schedule, problem: Problem) -> None:
    """ValueError or DeadlockError unless `schedule` runs and is one for `problem`."""
    if (schedule.placement, schedule.micro_batches) != (problem.placement, problem.micro_batches):
        raise ValueError(f"it is for {schedule.placement} and {schedule.micro_batches} micro-batches, not for "
                         f"{problem.placement} and {problem.micro_batches}")
    check(schedule)
    if max(action.pieces for _, action in schedule.passes()) > problem.max_pieces:
        raise ValueError(f"it has weight gradients in more than {problem.max_pieces} pieces")
    if not within(schedule, problem):
        raise ValueError("it takes more memory than the limits allow")
    deadlock.check(lower(schedule, Times.uniform(schedule.placement.stages)), schedule.placement)


def write(path: Path, schedule: Schedule) -> None:
    """Put `schedule` into `path`, whole or not at all: another process may read it, or write the same.

    A folder that can't be written is worth a warning and no more: the plan is there.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, name = tempfile.mkstemp(dir=path.parent, prefix=path.stem, suffix=".part")
        try:
            with os.fdopen(handle, "w", encoding="utf-8") as file:
                json.dump({"schedule": schedule_to_json(schedule)}, file)
            _replace(Path(name), path)
        except BaseException:
            os.unlink(name)
            raise
    except OSError as error:
        warnings.warn(f"the plan can't be cached: {error}", stacklevel=2)


def _replace(draft: Path, path: Path) -> None:
    """Give `draft` the name of `path`, whatever has it: nothing takes a folder's place, so that gets another name."""
    if path.is_dir() and not path.is_symlink():
        os.rename(path, tempfile.mkdtemp(dir=path.parent, prefix=f"{path.stem}-aside-"))
    os.replace(draft, path)
