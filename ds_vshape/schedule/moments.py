"""When each pass of a schedule starts and ends, as lowering looks at it."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property

from ds_vshape.schedule.repeated import Repeated
from ds_vshape.schedule.schedule import Schedule
from ds_vshape.schedule.timeline import Times, simulate

# Start or end of a pass: by the given times, then by equal ones.
Moment = tuple[float, float]


class Moments:
    """Those of all passes, by rank and place in its order; a pass that needs another starts after that one's start.

    Passes that take no time would otherwise share a moment with what they need, and two ranks could each wait first
    for what the other does next. Such ties are broken by a second simulation, in which every pass takes as long.

    Raises ScheduleError if the schedule can't run.
    """

    def __init__(self, schedule: Schedule, times: Times) -> None:
        self.schedule = schedule
        equal = Times.uniform(schedule.placement.stages)
        self._ties = simulate(schedule, equal).ranks
        self._timed = self._ties if times == equal else simulate(schedule, times).ranks
        # Of the ranks that were asked for.
        self._starts: dict[int, list[Moment]] = {}
        self._ends: dict[int, list[Moment]] = {}

    def starts(self, rank: int) -> Sequence[Moment]:
        """Of a rank's passes, in its order."""
        if rank not in self._starts:
            self._starts[rank] = [(span.start, tie.start) for span, tie in zip(self._timed[rank], self._ties[rank])]
        return self._starts[rank]

    def ends(self, rank: int) -> Sequence[Moment]:
        """Of a rank's passes, in its order."""
        if rank not in self._ends:
            self._ends[rank] = [(span.end, tie.end) for span, tie in zip(self._timed[rank], self._ties[rank])]
        return self._ends[rank]

    @cached_property
    def period(self) -> Moment | None:
        """How much later the last repeat of the middle of all orders comes than what stands before it in each; None if
        that differs, or if a rank has too few passes before it."""
        found = set()
        for rank, order in enumerate(self.schedule.orders):
            if not isinstance(order, Repeated) or len(order.head) + len(order.body) * (order.times - 2) < 0:
                return None
            end, length = len(order) - len(order.tail), len(order.body)
            starts = self.starts(rank)[end - 2 * length:end]
            found |= {(late[0] - early[0], late[1] - early[1]) for early, late in zip(starts, starts[length:])}
        return found.pop() if len(found) == 1 else None
