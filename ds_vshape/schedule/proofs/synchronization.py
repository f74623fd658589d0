"""The checker's third rule: no synchronization of a device can turn programs into a deadlock.

    synchronize  a rank that synchronizes its device in a pass waits for all operations that it has started

On a GPU a posted receive is a kernel that spins until its message is there, and a send one until it is received. An
allocator that is short of memory, the first launch of a kernel or a profiler synchronizes the device inside a pass: the
host then waits for all of these, so none of them may wait for anything that this rank does from that pass on.

The programs are run together once, each operation with a vector clock: how many passes of each rank must have ended
before it completes. One run says it for all passes, since what an operation waits for doesn't depend on times.

What repeats is run until the state comes back, clocks apart, and all that was started until then is complete. For an
operation waits for a later pass of its own rank only through passes and operations that come between its start and its
end. So nothing before its start matters, and an operation of a further repeat has the same between its ends as one of
these repeats, or if it ends behind all repeats, as one that is started as many repeats before their end.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Hashable, Sequence
from operator import ge
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from ds_vshape.schedule.communicators import communicator_of
from ds_vshape.schedule.lowering import Channel, MessageStep, PostReceive, Program, Send
from ds_vshape.schedule.passes import Pass
from ds_vshape.schedule.placement import Placement
from ds_vshape.schedule.proofs.deadlock import check
from ds_vshape.schedule.proofs.rendezvous import (DeadlockError, Direction, JointRun, Operation, Operations, Receives,
                                                  run_together)

# How many passes of each rank: the vector clock of distributed systems (Fidge; Mattern), counted in passes.
Clock = NDArray[np.int32]


class _Start(NamedTuple):
    """A rank's operation, and the rank's clock then: what it knows of other ranks, and its own passes."""

    rank: int
    clock: Clock
    operation: Operation


class _Completed(NamedTuple):
    """The clock of a completed message, and at how many ends it is waited for."""

    clock: Clock
    ends: int


def check_synchronization(programs: Sequence[Program],
                          communicator: Callable[[Channel], Hashable] = communicator_of) -> None:
    """Raise DeadlockError unless every rank may synchronize its device in any single one of its passes.

    Receives start when they are posted. Several ranks that synchronize at once may still wait for one another, other
    than in the programs of batches in which shapes are announced (`Lowering.announced`).

    Args:
        programs: those of all ranks, which `deadlock.check` has accepted with the same `communicator`.
        communicator: which channels share one, as they do at runtime unless it is given.
    """
    run_together(programs, communicator, [_ClockedRun(len(programs))])


def check_with_synchronization(programs: Sequence[Program], placement: Placement) -> None:
    """`deadlock.check` and `check_synchronization` of the same programs in one, which takes less time."""
    check(programs, placement, early=_ClockedRun(len(programs)))


class _ClockedRun(JointRun):
    """A run that knows the clock at which each operation completes.

    A rank's entry in its own clock is out of date: how many passes it has run is known of each operation.
    """

    def __init__(self, ranks: int) -> None:
        super().__init__(Receives.EARLY)
        self._clocks: list[Clock] = [np.zeros(ranks, np.int32) for _ in range(ranks)]
        self._sharing: dict[int, _Start] = {}
        # By direction: what was started at either end and isn't complete; and by number, what is.
        self._started: list[tuple[deque[_Start], deque[_Start]]] = []
        self._completed: list[dict[int, _Completed]] = []
        # By direction: its communicator at either end; the clock of the last completion there.
        self._ends: list[tuple[tuple[int, Hashable], tuple[int, Hashable]]] = []
        self._last: dict[tuple[int, Hashable], Clock] = {}
        self._passes: Sequence[Sequence[Pass]] = ()
        # How many messages of each direction were started when the state came back.
        self._until: list[int] | None = None

    def run(self, parts: Sequence[Sequence[Operation]], operations: Operations) -> None:
        self._passes = operations.passes
        for source, target, shared in operations.places[len(self._ends):]:
            self._started.append((deque(), deque()))
            self._completed.append({})
            self._ends.append(((source, shared), (target, shared)))
        super().run(parts, operations)

    def _act(self, rank: int, operation: Operation) -> bool:
        step, index, number, _ = operation
        kind = type(step)
        if kind is Send or kind is PostReceive:
            self._started[index][kind is PostReceive].append(_Start(rank, self._clocks[rank], operation))
            return super()._act(rank, operation)
        if index < 0:
            self._share(_Start(rank, self._clocks[rank], operation))
            return True
        if self._directions[index].through <= number:
            return False
        completed = self._completed[index]
        clock, ends = completed.pop(number)
        if ends > 1:
            completed[number] = _Completed(clock, ends - 1)
        self._clocks[rank] = np.maximum(self._clocks[rank], clock)
        return True

    def _complete(self, direction: Direction) -> None:
        starts = [started.popleft() for started in self._started[direction.index]]
        completion = _joined(starts)
        ends = self._ends[direction.index]
        for end in ends:
            if end in self._last:
                np.maximum(completion, self._last[end], out=completion)
        for end in ends:
            self._last[end] = completion
        for start in starts:
            self._check(start, completion)
        self._completed[direction.index][direction.through] = _Completed(completion, len(starts))

    def is_known(self) -> bool:
        if self._until is None:
            self._until = [max(each.sent, each.received) for each in self._directions]
        # Sharing the loss would stay open for all repeats.
        return not self._sharing and all(map(ge, self.through(), self._until))

    def _share(self, start: _Start) -> None:
        """Start a rank's part in sharing the loss, which completes once all ranks have."""
        self._sharing[start.rank] = start
        if len(self._sharing) == len(self._clocks):
            completion = _joined(list(self._sharing.values()))
            for sharer in self._sharing.values():
                self._check(sharer, completion)

    def _check(self, start: _Start, completion: Clock) -> None:
        """Raise DeadlockError if an operation waits for a pass that its rank runs after its start."""
        if completion[start.rank] > start.operation.passes:
            passes, place = self._passes[start.rank], start.operation.passes
            blocked = passes[place] if place < len(passes) else f"the pass after {passes[-1]}"
            step = start.operation.step
            what = step.message if isinstance(step, MessageStep) else "the batch's loss"
            raise DeadlockError(f"rank {start.rank} can't synchronize its device in {blocked}: it would wait there for "
                                f"{what}, which waits for that pass")


def _joined(starts: Sequence[_Start]) -> Clock:
    """The clock at which all of `starts` have come."""
    joined: Clock = np.maximum.reduce([start.clock for start in starts])
    for start in starts:
        joined[start.rank] = max(joined[start.rank], start.operation.passes)
    return joined
