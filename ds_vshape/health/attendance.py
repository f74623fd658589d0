"""Decides which rank of a job is lost, from the status that every rank sends each second or so.

A rank that works on something for hours keeps sending, and no other rank ends because of it. A rank is lost if

    its process has ended                     its connection tells so at once
    its script has ended in an error          it tells so itself
    it has sent nothing for `seconds`         its process is stopped, or its host is cut off
    it hasn't come within `seconds`           nothing is known of it

The job is lost as well if no single rank is, but all of them wait for each other.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

# Where a rank has failed or ended, others that have waited for so long (longer than a pass takes) wait for that rank.
STUCK_SECONDS = 10.0


@dataclass(frozen=True)
class Status:
    """What a rank tells of itself.

    `waits` is how many seconds its script has been in one exchange with other ranks, 0 while it is in none; `place`
    names that exchange; `failure` is an error of this rank that the others don't know of yet.
    """

    waits: float = 0.0
    place: str = ""
    failure: str | None = None


@dataclass(frozen=True)
class JobLost:
    """Why the job can't continue: what happened to `rank`, which is None where no single rank is the cause."""

    rank: int | None
    why: str
    fate: str = "is lost"


class Attendance:
    """The ranks of a job. Every argument `now` is in seconds since one fixed moment."""

    def __init__(self, ranks: Iterable[int], seconds: float) -> None:
        self.seconds = seconds
        self._absent = set(ranks)
        self._heard: dict[int, float] = {}
        self._status: dict[int, Status] = {}
        self._left: set[int] = set()
        self._loss: JobLost | None = None

    @property
    def complete(self) -> bool:
        """Whether all have come."""
        return not self._absent

    def heard(self, rank: int, now: float, status: Status | None = None) -> None:
        """`rank` has sent a message, with its `status` if it is one."""
        self._absent.discard(rank)
        self._heard[rank] = now
        if status is not None:
            self._status[rank] = status

    def left(self, rank: int, error: str) -> None:
        """The script of `rank` has ended: in an error, unless the text `error` is empty."""
        self._forget(rank)
        self._left.add(rank)
        if error:
            self._lose(rank, f"its script has ended in {error}")

    def gone(self, rank: int) -> None:
        """The connection to `rank` is closed."""
        if rank in self._heard:
            self._forget(rank)
            self._lose(rank, "its process has ended")

    def silent(self, now: float, seconds: float) -> list[int]:
        """The ranks that have sent nothing for `seconds`, in order."""
        return sorted(rank for rank, last in self._heard.items() if now - last > seconds)

    def loss(self, now: float) -> JobLost | None:
        """Why the job is lost, None if it isn't; the first reason that is found stays."""
        if self._loss is None:
            self._look(now)
        return self._loss

    def _look(self, now: float) -> None:
        for rank, last in self._heard.items():
            if now - last > self.seconds:
                return self._lose(rank, f"it has given no sign of life for {self.seconds:g} seconds: its process is "
                                        "stopped, or its host cut off")
        if self._absent:
            if now > self.seconds:
                self._lose(min(self._absent), f"it hasn't reached its PipelineModule within {self.seconds:g} seconds")
            return None
        failures = {rank: status.failure for rank, status in self._status.items() if status.failure is not None}
        limit = min(self.seconds, STUCK_SECONDS) if failures or self._left else self.seconds
        waiting = {rank: self._status.get(rank, Status()) for rank in self._heard}
        if waiting and all(status.waits >= limit for status in waiting.values()):
            self._stuck(waiting, failures)
        return None

    def _stuck(self, waiting: dict[int, Status], failures: dict[int, str]) -> None:
        places: dict[str, list[int]] = {}
        for rank, status in waiting.items():
            if rank not in failures:
                places.setdefault(status.place, []).append(rank)
        waiting_for = "; ".join(f"rank{'s' if len(ranks) > 1 else ''} {_shown(ranks)} in {place}"
                         for place, ranks in places.items())
        if failures:
            rank, failure = min(failures.items())
            self._lose(rank, f"{failure}{'; waiting for it: ' + waiting_for if waiting_for else ''}", "has failed")
        elif self._left:
            self._lose(min(self._left), f"its script has ended; waiting for it: {waiting_for}")
        else:
            self._lose(None, f"all ranks wait for each other: {waiting_for}")

    def _lose(self, rank: int | None, why: str, fate: str = "is lost") -> None:
        if self._loss is None:
            self._loss = JobLost(rank, why, fate)

    def _forget(self, rank: int) -> None:
        self._absent.discard(rank)
        self._heard.pop(rank, None)
        self._status.pop(rank, None)


def _shown(ranks: list[int]) -> str:
    few = ", ".join(map(str, sorted(ranks)[:8]))
    return few if len(ranks) <= 8 else f"{few} and {len(ranks) - 8} more"
