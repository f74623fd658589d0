"""A device may be synchronized in any pass: the rule on clocks agrees with a run that synchronizes."""

from __future__ import annotations

import random
from collections import Counter, defaultdict
from collections.abc import Set
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from programs import COMMUNICATORS, Communicator, Programs, lower_announced, lowered, of_the_direction, own, shuffled

from ds_vshape.schedule.builders.everything import with_everything_offloaded, with_everything_recomputed
from ds_vshape.schedule.builders.forward_only import forward_only
from ds_vshape.schedule.lowering import (AwaitReceive, AwaitSend, Message, PostReceive, Program, Run, Send, ShareLoss,
                                         Step, lower)
from ds_vshape.schedule.named import SCHEDULES, build
from ds_vshape.schedule.passes import Kind
from ds_vshape.schedule.proofs import deadlock
from ds_vshape.schedule.proofs.rendezvous import DeadlockError
from ds_vshape.schedule.proofs.synchronization import check_synchronization
from ds_vshape.schedule.schedule import Schedule
from ds_vshape.schedule.timeline import Times, simulate


@pytest.mark.parametrize("name", SCHEDULES)
@pytest.mark.quick_cases("1f1b", "zb-h1", "v-zb")
def test_no_synchronization_hangs_a_named_schedule(name: str) -> None:
    for ranks in (1, 2, 3, 4, 5, 8, 16):
        for micro_batches in (1, 2, 5, 16, 64):
            programs, placement = lowered(name, ranks, micro_batches)
            check_synchronization(programs)
            # Messages of one direction are posted in the order in which they are sent, so they may share.
            check_synchronization(programs, of_the_direction)
            check_synchronization(lower(forward_only(placement, micro_batches), Times.uniform(placement.stages)))


@st.composite
def any_orders(draw: st.DrawFn) -> Schedule:
    """A schedule whose ranks do their passes in any order in which they can be done, some with C or with O and R."""
    name, ranks = draw(st.sampled_from(sorted(SCHEDULES))), draw(st.integers(2, 6))
    change = draw(st.sampled_from((lambda named: named, with_everything_recomputed, with_everything_offloaded)))
    regular = change(build(name, ranks, draw(st.integers(1, 10))))
    stages = regular.placement.stages
    costs = [draw(st.lists(st.sampled_from([1.0, 2.0, 5.0, 20.0]), min_size=stages, max_size=stages).map(tuple))
             for _ in range(3)]
    # Sorted by when they would start with other times, they can run, and no rule has made them.
    spans = simulate(regular, Times(*costs, (draw(st.floats(0, 9)),) * (stages - 1))).ranks
    mixed = [list(rank) for rank in spans]
    for rank in mixed:
        if draw(st.booleans()):
            rank.sort(key=lambda span: (span.end, span.start))
    schedule = regular.with_orders(tuple(tuple(span.action for span in rank) for rank in mixed))
    try:
        simulate(schedule, Times.uniform(stages))
    except ValueError:
        return regular
    return schedule


@settings(max_examples=200)
@given(any_orders(), st.sampled_from([own, of_the_direction]), st.floats(0, 5))
def test_no_synchronization_hangs_any_other_order(schedule: Schedule, communicator: Communicator, hop: float) -> None:
    programs = lower(schedule, Times.uniform(schedule.placement.stages, hop=hop))
    deadlock.check(programs, schedule.placement)
    check_synchronization(programs, communicator)


# -- against runs with a synchronization


def test_agrees_with_runs_that_synchronize() -> None:
    verdicts: Counter[bool] = Counter()
    for seed in range(400):
        pick = random.Random(seed)
        good, placement = lowered(pick.choice(sorted(SCHEDULES)), pick.randint(2, 4), pick.randint(1, 4))
        programs, communicator = early_posts(good, pick), pick.choice(COMMUNICATORS)
        if pick.random() < 0.5:
            programs = shuffled(programs, pick, pick.randint(0, 4))
        try:
            deadlock.check(programs, placement, communicator)
        except DeadlockError:
            continue
        hanging = [(rank, number) for rank, program in enumerate(programs) for number, step in enumerate(program)
                   if isinstance(step, Run) and hangs(programs, communicator, {(rank, number)})]
        try:
            check_synchronization(programs, communicator)
        except DeadlockError:
            assert hanging
        else:
            assert not hanging
        verdicts[bool(hanging)] += 1
    assert min(verdicts.values()) > 40, verdicts


