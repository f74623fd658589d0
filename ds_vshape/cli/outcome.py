"""One planned schedule with its figures, also as JSON."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from time import perf_counter
from typing import Any

from ds_vshape.cli.giving_back import GivingBack
from ds_vshape.cli.layer_costs import LayerCostsFile
from ds_vshape.cli.options import Limit, PlanOptions
from ds_vshape.schedule.choose import Choice
from ds_vshape.schedule.chunk_times import ChunkTimes
from ds_vshape.schedule.metrics import Metrics, measure
from ds_vshape.schedule.named import ADAPTIVE
from ds_vshape.schedule.partition.balance import balance
from ds_vshape.schedule.partition.partition_and_order import PartitionProblem, limits_of_1f1b, plan_partition
from ds_vshape.schedule.placement import Placement
from ds_vshape.schedule.request import Request, usable_cores
from ds_vshape.schedule.schedule import Schedule
from ds_vshape.schedule.serial import pass_to_json
from ds_vshape.schedule.timeline import Timeline


@dataclass(frozen=True)
class Outcome:
    """A schedule, its timeline and its metrics; `planning_s` seconds to make it, `origin` as in `choose.Choice`.

    `bounds` are the first layer of each stage and the number of layers, where the costs of layers are known.
    """

    schedule: Schedule
    timeline: Timeline
    metrics: Metrics
    planning_s: float
    origin: str
    bounds: tuple[int, ...] | None = None

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
        if not limit.is_count:
            return self.metrics.peak_fraction_of_1f1b <= limit.value + 1e-9
        return self.peak <= limit.value + 1e-9

    def to_json(self) -> dict[str, Any]:
        """The schedule and its figures for other programs; "stages" is the number of pipeline ranks."""
        return {
            "schedule": self.schedule.name,
            "stages": self.schedule.placement.ranks,
            "micro_batches": self.schedule.micro_batches,
            "placement": [list(stages) for stages in self.schedule.placement.chunks],
            **({} if self.bounds is None else {"partition": list(self.bounds)}),
            "orders": [[pass_to_json(action) for action in order] for order in self.schedule.orders],
            "metrics": {**asdict(self.metrics), "planning_s": self.planning_s},
        }


def plan_one(name: str, placement: Placement, options: PlanOptions, limit: Limit | None,
             progress: Callable[[float], None]) -> Outcome:
    """Plan the schedule `name` on `placement` as `options` say; `limit` holds for adaptive, whose default is 1F1B's
    peak."""
    if options.layer_costs is not None:
        return _plan_layers(name, placement, options, options.layer_costs, limit, progress)
    micro_batches, giving_back = options.micro_batches, options.giving_back
    count = None if limit is None or name != ADAPTIVE else limit.count(placement.ranks, micro_batches)
    times = giving_back.times(options.times.on(placement), placement)
    request = Request.within(count, name, placement, micro_batches, times, giving_back.sizes(placement),
                             time_limit=options.time_limit, cache=options.cache)
    request = replace(request, recompute=giving_back.recompute, offload=giving_back.offload,
                      cores=usable_cores())
    return Outcome.of(request.choose(progress), options.times, giving_back)


def _plan_layers(name: str, placement: Placement, options: PlanOptions, file: LayerCostsFile, limit: Limit | None,
                 progress: Callable[[float], None]) -> Outcome:
    """The same where the costs of layers are known: adaptive plans its partition too, for others ranks are balanced,
    unless the config says where the stages are."""
    layers, ranks, micro_batches = file.layers, options.stages, options.micro_batches
    began = perf_counter()
    hops = (file.hop,) * (placement.stages - 1)
    given = options.bounds if name == options.schedules[0][0] else None
    limits = limits_of_1f1b(1.0 if limit is None else limit.value, layers, ranks, micro_batches)
    if name == ADAPTIVE and given is None:
        found = plan_partition(PartitionProblem(layers, placement, micro_batches, limits, hops), options.time_limit / 2)
        bounds, planned = found.bounds, found.plan
        choice = Choice(planned.schedule, planned.timeline, planned.peaks, planned.lower_bound, 0.0,
                        "plan for these layers")
    else:
        bounds = given or balance(layers.costs, placement)
        request = Request.within(limits[0] if name == ADAPTIVE else None, name, placement, micro_batches,
                                 layers.times(bounds, hops), layers.activations(bounds), time_limit=options.time_limit,
                                 cache=options.cache)
        choice = replace(request, cores=usable_cores()).choose(progress)
    progress(1.0)
    # In units of a chunk of the model, as everywhere, but by the layers' own sizes.
    chunk = sum(layers.after_forward) / (2 * ranks) or 1.0
    peak_of_1f1b = limits_of_1f1b(1.0, layers, ranks, micro_batches)[0] or 1.0
    metrics = Metrics(choice.timeline.makespan, choice.timeline.longest_span, choice.timeline.bubble,
                      tuple(peak / chunk for peak in choice.peaks), max(choice.peaks) / peak_of_1f1b,
                      choice.lower_bound)
    return Outcome(choice.schedule, choice.timeline, metrics, perf_counter() - began, choice.origin, bounds)
