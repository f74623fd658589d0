"""Joins B and W to whole backwards where no rank gains from the split.

Splitting a backward has a cost: the output gradient stays in memory, and the framework has two smaller pieces of work.
If W directly follows its B, and the stage before doesn't use the input gradient until W has ended, BW is equivalent.
"""

from __future__ import annotations

from ds_vshape.schedule.passes import Kind, Pass
from ds_vshape.schedule.schedule import Order, Schedule
from ds_vshape.schedule.steady_state import changed
from ds_vshape.schedule.timeline import Span, Timeline, Times, simulate

# The slack of measured times, as a share of a mean F.
_MEASURED_SLACK = 0.1


def fuse(schedule: Schedule, times: Times, slack: float = 0.0) -> Schedule:
    """`schedule` with B and W run as BW wherever that delays no pass of any rank, given `times`.

    `slack` is how long before its use the input gradient must still be there: fusions that are free only if the times
    hold exactly would cost something as soon as they don't.

    Every pass still starts when it did: each fused input gradient is there before the pass that uses it started in
    `simulate(schedule, times)`, so all its fusions may happen at once. The peaks are those of the order, unchanged.
    """
    timeline = simulate(schedule, times)
    users = _starts_of_backwards(timeline)
    delays = times.delays(schedule.placement)

    def waits_not(b: Span, w: Span) -> bool:
        stage, micro_batch = b.action.stage, b.action.micro_batch
        if (b.action.kind, w.action) != (Kind.B, Pass(Kind.W, stage, micro_batch)):
            return False
        if stage == 0:
            return True
        return w.end + delays[stage - 1] + slack <= users[stage - 1, micro_batch]

    def fused(spans: tuple[Span, ...]) -> Order:
        order: list[Pass] = []
        place = 0
        while place < len(spans):
            b = spans[place]
            if place + 1 < len(spans) and waits_not(b, spans[place + 1]):
                order.append(Pass(Kind.BW, b.action.stage, b.action.micro_batch))
                place += 2
            else:
                order.append(b.action)
                place += 1
        return tuple(order)

    return schedule.with_orders(tuple(fused(spans) for spans in timeline.ranks))


def fuse_measured(schedule: Schedule, times: Times) -> Schedule:
    """As `fuse`, for times that were measured: a fusion that is free by a hair would cost something as soon as they
    drift."""
    return fuse(schedule, times, _MEASURED_SLACK * sum(times.forward) / len(times.forward))


def unfused(schedule: Schedule) -> Schedule:
    """`schedule` with every BW as B and its W behind it, so that each of them can be timed."""
    return changed(schedule, _unfused)


def _unfused(schedule: Schedule) -> Schedule:
    return schedule.with_orders(tuple(
        tuple(part for action in order for part in _parts(action)) for order in schedule.orders))


def with_whole_backwards(schedule: Schedule) -> Schedule:
    """`schedule` with every B as BW and no W: the same order of everything else."""
    return changed(schedule, _with_whole_backwards)


def _with_whole_backwards(schedule: Schedule) -> Schedule:
    return schedule.with_orders(tuple(
        tuple(Pass(Kind.BW, action.stage, action.micro_batch) if action.kind is Kind.B else action
              for action in order if action.kind is not Kind.W) for order in schedule.orders))


def _parts(action: Pass) -> tuple[Pass, ...]:
    if action.kind is not Kind.BW:
        return (action,)
    return Pass(Kind.B, action.stage, action.micro_batch), Pass(Kind.W, action.stage, action.micro_batch)


def _starts_of_backwards(timeline: Timeline) -> dict[tuple[int, int], float]:
    """When the B or BW of each (stage, micro-batch) starts."""
    return {(span.action.stage, span.action.micro_batch): span.start
            for spans in timeline.ranks for span in spans if span.action.kind.gives_input_gradient}
