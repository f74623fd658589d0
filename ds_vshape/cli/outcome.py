"""One planned schedule with its figures, and how it is written for other programs."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

from ds_vshape.cli.request import Limit, Request
from ds_vshape.schedule.activations import Activations
from ds_vshape.schedule.choose import Choice, schedule_for
from ds_vshape.schedule.chunk_times import ChunkTimes
from ds_vshape.schedule.memory_limit import peak_of_1f1b
from ds_vshape.schedule.metrics import Metrics, measure
from ds_vshape.schedule.named import ADAPTIVE, placement_of
from ds_vshape.schedule.schedule import Schedule
from ds_vshape.schedule.serial import pass_to_json
from ds_vshape.schedule.timeline import Timeline


@dataclass(frozen=True)
class Outcome:
    """A schedule, its timeline and its metrics; `planning_s` seconds to make it, `origin` as in `choose.Choice`."""

    schedule: Schedule
    timeline: Timeline
    metrics: Metrics
    planning_s: float
    origin: str

    @classmethod
    def of(cls, choice: Choice, times: ChunkTimes) -> Outcome:
        """The outcome of a choice made for `times`."""
        metrics = measure(choice.schedule, times.on(choice.schedule.placement), choice.timeline)
        return cls(choice.schedule, choice.timeline, metrics, choice.planning_s, choice.origin)

    @property
    def peak(self) -> float:
        """The highest peak of a rank, in chunk activations."""
        return max(self.metrics.peak_activations)

    @property
    def title(self) -> str:
        """What it is, in a line."""
        placement = self.schedule.placement
        return (f"{self.schedule.name}: {placement.ranks} ranks, {placement.stages} stages ({placement.name}), "
                f"{self.schedule.micro_batches} micro-batches")

    @property
    def figures(self) -> str:
        """What it costs, in a line."""
        metrics = self.metrics
        return (f"makespan {metrics.makespan:g} (lower bound {metrics.lower_bound:g}),  bubble {metrics.bubble:.1%},  "
                f"peak {self.peak:g} = {metrics.peak_fraction_of_1f1b:.3g} of 1F1B's,  {self.origin}")

    def within(self, limit: Limit) -> bool:
        """Whether no rank peaks above `limit`."""
        return self.peak <= limit.count(self.schedule.placement.ranks, self.schedule.micro_batches) + 1e-9

    def to_json(self) -> dict[str, Any]:
        """The schedule and its figures for other programs; "stages" is the number of pipeline ranks."""
        return {
            "schedule": self.schedule.name,
            "stages": self.schedule.placement.ranks,
            "micro_batches": self.schedule.micro_batches,
            "placement": [list(stages) for stages in self.schedule.placement.chunks],
            "orders": [[pass_to_json(work) for work in order] for order in self.schedule.orders],
            "metrics": {**asdict(self.metrics), "planning_s": self.planning_s},
        }


def plan_one(name: str, request: Request, limit: Limit | None, progress: Callable[[float], None]) -> Outcome:
    """Plan the schedule `name` as `request` says; `limit` holds for adaptive, whose default is 1F1B's peak."""
    ranks, micro_batches = request.stages, request.micro_batches
    placement = placement_of(name, ranks)
    limits = None
    if name == ADAPTIVE:
        count = peak_of_1f1b(ranks, micro_batches) if limit is None else limit.count(ranks, micro_batches)
        limits = (float(count),) * ranks
    choice = schedule_for(name, ranks, micro_batches, request.times.on(placement),
                          Activations.counted(placement), limits, time_limit=request.time_limit, progress=progress,
                          cache=request.cache)
    return Outcome.of(choice, request.times)
