"""Plans on disk, each under the hash of all that it depends on.

A file holds one schedule as JSON; its figures are computed again when it is read. A file that can't be read, or holds
no schedule for the problem, counts as missing.
"""

from __future__ import annotations

import hashlib
import json
import os
import tempfile
import warnings
from dataclasses import asdict
from pathlib import Path

from ds_vshape.schedule.adaptive.problem import Problem
from ds_vshape.schedule.schedule import Schedule, ScheduleError, check
from ds_vshape.schedule.serial import schedule_from_json, schedule_to_json

# To be raised whenever the planner gives other plans: older files are then no longer found.
VERSION = 9


def path_of(cache: Path, problem: Problem, time_limit: float, compiled: bool) -> Path:
    """Where the plan of `problem` is; `compiled` tells whether numba was there to make it."""
    content = {"version": VERSION, "problem": asdict(problem), "time_limit": float(time_limit), "compiled": compiled}
    digest = hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()
    return cache / f"plan-{digest[:32]}.json"


def read(path: Path, problem: Problem) -> Schedule | None:
    """The schedule in `path`, or None."""
    try:
        schedule = schedule_from_json(json.loads(path.read_text(encoding="utf-8"))["schedule"])
        if (schedule.placement, schedule.micro_batches) != (problem.placement, problem.micro_batches):
            return None
        check(schedule)
    except (OSError, ValueError, KeyError, TypeError, ScheduleError):
        return None
    return schedule


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
            os.replace(name, path)
        except BaseException:
            os.unlink(name)
            raise
    except OSError as error:
        warnings.warn(f"the plan is not kept for the next time: {error}", stacklevel=2)
