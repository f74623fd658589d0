"""All programs run together, without times: an operation completes as soon as the rules of `deadlock` let it.

What `deadlock.check` and `synchronization.check_synchronization` look at is such a run.
"""

from __future__ import annotations

import enum
from collections import defaultdict, deque
from collections.abc import Callable, Hashable, Sequence

from ds_vshape.schedule.lowering import AwaitReceive, AwaitSend, Channel, Message, MessageStep, PostReceive, Send, Step

# One direction of a communicator: source, target, and what its channels share.
Place = tuple[int, int, Hashable]


class DeadlockError(RuntimeError):
    """The programs can't run to their end; the message names the rank and the step."""


class Receives(enum.Enum):
    """When the runtime starts a receive."""

    EARLY = "receives start when posted"
    LATE = "receives start when waited for"


class Direction:
    """One direction of a communicator: how many of its messages are sent, have a receive, and have arrived.

    `queues` are those of the communicator at either end: directions of started operations, in the order of their start.
    """

    __slots__ = ("coming", "place", "queues", "received", "sent", "through")

    def __init__(self, place: Place, queues: tuple[deque[Direction], deque[Direction]]) -> None:
        self.place, self.queues = place, queues
        self.sent = self.received = self.through = 0
        # How many of its messages the steps taken in send and post.
        self.coming = {Send: 0, PostReceive: 0}


# A step, and if it is one of communication its message's direction and the number on it.
Operation = tuple[Step, Direction | None, int]


class JointRun:
    """All programs at once, under one rule for receives; `run` and `state` are as `repeated.run_through` wants them."""

    def __init__(self, receives: Receives, communicator: Callable[[Channel], Hashable]) -> None:
        self._receives, self._communicator = receives, communicator
        self._of_channel: dict[Channel, Direction] = {}
        self._directions: dict[Place, Direction] = {}
        self._queues: dict[tuple[int, Hashable], deque[Direction]] = defaultdict(deque)
        # The numbers of messages that are started and not waited for, by whether they are sent.
        self._numbers: dict[tuple[bool, Message], int] = {}

    def run(self, parts: Sequence[Sequence[Step]]) -> None:
        """Run some steps of all ranks to their end; DeadlockError where they get stuck."""
        operations = [self._operations(rank, part) for rank, part in enumerate(parts)]
        places = [0] * len(operations)
        moved = True
        while moved:
            moved = False
            for rank, program in enumerate(operations):
                place = before = places[rank]
                while place < len(program) and self._act(rank, *program[place]):
                    place += 1
                places[rank] = place
                moved |= place > before
        stuck = [f"rank {rank} at {program[place][0]}" for rank, (program, place) in enumerate(zip(operations, places))
                 if place < len(program)]
        if stuck:
            raise DeadlockError(f"deadlock ({self._receives.value}): " + "; ".join(stuck))

    def _operations(self, rank: int, part: Sequence[Step]) -> list[Operation]:
        return [self._numbered(step) for step in part if isinstance(step, MessageStep)]

    def _numbered(self, step: MessageStep) -> Operation:
        if isinstance(step, (Send, PostReceive)):
            direction = self._of_channel.get(step.message.channel) or self._direction(step.message.channel)
            number = self._numbers[isinstance(step, Send), step.message] = direction.coming[type(step)]
            direction.coming[type(step)] += 1
            return step, direction, number
        number = self._numbers.pop((isinstance(step, AwaitSend), step.message))
        return step, self._of_channel[step.message.channel], number

    def _direction(self, channel: Channel) -> Direction:
        shared = self._communicator(channel)
        place = channel.source, channel.target, shared
        if place not in self._directions:
            ends = self._queues[channel.source, shared], self._queues[channel.target, shared]
            self._directions[place] = Direction(place, ends)
        self._of_channel[channel] = self._directions[place]
        return self._directions[place]

    def _act(self, rank: int, step: Step, direction: Direction | None, number: int) -> bool:
        """Do `step` of `rank`, or return False if it has to wait."""
        assert direction is not None
        kind = type(step)
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
        candidates = [direction]
        while candidates:
            direction = candidates.pop()
            source, target = direction.queues
            both = min(direction.sent, direction.received)
            if direction.through < both and source[0] is direction and target[0] is direction:
                source.popleft()
                target.popleft()
                self._complete(direction)
                direction.through += 1
                candidates += [queue[0] for queue in (source, target) if queue]

    def _complete(self, direction: Direction) -> None:
        """Called when the message number `through` of `direction` completes."""

    def state(self, start: int) -> Hashable:
        """All that decides how the run goes on."""
        directions = list(self._directions.values())
        counts = tuple(tuple(count - each.through for count in (each.sent, each.received, *each.coming.values()))
                       for each in directions)
        numbers = {direction: number for number, direction in enumerate(directions)}
        queues = tuple(tuple(numbers[direction] for direction in queue) for queue in self._queues.values())
        started = frozenset((sent, message.later(-start), number - self._of_channel[message.channel].through)
                            for (sent, message), number in self._numbers.items())
        return counts, queues, started
