"""A process that plans: one request as JSON on standard input, one answer as JSON on standard output.

    python -m ds_vshape.schedule.worker [PARENT] < request.json > answer.json

It ends when the process PARENT isn't its parent any more.

Planning takes seconds of pure Python. In a process of its own, which imports neither torch nor deepspeed, it doesn't
hold up the training that goes on meanwhile.
"""

from __future__ import annotations

import json
import os
import sys
import threading
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ds_vshape.schedule.activations import Activations
from ds_vshape.schedule.choose import schedule_for
from ds_vshape.schedule.schedule import Schedule
from ds_vshape.schedule.serial import (activations_from_json, activations_to_json, schedule_from_json, schedule_to_json,
                                       times_from_json, times_to_json)
from ds_vshape.schedule.timeline import Times

_SECONDS_BETWEEN_LOOKS = 0.5


@dataclass(frozen=True)
class Request:
    """What to plan; `limits` are the highest peaks of the ranks in the unit of `activations`, None for no limit."""

    name: str
    ranks: int
    micro_batches: int
    times: Times
    activations: Activations
    limits: tuple[float, ...] | None
    time_limit: float
    cache: str | None

    def to_json(self) -> dict[str, Any]:
        """The request as plain values."""
        return {**vars(self), "times": times_to_json(self.times), "activations": activations_to_json(self.activations)}

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Request:
        """The request that `to_json` wrote."""
        limits = None if data["limits"] is None else tuple(data["limits"])
        return cls(**{**data, "limits": limits, "times": times_from_json(data["times"]),
                      "activations": activations_from_json(data["activations"])})


def answer(request: Request) -> dict[str, Any]:
    """The planned schedule, or the error that says why there is none."""
    cache = None if request.cache is None else Path(request.cache)
    try:
        plan = schedule_for(request.name, request.ranks, request.micro_batches, request.times, request.activations,
                            limits=request.limits, time_limit=request.time_limit, cache=cache)
    except ValueError as error:
        return {"error": str(error)}
    return {"schedule": schedule_to_json(plan.schedule), "lower_bound": plan.lower_bound, "planning_s": plan.planning_s}


def planned(data: Mapping[str, Any]) -> Schedule:
    """The schedule in an answer; ValueError with the planner's message if there can be none."""
    if "error" in data:
        raise ValueError(data["error"])
    return schedule_from_json(data["schedule"])


def end_with(parent: int) -> None:
    """End this process soon after its `parent` has ended, however that was."""
    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(_SECONDS_BETWEEN_LOOKS)
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


def main() -> None:
    """One request, one answer."""
    if len(sys.argv) > 1:
        end_with(int(sys.argv[1]))
    json.dump(answer(Request.from_json(json.load(sys.stdin))), sys.stdout)


if __name__ == "__main__":
    main()
