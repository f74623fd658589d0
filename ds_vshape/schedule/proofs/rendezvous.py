"""All programs run together, without times: an operation completes as soon as the rules of `deadlock` let it.

What `deadlock.check` and `synchronization.check_synchronization` look at are such runs.
"""

from __future__ import annotations

import enum
from collections import defaultdict, deque
from collections.abc import Callable, Hashable, Sequence
from typing import NamedTuple

from ds_vshape.schedule.lowering import (AwaitReceive, AwaitSend, Channel, Message, MessageStep, PostReceive, Program,
                                         Run, Send, ShareLoss, Step)
from ds_vshape.schedule.passes import Pass
from ds_vshape.schedule.repeated import ComesBack, run_through

# One direction of a communicator: source, target, and what its channels share.
Place = tuple[int, int, Hashable]


class DeadlockError(RuntimeError):
    """The programs can't run to their end; the message names the rank and the step."""


class Receives(enum.Enum):
    """When the runtime starts a receive."""

    EARLY = "receives start when posted"
    LATE = "receives start when waited for"


class Operation(NamedTuple):
    """A step of communication: the direction of its message, its message's number there, and how many passes its rank
    runs before it. Sharing the loss has no direction."""

    step: MessageStep | ShareLoss
    direction: int
    number: int
    passes: int


class Operations:
    """The operations of all ranks, part by part."""

    def __init__(self, ranks: int, communicator: Callable[[Channel], Hashable]) -> None:
        self._communicator = communicator
        self.passes: list[list[Pass]] = [[] for _ in range(ranks)]
        self.places: list[Place] = []
        # By direction, how many messages are sent and posted.
        self._sent: list[int] = []
        self._posted: list[int] = []
        self._of_channel: dict[Channel, int] = {}
        self._of_place: dict[Place, int] = {}
        # The numbers of messages that are started and not waited for, by whether they are sent.
        self._open_sends: dict[Message, int] = {}
        self._open_receives: dict[Message, int] = {}

    def of(self, rank: int, part: Sequence[Step]) -> list[Operation]:
        """Those of the next part of a rank's program."""
        passes, found = self.passes[rank], []
        for step in part:
            kind = type(step)
            if kind is Run:
                passes.append(step.action)  # type: ignore[union-attr]
            elif isinstance(step, MessageStep):
                message = step.message
                direction = self._of_channel.get(message.channel)
                if direction is None:
                    direction = self._direction(message.channel)
                if kind is Send:
                    number = self._open_sends[message] = self._sent[direction]
                    self._sent[direction] += 1
                elif kind is PostReceive:
                    number = self._open_receives[message] = self._posted[direction]
                    self._posted[direction] += 1
                else:
                    number = (self._open_sends if kind is AwaitSend else self._open_receives).pop(message)
                found.append(Operation(step, direction, number, len(passes)))
            elif kind is ShareLoss:
                found.append(Operation(step, -1, 0, len(passes)))  # type: ignore[arg-type]
        return found

    def _direction(self, channel: Channel) -> int:
        place = channel.source, channel.target, self._communicator(channel)
        if place not in self._of_place:
            self._of_place[place] = len(self.places)
            self.places.append(place)
            self._sent.append(0)
            self._posted.append(0)
        self._of_channel[channel] = self._of_place[place]
        return self._of_place[place]

    def state(self, start: int, through: Sequence[int]) -> Hashable:
        """What decides about the operations of the next part, where so many messages are `through`."""
        return (tuple(sent - done for sent, done in zip(self._sent, through)),
                tuple(posted - done for posted, done in zip(self._posted, through)),
                *(frozenset((message.later(-start), number - through[self._of_channel[message.channel]])
                            for message, number in each.items()) for each in (self._open_sends, self._open_receives)))


class Direction:
    """One direction of a communicator: how many of its messages are sent, have a receive, and have arrived.

    `queues` are those of the communicator at either end: directions of started operations, in the order of their start.
    """

    __slots__ = ("index", "queues", "received", "sent", "through")

    def __init__(self, index: int, queues: tuple[deque[Direction], deque[Direction]]) -> None:
        self.index, self.queues = index, queues
        self.sent = self.received = self.through = 0


