"""The simulator against a second one that shares nothing with it, and its measures by hand."""

from __future__ import annotations

import random
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from random_orders import needs, random_schedule

from ds_vshape.schedule.activations import Activations, peak_activations
from ds_vshape.schedule.passes import BW, B, C, F, Kind, O, Pass, R, W
from ds_vshape.schedule.placement import PLACEMENTS, linear, v
from ds_vshape.schedule.schedule import Schedule, ScheduleError, check
from ds_vshape.schedule.timeline import Times, simulate


# What takes time or stands somewhere: a pass, an O or R (which take none), or the copy of one of these.
Node = Pass | tuple[str, Pass]


def slow_simulation(schedule: Schedule, times: Times) -> dict[Node, tuple[float, float]]:
    """Push every start later until no rule is broken any more: O(passes^2), and no events."""
    length: dict[Node, float] = {action: 0.0 if action.kind in (Kind.O, Kind.R) else times.of(action)
                                 for _, action in schedule.passes()}
    rules: list[tuple[Node, Node, float]] = []
    for rank, order in enumerate(schedule.orders):
        rules += [(before, after, 0.0) for before, after in zip(order, order[1:])]
        rules += [(need, action, times.hops[min(need.stage, action.stage)]
                   if schedule.placement.rank_of(need.stage) != rank else 0.0)
                  for action in order for need in needs(action, schedule)]
        out = [O(one.stage, one.micro_batch) for one in order
               if one.kind is Kind.F and O(one.stage, one.micro_batch) in order]
        back = [action for action in order if action.kind is Kind.R]
        for copies in (out, back):
            length |= {("copy", one): times.of(one) * (times.copied[one.stage][-1] if C(one.stage, one.micro_batch)
                                                       in order and times.copied else 1) for one in copies}
            rules += [(("copy", before), ("copy", after), 0.0) for before, after in zip(copies, copies[1:])]
        for one in out:
            rules += [(F(one.stage, one.micro_batch), ("copy", one), 0.0), (("copy", one), one, 0.0)]
        for one in back:
            rules.append((one, ("copy", one), 0.0))
            rules += [(("copy", one), user, 0.0) for user in order if one in needs(user, schedule)]
    start: dict[Node, float] = dict.fromkeys(length, 0.0)
    moved = True
    while moved:
        moved = False
        for before, after, hop in rules:
            earliest = start[before] + length[before] + hop
            if start[after] < earliest:
                start[after], moved = earliest, True
    return {action: (start[action], start[action] + length[action]) for action in start}


@given(st.integers(1, 3), st.integers(1, 3), st.sampled_from(sorted(PLACEMENTS)), st.randoms(use_true_random=False))
@settings(max_examples=80)
def test_agrees_with_the_slow_simulator(ranks: int, micro_batches: int, placement: str,
                                        dice: random.Random) -> None:
    schedule = random_schedule(ranks, micro_batches, placement, dice)
    check(schedule)
    stages = range(schedule.placement.stages)
    times = Times(*(tuple(dice.uniform(0, 3) for _ in stages) for _ in range(3)),
                  tuple(dice.choice((0.0, dice.uniform(0, 5))) for _ in stages[1:]),
                  recompute=dice.choice(((), tuple((dice.uniform(0, 1), dice.uniform(0, 3)) for _ in stages))),
                  offload=tuple(dice.uniform(0, 5) for _ in stages), reload=tuple(dice.uniform(0, 5) for _ in stages),
                  copied=dice.choice(((), tuple((0.7, dice.uniform(0, 1)) for _ in stages))))
    timeline = simulate(schedule, times)
    slow = slow_simulation(schedule, times)
    for spans, order in zip(timeline.ranks, schedule.orders):
        assert tuple(span.action for span in spans) == order
        for span in spans:
            assert (span.start, span.end) == pytest.approx(slow[span.action])
    for copies in filter(None, (timeline.offloads, timeline.reloads)):
        for span in (span for of_rank in copies for span in of_rank):
            assert (span.start, span.end) == pytest.approx(slow["copy", span.action])
    assert sum(map(len, timeline.offloads + timeline.reloads)) == sum(not isinstance(node, Pass) for node in slow)
    slow = {action: slow[action] for _, action in schedule.passes()}
    ends = [end for _, end in slow.values()]
    assert timeline.makespan == pytest.approx(max(ends) - min(start for start, _ in slow.values()))
    own = [max(slow[action][1] for action in order) - min(slow[action][0] for action in order)
           for order in schedule.orders]
    assert timeline.longest_span == pytest.approx(max(own))
    assert timeline.work == pytest.approx(sum(end - start for start, end in slow.values()))


ONE = Schedule("one", linear(2), 1, ((F(0, 0), B(0, 0), W(0, 0)), (F(1, 0), BW(1, 0))))


def test_by_hand() -> None:
    """Rank 0: F 0-2, then it waits for BW of stage 1 (2 + hop 1 = 3-6, 6-15) and the hop back."""
    timeline = simulate(ONE, Times((2, 3), (4, 5), (6, 4), hops=(1,)))
    assert [[(span.start, span.end) for span in rank] for rank in timeline.ranks] == [
        [(0, 2), (16, 20), (20, 26)], [(3, 6), (6, 15)]]
    assert (timeline.makespan, timeline.longest_span, timeline.work) == (26, 26, 24)
    assert timeline.bubble == pytest.approx(1 - 24 / 52)


