"""A trace in the Trace Event Format of chrome://tracing and ui.perfetto.dev (JSON).

    process "pipeline ranks"   a row for each rank: passes, waits, the end of the batch; and its activations
    process "channels"         a row for each channel: messages from the start of their send to their arrival
    process "copies"           where ranks offload, two rows for each: copies to the host, and back
    arrows                     from each send to the wait for it
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from ds_vshape.measure.trace.batch import LOAD, PASS, BatchTrace, Delivery, Event
from ds_vshape.schedule.activations import memory_curve
from ds_vshape.schedule.lowering import Channel, Content, channels
from ds_vshape.schedule.passes import Kind, Pass

_RANKS, _CHANNELS, _COPIES = 0, 1, 2
# Of chrome://tracing's fixed set of colours; Perfetto gives each kind one of its own choice, by the names.
_COLOURS = {Kind.F: "rail_response", Kind.B: "thread_state_running", Kind.W: "rail_load",
            Kind.BW: "thread_state_uninterruptible", Kind.C: "rail_animation", Kind.O: "grey", Kind.R: "grey"}
_MESSAGE_COLOURS = {Content.ACTIVATION: "rail_response", Content.GRADIENT: "thread_state_running"}
_IDLE, _END = "grey", "generic_work"

_Json = dict[str, Any]


def chrome_trace(batches: Sequence[BatchTrace]) -> _Json:
    """The whole trace; times are microseconds from the first event of the first batch."""
    writer = _Writer(min(batch.start for batch in batches))
    placement = batches[0].schedule.placement
    lanes = _Lanes(channels(placement))
    events: list[_Json] = []
    for batch in batches:
        for rank, trace in enumerate(batch.ranks):
            events += [writer.slice(batch, rank, event) for event in trace.events]
            events += writer.memory(batch, rank)
            events += writer.copies(batch, rank)
        for delivery in sorted(batch.deliveries(), key=lambda delivery: delivery.sent.start):
            events += writer.message(batch, lanes.take(delivery), delivery)
    events += _names(placement.chunks, lanes.rows(), any(trace.copies for batch in batches for trace in batch.ranks))
    return {"traceEvents": events, "displayTimeUnit": "ms", "otherData": {
        "batches": [_about(batch) for batch in batches],
    }}


def _about(batch: BatchTrace) -> _Json:
    return {
        "batch": batch.number,
        "schedule": batch.schedule.name,
        "micro_batches": batch.schedule.micro_batches,
        "predicted_makespan_s": batch.predicted.makespan,
        "measured_makespan_s": batch.measured.makespan,
        "predicted_bubble": batch.predicted.bubble,
        "measured_bubble": batch.measured.bubble,
        "predicted_with": batch.times_of,
        "activations_unit": batch.unit,
        "clocks_ahead_of_rank_0_s": [clock.offset for clock in batch.clocks],
        "clock_uncertainty_s": [clock.uncertainty for clock in batch.clocks],
    }


class _Lanes:
    """Rows of the channels: messages of one row may not overlap, so a channel gets a second one where they do."""

    def __init__(self, order: Sequence[Channel]) -> None:
        self._ends: dict[Channel, list[float]] = {channel: [] for channel in order}

    def take(self, delivery: Delivery) -> int:
        """The number of the channel's first row that is free; to be called in the order of the sends."""
        channel = delivery.message.channel
        ends = self._ends[channel]
        lane = next((lane for lane, end in enumerate(ends) if end <= delivery.sent.start), len(ends))
        ends[lane:lane + 1] = [delivery.arrived]
        return self._number(channel, lane)

    def rows(self) -> dict[int, str]:
        """The names of all rows, by number."""
        return {self._number(channel, lane): f"{channel} ({lane + 1})" if lane else str(channel)
                for channel, ends in self._ends.items() for lane in range(max(1, len(ends)))}

    def _number(self, channel: Channel, lane: int) -> int:
        return 100 * list(self._ends).index(channel) + lane


