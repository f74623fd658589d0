"""Problems for the adaptive planner, and what holds of every plan."""

from __future__ import annotations

import pytest
from hypothesis import strategies as st

from ds_vshape.schedule.activations import Activations, peak_activations
from ds_vshape.schedule.adaptive import Plan, Problem
from ds_vshape.schedule.adaptive.seeds import known_schedules
from ds_vshape.schedule.passes import Kind, Pass
from ds_vshape.schedule.placement import v
from ds_vshape.schedule.schedule import Schedule, check
from ds_vshape.schedule.timeline import Times, simulate


def counted(ranks: int, micro_batches: int, times: tuple[float, float, float, float], peak: float) -> Problem:
    """Equal stages, counted as the paper does."""
    forward, input_grad, weight_grad, hop = times
    return Problem(ranks, micro_batches, Times.uniform(2 * ranks, forward, input_grad, weight_grad, hop),
                   Activations.counted(v(ranks)), (float(peak),) * ranks)


@st.composite
def problems(draw: st.DrawFn) -> Problem:
    """Any times and sizes, different on every stage, and limits from the least upwards."""
    ranks, micro_batches = draw(st.integers(1, 4)), draw(st.integers(1, 6))

    def each(low: float, high: float) -> tuple[float, ...]:
        return tuple(draw(st.lists(st.floats(low, high), min_size=2 * ranks, max_size=2 * ranks)))

    whole, kept = each(0.5, 4), each(0, 4)
    if draw(st.booleans()):
        kept = tuple(min(size, left) for size, left in zip(whole, kept))
    limits = tuple((whole[rank] + whole[2 * ranks - 1 - rank]) * draw(st.floats(1, 3)) for rank in range(ranks))
    return Problem(ranks, micro_batches, Times(each(0.5, 4), each(0.5, 4), each(0, 4), each(0, 2)[1:]),
                   Activations(whole, kept), limits, draw(st.sampled_from((1, 2, 4))))


def second_simulator(schedule: Schedule, times: Times) -> dict[Pass, tuple[float, float]]:
    """Starts and ends by relaxing every constraint until nothing moves any more: slow, and nothing like the first."""
    placement = schedule.placement
    rank_of = {work: rank for rank, order in enumerate(schedule.orders) for work in order}
    giver = {(work.stage, work.micro_batch): work for work in rank_of if work.kind in (Kind.B, Kind.BW)}
    start = {work: 0.0 for work in rank_of}
    moved = True
    while moved:
        moved = False
        for order in schedule.orders:
            for place, work in enumerate(order):
                needs = [(order[place - 1], 0.0)] if place else []
                inputs = []
                if work.kind is Kind.F and work.stage > 0:
                    inputs.append(Pass(Kind.F, work.stage - 1, work.micro_batch))
                if work.kind in (Kind.B, Kind.BW):
                    inputs.append(Pass(Kind.F, work.stage, work.micro_batch))
                    if work.stage < placement.last_stage:
                        inputs.append(giver[work.stage + 1, work.micro_batch])
                if work.kind is Kind.W:
                    inputs.append(giver[work.stage, work.micro_batch])
                needs += [(need, times.hops[min(need.stage, work.stage)] if rank_of[need] != rank_of[work] else 0.0)
                          for need in inputs]
                earliest = max((start[need] + times.of(need) + delay for need, delay in needs), default=0.0)
                if earliest > start[work] + 1e-12:
                    start[work], moved = earliest, True
    return {work: (begin, begin + times.of(work)) for work, begin in start.items()}


def assert_plan_is_right(found: Plan, problem: Problem) -> None:
    schedule = found.schedule
    assert schedule.name == "adaptive" and schedule.placement == v(problem.ranks)
    check(schedule)
    # Micro-batches in order on every stage, and the pieces of a W too: gradients are summed in a fixed order.
    for order in schedule.orders:
        for stage in {work.stage for work in order}:
            for kinds in ((Kind.F,), (Kind.B, Kind.BW), (Kind.W, Kind.BW)):
                line = [(work.micro_batch, work.piece) for work in order if work.stage == stage and work.kind in kinds]
                assert line == sorted(line)
    spans = second_simulator(schedule, problem.times)
    for rank in found.timeline.ranks:
        for span in rank:
            assert (span.start, span.end) == pytest.approx(spans[span.work], abs=1e-9)
    assert found.timeline.makespan == pytest.approx(max(end for _, end in spans.values()), abs=1e-9)
    assert found.peaks == peak_activations(schedule, problem.activations)
    assert all(peak <= limit * (1 + 1e-6) for peak, limit in zip(found.peaks, problem.limits))
    assert found.lower_bound <= found.timeline.makespan * (1 + 1e-9)
    for known in known_schedules(problem):
        assert found.timeline.makespan <= simulate(known, problem.times).makespan * (1 + 1e-9)
