"""Peaks and curves of what a rank keeps, against a count of what is alive at each moment."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ds_vshape.schedule.activations import Activations, memory_curve, peak_activations
from ds_vshape.schedule.builders.everything import with_everything_offloaded, with_everything_recomputed
from ds_vshape.schedule.named import SCHEDULES, build
from ds_vshape.schedule.passes import Kind, Pass
from ds_vshape.schedule.placement import v
from ds_vshape.schedule.schedule import Schedule
from ds_vshape.schedule.timeline import Span, Times, simulate


@settings(max_examples=60)
@given(st.sampled_from(sorted(SCHEDULES)), st.integers(1, 4), st.integers(1, 6), st.data())
def test_at_every_moment_it_is_the_sum_of_what_is_alive(name: str, ranks: int, micro_batches: int,
                                                        data: st.DataObject) -> None:
    schedule = in_pieces(build(name, ranks, micro_batches), data.draw(st.integers(1, 3)))
    stages = schedule.placement.stages
    sizes = st.lists(st.integers(1, 9), min_size=stages, max_size=stages).map(tuple)
    activations = Activations(data.draw(sizes), data.draw(sizes))
    timeline = simulate(schedule, Times.uniform(stages, 10, 12, 8, 1))
    for rank, spans in enumerate(timeline.ranks):
        curve = memory_curve(spans, activations)
        assert [time for time, _ in curve] == sorted(time for time, _ in curve)
        moments = [moment for span in spans for moment in (span.start, span.end)]
        most = max(alive_at(moment, spans, activations) for moment in moments)
        assert max(alive for _, alive in curve) == most == peak_activations(schedule, activations)[rank]
        assert curve[-1][1] == 0
        for (time, alive), (until, _) in zip(curve, curve[1:]):
            if until > time:
                assert alive == alive_at((time + until) / 2, spans, activations)


def in_pieces(schedule: Schedule, pieces: int) -> Schedule:
    """Each W in `pieces`; the next F goes between two of them where only W stand before it."""
    orders = []
    for order in schedule.orders:
        cut = [part for action in order for part in (action.cut(pieces) if action.kind is Kind.W else (action,))]
        for place in range(len(cut) - 1):
            if cut[place].kind is Kind.W and cut[place].piece < pieces - 1 and cut[place + 1].kind is not Kind.F:
                later = next((other for other in range(place + 1, len(cut)) if cut[other].kind is not Kind.W), None)
                if later is not None and cut[later].kind is Kind.F:
                    cut.insert(place + 1, cut.pop(later))
        orders.append(tuple(cut))
    return schedule.with_orders(tuple(orders))


def alive_at(time: float, spans: tuple[Span, ...], activations: Activations) -> float:
    """By the definition: all of it from the start of F to the end of B, then what B leaves to the end of the last piece
    of W."""
    found = 0.0
    starts = {(span.action.stage, span.action.micro_batch): span.start for span in spans if span.action.kind is Kind.F}
    for (stage, micro_batch), start in starts.items():
        ends = {span.action.kind: span.end for span in spans
                if (span.action.stage, span.action.micro_batch) == (stage, micro_batch)}
        if start <= time < ends.get(Kind.B, ends.get(Kind.BW, 0.0)):
            found += activations.after_forward[stage]
        elif Kind.B in ends and ends[Kind.B] <= time < ends[Kind.W]:
            found += activations.after_backward[stage]
    return found


@settings(max_examples=40, deadline=None)
@given(st.sampled_from(sorted(SCHEDULES)), st.integers(1, 3), st.integers(1, 4), st.integers(1, 3), st.integers(1, 3),
       st.booleans(), st.data())
def test_what_is_forgotten_or_on_the_host_takes_no_memory(name: str, ranks: int, micro_batches: int, behind: int,
                                                          ahead: int, recomputes: bool, data: st.DataObject) -> None:
    named = build(name, ranks, micro_batches)
    schedule = with_everything_offloaded(with_everything_recomputed(named) if recomputes else named, behind, ahead)
    stages = schedule.placement.stages

    def sizes(least: int, most: int) -> tuple[int, ...]:
        return tuple(data.draw(st.lists(st.integers(least, most), min_size=stages, max_size=stages)))

    activations = Activations(sizes(10, 19), sizes(1, 19), tuple((9, left) for left in sizes(1, 12)), sizes(5, 15))
    timeline = simulate(schedule, Times.uniform(stages, 10, 12, 8, 1, 7))
    for rank, spans in enumerate(timeline.ranks):
        curve = memory_curve(spans, activations)
        moments = sorted({moment for span in spans for moment in (span.start, span.end)})
        # Between two moments nothing changes, and at some of them memory is freed before more is taken.
        between = [(one + other) / 2 for one, other in zip(moments, moments[1:])]
        for moment in between:
            alive = [alive for time, alive in curve if time <= moment][-1]
            assert alive == pytest.approx(alive_with_copies(moment, spans, activations))
        peak = max(alive for _, alive in curve)
        assert peak == pytest.approx(peak_activations(schedule, activations)[rank])
        assert peak >= max(alive_with_copies(moment, spans, activations) for moment in between)
        assert curve[-1][1] == pytest.approx(0)


def alive_with_copies(time: float, spans: tuple[Span, ...], activations: Activations) -> float:
    """By the definition, for each stage and micro-batch."""
    found = 0.0
    for stage, micro_batch in {(span.action.stage, span.action.micro_batch) for span in spans}:
        starts = {span.action.kind: span.start for span in spans
                  if (span.action.stage, span.action.micro_batch) == (stage, micro_batch)}
        ends = {span.action.kind: span.end for span in spans
                if (span.action.stage, span.action.micro_batch) == (stage, micro_batch)}
        backward = ends.get(Kind.B, ends.get(Kind.BW))
        whole = activations.after_forward[stage]
        left = activations.recomputed[stage][-1] if Kind.C in ends else whole
        if starts[Kind.F] < time < backward:
            forgotten = Kind.C in ends and ends[Kind.F] < time < starts[Kind.C]
            alive = left if forgotten else whole
            if Kind.O in ends and ends[Kind.O] < time < starts[Kind.R]:
                alive = min(alive, max(0, whole - activations.offloadable[stage]))
            found += alive
        elif Kind.B in ends and backward < time < ends[Kind.W]:
            found += activations.after_backward[stage]
    return found


def test_sizes_of_another_number_of_stages_are_refused() -> None:
    with pytest.raises(ValueError, match="activations.offloadable must be 2 finite numbers"):
        Activations((1, 1), (1, 1), offloadable=(1,))
    with pytest.raises(ValueError, match="activations.recomputed must be 2 rows"):
        Activations((1, 1), (1, 1), recomputed=((1,),))


def test_memory_that_is_taken_again_at_once_leaves_no_dip() -> None:
    schedule = build("1f1b", 2, 3)
    spans = simulate(schedule, Times.uniform(2)).ranks[1]
    assert memory_curve(spans, Activations((2, 2), (2, 2))) == [(1, 2), (4, 2), (7, 2), (10, 0)]


def test_the_first_piece_of_a_w_frees_nothing() -> None:
    """On one order a count by shares would be 3."""
    passes = map(Pass.parse, "F0.0 F1.0 B1.0 B0.0 W1.0[0/2] F0.1 W0.0[0/2] F1.1".split())
    rest = map(Pass.parse, "W1.0[1/2] W0.0[1/2] B1.1 W1.1 B0.1 W0.1".split())
    schedule = Schedule("pieces", v(1), 2, ((*passes, *rest),))
    assert peak_activations(schedule) == (4.0,)
    spans = simulate(schedule, Times.uniform(2)).ranks[0]
    falls = memory_curve(spans, Activations((10, 10), (10, 10)))
    assert [time for (_, before), (time, after) in zip(falls, falls[1:]) if after < before] == [
        span.end for span in spans if span.action.frees_activations]
