"""Schedules in which everything is recomputed or offloaded, and what lowering and the checkers make of C, O and R."""

from __future__ import annotations

from itertools import permutations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from programs import lower_announced

from ds_vshape.schedule.builders.everything import with_everything_offloaded, with_everything_recomputed
from ds_vshape.schedule.lowering import (AwaitOffload, AwaitReceive, AwaitReload, Offload, Program, Reload, Run, Send,
                                         lower)
from ds_vshape.schedule.named import SCHEDULES, build
from ds_vshape.schedule.passes import BW, B, C, F, Kind, O, Pass, R, W
from ds_vshape.schedule.placement import linear
from ds_vshape.schedule.proofs import deadlock
from ds_vshape.schedule.proofs.synchronization import check_synchronization
from ds_vshape.schedule.schedule import Schedule, ScheduleError, check
from ds_vshape.schedule.timeline import Times, simulate


def order(text: str) -> tuple[Pass, ...]:
    return tuple(map(Pass.parse, text.split()))


THREE = Schedule("three", linear(1), 4, (order("F0.0 F0.1 F0.2 BW0.0 F0.3 BW0.1 B0.2 W0.2 BW0.3"),))


def test_by_hand() -> None:
    recomputed = with_everything_recomputed(THREE)
    assert recomputed.orders == (order("F0.0 F0.1 F0.2 C0.0 BW0.0 F0.3 C0.1 BW0.1 C0.2 B0.2 W0.2 C0.3 BW0.3"),)
    assert with_everything_offloaded(THREE).orders == (
        order("F0.0 O0.0 F0.1 O0.1 R0.0 F0.2 BW0.0 O0.2 R0.1 F0.3 R0.2 BW0.1 B0.2 W0.2 BW0.3"),)
    # R two passes before what needs it: of the first and the third there is no O a pass before that.
    assert with_everything_offloaded(THREE, ahead=2).orders == (
        order("F0.0 F0.1 O0.1 F0.2 R0.1 BW0.0 F0.3 BW0.1 B0.2 W0.2 BW0.3"),)
    # With two copies on their way, nothing is away long enough.
    assert with_everything_offloaded(THREE, behind=2) == THREE
    assert with_everything_offloaded(recomputed).orders == (
        order("F0.0 O0.0 F0.1 O0.1 R0.0 F0.2 C0.0 BW0.0 O0.2 R0.1 F0.3 C0.1 R0.2 BW0.1 C0.2 B0.2 W0.2 C0.3 BW0.3"),)


@settings(max_examples=30, deadline=None)
@given(st.sampled_from(sorted(SCHEDULES)), st.integers(1, 4), st.integers(1, 20), st.booleans(), st.integers(0, 2),
       st.floats(0, 3), st.floats(0, 3), st.booleans())
def test_they_run_and_their_programs_have_each_copy_in_its_place(
        name: str, ranks: int, micro_batches: int, recomputes: bool, ahead: int, hop: float, copy: float,
        announced: bool) -> None:
    named = build(name, ranks, micro_batches)
    schedule = with_everything_recomputed(named) if recomputes else named
    if ahead:
        schedule = with_everything_offloaded(schedule, 1, ahead)
    check(schedule)
    for old, new in zip(named.orders, schedule.orders, strict=True):
        assert tuple(action for action in new if not action.kind.is_optional) == old
    times = Times.uniform(schedule.placement.stages)
    if schedule.repeats == 1:
        # What repeats was found with equal times and runs in step with them alone.
        times = Times.uniform(schedule.placement.stages, hop=hop, copy=copy)
    programs = (lower_announced if announced else lower)(schedule, times)
    deadlock.check(programs, schedule.placement)
    check_synchronization(programs)
    for rank_order, program in zip(schedule.orders, programs, strict=True):
        check_steps(tuple(rank_order), tuple(program))


def check_steps(rank_order: tuple[Pass, ...], program: Program) -> None:
    """O is a wait and R a start, in the order of the rank; the other halves stand where they are due."""
    ran = [step.action for step in program if isinstance(step, (Run, AwaitOffload, Reload))]
    assert tuple(ran) == rank_order
    assert {step.action for step in program if isinstance(step, Offload)} == {
        action for action in rank_order if action.kind is Kind.O}
    for place, step in enumerate(program):
        if isinstance(step, Offload):
            # Behind its F stands at most what sends that.
            earlier = next(other for other in reversed(program[:place]) if not isinstance(other, Send))
            assert earlier == Run(F(step.action.stage, step.action.micro_batch))
        elif isinstance(step, Run) and step.action.kind in (Kind.C, Kind.B, Kind.BW):
            stage, micro_batch = step.action.stage, step.action.micro_batch
            first = step.action.kind is Kind.C or C(stage, micro_batch) not in rank_order
            waits = program[place - 1] == AwaitReload(R(stage, micro_batch))
            assert waits == (first and R(stage, micro_batch) in rank_order)
        elif isinstance(step, AwaitReload):
            assert isinstance(program[place + 1], Run)
        elif isinstance(step, AwaitReceive):
            assert not isinstance(program[place - 1], AwaitReload)


def test_checker_takes_the_passes_of_a_micro_batch_in_one_order() -> None:
    """All orders of all selections, against rules on each pair."""
    every = (F(0, 0), O(0, 0), R(0, 0), C(0, 0), B(0, 0), W(0, 0), BW(0, 0))
    accepted = 0
    for number in range(1, 7):
        for some in permutations(every, number):
            good = legal(some)
            accepted += good
            assert accepts(Schedule("one", linear(1), 1, (some,))) == good, some
    # Whole or split, with each selection of C and of O with R.
    assert accepted == 8


def legal(some: tuple[Pass, ...]) -> bool:
    place = {action.kind: number for number, action in enumerate(some)}
    backward = [kind for kind in (Kind.B, Kind.BW) if kind in place]
    if Kind.F not in place or len(backward) != 1 or (Kind.W in place) != (Kind.B in place):
        return False
    pairs = [(Kind.F, Kind.O), (Kind.O, Kind.R), (Kind.R, Kind.C), (Kind.F, Kind.C), (Kind.F, backward[0]),
             *((kind, backward[0]) for kind in (Kind.C, Kind.O, Kind.R)), (Kind.B, Kind.W)]
    both = (Kind.O in place) == (Kind.R in place)
    return both and all(place[one] < place[other] for one, other in pairs if one in place and other in place)


def accepts(schedule: Schedule) -> bool:
    try:
        check(schedule)
        simulate(schedule, Times.uniform(1))
    except ScheduleError:
        return False
    return True


def test_repeats_that_are_offloaded_differently_are_looked_at_one_by_one() -> None:
    """Each number of times is legal with once and twice but for the copies of what the body doesn't show then."""
    schedule = with_everything_offloaded(build("1f1b", 3, 40))
    assert schedule.repeats > 5
    check(schedule)
    first = schedule.orders[0]
    wrong = [each for each in first.body if each.kind is not Kind.R]  # type: ignore[attr-defined]
    broken = type(first)(first.head, wrong, first.tail, first.times, first.interval)  # type: ignore[attr-defined]
    with pytest.raises(ScheduleError, match="between them O, then R"):
        check(schedule.with_orders((broken, *schedule.orders[1:])))