class JointRun:
    """All programs at once, under one rule for receives.

    A rank needn't end a part before others go on to the next: where it is slower than a receiver, it may wait for a
    send in a part that comes before the one that receives it.
    """

    def __init__(self, receives: Receives) -> None:
        self._receives = receives
        self._directions: list[Direction] = []
        self._queues: dict[tuple[int, Hashable], deque[Direction]] = defaultdict(deque)
        # What each rank has taken in and not done.
        self._waiting: list[Sequence[Operation]] = []

    def run(self, parts: Sequence[Sequence[Operation]], operations: Operations) -> None:
        """Take in some operations of all ranks, and run them as far as they go; DeadlockError once all are stuck."""
        for source, target, shared in operations.places[len(self._directions):]:
            ends = self._queues[source, shared], self._queues[target, shared]
            self._directions.append(Direction(len(self._directions), ends))
        if any(self._waiting):
            parts = [(*before, *part) for before, part in zip(self._waiting, parts)]
        places = [0] * len(parts)
        moved = True
        while moved:
            moved = False
            for rank, part in enumerate(parts):
                place = before = places[rank]
                while place < len(part) and self._act(rank, part[place]):
                    place += 1
                places[rank] = place
                moved |= place > before
        self._waiting = [part[place:] for part, place in zip(parts, places)]
        if all(self._waiting) and not any(places):
            self.end()

    def end(self) -> None:
        """DeadlockError if a rank isn't done."""
        stuck = [f"rank {rank} at {part[0].step}" for rank, part in enumerate(self._waiting) if part]
        if stuck:
            raise DeadlockError(f"deadlock ({self._receives.value}): " + "; ".join(stuck))

    def _act(self, rank: int, operation: Operation) -> bool:
        """Do `operation` of `rank`, or return False if it has to wait."""
        step, index, number, _ = operation
        kind = type(step)
        if kind is ShareLoss:
            return True
        direction = self._directions[index]
        if kind is Send:
            direction.sent += 1
            self._start(direction, 0)
            return True
        if kind is PostReceive:
            if self._receives is Receives.EARLY:
                direction.received += 1
                self._start(direction, 1)
            return True
        if kind is AwaitReceive:
            # The runtime starts what was posted before the message on its communicator, too.
            while direction.received <= number:
                direction.received += 1
                self._start(direction, 1)
        return direction.through > number

    def _start(self, direction: Direction, end: int) -> None:
        """Start an operation at one end of `direction`; complete all operations that it unblocks."""
        direction.queues[end].append(direction)
        candidates = [direction] if direction.sent > direction.through < direction.received else []
        while candidates:
            direction = candidates.pop()
            source, target = direction.queues
            if (direction.sent > direction.through < direction.received and source[0] is direction
                    and target[0] is direction):
                source.popleft()
                target.popleft()
                self._complete(direction)
                direction.through += 1
                candidates += [queue[0] for queue in (source, target) if queue]

    def _complete(self, direction: Direction) -> None:
        """Called when the message number `through` of `direction` completes."""

    def through(self) -> list[int]:
        """How many messages of each direction have arrived."""
        return [each.through for each in self._directions]

    def state(self) -> Hashable:
        """What decides how the run goes on, besides the next operations."""
        return (tuple((each.sent - each.through, each.received - each.through) for each in self._directions),
                tuple(tuple(direction.index for direction in queue) for queue in self._queues.values()),
                tuple(tuple((type(each.step), each.direction,
                             each.number - (self._directions[each.direction].through if each.direction >= 0 else 0))
                            for each in part) for part in self._waiting))

    def is_known(self) -> bool:
        """Whether further repeats, which all run as the last one has, could tell nothing more."""
        return True


def run_together(programs: Sequence[Program], communicator: Callable[[Channel], Hashable],
                 runs: Sequence[JointRun]) -> None:
    """Run `programs` in each of `runs`; DeadlockError where they get stuck in one."""
    operations = Operations(len(programs), communicator)

    def run(parts: Sequence[Sequence[Step]]) -> None:
        of_ranks = [operations.of(rank, part) for rank, part in enumerate(parts)]
        for each in runs:
            each.run(of_ranks, operations)

    def state(start: int) -> Hashable:
        return operations.state(start, runs[0].through()), tuple(each.state() for each in runs), tuple(
            tuple(one - other for one, other in zip(each.through(), runs[0].through())) for each in runs[1:])

    comes_back = ComesBack(state)
    run_through(programs, run, lambda start: comes_back(start) and all([each.is_known() for each in runs]))
    for each in runs:
        each.end()
