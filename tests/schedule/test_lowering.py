"""Lowering: programs whose messages match, for every schedule and whatever the times."""

from __future__ import annotations

from collections import Counter, defaultdict

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from ds_vshape.schedule.builders.forward_only import forward_only
from ds_vshape.schedule.lowering import (AwaitReceive, AwaitSend, Channel, Content, Load, Message, PostReceive, Program,
                                         Run, Send, ShareLoss, Step, channels, detour, lower, message_into)
from ds_vshape.schedule.named import SCHEDULES, build, placement_of
from ds_vshape.schedule.passes import BW, B, F, Kind, Pass, W
from ds_vshape.schedule.placement import Placement, interleaved, linear, v
from ds_vshape.schedule.proofs import deadlock
from ds_vshape.schedule.schedule import Schedule, ScheduleError, dependencies, variants
from ds_vshape.schedule.timeline import Times, simulate

# Zeros, numbers that differ by more than a float can add, equal ones and any others.
SECONDS = st.one_of(st.sampled_from([0.0, 0.0, 1.0, 1e-12]), st.floats(0, 100))


@st.composite
def schedules(draw: st.DrawFn) -> Schedule:
    name = draw(st.sampled_from(sorted(SCHEDULES)))
    ranks, micro_batches = draw(st.integers(1, 8)), draw(st.integers(1, 12))
    if draw(st.booleans()):
        return forward_only(placement_of(name, ranks), micro_batches)
    return build(name, ranks, micro_batches)


def times_for(draw: st.DrawFn, schedule: Schedule) -> Times:
    stages = schedule.placement.stages
    seconds = st.lists(SECONDS, min_size=stages, max_size=stages).map(tuple)
    hops = st.lists(SECONDS, min_size=stages - 1, max_size=stages - 1).map(tuple)
    return Times(draw(seconds), draw(seconds), draw(seconds), draw(hops))


@st.composite
def cases(draw: st.DrawFn) -> tuple[Schedule, Times]:
    schedule = draw(schedules())
    return schedule, times_for(draw, schedule)


@settings(max_examples=150)
@given(cases())
# Messages that take longer than all passes: with each repeat more are on their way.
@example((forward_only(linear(2), 6), Times((0, 0), (0, 0), (0, 0), (1,))))
def test_every_message_once_and_in_one_sequence_and_no_deadlock(case: tuple[Schedule, Times]) -> None:
    schedule, times = case
    programs = lower(schedule, times)
    assert sent_by_passes(schedule) == Counter(step.message for program in programs for step in program
                                               if isinstance(step, Send))
    for kind, end in ((Send, "source"), (AwaitSend, "source"), (PostReceive, "target"), (AwaitReceive, "target")):
        found = Counter()
        for rank, program in enumerate(programs):
            for step in program:
                if isinstance(step, kind):
                    assert getattr(step.message.channel, end) == rank
                    found[step.message] += 1
        assert found == sent_by_passes(schedule), kind
    assert sequences(programs, Send) == sequences(programs, PostReceive)
    for program in programs:
        place = {step: number for number, step in enumerate(program)}
        assert len(place) == len(program), "a step stands twice"
        for step, number in place.items():
            if isinstance(step, AwaitReceive):
                assert place[PostReceive(step.message)] < number
            if isinstance(step, AwaitSend):
                assert place[Send(step.message)] < number
    deadlock.check(programs, schedule.placement)


def sent_by_passes(schedule: Schedule) -> Counter[Message]:
    """What must be sent, from the placement alone: each hop of the chain of stages that changes ranks, both ways."""
    expected: Counter[Message] = Counter()
    backward = any(action.kind is not Kind.F for _, action in schedule.passes())
    for stage in range(schedule.placement.last_stage):
        here, there = schedule.placement.rank_of(stage), schedule.placement.rank_of(stage + 1)
        for micro_batch in range(schedule.micro_batches if here != there else 0):
            expected[Message(Channel(here, there, Content.ACTIVATION), stage + 1, micro_batch)] += 1
            if backward:
                expected[Message(Channel(there, here, Content.GRADIENT), stage, micro_batch)] += 1
    return expected


def sequences(programs: tuple[Program, ...], kind: type[Step]) -> dict[Channel, list[Message]]:
    found: dict[Channel, list[Message]] = defaultdict(list)
    for program in programs:
        for step in program:
            if isinstance(step, kind):
                found[step.message.channel].append(step.message)
    return found


@settings(max_examples=60)
@given(cases())
def test_passes_keep_their_order_and_stand_between_their_messages(case: tuple[Schedule, Times]) -> None:
    schedule, times = case
    for order, program in zip(schedule.orders, lower(schedule, times), strict=True):
        assert tuple(step.action for step in program if isinstance(step, Run)) == order
        for number, step in enumerate(program):
            if isinstance(step, Run):
                need = message_into(step.action, schedule.placement)
                assert need is None or AwaitReceive(need) in program[:number]
            if isinstance(step, Send):
                # At once: only sends may stand between a message and the pass that made it.
                makers = [earlier for earlier in program[:number] if not isinstance(earlier, Send)]
                assert isinstance(makers[-1], Run) and makers[-1].action in makers_of(step.message)


