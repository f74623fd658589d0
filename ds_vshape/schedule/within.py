"""Schedules within limits that also hold for what passes need while they run, and for messages in transit.

The planner limits activations alone (adaptive/). How much more a rank needs depends on the order: which pass runs at
the peak, and which messages are on their way. So the planner gets the limits less what a known order needs besides, and
plans again with what its own order needs, if that is more.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

from ds_vshape.schedule.activations import Activations, Working, peak_activations, working_peaks
from ds_vshape.schedule.adaptive.problem import SLACK, LimitError
from ds_vshape.schedule.lowering import lower
from ds_vshape.schedule.passes import BW, F, Kind, O, Pass
from ds_vshape.schedule.placement import Placement
from ds_vshape.schedule.schedule import Schedule
from ds_vshape.schedule.timeline import Times

Limits = tuple[float, ...]
# How often the planner is asked again with less room, before the order that needs least is taken.
_AGAIN = 3


def peaks_with_passes(schedule: Schedule, activations: Activations, working: Working) -> Limits:
    """The most that is alive at once on each rank, with running passes and messages."""
    # A repeat frees what it takes; but which micro-batches are recomputed or offloaded may differ.
    looked_at = schedule if schedule.gives_back_memory else schedule.with_repeats(1)
    return working_peaks(lower(looked_at, Times.uniform(schedule.placement.stages)), activations, working)


def one_at_a_time(placement: Placement, activations: Activations, micro_batches: int = 1, *, recompute: bool = False,
                  offload: bool = False) -> Schedule:
    """The order that needs least memory: the passes of a micro-batch with whole backwards, then those of the next; with
    each stage but the rank's last recomputed or offloaded, where that is allowed and gives memory back."""
    def of_micro_batch(stages: Sequence[int], micro_batch: int) -> Iterator[Pass]:
        *before, last = sorted(stages)
        kinds = {stage: activations.least_between(stage, recompute, offload)[1] for stage in before}
        for stage in before:
            yield F(stage, micro_batch)
            if kinds[stage] is Kind.O:
                yield O(stage, micro_batch)
        yield F(last, micro_batch)
        yield BW(last, micro_batch)
        for stage in reversed(before):
            if kinds[stage] is not None:
                yield Pass(Kind.C if kinds[stage] is Kind.C else Kind.R, stage, micro_batch)
            yield BW(stage, micro_batch)

    orders = tuple(tuple(action for micro_batch in range(micro_batches)
                         for action in of_micro_batch(stages, micro_batch)) for stages in placement.chunks)
    return Schedule("one at a time", placement, micro_batches, orders)


def besides_activations(schedule: Schedule, activations: Activations, working: Working) -> Limits:
    """What each rank's peak with passes is above its peak of activations."""
    peaks = peaks_with_passes(schedule, activations, working)
    return tuple(peak - alive for peak, alive in zip(peaks, peak_activations(schedule, activations), strict=True))


def plan_within(limits: Limits, alive: Limits, usual: Schedule, smallest: Schedule, activations: Activations,
                working: Working, plan: Callable[[Limits], Schedule]) -> Schedule:
    """A schedule whose peaks with passes are within `limits`, of one rank each.

    Args:
        alive: the least possible peaks of activations.
        usual: what is known of orders: what passes need besides the activations in this one is left for them at first.
        smallest: the order that needs least.
        plan: makes a schedule for limits of activations alone; raises LimitError for those that can't be met.

    Raises:
        LimitError: if not even the order that needs least is within the limits.
    """
    sizes = activations, working
    least = tuple(map(sum, zip(alive, besides_activations(smallest, *sizes), strict=True)))
    short = [rank for rank, peak in enumerate(least) if peak > limits[rank] * (1 + SLACK)]
    if short:
        raise LimitError(f"a limit of {', '.join(f'{limits[rank]:g} on rank {rank}' for rank in short)} can't be met: "
                         f"the least possible peaks of the ranks are {', '.join(f'{peak:g}' for peak in least)}")
    # Where the usual leaves no room for activations, as little as is needed.
    left = tuple(max(kept, limit - extra) for kept, limit, extra in
                 zip(alive, limits, besides_activations(usual, *sizes), strict=True))
    for _ in range(_AGAIN):
        found = plan(left)
        extras = besides_activations(found, *sizes)
        if all(peak <= limit * (1 + SLACK) for peak, limit in
               zip(peaks_with_passes(found, *sizes), limits, strict=True)):
            return found
        left = tuple(max(kept, min(before, limit - extra)) for kept, before, limit, extra in
                     zip(alive, left, limits, extras, strict=True))
    if any(peak > limit * (1 + SLACK) for peak, limit in zip(peaks_with_passes(smallest, *sizes), limits, strict=True)):
        raise LimitError("no plan was found whose running passes are within the limits; the least peaks of the "
                         f"ranks are about {', '.join(f'{peak:g}' for peak in least)}")
    return smallest
