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
from collections.abc import Callable, Hashable, Sequence
from typing import NamedTuple

import numpy as np

from ds_vshape.schedule.communicators import communicator_of
from ds_vshape.schedule.lowering import Channel, Message, MessageStep, PostReceive, Program, Run, Send, ShareLoss, Step
from ds_vshape.schedule.passes import Pass
from ds_vshape.schedule.rendezvous import DeadlockError, Direction, JointRun, Operation, Receives
from ds_vshape.schedule.repeated import run_through
from ds_vshape.schedule.vector_clocks import Clock


class _Start(NamedTuple):
    """A rank's start of its end of a message, and the rank's clock then."""

    rank: int
    clock: Clock
    message: Message


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


class _Operations(JointRun):
    """Sends and receives that were started, and the clocks at which they completed."""

    def __init__(self, ranks: int, communicator: Callable[[Channel], Hashable]) -> None:
        super().__init__(Receives.EARLY, communicator)
        self._clocks = [np.zeros(ranks, np.int32) for _ in range(ranks)]
        self._passes: list[list[Pass]] = [[] for _ in range(ranks)]
        self._sharing: dict[int, Clock] = {}
        # What was started at both ends of each direction and isn't complete.
        self._started: dict[Direction, tuple[deque[_Start], deque[_Start]]] = defaultdict(lambda: (deque(), deque()))
        # By number: what is complete, and how many ends still wait for it.
        self._completed: dict[Direction, dict[int, tuple[Clock, int]]] = defaultdict(dict)
        # By rank and communicator: the clock of the last completion.
        self._last: dict[tuple[int, Hashable], Clock] = {}

    def _operations(self, rank: int, part: Sequence[Step]) -> list[Operation]:
        found: list[Operation] = []
        for step in part:
            if isinstance(step, MessageStep):
                found.append(self._numbered(step))
            elif isinstance(step, (Run, ShareLoss)):
                found.append((step, None, 0))
                if isinstance(step, Run):
                    self._passes[rank].append(step.action)
        return found

    def _act(self, rank: int, step: Step, direction: Direction | None, number: int) -> bool:
        clock = self._clocks[rank]
        if direction is None:
            if isinstance(step, Run):
                clock[rank] += 1
            else:
                self._share(rank, clock.copy())
            return True
        if isinstance(step, (Send, PostReceive)):
            self._started[direction][isinstance(step, PostReceive)].append(_Start(rank, clock.copy(), step.message))
            return super()._act(rank, step, direction, number)
        if direction.through <= number:
            return False
        completed = self._completed[direction]
        completion, ends = completed.pop(number)
        if ends > 1:
            completed[number] = completion, ends - 1
        np.maximum(clock, completion, out=clock)
        return True

    def _complete(self, direction: Direction) -> None:
        starts = [started.popleft() for started in self._started[direction]]
        completion = np.maximum(*(start.clock for start in starts))
        source, target, shared = direction.place
        for end in (source, shared), (target, shared):
            if end in self._last:
                np.maximum(completion, self._last[end], out=completion)
        for end in (source, shared), (target, shared):
            self._last[end] = completion
        for start in starts:
            self._check(start.rank, start.clock, completion, start.message)
        self._completed[direction][direction.through] = completion, len(starts)

    def state(self, start: int) -> Hashable:
        """What decides how the run goes on, with clocks counted from the passes done."""
        done = np.array([clock[rank] for rank, clock in enumerate(self._clocks)], np.int32)
        clocks: list[tuple[Hashable, Clock]] = [
            *self._last.items(), *enumerate(self._clocks),
            *((("loss", rank), clock) for rank, clock in self._sharing.items()),
            *(((direction, end, place), each.clock) for direction, ends in self._started.items()
              for end, started in enumerate(ends) for place, each in enumerate(started)),
            *(((direction, number - direction.through, ends), clock) for direction, completed in self._completed.items()
              for number, (clock, ends) in completed.items())]
        return super().state(start), {key: (clock - done).tobytes() for key, clock in clocks}

    def _share(self, rank: int, clock: Clock) -> None:
        """Start `rank`'s part in sharing the loss, which completes once all ranks have."""
        self._sharing[rank] = clock
        if len(self._sharing) == len(self._passes):
            completion = np.maximum.reduce(list(self._sharing.values()))
            for sharer, started in self._sharing.items():
                self._check(sharer, started, completion, "the batch's loss")

    def _check(self, rank: int, clock: Clock, completion: Clock, what: object) -> None:
        """Raise DeadlockError if an operation that `rank` started at its `clock` waits for a pass after that."""
        if completion[rank] > clock[rank]:
            # What repeats is only taken in part by part.
            passes, place = self._passes[rank], int(clock[rank])
            blocked = passes[place] if place < len(passes) else f"the pass after {passes[-1]}"
            raise DeadlockError(f"rank {rank} can't synchronize its device in {blocked}: it would wait there for "
                                f"{what}, which waits for that pass")
