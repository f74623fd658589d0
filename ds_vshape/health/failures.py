"""A batch that fails on one rank fails on all, and nothing else is lost.

A rank that can't continue (its data end, a layer raises) must not leave others waiting for its messages. It skips
the rest of its passes, still takes in what it is sent, and sends messages without content; before the gradients are
reduced all ranks of the job agree whether the batch counts. If not, every rank raises, and the parameters, the
optimizer and the channels are as they were before the batch.

Ranks that share their stages' layers (tensor parallel) meet in every pass, and can skip passes only together. Where one
of them fails alone, the others wait for it inside a layer, and all that it can do is end.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from enum import IntEnum
from typing import NoReturn, TypeVar

import torch.distributed as dist
from deepspeed.runtime.pipe.module import PipelineError

from ds_vshape.comm.channels import PeerLost, Withdrawn
from ds_vshape.comm.exchange import Exchange, Numbers
from ds_vshape.health.step import Reached
from ds_vshape.health.waits import is_ended_wait

T = TypeVar("T")

_TEXT_SIZE = 2048
# Tensor parallel ranks reach the same error within the time that a pass takes.
PEERS_SECONDS = 10.0


class _State(IntEnum):
    """How a rank's part of a batch ended; the worst of all ranks counts."""

    DONE = 0
    WITHDRAWN = 1  # another rank's failure
    OUT_OF_DATA = 2
    FAILED = 3


@dataclass(frozen=True)
class Failure:
    """Why a rank can't continue with a batch, and where it was."""

    error: Exception
    place: str

    @property
    def is_anothers(self) -> bool:
        """Whether it follows from another rank's failure."""
        return isinstance(self.error, Withdrawn)

    @property
    def state(self) -> _State:
        """What kind of failure it is."""
        if self.is_anothers:
            return _State.WITHDRAWN
        return _State.OUT_OF_DATA if isinstance(self.error, StopIteration) else _State.FAILED

    def __str__(self) -> str:
        return f"{self.place}: {self.description}"

    @property
    def description(self) -> str:
        """The error without the place: the same text on all ranks that fail for one reason."""
        return f"{type(self.error).__name__}: {self.error}"


def is_raised_by_all(error: Exception) -> bool:
    """Whether an Agreement has raised `error`, as it does on all ranks together."""
    return getattr(error, "is_raised_by_all", False)


def is_known_to_all(error: Exception) -> bool:
    """Whether all ranks raise `error`, or find out by themselves what it is about, a lost rank."""
    return is_raised_by_all(error) or is_ended_wait(error)


@contextmanager
def _reached_by_all(what: str) -> Iterator[None]:
    """Around what all ranks do together at the end of `what`; PeerLost if a rank doesn't come."""
    try:
        yield
    except RuntimeError as error:
        raise PeerLost(f"not all ranks reached the end of the {what}: {str(error).splitlines()[0]}") from error


class PendingStatus:
    """Numbers of every rank about a batch, on their way to all ranks."""

    def __init__(self, numbers: Numbers) -> None:
        self._numbers = numbers

    def result(self) -> list[list[float]]:
        """Wait for every rank's numbers [rank][number]; PeerLost if a rank doesn't send them."""
        with _reached_by_all("batch"):
            return self._numbers.result()


class TensorParallelPeers:
    """The ranks that share their layers with this one.

    Args:
        groups: the global ranks of each such group of the job, the same on every rank.
        seconds: how long the first to fail waits for the others, at most PEERS_SECONDS.

    Creating it is collective over the job.
    """

    def __init__(self, groups: Sequence[Sequence[int]], seconds: float) -> None:
        self._exchange: Exchange | None = None
        self._ranks: Sequence[int] = ()
        for ranks in groups:
            exchange = Exchange(ranks, min(seconds, PEERS_SECONDS))
            if dist.get_rank() in ranks and len(ranks) > 1:
                self._exchange, self._ranks = exchange, ranks

    def check_all_failed(self, failure: Failure) -> None:
        """Return if all of them call this; PeerLost if some don't, which can't be helped any more."""
        if self._exchange is None:
            return
        try:
            self._exchange.largest(_State.FAILED)
        except RuntimeError:
            raise PeerLost(f"{failure}. Not all of the ranks {', '.join(map(str, self._ranks))} failed, which share "
                           "their layers: the others wait for it inside one") from failure.error


