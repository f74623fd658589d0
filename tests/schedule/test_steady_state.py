"""Schedules and programs whose middle repeats are those that would be made for all micro-batches at once; and the
checkers, which look at a repeat until nothing new can happen, refuse what they refuse of the whole."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Callable

import pytest
from programs import Programs, lower_announced, mutant

from ds_vshape.schedule.builders import forward_only as forwards
from ds_vshape.schedule.builders.forward_only import forward_only
from ds_vshape.schedule.builders.fuse import fuse, unfused, with_whole_backwards
from ds_vshape.schedule.builders.pending import with_few_pending
from ds_vshape.schedule.lowering import lower
from ds_vshape.schedule.named import SCHEDULES, build, named
from ds_vshape.schedule.passes import BW, F
from ds_vshape.schedule.placement import PLACEMENTS, Placement
from ds_vshape.schedule.proofs.deadlock import check
from ds_vshape.schedule.proofs.rendezvous import DeadlockError
from ds_vshape.schedule.proofs.synchronization import check_synchronization
from ds_vshape.schedule.repeated import Repeated
from ds_vshape.schedule.schedule import Schedule, ScheduleError
from ds_vshape.schedule.schedule import check as check_schedule
from ds_vshape.schedule.timeline import Times

STEADY = [name for name, entry in SCHEDULES.items() if entry.steady is not None]
SIZES = [(1, 13), (2, 20), (3, 31), (4, 37), (5, 41)]


def whole(schedule: Schedule) -> Schedule:
    return schedule.with_orders(tuple(tuple(order) for order in schedule.orders))


def assert_same(found: Schedule, expected: Schedule) -> None:
    """The same orders and programs, step by step; `expected` has no repeats."""
    assert found.repeats > 1
    assert expected.repeats == 1 and found == expected
    times = Times.uniform(expected.placement.stages)
    for lowering in (lower, lower_announced):
        programs = lowering(found, times)
        assert all(isinstance(program, Repeated) for program in programs)
        assert tuple(map(tuple, programs)) == lowering(expected, times)


@pytest.mark.parametrize("name", STEADY)
def test_a_named_schedule_is_the_one_built_for_all_its_micro_batches(name: str) -> None:
    for ranks, micro_batches in SIZES:
        assert_same(build(name, ranks, micro_batches), built_whole(name, ranks, micro_batches))


@pytest.mark.slow
@pytest.mark.parametrize("name", STEADY)
def test_and_so_it_is_for_more_ranks(name: str) -> None:
    for ranks in (*range(6, 13), 16):
        for micro_batches in (5 * ranks + 9, 5 * ranks + 14):
            assert_same(build(name, ranks, micro_batches), built_whole(name, ranks, micro_batches))


def built_whole(name: str, ranks: int, micro_batches: int) -> Schedule:
    builder = next(iter(named(name).builders.values()))
    schedule = builder(ranks, micro_batches)
    return fuse(schedule, Times.uniform(schedule.placement.stages), slack=1.0)


@pytest.mark.parametrize("name", STEADY)
@pytest.mark.parametrize("change", [unfused, with_whole_backwards, with_few_pending])
@pytest.mark.quick_cases(*(f"{change}-v-half" for change in ("unfused", "with_whole_backwards", "with_few_pending")))
def test_changes_keep_what_repeats(change: Callable[[Schedule], Schedule], name: str) -> None:
    schedule = build(name, 4, 45)
    assert_same(change(schedule), change(whole(schedule)))


@pytest.mark.parametrize("name", PLACEMENTS)
def test_forwards_alone(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    placements = [PLACEMENTS[name](ranks) for ranks in (1, 2, 4)]
    repeated = [forward_only(placement, 50) for placement in placements]
    monkeypatch.setattr(forwards, "extended", lambda make, micro_batches, *_: make(micro_batches))
    for placement, found in zip(placements, repeated):
        expected = forward_only(placement, 50)
        assert found.repeats > 1 and found == expected
        times = Times.uniform(placement.stages)
        assert lower_announced(found, times) == lower_announced(expected, times)


@pytest.mark.parametrize("name", STEADY)
def test_what_is_kept_and_checked_does_not_grow_with_the_batch(name: str) -> None:
    def kept(micro_batches: int) -> list[int]:
        schedule = build(name, 4, micro_batches)
        programs = lower(schedule, Times.uniform(schedule.placement.stages))
        check(programs, schedule.placement)
        check_synchronization(programs)
        return [len(each.head) + len(each.body) + len(each.tail) for each in (*schedule.orders, *programs)]

    assert kept(30_000) == kept(60)


def test_a_repeated_sequence() -> None:
    found = Repeated([F(0, 0)], [F(0, 1), BW(0, 0)], [BW(0, 1)], times=3, interval=1)
    expected = (F(0, 0), F(0, 1), BW(0, 0), F(0, 2), BW(0, 1), F(0, 3), BW(0, 2), BW(0, 3))
    assert tuple(found) == expected and len(found) == 8 and found == expected and hash(found) == hash(expected)
    assert [found[place] for place in range(-8, 8)] == [expected[place] for place in range(-8, 8)]
    assert found[1:-2] == expected[1:-2] and found.index(F(0, 3)) == 5
    assert found != expected[:-1] and found.repeated(2) != found
    with pytest.raises(IndexError):
        found[8]


def test_a_schedule_whose_repeats_miss_a_micro_batch_is_refused() -> None:
    """Once it is complete, twice it isn't."""
    order = Repeated([F(0, 0), BW(0, 0)], [F(0, 1)], [BW(0, 1)], times=5, interval=1)
    schedule = Schedule("wrong", PLACEMENTS["linear"](1), 6, (order,))
    check_schedule(schedule.with_repeats(1))
    with pytest.raises(ScheduleError, match="stage 0 has F0.1 for micro-batch 1"):
        check_schedule(schedule)


