"""The checker's third rule: no synchronization of a device can turn programs into a deadlock.

    synchronize  a rank that synchronizes its device in a pass waits for all operations that it has started

On a GPU a posted receive is a kernel that spins until its message is there, and a send one until it is received. An
allocator that is short of memory, the first launch of a kernel or a profiler synchronizes the device inside a pass: the
host then waits for all of these, so none of them may wait for anything that this rank does from that pass on.

The programs are run together once, each operation with a vector clock: how many passes of each rank must have ended
before it completes. One run says it for all passes, since what an operation waits for doesn't depend on times. What
repeats is run until the clocks, counted from the passes done, are those of the repeat before (`repeated.run_through`).
"""

from __future__ import annotations

from collections import defaultdict, deque
from collections.abc import Callable, Hashable, Mapping, Sequence

import numpy as np

from ds_vshape.schedule.communicators import communicator_of
from ds_vshape.schedule.deadlock import DeadlockError
from ds_vshape.schedule.lowering import (AwaitReceive, AwaitSend, Channel, Message, PostReceive, Program, Run, Send,
                                         ShareLoss, Step)
from ds_vshape.schedule.passes import Pass
from ds_vshape.schedule.repeated import run_through
from ds_vshape.schedule.vector_clocks import Clock


def check_synchronization(programs: Sequence[Program],
                          communicator: Callable[[Channel], Hashable] = communicator_of) -> None:
    """Raise DeadlockError unless every rank may synchronize its device in any single one of its passes.

    Receives start when they are posted. Several ranks that synchronize at once may still wait for one another, other
    than in the programs of batches in which shapes are announced (`lower_announced`).

    Args:
        programs: those of all ranks, which `deadlock.check` has accepted with the same `communicator`.
        communicator: which channels share one, as they do at runtime unless it is given.
    """
    operations = _Operations(len(programs), communicator)
    run_through(programs, operations.run, operations.state)


class _Operations:
    """Sends and receives that were started, and the clocks at which they completed."""

    def __init__(self, ranks: int, communicator: Callable[[Channel], Hashable]) -> None:
        # Of the ends that still wait for a completed message there are so many.
        self._completed: dict[Message, tuple[Clock, int]] = {}
        self._clocks = np.zeros((ranks, ranks), np.int32)
        self._passes: list[list[Pass]] = [[] for _ in range(ranks)]
        self._communicator = communicator
        self._sharing: dict[int, Clock] = {}
        self._started: dict[tuple[int, Message], Clock] = {}
        # By rank and communicator: what was started and isn't complete, and the clock of the last completion.
        self._queues: dict[tuple[int, Hashable], deque[Message]] = defaultdict(deque)
        self._last: dict[tuple[int, Hashable], Clock] = {}

    def run(self, parts: Sequence[Sequence[Step]]) -> None:
        """Run some steps of all ranks together."""
        for passes, part in zip(self._passes, parts):
            passes += [step.action for step in part if isinstance(step, Run)]
        places = [0] * len(parts)
        moved = True
        while moved:
            moved = False
            for rank, part in enumerate(parts):
                place = places[rank]
                while place < len(part) and self._act(rank, part[place]):
                    place += 1
                moved |= place > places[rank]
                places[rank] = place

    def _act(self, rank: int, step: Step) -> bool:
        """Do `step`, or return False if it has to wait."""
        clock = self._clocks[rank]
        if isinstance(step, Run):
            clock[rank] += 1
        elif isinstance(step, (Send, PostReceive)):
            self._start(rank, step.message, clock.copy())
        elif isinstance(step, ShareLoss):
            self._share(rank, clock.copy())
        elif isinstance(step, (AwaitSend, AwaitReceive)):
            if step.message not in self._completed:
                return False
            completion, ends = self._completed.pop(step.message)
            if ends > 1:
                self._completed[step.message] = completion, ends - 1
            np.maximum(clock, completion, out=clock)
        return True

    def state(self, start: int) -> object:
        """As `run_through` wants it."""
        done = self._clocks.diagonal()
        clocks: list[tuple[Hashable, Clock]] = [
            *((key, clock) for key, clock in self._last.items()),
            *(((rank, message.later(-start)), clock) for (rank, message), clock in self._started.items()),
            *(((message.later(-start), ends), clock) for message, (clock, ends) in self._completed.items()),
            *enumerate(self._clocks), *((("loss", rank), clock) for rank, clock in self._sharing.items())]
        queues = tuple((end, tuple(message.later(-start) for message in queue)) for end, queue in self._queues.items())
        return queues, {key: (clock - done).tobytes() for key, clock in clocks}

    def _start(self, rank: int, message: Message, clock: Clock) -> None:
        """Start `rank`'s end of `message`, and complete all that is set free."""
        self._started[rank, message] = clock
        self._queues[rank, self._communicator(message.channel)].append(message)
        candidates = [message]
        while candidates:
            message = candidates.pop()
            shared = self._communicator(message.channel)
            ends = (message.channel.source, shared), (message.channel.target, shared)
            if all(self._queues[end] and self._queues[end][0] == message for end in ends):
                self._complete(message, ends)
                candidates += [self._queues[end][0] for end in ends if self._queues[end]]

    def _complete(self, message: Message, ends: tuple[tuple[int, Hashable], tuple[int, Hashable]]) -> None:
        starts = {end[0]: self._started.pop((end[0], message)) for end in ends}
        before = [self._last[end] for end in ends if end in self._last]
        completion = np.maximum.reduce([*starts.values(), *before])
        self._check(starts, completion, message)
        for end in ends:
            self._queues[end].popleft()
            self._last[end] = completion
        self._completed[message] = completion, len(ends)

    def _share(self, rank: int, clock: Clock) -> None:
        """Start `rank`'s part in sharing the loss, which completes once all ranks have."""
        self._sharing[rank] = clock
        if len(self._sharing) == len(self._passes):
            self._check(self._sharing, np.maximum.reduce(list(self._sharing.values())), "the batch's loss")

    def _check(self, starts: Mapping[int, Clock], completion: Clock, what: object) -> None:
        """Raise DeadlockError if an operation, started by each rank at its clock, waits for a pass after that."""
        for rank, clock in starts.items():
            if completion[rank] > clock[rank]:
                # What repeats is only taken in part by part.
                passes, place = self._passes[rank], int(clock[rank])
                blocked = passes[place] if place < len(passes) else f"the pass after {passes[-1]}"
                raise DeadlockError(f"rank {rank} can't synchronize its device in {blocked}: it would wait there for "
                                    f"{what}, which waits for that pass")