def test_a_w_is_cut_between_its_entries() -> None:
    """The first stage's W takes 3 for 1, 1 and 4: 1 and 1 apart from 4. The second's has no entries."""
    times = Times((1, 1), (1, 1), (3, 2), entry_costs=((1, 1, 4), ()))
    assert [times.of(piece) for piece in W(0, 0).cut(2)] == [1, 2]
    assert [times.of(piece) for piece in W(0, 0).cut(4)] == pytest.approx([0.5, 0.5, 2, 0])
    assert [times.of(piece) for piece in W(1, 0).cut(2)] == [2, 0]
    assert times.of(W(0, 0)) == 3 and times.of(BW(0, 0)) == 4
    assert [replace(times, entry_costs=()).of(piece) for piece in W(0, 0).cut(2)] == [1.5, 1.5]
    with pytest.raises(ValueError, match=r"times.entry_costs must be of 2 stages, not of 1"):
        replace(times, entry_costs=((1.0,),))
    with pytest.raises(ValueError, match=r"times.entry_costs\[1\] must be 2 finite numbers"):
        replace(times, entry_costs=((), (1.0, -1.0)))


def test_a_hop_costs_nothing_within_a_rank() -> None:
    schedule = Schedule("one", v(1), 1, ((F(0, 0), F(1, 0), BW(1, 0), BW(0, 0)),))
    assert simulate(schedule, Times.uniform(2, hop=100)).makespan == 6


def test_copies_by_hand() -> None:
    """O1 waits for the second copy, B1 for the copy back and for the C of two layers that needs it."""
    order = tuple(map(Pass.parse, "F0.0 F0.1 O0.1 B0.0 R0.1 W0.0 C0.1[2] BW0.1".split()))
    order = (*order[:2], O(0, 0), R(0, 0), *order[2:])
    schedule = Schedule("copies", linear(1), 2, (order,))
    check(schedule)
    times = Times((2,), (3,), (4,), (), (1, 2), recompute=((0.5, 1, 1.5),), offload=(4,), reload=(5,),
                  copied=((1, 0.25, 0.1),))
    timeline = simulate(schedule, times)
    assert [(repr(span.action), span.start, span.end) for span in timeline.ranks[0]] == [
        ("F0.0", 0, 2), ("F0.1", 2, 6), ("O0.0", 6, 6), ("R0.0", 6, 6), ("O0.1", 8, 8), ("B0.0", 11, 14),
        ("R0.1", 14, 14), ("W0.0", 14, 18), ("C0.1[2]", 18, 20), ("BW0.1", 20, 34)]
    assert [(span.start, span.end) for span in timeline.offloads[0]] == [(2, 6), (6, 8)]
    assert [(span.start, span.end) for span in timeline.reloads[0]] == [(6, 11), (14, 16.5)]


@pytest.mark.parametrize(("wrong", "message"), [
    ({"offload": (1, 2)}, "times.offload must be 1 finite numbers"), ({"reload": (-1,)}, "times.reload must be"),
    ({"recompute": ((1,), (1,))}, "times.recompute must be 1 rows"), ({"recompute": ((),)}, "times.recompute must be"),
    ({"copied": ((float("inf"),),)}, r"times.copied\[0\] must be 1 finite")])
def test_times_of_copies_are_one_for_each_stage(wrong: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Times((1,), (1,), (1,), **wrong)


def test_layers_without_a_time_are_named() -> None:
    schedule = Schedule("layers", linear(1), 1, ((F(0, 0), C(0, 0, 3), BW(0, 0)),))
    with pytest.raises(ValueError, match=r"C0\.0\[3\]: of stage 0 there are numbers for 2 layers"):
        simulate(schedule, Times((1,), (1,), (1,), recompute=((1, 2),)))


def test_peaks_count_from_f_to_w() -> None:
    kept = Schedule("kept", v(1), 1, ((F(0, 0), F(1, 0), B(1, 0), B(0, 0), W(1, 0), W(0, 0)),))
    assert peak_activations(kept) == (2,)
    assert peak_activations(kept, Activations((3, 0.5), (3, 0.5))) == (3.5,)
    # One stage a rank is twice as large as one of two.
    assert peak_activations(ONE) == (2, 2)


def test_ranks_that_wait_for_each_other_are_named() -> None:
    crossed = Schedule("crossed", linear(2), 1, ((BW(0, 0), F(0, 0)), (F(1, 0), BW(1, 0))))
    with pytest.raises(ScheduleError, match=r"crossed can't run: rank 0 at BW0\.0, rank 1 at F1\.0 wait"):
        simulate(crossed, Times.uniform(2))


def test_an_empty_timeline_has_no_time() -> None:
    empty = simulate(Schedule("empty", linear(2), 0, ((), ())), Times.uniform(2))
    assert (empty.makespan, empty.longest_span, empty.bubble) == (0, 0, 0)