# -- the checkers, by brute force: the same programs with and without repeats


def accepted(programs: Programs, placement: Placement) -> tuple[bool, bool]:
    """Whether each checker accepts them; the second looks only at what the first has accepted."""
    try:
        check(programs, placement)
    except DeadlockError:
        return False, False
    try:
        check_synchronization(programs)
    except DeadlockError:
        return True, False
    return True, True


def disagreements(seeds: range) -> tuple[list[tuple[int, object, object]], Counter[tuple[bool, bool]]]:
    wrong, seen = [], Counter[tuple[bool, bool]]()
    good = {}
    for seed in seeds:
        pick = random.Random(seed)
        of = pick.choice(STEADY), pick.randint(1, 3), pick.choice([lower, lower_announced])
        if of not in good:
            schedule = build(of[0], of[1], 30)
            good[of] = of[2](schedule, Times.uniform(schedule.placement.stages)), schedule.placement
        programs, placement = good[of]
        programs = tuple(program.repeated(pick.randint(2, 5)) for program in programs[:1]) + programs[1:]
        programs = mutant(tuple(program.repeated(programs[0].times) for program in programs), pick)
        repeated, expected = accepted(programs, placement), accepted(tuple(map(tuple, programs)), placement)
        seen[expected] += 1
        if repeated != expected:
            wrong.append((seed, repeated, expected))
    return wrong, seen


def test_checkers_accept_repeats_exactly_if_they_accept_the_whole() -> None:
    wrong, seen = disagreements(range(300))
    assert not wrong
    assert all(seen[verdict] > 2 for verdict in ((False, False), (True, False), (True, True))), seen


def test_ranks_of_very_unequal_speed() -> None:
    """A slow sender waits for what a fast receiver does in a later repeat."""
    verdicts = Counter[tuple[bool, bool]]()
    for seed in range(60):
        pick = random.Random(seed)
        schedule = build(pick.choice(STEADY), pick.randint(2, 4), 40)
        stages = schedule.placement.stages
        counts = (stages, stages, stages, stages - 1)
        times = Times(*(tuple(10 ** pick.uniform(-2, 2) for _ in range(count)) for count in counts))
        programs = pick.choice([lower, lower_announced])(schedule, times)
        found, expected = (accepted(some, schedule.placement) for some in (programs, tuple(map(tuple, programs))))
        assert found == expected, seed
        verdicts[found] += 1
    assert verdicts[True, True] > 30, verdicts


@pytest.mark.drill
def test_and_so_for_many_more() -> None:
    wrong, _ = disagreements(range(1000, 2500))
    assert not wrong
