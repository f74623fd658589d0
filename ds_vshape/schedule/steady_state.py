"""Schedules for many micro-batches, made as schedules for a few whose steady state repeats.

Between warm-up and cool-down all ranks do the same again every T time units, each time for the next micro-batches. So a
schedule for few micro-batches shows that of many, and making it takes no longer however many there are:

    few     rank 0  F0 F1       B0 B0 F2|B1 B1 F3|B2 B2    B3 B3            1F1B, p = 2; T = 3
            rank 1     F0 B0 B0 F1 B1 B1|F2 B2 B2|F3 B3 B3
    many    what stands between the bars again and again; what follows comes as much later

That this is the schedule that would be made for many: `building_block.reorder` and `fuse` go through time, and what
they do next depends on what is ready, what the ranks keep, and the passes that come next. Once all of that is as it was
T before, but for later micro-batches, it will be so again for as long as there are micro-batches to start.
"""

from __future__ import annotations

from bisect import bisect_left
from collections import defaultdict
from collections.abc import Callable, Mapping
from operator import attrgetter

from ds_vshape.schedule.passes import Kind
from ds_vshape.schedule.repeated import Repeated
from ds_vshape.schedule.schedule import Schedule
from ds_vshape.schedule.timeline import Timeline, Times, simulate

_start_of = attrgetter("start")


def extended(make: Callable[[int], Schedule], micro_batches: int, fewest: int, interval: int = 1) -> Schedule:
    """`make(micro_batches)`, made of a schedule for fewer micro-batches if its middle repeats.

    Args:
        make: the schedule for a number of micro-batches.
        fewest: the number of micro-batches to try first.
        interval: how many of them go through the pipeline in each repeat.
    """
    few = fewest + (micro_batches - fewest) % interval
    while few < micro_batches:
        schedule = make(few)
        times = 1 + (micro_batches - few) // interval
        found = _repeated(schedule, times, interval)
        if found is not None:
            return found
        few += interval * -(-few // (2 * interval))
    return make(micro_batches)


def changed(schedule: Schedule, change: Callable[[Schedule], Schedule]) -> Schedule:
    """`change(schedule)`, made of a schedule for fewer micro-batches where the middle of `schedule` repeats."""
    repeated = [order for order in schedule.orders if isinstance(order, Repeated)]
    if schedule.repeats == 1:
        return change(schedule)
    interval = repeated[0].interval

    def make(few: int) -> Schedule:
        return change(schedule.with_repeats(schedule.repeats - (schedule.micro_batches - few) // interval))

    return extended(make, schedule.micro_batches, schedule.with_repeats(1).micro_batches, interval)


def _repeated(schedule: Schedule, times: int, interval: int) -> Schedule | None:
    """`schedule` with its steady state so many `times`; None where there is none."""
    timeline = simulate(schedule, Times.uniform(schedule.placement.stages))
    found = _steady_state(timeline, interval, schedule.placement.last_stage)
    if found is None:
        return None
    orders = []
    for spans, order in zip(timeline.ranks, schedule.orders):
        first, last = (bisect_left(spans, moment, key=_start_of) for moment in found)
        orders.append(Repeated(order[:first], order[first:last], order[last:], times, interval))
    return Schedule(schedule.name, schedule.placement, schedule.micro_batches + (times - 1) * interval, tuple(orders))


def _steady_state(timeline: Timeline, interval: int, last_stage: int) -> tuple[float, float] | None:
    """From when to when all ranks do what they did just before, for micro-batches that come `interval` later.

    Of all such times the middle one: those who post receives and release sends look some passes ahead and back.
    """
    starts: dict[tuple[Kind, int], dict[int, float]] = defaultdict(dict)
    for spans in timeline.ranks:
        for span in spans:
            starts[span.action.kind, span.action.stage][span.action.micro_batch] = span.start
    of_last = starts[Kind.F, last_stage]
    middle = (len(of_last) - interval) // 2
    if middle < 0:
        return None
    period = of_last[middle + interval] - of_last[middle]
    # When a pass starts that doesn't come again a period later, or didn't come a period before.
    alone = {0.0, timeline.makespan}
    for of_stage in starts.values():
        for micro_batch, start in of_stage.items():
            if of_stage.get(micro_batch + interval) != start + period:
                alone.add(start)
            if of_stage.get(micro_batch - interval) != start - period:
                alone.add(start - period)
    # Between two of these that are far enough apart, what happens in a period happens in the next one again.
    moments = sorted(alone)
    steady = [(one, other) for one, other in zip(moments, moments[1:]) if other - one > period]
    for one, other in sorted(steady, key=lambda pair: pair[0] - pair[1]):
        start = (one + 1 + other - period) // 2
        # A warm-up may look steady too, but runs forwards alone.
        if all(sum(start <= moment < start + period for kind in kinds for moment in starts[kind, stage].values())
               == interval for stage in range(last_stage + 1) for kinds in _together(starts, stage)):
            return start + period, start + 2 * period
    return None


def _together(starts: Mapping[tuple[Kind, int], object], stage: int) -> list[list[Kind]]:
    """The kinds of pass of which a stage runs one for each micro-batch."""
    found = [[kind for kind in kinds if (kind, stage) in starts]
             for kinds in ((Kind.F,), (Kind.B, Kind.BW), (Kind.W, Kind.BW))]
    return [kinds for kinds in found if kinds]
