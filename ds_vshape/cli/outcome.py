"""One planned schedule with its figures, also as JSON."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from typing import Any

from ds_vshape.cli.giving_back import GivingBack
from ds_vshape.cli.options import Limit, PlanOptions
from ds_vshape.schedule.choose import Choice
from ds_vshape.schedule.chunk_times import ChunkTimes
from ds_vshape.schedule.metrics import Metrics, measure
from ds_vshape.schedule.named import ADAPTIVE
from ds_vshape.schedule.placement import Placement
from ds_vshape.schedule.request import Request, usable_cores
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
    def of(cls, choice: Choice, times: ChunkTimes, giving_back: GivingBack = GivingBack()) -> Outcome:
        """The outcome of a choice made for `times`."""
        placement = choice.schedule.placement
        metrics = measure(choice.schedule, times.on(placement), choice.timeline, giving_back.sizes(placement))
        if giving_back.any and choice.schedule.name == ADAPTIVE:
            # That of orders alone with the same peak is none.
            metrics = replace(metrics, lower_bound=choice.lower_bound)
        return cls(choice.schedule, choice.timeline, metrics, choice.planning_s, choice.origin)

    @property
    def peak(self) -> float:
        """The highest peak of a rank, in chunk activations."""
        return max(self.metrics.peak_activations)

    @property
    def title(self) -> str:
        """A line with its name and sizes."""
        placement = self.schedule.placement
        return (f"{self.schedule.name}: {placement.ranks} ranks, {placement.stages} stages ({placement.name}), "
                f"{self.schedule.micro_batches} micro-batches")

    @property
    def figures(self) -> str:
        """A line with its figures."""
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
            "orders": [[pass_to_json(action) for action in order] for order in self.schedule.orders],
            "metrics": {**asdict(self.metrics), "planning_s": self.planning_s},
        }


def plan_one(name: str, placement: Placement, options: PlanOptions, limit: Limit | None,
             progress: Callable[[float], None]) -> Outcome:
    """Plan the schedule `name` on `placement` as `options` say; `limit` holds for adaptive, whose default is 1F1B's
    peak."""
    micro_batches, giving_back = options.micro_batches, options.giving_back
    count = None if limit is None or name != ADAPTIVE else limit.count(placement.ranks, micro_batches)
    request = Request.within(count, name, placement, micro_batches, giving_back.times(options.times.on(placement)),
                             giving_back.sizes(placement), time_limit=options.time_limit, cache=options.cache)
    request = replace(request, recompute=giving_back.recompute, offload=giving_back.offload,
                      cores=usable_cores())
    return Outcome.of(request.choose(progress), options.times, giving_back)