def makers_of(message: Message) -> set[Pass]:
    if message.channel.content is Content.ACTIVATION:
        return {F(message.stage - 1, message.micro_batch)}
    return {B(message.stage + 1, message.micro_batch), BW(message.stage + 1, message.micro_batch)}


@settings(max_examples=60)
@given(schedules(), st.floats(0, 3), st.sampled_from([(1, 1, 1), (1, 2, 1), (3, 2, 2)]))
def test_receives_are_posted_before_the_sender_begins_and_sends_released_after_use(
        schedule: Schedule, hop: float, costs: tuple[int, int, int]) -> None:
    times = Times.uniform(schedule.placement.stages, *costs, hop)
    timeline = simulate(schedule, times)
    spans = {span.action: span for rank in timeline.ranks for span in rank}
    equal = {span.action: span.start for rank in simulate(schedule, Times.uniform(schedule.placement.stages)).ranks
             for span in rank}
    before = ancestors(schedule)
    for rank, (own, program) in enumerate(zip(timeline.ranks, lower(schedule, times), strict=True)):
        passes_before = 0
        for step in program:
            passes_before += isinstance(step, Run)
            if isinstance(step, PostReceive):
                maker, = (spans[action] for action in makers_of(step.message) if action in spans)
                order = schedule.orders[step.message.channel.source]
                afterwards = set(order[order.index(maker.action) + 1:])
                # The device may be synchronized in any pass, on either side.
                assert not before[maker.action] & {span.action for span in own[passes_before:]}, "posted too early"
                assert not any(before[span.action] & afterwards for span in own[:passes_before]), "posted too late"
                # One whole pass before the sender begins, as far as that allows, and no earlier: it costs memory.
                last = own[passes_before - 1].action if passes_before else None
                assert (last is None or last in before[maker.action] or own[passes_before + 1].start <= maker.start
                        # Around a ring the message may depend on it, for all that times tell.
                        or equal[last] + detour(schedule.placement) <= equal[maker.action])
                following = own[passes_before].action
                assert (before[following] & afterwards or following in users_of(step.message)
                        or passes_before + 2 >= len(own) or own[passes_before + 2].start >= maker.start)
            if isinstance(step, AwaitSend):
                user, = (spans[action] for action in users_of(step.message) if action in spans)
                assert passes_before == len(own) or own[passes_before].start >= user.end
                assert own[passes_before - 1].start <= user.end


def ancestors(schedule: Schedule) -> dict[Pass, set[Pass]]:
    """All passes that each pass waits for, through any others."""
    there = variants(schedule)
    direct: dict[Pass, set[Pass]] = {}
    for order in schedule.orders:
        for earlier, action in zip((None, *order), order):
            direct[action] = {*dependencies(action, schedule.placement.last_stage, there),
                              *([earlier] if earlier else ())}
    found: dict[Pass, set[Pass]] = {}
    for span in sorted((span for rank in simulate(schedule, Times.uniform(schedule.placement.stages)).ranks
                        for span in rank), key=lambda span: span.start):
        found[span.action] = direct[span.action].union(*(found[need] for need in direct[span.action]))
    return found


def users_of(message: Message) -> set[Pass]:
    kinds = (Kind.F,) if message.channel.content is Content.ACTIVATION else (Kind.B, Kind.BW)
    return {Pass(kind, message.stage, message.micro_batch) for kind in kinds}


def test_a_pass_of_no_time_leaves_no_two_ranks_waiting_for_each_other() -> None:
    # With starts alone as the order, releases of sends stood before posts that the other side needed.
    for name, ranks, micro_batches in (("v-min", 4, 4), ("zb-v", 3, 7), ("interleaved-1f1b", 2, 6)):
        schedule = build(name, ranks, micro_batches)
        programs = lower(schedule, Times.uniform(schedule.placement.stages, 0, 0, 0))
        deadlock.check(programs, schedule.placement)


@settings(max_examples=40)
@given(schedules())
def test_data_is_loaded_once_where_it_is_first_needed(schedule: Schedule) -> None:
    ends = {schedule.placement.rank_of(0), schedule.placement.rank_of(schedule.placement.last_stage)}
    for rank, program in enumerate(lower(schedule, Times.uniform(schedule.placement.stages))):
        loads = [step.micro_batch for step in program if isinstance(step, Load)]
        # In order, since data comes from an iterator.
        assert loads == (list(range(schedule.micro_batches)) if rank in ends else [])
        for number, step in enumerate(program):
            if isinstance(step, Load):
                stage = 0 if schedule.placement.rank_of(0) == rank else schedule.placement.last_stage
                assert program[number + 1] == Run(F(stage, step.micro_batch))


