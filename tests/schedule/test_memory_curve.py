"""The curve of what a rank keeps, against the count that gives its peak."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ds_vshape.schedule.activations import Activations, peaks
from ds_vshape.schedule.memory_curve import memory_curve
from ds_vshape.schedule.named import SCHEDULES, build
from ds_vshape.schedule.passes import Kind
from ds_vshape.schedule.timeline import Span, Times, simulate


@settings(max_examples=60, deadline=None)
@given(st.sampled_from(sorted(SCHEDULES)), st.integers(1, 4), st.integers(1, 6), st.data())
def test_at_every_moment_it_is_the_sum_of_what_is_alive(name: str, ranks: int, micro_batches: int,
                                                        data: st.DataObject) -> None:
    schedule = build(name, ranks, micro_batches)
    stages = schedule.placement.stages
    sizes = st.lists(st.integers(1, 9), min_size=stages, max_size=stages).map(tuple)
    activations = Activations(data.draw(sizes), data.draw(sizes))
    timeline = simulate(schedule, Times.uniform(stages, 10, 12, 8, 1))
    for rank, spans in enumerate(timeline.ranks):
        curve = memory_curve(spans, activations)
        assert [time for time, _ in curve] == sorted(time for time, _ in curve)
        assert max(alive for _, alive in curve) == peaks(schedule, activations)[rank]
        assert curve[-1][1] == 0
        for (time, alive), (until, _) in zip(curve, curve[1:]):
            if until > time:
                assert alive == alive_at((time + until) / 2, spans, activations)


def alive_at(time: float, spans: tuple[Span, ...], activations: Activations) -> float:
    """By the definition: whole from the start of F to the end of B, then what is kept to the end of W."""
    found = 0.0
    starts = {(span.work.stage, span.work.micro_batch): span.start for span in spans if span.work.kind is Kind.F}
    for (stage, micro_batch), start in starts.items():
        ends = {span.work.kind: span.end for span in spans
                if (span.work.stage, span.work.micro_batch) == (stage, micro_batch)}
        if start <= time < ends.get(Kind.B, ends.get(Kind.BW, 0.0)):
            found += activations.whole[stage]
        elif Kind.B in ends and ends[Kind.B] <= time < ends[Kind.W]:
            found += activations.kept[stage]
    return found


def test_memory_that_is_taken_again_at_once_leaves_no_dip() -> None:
    schedule = build("1f1b", 2, 3)
    spans = simulate(schedule, Times.uniform(2)).ranks[1]
    assert memory_curve(spans, Activations((2, 2), (2, 2))) == [(1, 2), (4, 2), (7, 2), (10, 0)]


@pytest.mark.parametrize("pieces", [2, 5])
def test_pieces_of_a_w_give_back_their_shares(pieces: int) -> None:
    schedule = build("v-min", 1, 1)
    order = tuple(part for work in schedule.orders[0]
                  for part in (work.cut(pieces) if work.kind is Kind.W else (work,)))
    spans = simulate(schedule.with_orders((order,)), Times.uniform(2)).ranks[0]
    curve = memory_curve(spans, Activations((10, 10), (10, 10)))
    falls = [before - after for (_, before), (_, after) in zip(curve, curve[1:]) if after < before]
    pieces_there = sum(span.work.kind is Kind.W for span in spans)
    assert falls.count(pytest.approx(10 / pieces)) == pieces_there