class Agreement:
    """All ranks of the job agree on the end of a batch, of a checkpoint, or of another piece of work.

    Args:
        name: what errors call this rank.

    Creating it is collective.
    """

    def __init__(self, name: object) -> None:
        self._exchange = Exchange()
        self._name = name

    def run(self, work: Callable[[], T], what: str) -> T:
        """What `work` gives; an error of it on one rank is raised on all, once all have done theirs. Collective.

        `what` is a noun that names the work, the same on every rank. Raises as `reach` does. In `work` this rank must
        not wait for others: one of them may have failed by then.
        """
        failure: Failure | None = None
        try:
            result = work()
        except PeerLost:
            raise
        except Exception as error:
            failure = self.failure(error, what)
        self.reach(failure, what)
        return result

    def holds_everywhere(self, holds: bool, what: str) -> bool:
        """Whether something holds on all ranks; collective. PeerLost, which names `what`, if a rank doesn't come."""
        with _reached_by_all(what):
            return not self._exchange.largest(int(not holds))

    def failure(self, error: Exception, what: str) -> Failure:
        """An error of this rank in `what`, for `reach`."""
        return Failure(error, f"{what} on {self._name}")

    def start_status(self, numbers: Sequence[float]) -> PendingStatus:
        """Start to tell all ranks something of this rank's part of a batch, ahead of its end; doesn't wait.

        Collective, in the same order on every rank.
        """
        with _reached_by_all("batch"):
            return PendingStatus(self._exchange.start_numbers(numbers))

    def reached(self, failure: Failure | None, reached: Reached) -> Reached | None:
        """None if no rank has failed; else how far the step has come on all ranks, or else MIDWAY. Collective."""
        with _reached_by_all("batch"):
            failed, most, least = self._exchange.largest_of_each([failure is not None, reached, -reached])
        if not failed:
            return None
        return Reached(most) if most == -least else Reached.MIDWAY

    def reach(self, failure: Failure | None, what: str = "batch", consequence: str | None = None) -> None:
        """Return if no rank has failed; collective.

        Raises on every rank else: where it happened the error itself; elsewhere PipelineError with its text, or
        StopIteration if the only reason is that the data have run out. PeerLost if a rank doesn't come. The
        `consequence`, the same on every rank, is part of the error; None: no rank counts `what`.
        """
        state = _State.DONE if failure is None else failure.state
        with _reached_by_all(what):
            worst = _State(self._exchange.largest(state))
        if worst is not _State.DONE:
            self._raise(failure, worst, consequence or f"no rank counts this {what}", consequence)

    def _raise(self, failure: Failure | None, worst: _State, noted: str, consequence: str | None) -> NoReturn:
        own = failure is not None and failure.state is worst
        text = str(failure)[:_TEXT_SIZE] if own else ""
        texts = [each for each in self._exchange.texts(text) if each]
        if failure is not None and own:
            failure.error.add_note(f"in the {failure.place}; {noted}")
            # One may be the other's cause: what can't be sent is taken for zeros where it is awaited.
            for other in dict.fromkeys(texts):
                if not other.endswith(failure.description):
                    failure.error.add_note(f"and in the {other}")
            error = failure.error
        else:
            text = "; ".join([*dict.fromkeys(texts), *([consequence] if consequence else [])])
            error = StopIteration(text) if worst is _State.OUT_OF_DATA else PipelineError(text)
        error.is_raised_by_all = True  # type: ignore[attr-defined]
        raise error