def test_channels_are_those_that_messages_use() -> None:
    for placement in (linear(4), v(4), interleaved(4), v(2), interleaved(2), v(1), interleaved(1), linear(1), v(3, 4),
                      interleaved(3, 4)):
        name = {"linear": "1f1b", "v": "v-zb", "interleaved": "interleaved-1f1b"}[placement.name]
        programs = lower(build(name, placement.ranks, 3, placement.chunks_each), Times.uniform(placement.stages))
        assert channels(placement) == sorted(sequences(programs, Send))
    assert channels(linear(2)) == [Channel(0, 1, Content.ACTIVATION), Channel(1, 0, Content.GRADIENT)]
    assert Channel(3, 0, Content.ACTIVATION) in channels(interleaved(4))
    assert Channel(0, 1, Content.GRADIENT) in channels(v(2))


def test_message_into() -> None:
    assert message_into(F(0, 5), v(2)) is None
    assert message_into(F(1, 5), v(2)) == Message(Channel(0, 1, Content.ACTIVATION), 1, 5)
    assert message_into(F(2, 5), v(2)) is None, "stage 1 and 2 are both on rank 1"
    assert message_into(B(3, 5), v(2)) is None, "the last stage starts from the loss"
    assert message_into(BW(2, 5), v(2)) == Message(Channel(0, 1, Content.GRADIENT), 2, 5)
    assert message_into(W(0, 5), v(2)) is None


def test_a_schedule_that_cannot_run_is_refused() -> None:
    crossed = Schedule("crossed", Placement("linear", ((0,), (1,))), 1, ((BW(0, 0), F(0, 0)), (F(1, 0), BW(1, 0))))
    with pytest.raises(ScheduleError, match="crossed can't run: rank 0 at BW0.0, rank 1 at F1.0"):
        lower(crossed, Times.uniform(2))


# Two ranks, two micro-batches: on a line, and around the V, where stages 1 and 2 meet on rank 1.
PROGRAMS = {
    "1f1b": ["""
        load 0
        F0.0
        send activation 1.0
        post gradient 0.0
        load 1
        F0.1
        send activation 1.1
        post gradient 0.1
        release activation 1.0
        await gradient 0.0
        BW0.0
        share the loss
        release activation 1.1
        await gradient 0.1
        BW0.1
    """, """
        post activation 1.0
        post activation 1.1
        await activation 1.0
        load 0
        F1.0
        BW1.0
        send gradient 0.0
        await activation 1.1
        load 1
        F1.1
        share the loss
        BW1.1
        send gradient 0.1
        release gradient 0.0
        release gradient 0.1
    """],
    "v-min": ["""
        load 0
        F0.0
        send activation 1.0
        post activation 3.0
        load 1
        F0.1
        send activation 1.1
        post activation 3.1
        release activation 1.0
        await activation 3.0
        F3.0
        release activation 1.1
        B3.0
        send gradient 2.0
        post gradient 0.0
        await activation 3.1
        F3.1
        share the loss
        release gradient 2.0
        B3.1
        send gradient 2.1
        post gradient 0.1
        await gradient 0.0
        B0.0
        release gradient 2.1
        W3.0
        await gradient 0.1
        B0.1
        W0.0
        W3.1
        W0.1
    """, """
        post activation 1.0
        post activation 1.1
        await activation 1.0
        F1.0
        F2.0
        send activation 3.0
        post gradient 2.0
        await activation 1.1
        F1.1
        release activation 3.0
        F2.1
        send activation 3.1
        post gradient 2.1
        await gradient 2.0
        B2.0
        share the loss
        release activation 3.1
        B1.0
        send gradient 0.0
        await gradient 2.1
        B2.1
        release gradient 0.0
        B1.1
        send gradient 0.1
        W2.0
        release gradient 0.1
        W1.0
        W2.1
        W1.1
    """],
}
# The V's orders are written here, so that a better V-Min changes no program.
ORDERS = {
    "1f1b": (linear(2), ["F0.0 F0.1 BW0.0 BW0.1", "F1.0 BW1.0 F1.1 BW1.1"]),
    "v-min": (v(2), ["F0.0 F0.1 F3.0 B3.0 F3.1 B3.1 B0.0 W3.0 B0.1 W0.0 W3.1 W0.1",
                     "F1.0 F2.0 F1.1 F2.1 B2.0 B1.0 B2.1 B1.1 W2.0 W1.0 W2.1 W1.1"]),
}


@pytest.mark.parametrize("name", PROGRAMS)
def test_programs_as_written(name: str) -> None:
    placement, orders = ORDERS[name]
    schedule = Schedule(name, placement, 2, tuple(tuple(map(Pass.parse, order.split())) for order in orders))
    for program, expected in zip(lower(schedule, Times.uniform(placement.stages)), PROGRAMS[name], strict=True):
        assert [written(step) for step in program] == [line.strip() for line in expected.strip().splitlines()]


def written(step: Step) -> str:
    if isinstance(step, Load):
        return f"load {step.micro_batch}"
    if isinstance(step, Run):
        return str(step.action)
    if isinstance(step, ShareLoss):
        return "share the loss"
    verb = {Send: "send", AwaitSend: "release", PostReceive: "post", AwaitReceive: "await"}[type(step)]
    return f"{verb} {step.message.channel.content} {step.message.stage}.{step.message.micro_batch}"
