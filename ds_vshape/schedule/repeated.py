"""What repeats, kept once: the middle of an order of passes, or of a program of steps.

After the warm-up a rank does the same with one micro-batch after another, until there are no more to start:

    1F1B, p = 2, m = 5, rank 0    F0 F1  B0 F2  B1 F3  B2 F4  B3 B4
                                  head   body: 3 times, each    tail
                                         a micro-batch later
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any, Protocol, TypeVar, overload


class Action(Protocol):
    """A pass or a step: something that is done for a micro-batch."""

    def later(self, micro_batches: int) -> Any:
        """The same for a micro-batch that comes so many later."""


T = TypeVar("T", bound=Action)


class Repeated(Sequence[T]):
    """`head`, the `body` so many `times` and then `tail`.

    The three hold what they do where the body comes once. Each repeat of the body, and the tail behind it, comes
    `interval` micro-batches later than the one before.
    """

    def __init__(self, head: Sequence[T], body: Sequence[T], tail: Sequence[T], times: int, interval: int) -> None:
        self.head, self.body, self.tail = tuple(head), tuple(body), tuple(tail)
        self.times, self.interval = times, interval

    def __len__(self) -> int:
        return len(self.head) + self.times * len(self.body) + len(self.tail)

    def __iter__(self) -> Iterator[T]:
        yield from self.head
        for time in range(self.times):
            yield from later(self.body, time * self.interval)
        yield from later(self.tail, (self.times - 1) * self.interval)

    @overload
    def __getitem__(self, place: int) -> T: ...

    @overload
    def __getitem__(self, place: slice) -> tuple[T, ...]: ...

    def __getitem__(self, place: int | slice) -> T | tuple[T, ...]:
        if isinstance(place, slice):
            return tuple(self)[place]
        place = range(len(self))[place]
        if place < len(self.head):
            return self.head[place]
        time, place = divmod(place - len(self.head), len(self.body))
        if time < self.times:
            return next(iter(later(self.body[place:place + 1], time * self.interval)))
        place += (time - self.times) * len(self.body)
        return next(iter(later(self.tail[place:place + 1], (self.times - 1) * self.interval)))

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, (tuple, Repeated)):
            return NotImplemented
        return len(self) == len(other) and all(one == another for one, another in zip(self, other))

    def __hash__(self) -> int:
        return hash(tuple(self))

    def __repr__(self) -> str:
        return f"Repeated({self.head}, {self.times} times {self.body}, {self.tail}; interval {self.interval})"

    def repeated(self, times: int) -> Repeated[T]:
        """The same with the body so many times."""
        return Repeated(self.head, self.body, self.tail, times, self.interval)


def later(actions: Sequence[T], micro_batches: int) -> Iterator[T]:
    """`actions` for micro-batches that come so many later."""
    return (action.later(micro_batches) for action in actions) if micro_batches else iter(actions)


def times_of(sequences: Sequence[Sequence[Any]]) -> int:
    """How often the body of all of these repeats; 1 where not all have one, or not as often."""
    found = {(each.times, each.interval) if isinstance(each, Repeated) else (1, 0) for each in sequences}
    return found.pop()[0] if len(found) == 1 else 1


class ComesBack:
    """Whether a state is what it was a repeat before.

    What repeats does the same from the same state, but for later micro-batches. So once the state comes back, all
    further repeats pass as the last one did, and leave what follows the same state.

    Args:
        state: all that decides how something goes on, for micro-batches counted from the given one.
    """

    def __init__(self, state: Callable[[int], object]) -> None:
        self._state = state
        self._before: object = None

    def __call__(self, start: int) -> bool:
        """Asked after each repeat, with the micro-batch from which the next one counts."""
        before, self._before = self._before, self._state(start)
        return before == self._before


def run_through(sequences: Sequence[Sequence[T]], run: Callable[[Sequence[Sequence[T]]], None],
                is_known: Callable[[int], bool]) -> None:
    """Run all of `sequences`, one of each rank, together, and what repeats only until nothing new can happen.

    Args:
        run: is given the heads of all ranks, then some times their bodies, then their tails; each to its end.
        is_known: whether further repeats could tell nothing more; asked as `ComesBack`.
    """
    repeated = [each for each in sequences if isinstance(each, Repeated)]
    if times_of(sequences) == 1:
        run(sequences)
        return
    interval = repeated[0].interval
    run([each.head for each in repeated])
    is_known(0)
    done = 0
    for time in range(repeated[0].times):
        run([tuple(later(each.body, time * interval)) for each in repeated])
        done = time
        if is_known((time + 1) * interval):
            break
    run([tuple(later(each.tail, done * interval)) for each in repeated])
