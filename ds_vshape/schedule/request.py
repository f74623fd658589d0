"""The request to a planner in a process of its own, and its answer, as JSON.

Planning takes seconds of pure Python. In another process, which imports neither torch nor deepspeed, it doesn't hold up
the training that goes on meanwhile. The answer is checked before anything is trained by it.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any, final

from pydantic import Field, TypeAdapter
from typing_extensions import TypedDict

from ds_vshape.schedule.activations import Activations, Working, peak_activations
from ds_vshape.schedule.adaptive.problem import SLACK, LimitError, Problem
from ds_vshape.schedule.builders.fuse import fuse_measured
from ds_vshape.schedule.choose import PLAN, Choice, schedule_for
from ds_vshape.schedule.placement import Placement
from ds_vshape.schedule.schedule import Schedule, check
from ds_vshape.schedule.serial import (JsonSchedule, activations_from_json, activations_to_json, most_bytes,
                                       placement_from_json, placement_to_json, read_json, schedule_from_json,
                                       schedule_to_json, times_from_json, times_to_json, working_from_json,
                                       working_to_json)
from ds_vshape.schedule.timeline import Times, simulate
from ds_vshape.schedule.within import peaks_with_passes

# The most that an answer has besides its schedule.
_REST_BYTES = 4096


def usable_cores() -> int:
    """How many cores this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


@dataclass(frozen=True)
class Request:
    """What to plan; `limits` are the highest peaks of the ranks in the unit of `activations`, None for no limit. With
    `working` they hold for what passes need while they run, too.

    `recompute` and `offload` say what the plan may do besides ordering. Planning uses up to `cores` cores. What is
    chosen is no slower than any of `running` that keeps to the limits: schedules that the job has trained by.
    """

    name: str
    placement: Placement
    micro_batches: int
    times: Times
    activations: Activations
    limits: tuple[float, ...] | None
    time_limit: float
    cache: str | None
    recompute: bool = False
    offload: bool = False
    working: Working | None = None
    cores: int = 1
    running: tuple[Schedule, ...] = ()

    @classmethod
    def within(cls, limit: float | None, name: str, placement: Placement, micro_batches: int, times: Times,
               activations: Activations | None = None, *, time_limit: float, cache: Path | None = None) -> Request:
        """A request with the same `limit` for every rank, in the unit of `activations`; without `activations` they are
        counted as the paper does.
        """
        limits = None if limit is None else (limit,) * placement.ranks
        return cls(name, placement, micro_batches, times, activations or Activations.counted(placement), limits,
                   time_limit, None if cache is None else str(cache))

    def choose(self, progress: Callable[[float], None] = lambda fraction: None) -> Choice:
        """Plan in this process; raises ValueError as `choose.schedule_for` does."""
        choice = schedule_for(self.name, self.placement, self.micro_batches, self.times, self.activations, self.limits,
                              self.working, recompute=self.recompute, offload=self.offload, time_limit=self.time_limit,
                              progress=progress, cores=self.cores,
                              cache=None if self.cache is None else Path(self.cache))
        for running in self.running:
            # Whole backwards may need more while they run than B and W do.
            for form in (fuse_measured(running, self.times), running):
                schedule = replace(form, name=self.name)
                timeline = simulate(schedule, self.times)
                if timeline.makespan < choice.timeline.makespan * (1 - SLACK) and self.keeps_to_limits(schedule):
                    choice = replace(choice, schedule=schedule, timeline=timeline, origin=PLAN,
                                     peaks=peak_activations(schedule, self.activations))
        return choice

    def keeps_to_limits(self, schedule: Schedule) -> bool:
        """Whether the peaks of `schedule`, with passes where `working` is known, are within `limits`."""
        if self.limits is None:
            return True
        peaks = peak_activations(schedule, self.activations) if self.working is None else (
            peaks_with_passes(schedule, self.activations, self.working))
        return all(peak <= limit * (1 + SLACK) for peak, limit in zip(peaks, self.limits, strict=True))

    def to_json(self) -> dict[str, Any]:
        """The request as plain values."""
        return {**vars(self), "placement": placement_to_json(self.placement), "times": times_to_json(self.times),
                "activations": activations_to_json(self.activations),
                "working": None if self.working is None else working_to_json(self.working),
                "running": [*map(schedule_to_json, self.running)]}

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Request:
        """The request that `to_json` wrote."""
        limits = None if data["limits"] is None else tuple(data["limits"])
        working = None if data["working"] is None else working_from_json(data["working"])
        return cls(**{**data, "placement": placement_from_json(data["placement"]), "limits": limits,
                      "times": times_from_json(data["times"]),
                      "activations": activations_from_json(data["activations"]), "working": working,
                      "running": tuple(map(schedule_from_json, data["running"]))})

    @property
    def most_bytes(self) -> int:
        """The greatest length of an answer."""
        return most_bytes(self.placement, self.micro_batches, Problem.max_pieces) + _REST_BYTES


_Finite = Annotated[float, Field(strict=True, ge=0, allow_inf_nan=False)]


@final
class Planned(TypedDict):
    """The schedule, a lower bound of all makespans in the unit of the times, and the seconds that planning took."""

    schedule: JsonSchedule
    lower_bound: _Finite
    planning_s: _Finite


@final
class Refused(TypedDict):
    """The error that says why no schedule keeps to the limits."""

    error: Annotated[str, Field(strict=True)]


Answer = Planned | Refused
_ANSWER: TypeAdapter[Answer] = TypeAdapter(Answer)


def answer(request: Request) -> dict[str, Any]:
    """The planned schedule, or the error that says why limits can't be met, as plain values."""
    try:
        plan = request.choose()
    except LimitError as error:
        return {"error": str(error)}
    return {"schedule": schedule_to_json(plan.schedule), "lower_bound": plan.lower_bound, "planning_s": plan.planning_s}


def read_answer(text: bytes) -> Answer:
    """The answer in `text`; ValueError if there is none."""
    return read_json(text, _ANSWER)


def check_schedule(schedule: Schedule, request: Request) -> None:
    """ValueError unless `schedule` is one that `request` asks for, and runs to its end."""
    asked = request.name, request.placement, request.micro_batches
    if (schedule.name, schedule.placement, schedule.micro_batches) != asked:
        raise ValueError(f"it is {schedule.name!r} for {schedule.placement} and {schedule.micro_batches} "
                         f"micro-batches, not {request.name!r} for {request.placement} and {request.micro_batches}")
    check(schedule)
    simulate(schedule, request.times)
    if not request.keeps_to_limits(schedule):
        raise ValueError("it takes more memory than the limits allow")