@pytest.mark.parametrize(["name", "ranks", "micro_batches"], [("interleaved-1f1b", 2, 4), ("1f1b-v", 6, 12)])
def test_over_one_connection_to_the_device_a_schedule_can_hang(name: str, ranks: int, micro_batches: int) -> None:
    """So CUDA_DEVICE_MAX_CONNECTIONS=1 is refused: an operation starts once those before it on its communicator are
    through, and until then nothing follows it over the same connection, no pass either."""
    programs, _ = lowered(name, ranks, micro_batches)
    assert not hangs(programs, of_the_direction, set())
    assert hangs(programs, of_the_direction, set(), one_connection=True)
    # Where messages are announced no operation stands behind one that waits.
    schedule = build(name, ranks, micro_batches)
    announced = lower_announced(schedule, Times.uniform(schedule.placement.stages))
    assert not hangs(announced, of_the_direction, set(), announced=True, one_connection=True)


def test_the_error_names_the_pass_and_the_message() -> None:
    (first, *_), placement = lowered("1f1b", 2, 1)
    post = next(step for step in first if isinstance(step, PostReceive))
    programs = ((post, *(step for step in first if step != post)), lowered("1f1b", 2, 1)[0][1])
    deadlock.check(programs, placement)
    with pytest.raises(DeadlockError, match=r"^rank 0 can't synchronize its device in F0.0: it would wait there for "
                                            r"gradient of 0.0 \(1->0\), which waits for that pass$"):
        check_synchronization(programs)


def early_posts(programs: Programs, pick: random.Random) -> Programs:
    """The programs with some posts moved ahead of a pass or two."""
    result = []
    for program in programs:
        steps: list[Step] = []
        for step in program:
            place = len(steps)
            if isinstance(step, PostReceive) and pick.random() < 0.2:
                same = [number for number, other in enumerate(steps) if isinstance(other, PostReceive)
                        and other.message.channel == step.message.channel]
                place = pick.randint(max((max(same, default=-1) + 1), place - 6), place)
            steps.insert(place, step)
        result.append(tuple(steps))
    return tuple(result)


def hangs(programs: Programs, communicator: Communicator, synchronized: Set[tuple[int, int]],
          announced: bool = False, one_connection: bool = False) -> bool:
    """Whether the programs get stuck if these steps, by rank and number, wait for all that their rank has started; with
    `announced` a post waits until its message is sent, with `one_connection` nothing comes after an operation before
    those ahead of it on its communicator are through."""
    places, through = [0] * len(programs), set()
    started: list[list[Any]] = [[] for _ in programs]

    def can_pass(rank: int, step: Step) -> bool:
        if one_connection and any(isinstance(last, Message) and not is_first(last, started[rank], through, communicator)
                                  for last in started[rank][-1:]):
            return False
        if isinstance(step, (AwaitSend, AwaitReceive)):
            return step.message in through
        if isinstance(step, PostReceive) and announced:
            return step.message in started[step.message.channel.source]
        return (rank, places[rank]) not in synchronized or through.issuperset(started[rank])

    moved = True
    while moved:
        moved = False
        for one, program in enumerate(programs):
            while places[one] < len(program) and can_pass(one, program[places[one]]):
                step = program[places[one]]
                if isinstance(step, (Send, PostReceive)):
                    started[one].append(step.message)
                elif isinstance(step, ShareLoss):
                    started[one].append(step)
                places[one] += 1
                moved = True
        for operation in {operation for operations in started for operation in operations} - through:
            if (all(operation in operations for operations in started) if isinstance(operation, ShareLoss) else
                    all(is_next(operation, started[end], through, communicator) for end in operation.channel[:2])):
                through.add(operation)
                moved = True
    return any(place < len(program) for place, program in zip(places, programs))


def is_next(message: Message, started: list[Any], through: set[Any], communicator: Communicator) -> bool:
    return message in started and is_first(message, started, through, communicator)


def is_first(message: Message, started: list[Any], through: set[Any], communicator: Communicator) -> bool:
    """Whether all that was started before `message` on its communicator is through."""
    before: dict[object, list[Message]] = defaultdict(list)
    for other in started[:started.index(message)]:
        if isinstance(other, Message):
            before[communicator(other.channel)].append(other)
    return through.issuperset(before[communicator(message.channel)])


