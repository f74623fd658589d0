"""A page for a browser: predicted above measured timelines of the traced batches, in one file that needs nothing else.

The layout is in page.html, page.css and page.js in this folder; this file makes the data. Times are seconds from the
first pass of a timeline.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from importlib.resources import files
from string import Template
from typing import Any

from ds_vshape.measure.trace.batch import BatchTrace
from ds_vshape.schedule.activations import memory_curve
from ds_vshape.schedule.timeline import Span, Timeline

_Json = dict[str, Any]


def page(batches: Sequence[BatchTrace]) -> str:
    """The whole page, as HTML."""
    folder = files(__package__)
    parts = {name: (folder / f"page.{name}").read_text(encoding="utf-8") for name in ("html", "css", "js")}
    # No text of the data may end the element that contains it.
    data = json.dumps({"batches": [_batch(batch) for batch in batches]}, separators=(",", ":")).replace("<", "\\u003c")
    return Template(parts["html"]).substitute(style=parts["css"], script=parts["js"], data=data)


def _batch(batch: BatchTrace) -> _Json:
    placement = batch.schedule.placement
    return {
        "number": batch.number,
        "schedule": batch.schedule.name,
        "microBatches": batch.schedule.micro_batches,
        "chunks": placement.chunks,
        "timesOf": batch.times_of,
        "unit": batch.unit,
        "uncertainty": max(clock.uncertainty for clock in batch.clocks),
        "predicted": {**_timeline(batch.predicted, batch), "others": [[] for _ in batch.ranks]},
        "measured": {**_timeline(batch.measured, batch), "others": _others(batch)},
        "messages": _messages(batch),
    }


def _start(timeline: Timeline) -> float:
    return min(rank[0].start for rank in timeline.ranks if rank)


def _timeline(timeline: Timeline, batch: BatchTrace) -> _Json:
    start, makespan = _start(timeline), timeline.makespan
    ranks = []
    for rank, spans in enumerate(timeline.ranks):
        curve = memory_curve(spans, batch.activations)
        ranks.append({
            # Kind, stage, micro-batch, piece, of pieces, start, end. An O or R takes none of the rank's time.
            "passes": [_span(span, start) for span in spans if not span.action.kind.is_copy],
            # Those to the host, and those back; nothing where no rank copies.
            "copies": [[_span(span, start) for span in ranks[rank]]
                       for ranks in (timeline.offloads, timeline.reloads) if any(ranks)],
            "memory": [[time - start, alive] for time, alive in curve],
            "bubble": 1 - sum(span.end - span.start for span in spans) / makespan if makespan else 0.0,
        })
    return {"makespan": makespan, "bubble": timeline.bubble, "ranks": ranks}


def _span(span: Span, start: float) -> list[Any]:
    action = span.action
    return [action.kind, action.stage, action.micro_batch, action.piece, action.pieces, span.start - start,
            span.end - start]


def _others(batch: BatchTrace) -> list[list[list[Any]]]:
    """Of each rank (what, start, end) of the end of the batch."""
    start = _start(batch.measured)
    return [[[event.what, event.start - start, event.end - start] for event in rank.events if event.action is None]
            for rank in batch.ranks]


def _messages(batch: BatchTrace) -> _Json:
    """(Sender, start of the send, arrival, start and end of the wait for it), by the pass that a message goes into."""
    start = _start(batch.measured)
    return {repr(delivery.awaited.action): [delivery.message.channel.source, *(time - start for time in (
        delivery.sent.start, delivery.arrived, delivery.awaited.start, delivery.awaited.end))]
        for delivery in batch.deliveries()}
