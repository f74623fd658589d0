"""What is known of a traced batch: pure data, as text between ranks and in one piece on the first of them.

Times are seconds. A rank's own are on its own clock; `BatchTrace.aligned` brings them all to that of rank 0.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

from ds_vshape.schedule.activations import Activations
from ds_vshape.schedule.lowering import Message, message_into
from ds_vshape.schedule.passes import Kind, Pass
from ds_vshape.schedule.placement import Placement
from ds_vshape.schedule.schedule import Schedule
from ds_vshape.schedule.timeline import Span, Timeline

# What events are, besides those of the end of a batch, which go by their instruction's name.
PASS, LOAD, WAIT, SEND, RELEASE = "pass", "load", "wait", "send", "release"
# Of copies, besides the O and R that are events of passes.
OFFLOAD, WAIT_RELOAD = "start", "wait for"


@dataclass(frozen=True)
class Event:
    """Something that a rank did.

    `action` is the pass that ran, that the data were loaded for, that a message goes into (F takes an activation, B a
    gradient), or the O or R whose copy is started or waited for; None at the end of a batch.
    """

    what: str
    action: Pass | None
    start: float
    end: float


@dataclass(frozen=True)
class RankTrace:
    """One rank's batch: its events in order, when messages arrived, by the pass that they go into, and its copies to
    the host (O) and back (R)."""

    events: tuple[Event, ...]
    arrivals: Mapping[Pass, float]
    copies: tuple[Span, ...] = ()

    def text(self) -> str:
        """As JSON, for `parse`."""
        events = [[event.what, repr(event.action) if event.action else "", event.start, event.end]
                  for event in self.events]
        return json.dumps([events, {repr(action): time for action, time in self.arrivals.items()},
                           [[repr(span.action), span.start, span.end] for span in self.copies]])

    @classmethod
    def parse(cls, text: str) -> RankTrace:
        """What `text` wrote."""
        events, arrivals, copies = json.loads(text)
        return cls(tuple(Event(what, Pass.parse(action) if action else None, start, end)
                         for what, action, start, end in events),
                   {Pass.parse(action): time for action, time in arrivals.items()},
                   tuple(Span(Pass.parse(action), start, end) for action, start, end in copies))

    def earlier(self, seconds: float) -> RankTrace:
        """On a clock that is behind by `seconds`."""
        return RankTrace(tuple(Event(event.what, event.action, event.start - seconds, event.end - seconds)
                               for event in self.events),
                         {action: time - seconds for action, time in self.arrivals.items()},
                         tuple(Span(span.action, span.start - seconds, span.end - seconds) for span in self.copies))


@dataclass(frozen=True)
class Clock:
    """How far a rank's clock is ahead of rank 0's, in seconds, and by how much that may be wrong."""

    offset: float
    uncertainty: float


@dataclass(frozen=True)
class Delivery:
    """A message: the start of its send, its arrival, and when its receiver had it in hand."""

    message: Message
    sent: Event
    arrived: float
    awaited: Event


@dataclass(frozen=True)
class BatchTrace:
    """One batch of the pipeline, on the clock of rank 0.

    `number` counts from 1, as DeepSpeed's steps. `predicted` starts at 0 and was simulated with `times_of`, in words.
    `activations` are sizes in `unit`.
    """

    number: int
    schedule: Schedule
    ranks: tuple[RankTrace, ...]
    clocks: tuple[Clock, ...]
    predicted: Timeline
    times_of: str
    activations: Activations
    unit: str

    @staticmethod
    def aligned(ranks: Sequence[RankTrace], clocks: Sequence[Clock]) -> tuple[RankTrace, ...]:
        """The ranks' traces on the clock of rank 0."""
        return tuple(rank.earlier(clock.offset) for rank, clock in zip(ranks, clocks, strict=True))

    @cached_property
    def measured(self) -> Timeline:
        """The passes as they ran."""
        return measured(self.ranks)

    @cached_property
    def start(self) -> float:
        """When the first rank did its first thing."""
        return min(event.start for rank in self.ranks for event in rank.events)

    def deliveries(self) -> Iterator[Delivery]:
        """All messages (`deliveries`)."""
        return deliveries(self.ranks, self.schedule.placement)


def deliveries(ranks: Sequence[RankTrace], placement: Placement) -> Iterator[Delivery]:
    """All messages, by receiver and there in the order in which they were waited for."""
    sends = {event.action: event for rank in ranks for event in rank.events if event.what == SEND}
    for rank in ranks:
        for event in rank.events:
            if event.what == WAIT and event.action is not None:
                message = message_into(event.action, placement)
                assert message is not None
                # Where the arrival itself wasn't observed, it is known from the wait for it.
                yield Delivery(message, sends[event.action], rank.arrivals.get(event.action, event.end), event)


def measured(ranks: Sequence[RankTrace]) -> Timeline:
    """The passes and copies of all ranks. An O, which waits, and an R are where the rank goes on after them."""
    passes = tuple(tuple(Span(event.action, event.end if event.action.kind.is_copy else event.start, event.end)
                         for event in rank.events if event.what == PASS and event.action is not None)
                   for rank in ranks)
    if not any(rank.copies for rank in ranks):
        return Timeline(passes)
    return Timeline(passes, *(tuple(tuple(span for span in rank.copies if span.action.kind is kind) for rank in ranks)
                              for kind in (Kind.O, Kind.R)))
