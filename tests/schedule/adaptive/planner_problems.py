"""Problems for the adaptive planner, and what holds of every plan."""

from __future__ import annotations

import pytest
from hypothesis import strategies as st

from ds_vshape.schedule.activations import Activations, peak_activations
from ds_vshape.schedule.adaptive import Plan, Problem
from ds_vshape.schedule.adaptive.seeds import known_schedules
from ds_vshape.schedule.passes import Kind, Pass
from ds_vshape.schedule.placement import Placement, v
from ds_vshape.schedule.schedule import Schedule, check
from ds_vshape.schedule.timeline import Times, simulate


def counted(ranks: int, micro_batches: int, times: tuple[float, float, float, float], peak: float,
            placement: Placement | None = None) -> Problem:
    """Equal stages, counted as the paper does; in a V if there is no other `placement`."""
    placement, (forward, input_grad, weight_grad, hop) = placement or v(ranks), times
    return Problem(placement, micro_batches, Times.uniform(placement.stages, forward, input_grad, weight_grad, hop),
                   Activations.counted(placement), (float(peak),) * ranks)


def entry_costs(stages: int) -> st.SearchStrategy[tuple[tuple[float, ...], ...]]:
    """What W is made of on each stage, very unequal, or nothing that is known."""
    entries = st.lists(st.sampled_from((0.0, 1.0, 2.0, 30.0)), max_size=9).map(tuple)
    return st.lists(entries, min_size=stages, max_size=stages).map(tuple) | st.just(())


@st.composite
def problems(draw: st.DrawFn, placements: st.SearchStrategy[Placement] = st.integers(1, 4).map(v)) -> Problem:
    """Any times and sizes, different on every stage, and limits from the least upwards."""
    placement, micro_batches = draw(placements), draw(st.integers(1, 6))
    stages = placement.stages

    def each(low: float, high: float) -> tuple[float, ...]:
        return tuple(draw(st.lists(st.floats(low, high), min_size=stages, max_size=stages)))

    whole, kept = each(0.5, 4), each(0, 4)
    if draw(st.booleans()):
        kept = tuple(min(size, left) for size, left in zip(whole, kept))
    scales = tuple(draw(st.lists(st.floats(0.2, 4), min_size=micro_batches, max_size=micro_batches) | st.just([])))
    limits = tuple(sum(whole[stage] for stage in chunks) * draw(st.floats(1, 3)) for chunks in placement.chunks)
    times = Times(each(0.5, 4), each(0.5, 4), each(0, 4), each(0, 2)[1:], scales,
                  entry_costs=draw(entry_costs(stages)))
    return Problem(placement, micro_batches, times, Activations(whole, kept), limits, draw(st.sampled_from((1, 2, 4))))


def second_simulator(schedule: Schedule, times: Times) -> dict[Pass, tuple[float, float]]:
    """Starts and ends by relaxing every constraint until nothing moves any more: slow, and nothing like the first."""
    placement = schedule.placement
    rank_of = {action: rank for rank, order in enumerate(schedule.orders) for action in order}
    giver = {(action.stage, action.micro_batch): action for action in rank_of if action.kind in (Kind.B, Kind.BW)}
    start = {action: 0.0 for action in rank_of}
    moved = True
    while moved:
        moved = False
        for order in schedule.orders:
            for place, action in enumerate(order):
                needs = [(order[place - 1], 0.0)] if place else []
                inputs = []
                if action.kind is Kind.F and action.stage > 0:
                    inputs.append(Pass(Kind.F, action.stage - 1, action.micro_batch))
                if action.kind in (Kind.B, Kind.BW):
                    inputs.append(Pass(Kind.F, action.stage, action.micro_batch))
                    if action.stage < placement.last_stage:
                        inputs.append(giver[action.stage + 1, action.micro_batch])
                if action.kind is Kind.W:
                    inputs.append(giver[action.stage, action.micro_batch])
                needs += [(need, times.hops[min(need.stage, action.stage)] if rank_of[need] != rank_of[action] else 0.0)
                          for need in inputs]
                earliest = max((start[need] + times.of(need) + delay for need, delay in needs), default=0.0)
                if earliest > start[action] + 1e-12:
                    start[action], moved = earliest, True
    return {action: (begin, begin + times.of(action)) for action, begin in start.items()}


def assert_plan_is_right(found: Plan, problem: Problem) -> None:
    schedule = found.schedule
    assert schedule.name == "adaptive" and schedule.placement == problem.placement
    check(schedule)
    # Micro-batches in order on every stage, and the pieces of a W too: gradients are summed in a fixed order.
    for order in schedule.orders:
        for stage in {action.stage for action in order}:
            for kinds in ((Kind.F,), (Kind.B, Kind.BW), (Kind.W, Kind.BW)):
                line = [(action.micro_batch, action.piece) for action in order
                        if action.stage == stage and action.kind in kinds]
                assert line == sorted(line)
    for _, action in schedule.passes():
        if problem.times.entry_costs:
            assert action.pieces <= max(1, len(problem.times.entry_costs[action.stage]))
    spans = second_simulator(schedule, problem.times)
    for rank in found.timeline.ranks:
        for span in rank:
            assert (span.start, span.end) == pytest.approx(spans[span.action], abs=1e-9)
    assert found.timeline.makespan == pytest.approx(max(end for _, end in spans.values()), abs=1e-9)
    assert found.peaks == peak_activations(schedule, problem.activations)
    assert all(peak <= limit * (1 + 1e-6) for peak, limit in zip(found.peaks, problem.limits))
    assert found.lower_bound <= found.timeline.makespan * (1 + 1e-9)
    for known in known_schedules(problem):
        assert found.timeline.makespan <= simulate(known, problem.times).makespan * (1 + 1e-9)
