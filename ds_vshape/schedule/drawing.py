"""A timeline as text, one row a rank, to be read like the papers' figures.

    time    0              5              10
    rank 0  F0 F1 ...f0 b0 w0 f1 b1 B0 w1 B1 W0 W1
    rank 1  ...F0 f0 F1 f1 b0 B0 w0 b1 B1 W0 w1 W1

A pass is its kind and micro-batch, as wide as it is long: capital letters on the rank's first chunk, small ones on its
second. Where ranks have more chunks than that, a letter follows instead: F0a on the first, F0b on the second. Dots are
bubbles. A piece of a W that is too short for its name has no number (w-). Copies to the host and back have rows of
their own, with their O or R where they take time:

    rank 0  F0 F1 ...F2 BW2-- BW1-- C0 BW0--
     out       O0---
     back                     R0---

Plain text; colours are the caller's (`PASSES` finds the passes of a kind).
"""

from __future__ import annotations

import math
from string import ascii_lowercase

from ds_vshape.schedule.passes import Kind, Pass
from ds_vshape.schedule.placement import Placement
from ds_vshape.schedule.timeline import Span, Timeline

LEGEND = ("F forward, B input gradient, W weight gradients, BW both at once, with the micro-batch; "
          "capital: the rank's first chunk, small: its second; dots: the rank waits")
_LEGEND_OF_MANY = LEGEND.replace("capital: the rank's first chunk, small: its second",
                                 "a: the rank's first chunk, b: its second, and so on")
_MORE = {Kind.C: "C forward again", Kind.O: "O copy to the host", Kind.R: "R copy back"}
# For each kind of pass a regular expression that finds it in the drawing; a piece of a W may have no number.
PASSES = {
    "F": r"[Ff]\d+[a-p]?-*",
    "B": r"[Bb]\d+[a-p]?-*",
    "W": r"(?<![Bb])[Ww](\d+[a-p]?-*|-+|(?=[.FBWCfbwc\n]|$))",
    "BW": r"(BW|bw)\d+[a-p]?-*",
    "C": r"[Cc]\d+[a-p]?-*",
    "O": r"[Oo]\d+[a-p]?-*",
    "R": r"[Rr]\d+[a-p]?-*",
}
BUBBLE = "."


def bubbles(timeline: Timeline) -> list[list[tuple[float, float]]]:
    """For each rank (start, end) of every time without a pass, from the first start on any rank to the last end."""
    spans = [span for rank in timeline.ranks for span in rank]
    begin, end = min((span.start for span in spans), default=0.0), max((span.end for span in spans), default=0.0)
    found = []
    for rank in timeline.ranks:
        passes = [span for span in rank if not span.action.kind.is_copy]
        ends, starts = [begin, *(span.end for span in passes)], [*(span.start for span in passes), end]
        found.append([(last, following) for last, following in zip(ends, starts) if following > last])
    return found


def draw(timeline: Timeline, placement: Placement, columns: int = 200) -> str:
    """`timeline` in lines of at most `columns` characters, with a ruler above and the legend below.

    The shortest pass gets just enough room for its name. What doesn't fit is cut off at the right, and a line says so.
    """
    spans = [span for rank in timeline.ranks for span in rank]
    if not spans:
        return "(no passes)"
    origin = min(span.start for span in spans)
    # Characters a unit of time: every whole pass with a duration has room for its name and a blank.
    scale = max(((len(_name(span.action, placement)) + 1) / (span.end - span.start)
                 for span in spans if span.end > span.start and span.action.pieces == 1), default=1.0)
    # Label, spans, and what stands where there is none.
    lanes: list[tuple[str, tuple[Span, ...], str]] = []
    for rank, passes in enumerate(timeline.ranks):
        lanes.append((f"rank {rank}", passes, BUBBLE))
        for label, copies in ((" out", timeline.offloads), (" back", timeline.reloads)):
            if copies and copies[rank]:
                lanes.append((label, copies[rank], " "))
    labels = [label for label, *_ in lanes]
    margin = max(len("time"), *map(len, labels)) + 2
    # A hop may be a million times as long as a pass: only what is shown is drawn.
    width = round(timeline.makespan * scale)
    shown = max(1, min(width, columns - margin))
    rows = ["time".ljust(margin) + _ruler(scale, shown)]
    for label, lane, empty in lanes:
        rows.append((label.ljust(margin) + _row(lane, empty, placement, origin, scale, shown)).rstrip())
    if shown < width:
        rows.append(f"... cut off at time {shown / scale:.4g} of {timeline.makespan:.4g}: "
                    f"all of it takes {width + margin} columns")
    kinds = {span.action.kind for span in spans}
    legend = LEGEND if placement.chunks_each <= 2 else _LEGEND_OF_MANY
    rows.append("; ".join([legend, *(meaning for kind, meaning in _MORE.items() if kind in kinds)]))
    return "\n".join(rows)


def _name(action: Pass, placement: Placement) -> str:
    kind, chunk = action.kind.value, placement.chunk_of(action.stage)
    if placement.chunks_each > 2:
        return f"{kind}{action.micro_batch}{ascii_lowercase[chunk]}"
    return f"{kind if chunk == 0 else kind.lower()}{action.micro_batch}"


def _row(spans: tuple[Span, ...], empty: str, placement: Placement, origin: float, scale: float, shown: int) -> str:
    """The first `shown` characters of a line, `empty` where it has no span."""
    row = [empty] * shown
    for span in spans:
        first, last = round((span.start - origin) * scale), round((span.end - origin) * scale)
        if first >= shown:
            break
        if last > first:
            name = _name(span.action, placement)
            if len(name) > last - first:  # a piece of a W, or a copy: no number rather than half of one
                name = name[:len(span.action.kind.value)].ljust(last - first, "-")
            ended = name.ljust(min(last, shown + 1) - first - 1, "-").ljust(min(last, shown) - first)
            row[first:last] = ended[:shown - first]
    return "".join(row).rstrip()


def _ruler(scale: float, width: int) -> str:
    """Times at round distances, at least 10 characters apart."""
    power = 10.0 ** math.floor(math.log10(10 / scale))
    step = next(base * power for base in (1, 2, 5, 10, 20) if base * power * scale >= 10)
    ruler, tick = "", 0
    while round(tick * step * scale) < width:
        ruler = ruler.ljust(round(tick * step * scale)) + f"{tick * step:g}"
        tick += 1
    return ruler[:width].rstrip()
