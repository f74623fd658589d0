"""What a schedule costs, in one place for the planner, the engine's predictions and the benchmarks."""

from __future__ import annotations

from dataclasses import dataclass

from ds_vshape.schedule.activations import Activations, peak_activations
from ds_vshape.schedule.bounds import lower_bound_of_limits
from ds_vshape.schedule.memory_limit import peak_of_1f1b
from ds_vshape.schedule.passes import Kind
from ds_vshape.schedule.schedule import Schedule, variants
from ds_vshape.schedule.timeline import Timeline, Times, simulate


@dataclass(frozen=True)
class Metrics:
    """Times in the unit of the pass times; activations in those of 1/(2p) of the model for one micro-batch."""

    makespan: float
    longest_span: float
    bubble: float
    peak_activations: tuple[float, ...]
    peak_fraction_of_1f1b: float
    lower_bound: float


def measure(schedule: Schedule, times: Times, timeline: Timeline | None = None,
            activations: Activations | None = None) -> Metrics:
    """The metrics of `schedule`, simulated with `times` unless its `timeline` is there already.

    `activations` are counted as the paper does; they matter where some are recomputed.
    """
    timeline = timeline or simulate(schedule, times)
    placement, micro_batches = schedule.placement, schedule.micro_batches
    sizes = activations or Activations.counted(placement)
    peaks = peak_activations(schedule, sizes)
    # Compared with what may be done as this schedule does.
    kinds = {kind for kind, _, _ in variants(schedule)} & {Kind.C, Kind.O} if schedule.gives_back_memory else ()
    return Metrics(
        makespan=timeline.makespan,
        longest_span=timeline.longest_span,
        bubble=timeline.bubble,
        peak_activations=peaks,
        peak_fraction_of_1f1b=max(peaks) / peak_of_1f1b(placement.ranks, micro_batches),
        lower_bound=lower_bound_of_limits(placement, micro_batches, times, sizes, (max(peaks),) * placement.ranks,
                                          kinds))
