"""The checker: shows that a set of programs is free of deadlock before any process runs it.

Two rules of the libraries below us can turn a plausible program into one that hangs:

    rendezvous   a send completes only once its receive is started (gloo, and NCCL beyond its buffers)
    in order     on one communicator a rank's operations complete in the order of their start (NCCL)

and one of our own runtime: while shapes are announced, a receive isn't started when it is posted, but when it, or one
that was posted after it on its communicator, is waited for.

`check` looks in four steps:

    [1] each program alone     a pass has its input, and runs once; what is started is waited for, and nothing else
    [2] each communicator      both ends see the same messages in the same sequence, each once
    [3] all programs together  they run to their end, without times: an operation completes as soon as both rules let it
    [4] what is passed on      a message is made before it is sent and taken after it has come; a micro-batch is loaded
                               once, before it is needed

Starting one more operation never keeps another from completing, so the order in which [3] tries the ranks doesn't
matter: what is stuck here is stuck on every real run, and what runs to its end here does so on every real run.
What passes under both rules also passes where only the first one binds.
"""

from __future__ import annotations

import enum
from collections import Counter, defaultdict, deque
from collections.abc import Callable, Hashable, Sequence
from dataclasses import replace
from itertools import zip_longest

from ds_vshape.schedule.communicators import communicator_of
from ds_vshape.schedule.lowering import (AwaitReceive, AwaitSend, Channel, Load, Message, PostReceive, Program, Run,
                                         Send, Step, message_into)
from ds_vshape.schedule.passes import Kind, Pass
from ds_vshape.schedule.placement import Placement
from ds_vshape.schedule.schedule import dependencies


class DeadlockError(RuntimeError):
    """The programs can't run to their end; the message names the rank and the step."""


class Receives(enum.Enum):
    """When the runtime starts a receive."""

    EARLY = "receives start when posted"
    LATE = "receives start when waited for"


def check(programs: Sequence[Program], placement: Placement,
          communicator: Callable[[Channel], Hashable] = communicator_of) -> None:
    """Raise DeadlockError unless `programs` run to their end and every pass finds its input.

    `communicator` tells which channels share one, as they do at runtime unless it is given.
    """
    for rank, program in enumerate(programs):
        _check_alone(rank, program, placement)
    directions = _check_communicators(programs, communicator)
    actions = [[_Action(step, directions[step.message.channel]) for step in program
                if isinstance(step, (Send, PostReceive, AwaitSend, AwaitReceive))] for program in programs]
    for receives in Receives:
        for direction in set(directions.values()):
            direction.reset()
        _run_together(actions, receives)
    # Programs may be made without the data.
    loading = any(isinstance(step, Load) for program in programs for step in program)
    for rank, program in enumerate(programs):
        _check_passed_on(rank, program, placement, loading)


# -- [1] each program alone


def _check_alone(rank: int, program: Program, placement: Placement) -> None:
    sending: set[Message] = set()
    receiving: set[Message] = set()
    received: set[Message] = set()
    done: set[Pass] = set()
    for step in program:
        if isinstance(step, Run):
            if step.action in done:
                raise DeadlockError(f"rank {rank} runs {step.action} twice")
            _check_input(rank, step.action, placement, received, done)
            done.add(step.action)
        elif isinstance(step, (Send, PostReceive)):
            channel = step.message.channel
            if rank != (channel.source if isinstance(step, Send) else channel.target):
                raise DeadlockError(f"rank {rank} is at the wrong end of {step.message}")
            (sending if isinstance(step, Send) else receiving).add(step.message)
        elif isinstance(step, (AwaitSend, AwaitReceive)):
            waited_for = sending if isinstance(step, AwaitSend) else receiving
            if step.message not in waited_for:
                raise DeadlockError(f"rank {rank} waits for {step.message} before it started it")
            waited_for.remove(step.message)
            if isinstance(step, AwaitReceive):
                received.add(step.message)
    for message in sending:
        raise DeadlockError(f"rank {rank} never waits for its send of {message}")
    for message in receiving:
        raise DeadlockError(f"rank {rank} never waits for its receive of {message}")


def _check_input(rank: int, action: Pass, placement: Placement, received: set[Message], done: set[Pass]) -> None:
    """The pass must stand on its stage's rank, and find its input: received, or made on this rank."""
    if placement.rank_of(action.stage) != rank:
        raise DeadlockError(f"rank {rank} runs {action}, but its stage is on rank {placement.rank_of(action.stage)}")
    message = message_into(action, placement)
    if message is not None and message not in received:
        raise DeadlockError(f"rank {rank} runs {action} without having waited for {message}")
    if action.piece:
        last_piece = replace(action, piece=action.piece - 1)
        if last_piece not in done:
            raise DeadlockError(f"rank {rank} runs {action} before {last_piece}")
    for need in dependencies(action, placement.last_stage, frozenset()):
        given = need in done if action.kind is Kind.W else _is_done(need, done)
        if placement.rank_of(need.stage) == rank and not given:
            raise DeadlockError(f"rank {rank} runs {action} before {need}")


def _is_done(need: Pass, done: set[Pass]) -> bool:
    """Whether `need` has run; a whole backward gives the input gradient as well."""
    return need in done or (need.kind is Kind.B and Pass(Kind.BW, need.stage, need.micro_batch) in done)


# -- [2] each communicator