def _names(chunks: Sequence[Sequence[int]], lanes: dict[int, str], copies: bool) -> Iterator[_Json]:
    processes = {_RANKS: "pipeline ranks", _CHANNELS: "channels", **({_COPIES: "copies"} if copies else {})}
    for process, name in processes.items():
        yield {"ph": "M", "name": "process_name", "pid": process, "args": {"name": name}}
        yield {"ph": "M", "name": "process_sort_index", "pid": process, "args": {"sort_index": process}}
    threads = {(_RANKS, rank): f"rank {rank} (stage{'s' * (len(stages) > 1)} {', '.join(map(str, stages))})"
               for rank, stages in enumerate(chunks)}
    threads |= {(_CHANNELS, number): name for number, name in lanes.items()}
    if copies:
        threads |= {(_COPIES, _row_of_copies(rank, kind)): f"rank {rank} {way}" for rank in range(len(chunks))
                    for kind, way in ((Kind.O, "to the host"), (Kind.R, "back"))}
    for place, ((process, thread), name) in enumerate(threads.items()):
        yield {"ph": "M", "name": "thread_name", "pid": process, "tid": thread, "args": {"name": name}}
        yield {"ph": "M", "name": "thread_sort_index", "pid": process, "tid": thread, "args": {"sort_index": place}}


class _Writer:
    """Writes events; `origin` is the time that becomes 0."""

    def __init__(self, origin: float) -> None:
        self._origin = origin
        self._flows = 0

    def _at(self, seconds: float) -> float:
        return round((seconds - self._origin) * 1e6, 3)

    def slice(self, batch: BatchTrace, rank: int, event: Event) -> _Json:
        """Something that a rank did, on its row."""
        return self._slice(_RANKS, rank, _name(event), event.what, _colour(event), event.start, event.end,
                           {"batch": batch.number, **_arguments(event.action)})

    def memory(self, batch: BatchTrace, rank: int) -> Iterator[_Json]:
        """A rank's activations over time."""
        for time, alive in memory_curve(batch.measured.ranks[rank], batch.activations):
            yield {"ph": "C", "name": f"activations of rank {rank}", "pid": _RANKS, "ts": self._at(time),
                   "args": {batch.unit: alive}}

    def copies(self, batch: BatchTrace, rank: int) -> Iterator[_Json]:
        """A rank's copies to the host and back, on rows of their own."""
        for span in batch.ranks[rank].copies:
            kind = span.action.kind
            yield self._slice(_COPIES, _row_of_copies(rank, kind), repr(span.action), "copy", _COLOURS[kind],
                              span.start, span.end, {"batch": batch.number, **_arguments(span.action)})

    def message(self, batch: BatchTrace, row: int, delivery: Delivery) -> Iterator[_Json]:
        """A message on its channel's row, and the arrow from its send to its receiver's wait."""
        message, sent, awaited = delivery.message, delivery.sent, delivery.awaited
        channel = message.channel
        yield self._slice(_CHANNELS, row, f"{channel.content} of {message.stage}.{message.micro_batch}",
                          "message", _MESSAGE_COLOURS[channel.content], sent.start,
                          delivery.arrived,
                          {"batch": batch.number, "stage": message.stage, "micro_batch": message.micro_batch,
                           "waited_us": round((awaited.end - awaited.start) * 1e6, 3)})
        self._flows += 1
        flow = {"cat": "messages", "name": str(channel.content), "id": self._flows, "pid": _RANKS}
        yield {"ph": "s", "tid": channel.source, "ts": self._at(sent.start), **flow}
        # Inside the wait, and not before the send.
        yield {"ph": "f", "bp": "e", "tid": channel.target,
               "ts": self._at((max(awaited.start, sent.start) + awaited.end) / 2), **flow}

    def _slice(self, process: int, row: int, name: str, what: str, colour: str, start: float, end: float,
               arguments: _Json) -> _Json:
        at = self._at(start)
        return {"ph": "X", "cat": what, "name": name, "pid": process, "tid": row, "ts": at,
                "dur": round(self._at(end) - at, 3), "cname": colour, "args": arguments}


def _row_of_copies(rank: int, kind: Kind) -> int:
    return 2 * rank + (kind is Kind.R)


def _name(event: Event) -> str:
    """F2.5 and W2.5[0/4] for passes, "wait activation 2.5" for messages, "start O2.5" for copies, "optimizer step" for
    the end."""
    action = event.action
    if action is None:
        return event.what
    if event.what == PASS:
        return repr(action)
    if event.what == LOAD:
        return f"load {action.micro_batch}"
    if action.kind.is_copy:
        return f"{event.what} {action!r}"
    return f"{event.what} {Content.into(action)} {action.stage}.{action.micro_batch}"


def _colour(event: Event) -> str:
    if event.what == PASS and event.action is not None:
        return _COLOURS[event.action.kind]
    return _IDLE if event.action is not None else _END


def _arguments(action: Pass | None) -> _Json:
    return {} if action is None else {"stage": action.stage, "micro_batch": action.micro_batch}
