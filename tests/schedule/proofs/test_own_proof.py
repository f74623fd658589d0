"""What each rank shows of its own program: the programs of all named schedules, and never of some that can hang."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Sequence

import pytest
from programs import mutant

from ds_vshape.schedule.builders.everything import with_everything_recomputed
from ds_vshape.schedule.builders.forward_only import forward_only
from ds_vshape.schedule.lowering import (AwaitReceive, AwaitSend, Lowering, PostReceive, Program, Run, Send, ShareLoss,
                                         Step)
from ds_vshape.schedule.named import SCHEDULES, build
from ds_vshape.schedule.proofs.own_proof import NotShown, show
from ds_vshape.schedule.proofs.rendezvous import DeadlockError
from ds_vshape.schedule.proofs.synchronization import check_with_synchronization
from ds_vshape.schedule.repeated import Repeated
from ds_vshape.schedule.schedule import Schedule
from ds_vshape.schedule.timeline import Times

STEADY = [name for name, entry in SCHEDULES.items() if entry.steady is not None]
LOWER = (Lowering.programs, Lowering.announced)


def lowering_of(schedule: Schedule) -> Lowering:
    return Lowering(schedule, Times.uniform(schedule.placement.stages))


def all_show(programs: Sequence[Program], schedule: Schedule, lowering: Lowering) -> bool:
    try:
        for rank, program in enumerate(programs):
            show(program, rank, schedule, lowering)
    except NotShown:
        return False
    return True


def can_run(programs: Sequence[Program], schedule: Schedule) -> bool:
    """By the checkers of all programs, step by step."""
    try:
        check_with_synchronization(tuple(map(tuple, programs)), schedule.placement)
    except DeadlockError:
        return False
    return True


@pytest.mark.parametrize("name", SCHEDULES)
@pytest.mark.parametrize("ranks", [1, 2, 3, 4, 7])
def test_each_rank_lowers_its_own_and_all_show_theirs(name: str, ranks: int) -> None:
    for micro_batches in (1, 2, 5, 9, 60):
        schedule = build(name, ranks, micro_batches)
        for one in (schedule, forward_only(schedule.placement, micro_batches)):
            for lower in LOWER:
                lowering = lowering_of(one)
                own = [lower(lowering, [rank])[0] for rank in range(ranks)]
                assert own == list(lower(lowering_of(one), None))
                assert all_show(own, one, lowering)
                assert can_run(own, one)


@pytest.mark.slow
@pytest.mark.parametrize("name", SCHEDULES)
def test_and_so_they_do_with_more_chunks_and_ranks(name: str) -> None:
    for chunks in SCHEDULES[name].builders:
        for ranks in (5, 8, 13) if chunks <= 4 else (3,):
            schedule = build(name, ranks, 9 * ranks, chunks)
            for lower in LOWER:
                lowering = lowering_of(schedule)
                assert all_show([lower(lowering, [rank])[0] for rank in range(ranks)], schedule, lowering)


# -- nothing is shown of what can hang


def shown_and_right(seeds: range) -> Counter[tuple[bool, bool]]:
    """Of programs with some steps moved, left out, or for another micro-batch: whether all is shown, and whether they
    can run."""
    seen = Counter[tuple[bool, bool]]()
    good: dict[object, tuple[Schedule, Lowering, tuple[Program, ...]]] = {}
    for seed in seeds:
        pick = random.Random(seed)
        name, ranks, lower = pick.choice(STEADY), pick.randint(1, 4), pick.choice(LOWER)
        micro_batches = pick.choice([2, 5, 30, 33])
        if (name, ranks, micro_batches, lower) not in good:
            schedule = build(name, ranks, micro_batches)
            lowering = lowering_of(schedule)
            good[name, ranks, micro_batches, lower] = schedule, lowering, lower(lowering, None)
        schedule, lowering, programs = good[name, ranks, micro_batches, lower]
        if isinstance(programs[0], Repeated):
            changed: Sequence[Program] = mutant(programs, pick)
        else:
            changed = moved(programs, pick)
        found = all_show(changed, schedule, lowering), can_run(changed, schedule)
        assert found != (True, False), seed
        seen[found] += 1
    return seen


def moved(programs: Sequence[Program], pick: random.Random) -> Sequence[Program]:
    """The programs with a step of communication moved by some places."""
    changed = [list(program) for program in programs]
    program = pick.choice(changed)
    places = [place for place, step in enumerate(program) if not isinstance(step, Run)]
    if places:
        place = pick.choice(places)
        program.insert(max(0, place + pick.choice([-4, -2, -1, 1, 2, 4])), program.pop(place))
    return tuple(map(tuple, changed))


def test_what_all_ranks_show_can_run() -> None:
    seen = shown_and_right(range(500))
    assert min(seen[True, True], seen[False, False]) > 50 and seen[False, True] > 5, seen


@pytest.mark.drill
def test_and_so_for_many_more() -> None:
    shown_and_right(range(1000, 6000))


SWAPS = {
    "a message that isn't sent at once": (Send, 1, "isn't sent at once|doesn't follow the pass"),
    "a send that is awaited before its receiver needs it": (AwaitSend, -3, "is awaited early|before it started"),
    "a wait for a message a pass early": (AwaitReceive, -2, "other messages before it|before it started"),
    "a post behind a wait": (PostReceive, 3, "posted behind|in turn|before it started|isn't sent at once"),
    "a loss that is shared early": (ShareLoss, -10**6, "isn't shared when it is known"),
}


@pytest.mark.parametrize("case", SWAPS)
def test_what_is_missing_is_named(case: str) -> None:
    kind, by, message = SWAPS[case]
    schedule = build("v-half", 3, 6)
    lowering = lowering_of(schedule)
    program: list[Step] = list(lowering.programs([1])[0])
    place = [number for number, step in enumerate(program) if isinstance(step, kind)][-1]
    program.insert(place + by, program.pop(place))
    with pytest.raises(NotShown, match=message):
        show(tuple(program), 1, schedule, lowering)


def test_programs_that_give_memory_back_are_for_the_other_checker() -> None:
    schedule = with_everything_recomputed(build("v-half", 2, 4))
    lowering = lowering_of(schedule)
    assert not all_show(lowering.programs(), schedule, lowering)
    assert can_run(lowering.programs(), schedule)