class _Direction:
    """One direction of a communicator in the run of [3]: how many of its messages are sent, have a receive, and have
    arrived.

    `queues` are those of the communicator at either end: directions of started operations, in the order of their start.
    """

    __slots__ = ("number", "queues", "received", "sent", "through")

    def __init__(self, messages: Sequence[Message], queues: tuple[deque[_Direction], deque[_Direction]]) -> None:
        self.number = {message: number for number, message in enumerate(messages)}
        self.queues = queues
        self.reset()

    def reset(self) -> None:
        """Back to before the first message."""
        self.sent = self.received = self.through = 0
        for queue in self.queues:
            queue.clear()


def _check_communicators(programs: Sequence[Program],
                         communicator: Callable[[Channel], Hashable]) -> dict[Channel, _Direction]:
    sent: dict[tuple[int, int, Hashable], list[Message]] = defaultdict(list)
    posted: dict[tuple[int, int, Hashable], list[Message]] = defaultdict(list)
    places: dict[Channel, tuple[int, int, Hashable]] = {}
    for program in programs:
        for step in program:
            if isinstance(step, (Send, PostReceive)):
                channel = step.message.channel
                place = places.get(channel)
                if place is None:
                    place = places[channel] = channel.source, channel.target, communicator(channel)
                (sent if isinstance(step, Send) else posted)[place].append(step.message)
    queues: dict[tuple[int, Hashable], deque[_Direction]] = defaultdict(deque)
    directions = {}
    for source, target, shared in sorted(sent.keys() | posted.keys(), key=lambda place: place[:2]):
        place = source, target, shared
        for number, (out, into) in enumerate(zip_longest(sent[place], posted[place])):
            if out is None or into is None:
                raise DeadlockError(f"messages {source}->{target}: {out or into} is "
                                    f"{'received' if out is None else 'sent'} by one end only; {len(sent[place])} "
                                    f"messages are sent and {len(posted[place])} received")
            if out != into:
                raise DeadlockError(f"messages {source}->{target}: number {number} is sent as {out} and received as "
                                    f"{into}")
        twice = [message for message, times in Counter(sent[place]).items() if times > 1]
        if twice:
            raise DeadlockError(f"messages {source}->{target}: {twice[0]} is sent twice")
        directions[place] = _Direction(sent[place], (queues[source, shared], queues[target, shared]))
    return {channel: directions[place] for channel, place in places.items()}


# -- [3] all programs together


class _Action:
    """A step of communication, with its message's direction and the number on it."""

    __slots__ = ("direction", "kind", "number", "step")

    def __init__(self, step: Send | PostReceive | AwaitSend | AwaitReceive, direction: _Direction) -> None:
        self.step: Step = step
        self.kind = type(step)
        self.direction = direction
        self.number = direction.number[step.message]


def _run_together(actions: Sequence[Sequence[_Action]], receives: Receives) -> None:
    places = [0] * len(actions)
    moved = True
    while moved:
        moved = False
        for rank, program in enumerate(actions):
            place = before = places[rank]
            while place < len(program) and _act(program[place], receives):
                place += 1
            places[rank] = place
            moved |= place > before
    stuck = [f"rank {rank} at {program[place].step}" for rank, (program, place) in enumerate(zip(actions, places))
             if place < len(program)]
    if stuck:
        raise DeadlockError(f"deadlock ({receives.value}): " + "; ".join(stuck))


def _act(action: _Action, receives: Receives) -> bool:
    """Do `action`, or return False if it has to wait."""
    kind, direction = action.kind, action.direction
    if kind is Send:
        direction.sent += 1
        _start(direction, 0)
        return True
    if kind is PostReceive:
        if receives is Receives.EARLY:
            direction.received += 1
            _start(direction, 1)
        return True
    if kind is AwaitReceive:
        # The runtime starts what was posted before the message on its communicator, too.
        while direction.received <= action.number:
            direction.received += 1
            _start(direction, 1)
    return direction.through > action.number


def _start(direction: _Direction, end: int) -> None:
    """Start an operation at one end of `direction`; complete all operations that it unblocks."""
    direction.queues[end].append(direction)
    candidates = [direction]
    while candidates:
        direction = candidates.pop()
        source, target = direction.queues
        both = min(direction.sent, direction.received)
        if direction.through < both and source[0] is direction and target[0] is direction:
            source.popleft()
            target.popleft()
            direction.through += 1
            candidates += [queue[0] for queue in (source, target) if queue]


# -- [4] what is passed on


def _check_passed_on(rank: int, program: Program, placement: Placement, loading: bool) -> None:
    done: set[Pass] = set()
    loaded: set[int] = set()
    ends = (0, placement.last_stage)
    for step in program:
        if isinstance(step, Run):
            action = step.action
            if loading and action.kind is Kind.F and action.stage in ends and action.micro_batch not in loaded:
                raise DeadlockError(f"rank {rank} runs {action} before it has loaded the micro-batch")
            done.add(action)
        elif isinstance(step, Send):
            maker = step.message.maker
            if placement.rank_of(maker.stage) != rank:
                raise DeadlockError(f"rank {rank} sends {step.message}, but stage {maker.stage} is on rank "
                                    f"{placement.rank_of(maker.stage)}")
            if not _is_done(maker, done):
                raise DeadlockError(f"rank {rank} sends {step.message} before {maker} has made it")
        elif isinstance(step, Load):
            if step.micro_batch in loaded:
                raise DeadlockError(f"rank {rank} loads micro-batch {step.micro_batch} twice")
            loaded.add(step.micro_batch)
    for step in program:
        if isinstance(step, AwaitReceive) and not _is_done(step.message.taker, done):
            raise DeadlockError(f"rank {rank} receives {step.message}, but never runs {step.message.taker}")