@pytest.mark.slow
def test_large_programs() -> None:
    for name, ranks, micro_batches in (("v-zb", 32, 64), ("zb-h1", 64, 64)):
        schedule = build(name, ranks, micro_batches)
        check_synchronization(lower(schedule, Times.uniform(schedule.placement.stages)))


# -- while messages are announced


@pytest.mark.parametrize("name", SCHEDULES)
def test_no_synchronizations_hang_a_batch_in_which_messages_are_announced(name: str) -> None:
    """Not even if every pass of every rank synchronizes its device: training and evaluation."""
    for ranks, micro_batches in ((1, 2), (2, 3), (3, 2), (4, 5), (4, 8)):
        schedule = build(name, ranks, micro_batches)
        for one in (schedule, forward_only(schedule.placement, micro_batches)):
            assert_bears_all(one, Times.uniform(schedule.placement.stages))


@settings(max_examples=60)
@given(any_orders(), st.floats(0, 5))
def test_nor_in_any_other_order(schedule: Schedule, hop: float) -> None:
    assert_bears_all(schedule, Times.uniform(schedule.placement.stages, hop=hop))


def assert_bears_all(schedule: Schedule, times: Times) -> None:
    programs = lower_announced(schedule, times)
    deadlock.check(programs, schedule.placement)
    check_synchronization(programs)
    everywhere = passes(programs)
    pick = random.Random(len(everywhere))
    for synchronized in (set(), everywhere, {step for step in everywhere if pick.random() < 0.5}):
        assert not hangs(programs, of_the_direction, synchronized, announced=True)


def test_receives_that_start_when_they_are_waited_for_hang_a_v_whose_kernels_are_loaded_in_it() -> None:
    # Each stage's first F, B and W waits until the device is idle, and so does the first W that adds to a sum.
    for name in ("v-min", "v-half", "v-zb", "1f1b-v"):
        programs, _ = lowered(name, 4, 8)
        assert hangs(late(programs), of_the_direction, first_uses(programs)), name


def test_a_loss_that_is_shared_after_the_own_last_forward_can_hang() -> None:
    for name in ("zb-h2", "interleaved-1f1b"):
        schedule = build(name, 4, 8)
        programs = lower_announced(schedule, Times.uniform(schedule.placement.stages))
        early = tuple(shared_after_the_last_forward(program) for program in programs)
        assert hangs(early, of_the_direction, passes(early), announced=True), name


def test_a_loss_that_is_shared_too_early_is_found() -> None:
    programs, _ = lowered("1f1b", 2, 3)
    early = (ShareLoss(), *(step for step in programs[0] if not isinstance(step, ShareLoss))), programs[1]
    with pytest.raises(DeadlockError, match="rank 0 can't synchronize its device in F0.0: it would wait there for the "
                                            "batch's loss, which waits for that pass"):
        check_synchronization(early)


def shared_after_the_last_forward(program: Program) -> Program:
    steps = [step for step in program if not isinstance(step, ShareLoss)]
    last = max(place for place, step in enumerate(steps) if isinstance(step, Run) and step.action.kind is Kind.F)
    return (*steps[:last + 1], ShareLoss(), *steps[last + 1:])


def passes(programs: Programs) -> set[tuple[int, int]]:
    return {(rank, number) for rank, program in enumerate(programs) for number, step in enumerate(program)
            if isinstance(step, Run)}


def late(programs: Programs) -> Programs:
    """The programs with each post right before its wait."""
    return tuple(tuple(step for one in program if not isinstance(one, PostReceive)
                       for step in ((PostReceive(one.message), one) if isinstance(one, AwaitReceive) else (one,)))
                 for program in programs)


def first_uses(programs: Programs) -> set[tuple[int, int]]:
    found = set()
    for rank, program in enumerate(programs):
        seen: Counter[tuple[Kind, int]] = Counter()
        for number, step in enumerate(program):
            if isinstance(step, Run):
                key = step.action.kind, step.action.stage
                seen[key] += 1
                if seen[key] <= 1 + step.action.kind.gives_weight_gradients:
                    found.add((rank, number))
    return found
