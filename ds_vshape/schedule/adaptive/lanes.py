"""Loops side by side on threads, one for each core: machine code runs without the interpreter's lock.

What they find doesn't depend on which of them ends first, so the same calls with the same clock still give the same
plan. It does depend on how many there are.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from random import Random
from typing import Any, Protocol, TypeVar

from ds_vshape.schedule.adaptive.machine_code import COMPILED

T = TypeVar("T")

# More would share a search that one run after another leads on.
_MOST = 8


class Annealed(Protocol):
    """What cools down while others do."""

    @property
    def done(self) -> bool:
        """Whether nothing can be better."""

    def steps(self, cooled: float, seed: int) -> Callable[[], Any]:
        """What to call for some steps, where the share `cooled` of the way down is done."""


class Lanes:
    """As many threads as loops may run at once; one alone without machine code."""

    def __init__(self, most: int) -> None:
        self.count = max(1, min(most, _MOST)) if COMPILED else 1
        self._threads = ThreadPoolExecutor(self.count, "planner")

    def run(self, loops: Sequence[Callable[[], T]]) -> list[T]:
        """The results of `loops`, which change nothing that two of them use."""
        if len(loops) == 1:
            return [loops[0]()]
        return list(self._threads.map(lambda loop: loop(), loops))

    def groups(self, members: Sequence[T]) -> Iterator[Sequence[T]]:
        """`members` in turn, as many together as there are lanes."""
        for first in range(0, len(members), self.count):
            yield members[first:first + self.count]

    def anneal(self, annealed: Sequence[Annealed], left: Callable[[], float], length: float, random: Random) -> None:
        """Cool all of `annealed` down, side by side, in the share `length` of the time, of which `left` says what is
        left; end when one is done."""
        began = now = left()
        length = min(length, began)
        while now > began - length and now > 0 and not any(each.done for each in annealed):
            cooled = (began - now) / length
            self.run([each.steps(cooled, random.getrandbits(31)) for each in annealed])
            now = left()
