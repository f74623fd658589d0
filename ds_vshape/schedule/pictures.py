"""Schedules as pictures in the manner of the papers' figures; needs matplotlib (the extra `plots`).

    title and figures                                           legend
    rank 0         | F 0 | F 1 | bubble | F 0 | B 0 | W 0 | ...        one box a pass, with its micro-batch
                         |=====|=====|        |=====|                  copies to the host and back, where there are any
    stages 0, 7    |____==========____=====___ ...                     what the rank keeps, below the limit   peak
    rank 1         ...
                   time

Dark boxes are on the rank's first chunk, light ones on its second. In an SVG every box has an id: panel0-F2.5 is the
box of F2.5 in the first panel.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.legend_handler import HandlerTuple
from matplotlib.lines import Line2D
from matplotlib.patches import Patch, Rectangle

from ds_vshape.schedule.activations import Activations, memory_curve
from ds_vshape.schedule.drawing import bubbles
from ds_vshape.schedule.passes import Kind
from ds_vshape.schedule.placement import Placement
from ds_vshape.schedule.timeline import Span, Timeline

# Of the first and the second chunk of a rank, with the colour of the number on it.
COLOURS = {
    Kind.F: (("#2f62b5", "white"), ("#b3ccf2", "black")),
    Kind.B: (("#0f8a8a", "white"), ("#9adbd6", "black")),
    Kind.W: (("#4c9a2a", "white"), ("#c3e6ae", "black")),
    Kind.BW: (("#6d4fa3", "white"), ("#d3c4ec", "black")),
    Kind.C: (("#b5447f", "white"), ("#eebdd6", "black")),
    Kind.O: (("#5b5f66", "white"), ("#b9bdc4", "black")),
    Kind.R: (("#a8741a", "white"), ("#e8cf9c", "black")),
}
MEANINGS = {Kind.F: "F  forward", Kind.B: "B  input gradient", Kind.W: "W  weight gradients",
            Kind.BW: "BW  both at once", Kind.C: "C  forward again", Kind.O: "O  copy to the host",
            Kind.R: "R  copy back"}
_FRAME, _MEMORY, _LIMIT, _FULL = "#8c8c8c", "#d9772f", "#c1121f", "#9a9a9a"

# Inches: of a usual pass, of a figure's width, of a rank's boxes and of what it keeps below them.
_PASS, _WIDTHS = 0.2, (10.0, 60.0)
_LANE, _BETWEEN, _CURVE, _GAP = 0.28, 0.04, 0.22, 0.12
# Of a row of copies.
_COPY = 0.08
# Around them: names, peaks, title, time axis, legend.
_LEFT, _RIGHT, _TOP, _BOTTOM, _LEGEND = 0.95, 0.85, 0.52, 0.55, 0.32
_POINTS = 72
# Numbers: points of the font, and the width of a digit as a share of it.
_SMALLEST, _LARGEST, _DIGIT = 3.6, 8.5, 0.6
_DPI = 150


@dataclass(frozen=True)
class Panel:
    """One schedule; `limit` and `full` (1F1B's peak) are in the unit of `activations`, no limit is None."""

    title: str
    figures: str
    placement: Placement
    timeline: Timeline
    activations: Activations
    limit: float | None
    full: float

    @property
    def digits(self) -> int:
        """Of the highest micro-batch."""
        return max((len(str(span.action.micro_batch)) for rank in self.timeline.ranks for span in rank), default=1)

    @property
    def copies(self) -> float:
        """Inches of a rank's rows of copies: none where no rank copies."""
        return 2 * (_COPY + _BETWEEN / 2) if any(map(any, (self.timeline.offloads, self.timeline.reloads))) else 0.0

    @property
    def rank(self) -> float:
        """Inches of a rank."""
        return _LANE + _BETWEEN + self.copies + _CURVE + _GAP

    @property
    def height(self) -> float:
        """Inches, title and time axis included."""
        return _TOP + self.placement.ranks * self.rank + _BOTTOM


def save(panels: Sequence[Panel], file: Path, kind: str, time_label: str = "time") -> None:
    """Write `panels` below each other, all on one scale of time, to `file`; `kind` is "svg" or "png"."""
    # Text stays text in an SVG, and the same schedule gives the same file: without date, version and random ids.
    with rc_context({"svg.fonttype": "none", "svg.hashsalt": "ds_vshape", "font.family": "sans-serif"}):
        figure = _figure(panels, time_label)
        figure.savefig(file, format=kind, dpi=_DPI, metadata={"Date": None, "Creator": None} if kind == "svg" else None)


def _figure(panels: Sequence[Panel], time_label: str) -> Figure:
    longest = max(panel.timeline.makespan for panel in panels) or 1.0
    usual = median(_whole_durations(panels)) or longest
    drawn = min(max(longest / usual * _PASS, _WIDTHS[0] - _LEFT - _RIGHT), _WIDTHS[1])
    width, height = _LEFT + drawn + _RIGHT, _LEGEND + sum(panel.height for panel in panels)
    figure = Figure(figsize=(width, height), facecolor="white")
    top = height - _LEGEND
    for place, panel in enumerate(panels):
        lanes = panel.height - _TOP - _BOTTOM
        axes = figure.add_axes((_LEFT / width, (top - _TOP - lanes) / height, drawn / width, lanes / height))
        axes.set_xlim(0, longest)
        axes.set_ylim(lanes, 0)
        axes.set_xlabel(time_label, fontsize=8, labelpad=2)
        _Drawer(axes, panel, f"panel{place}", drawn / longest, panel.digits).draw()
        figure.text(_LEFT / width, (top - 0.12) / height, panel.title, fontsize=11, fontweight="bold", va="center")
        figure.text(_LEFT / width, (top - 0.34) / height, panel.figures, fontsize=9, va="center")
        top -= panel.height
    _add_legend(figure, panels, (_LEFT / width, 1 - 0.08 / height))
    return figure


def _whole_durations(panels: Sequence[Panel]) -> list[float]:
    return [span.end - span.start for panel in panels for rank in panel.timeline.ranks for span in rank
            if span.action.pieces == 1 and not span.action.kind.is_copy] or [0.0]


@dataclass(frozen=True)
class _Drawer:
    """Draws a panel: x in units of time, `inches` each; y in inches from the top.

    Its ids start with `name`, and its numbers have up to `digits` digits.
    """

    axes: Axes
    panel: Panel
    name: str
    inches: float
    digits: int

    def draw(self) -> None:
        timeline, placement = self.panel.timeline, self.panel.placement
        origin = min((rank[0].start for rank in timeline.ranks if rank), default=0.0)
        gaps = bubbles(timeline)
        for rank, spans in enumerate(timeline.ranks):
            top = rank * self.panel.rank
            memory = top + _LANE + _BETWEEN + self.panel.copies
            for span in spans:
                if not span.action.kind.is_copy:
                    self._pass(span, span.start - origin, top)
            for place, copies in enumerate((timeline.offloads, timeline.reloads)):
                for span in copies[rank] if copies else ():
                    self._box(repr(span.action), span.start - origin, span.end - span.start,
                              top + _LANE + _BETWEEN + place * self.panel.copies / 2, self._colours(span)[0], "white",
                              _COPY)
            # Above the passes, so that their frames are whole.
            for place, (start, end) in enumerate(gaps[rank]):
                self._box(f"bubble{rank}-{place}", start - origin, end - start, top, "white", _FRAME)
            self._memory(spans, origin, rank, memory)
            stages = placement.chunks[rank]
            self._beside(top + _LANE / 2, f"rank {rank}", 9, "black")
            self._beside(memory + _CURVE / 2,
                         f"stage{'s' * (len(stages) > 1)} {', '.join(map(str, stages))}", 6.5, "#555555")
        self._style()

    def _colours(self, span: Span) -> tuple[str, str]:
        """Of a box and the number on it."""
        return COLOURS[span.action.kind][min(self.panel.placement.chunk_of(span.action.stage), 1)]

    def _box(self, name: str, start: float, duration: float, top: float, colour: str, edge: str, height: float = _LANE
             ) -> None:
        self.axes.add_artist(Rectangle((start, top), duration, height, facecolor=colour, edgecolor=edge, linewidth=0.6,
                                       gid=f"{self.name}-{name}", clip_on=False))

    def _beside(self, y: float, text: str, size: float, colour: str) -> None:
        self.axes.text(-0.1 / self.inches, y, text, fontsize=size, color=colour, ha="right", va="center")

    def _pass(self, span: Span, start: float, top: float) -> None:
        action, duration = span.action, span.end - span.start
        colour, ink = self._colours(span)
        # W2.5[0/4] as W2.5-0of4: an id may have neither brackets nor slashes.
        name = repr(action).replace("[", "-").replace("/", "of").removesuffix("]")
        self._box(name, start, duration, top, colour, "white")
        number = str(action.micro_batch)
        room = duration * self.inches * _POINTS * 0.85 / _DIGIT
        # All numbers or none on boxes of one width.
        if room / self.digits >= _SMALLEST:
            size = min(_LARGEST, room / len(number))
            self.axes.text(start + duration / 2, top + _LANE / 2, number, fontsize=size, color=ink, ha="center",
                           va="center_baseline")

    def _memory(self, spans: Sequence[Span], origin: float, rank: int, top: float) -> None:
        panel = self.panel
        curve = memory_curve(spans, panel.activations)
        peak = max((alive for _, alive in curve), default=0.0)
        most = max(panel.full, panel.limit or 0.0, peak) or 1.0
        bottom = top + _CURVE
        times = [0.0, *(time - origin for time, _ in curve), panel.timeline.makespan]
        heights = [bottom - alive / most * _CURVE for alive in (0.0, *(alive for _, alive in curve))]
        heights.append(heights[-1])
        self.axes.fill_between(times, heights, bottom, step="post", facecolor=_MEMORY, alpha=0.3, linewidth=0)
        self.axes.step(times, heights, where="post", color=_MEMORY, linewidth=0.9, gid=f"{self.name}-memory{rank}")
        end = panel.timeline.makespan
        self.axes.plot((0, end), (bottom, bottom), color=_FRAME, linewidth=0.6)
        self.axes.plot((0, end), [bottom - panel.full / most * _CURVE] * 2, color=_FULL, linewidth=0.7, linestyle=":")
        if panel.limit is not None:
            self.axes.plot((0, end), [bottom - panel.limit / most * _CURVE] * 2, color=_LIMIT, linewidth=0.9,
                           linestyle=(0, (4, 2)), gid=f"{self.name}-limit{rank}")
        self.axes.text(end + 0.08 / self.inches, top + _CURVE / 2, f"peak {peak:.4g}", fontsize=7.5, color=_MEMORY,
                       fontweight="bold", ha="left", va="center")

    def _style(self) -> None:
        for side in ("top", "left", "right"):
            self.axes.spines[side].set_visible(False)
        self.axes.spines["bottom"].set_position(("outward", 3))
        self.axes.spines["bottom"].set_color(_FRAME)
        self.axes.set_yticks([])
        self.axes.tick_params(axis="x", labelsize=7.5, length=3, color=_FRAME)
        self.axes.locator_params(axis="x", nbins=max(6, int(self.axes.get_xlim()[1] * self.inches)))


def _add_legend(figure: Figure, panels: Sequence[Panel], corner: tuple[float, float]) -> None:
    """In one line, of what is there."""
    works = [(span.action.kind, min(panel.placement.chunk_of(span.action.stage), 1))
             for panel in panels for rank in panel.timeline.ranks for span in rank]
    chunks = sorted({chunk for _, chunk in works})
    handles: list[Any] = []
    labels: list[str] = []
    for kind in Kind:
        if kind in {kind for kind, _ in works}:
            handles.append(tuple(Patch(facecolor=COLOURS[kind][chunk][0]) for chunk in chunks))
            labels.append(MEANINGS[kind])
    handles.append(Patch(facecolor="white", edgecolor=_FRAME, linewidth=0.8))
    labels.append("bubble")
    handles.append((Patch(facecolor=_MEMORY, alpha=0.3), Line2D([], [], color=_MEMORY, linewidth=1)))
    labels.append("activations kept")
    handles.append(Line2D([], [], color=_FULL, linewidth=1, linestyle=":"))
    labels.append("1F1B's peak")
    if any(panel.limit is not None for panel in panels):
        handles.append(Line2D([], [], color=_LIMIT, linewidth=1, linestyle=(0, (4, 2))))
        labels.append("memory limit")
    legend = figure.legend(handles, labels, loc="upper left", bbox_to_anchor=corner, ncols=len(handles), fontsize=7.5,
                           frameon=False, borderaxespad=0, borderpad=0, handlelength=1.8, columnspacing=1.2,
                           handletextpad=0.5, handler_map={tuple: HandlerTuple(ndivide=None, pad=0)})
    legend.set_in_layout(False)
