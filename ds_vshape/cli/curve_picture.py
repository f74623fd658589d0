"""The curve of bubble against memory as a picture; needs matplotlib (the extra `plots`)."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from itertools import cycle
from pathlib import Path
from typing import Any

from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import FuncFormatter, MaxNLocator

from ds_vshape.cli.curve import Curve, Point
from ds_vshape.schedule.memory_limit import peak_of_1f1b
from ds_vshape.schedule.named import SCHEDULES

_ADAPTIVE, _BOUND, _V, _OTHER, _REFERENCE = "#2f62b5", "#7a7a7a", "#d9772f", "#8c8c8c", "#8f2d8f"
_GIVING_BACK = "#c1121f", "#4c9a2a", "#0f8a8a"
_BOUND_NAME = "lower bound of orders (V)"
# Of the lines of plans, in the order in which they are drawn: where one lies on another, both are seen.
_DASHES = "-", (0, (3, 3)), "-", (0, (3, 3))
_MARKERS = "sD^vPXo*<>phHd"
# The height of a line of the legend, relative to the axes.
_ROW = 0.046


def save(curve: Curve, file: Path, kind: str) -> None:
    """Write the picture of `curve` to `file`; `kind` is "svg" or "png"."""
    with rc_context({"svg.fonttype": "none", "svg.hashsalt": "ds_vshape", "font.family": "sans-serif"}):
        figure = Figure(figsize=(9.5, 5.2), facecolor="white")
        axes = figure.add_axes((0.075, 0.145, 0.62, 0.705))
        _Drawer(axes, curve).draw()
        figure.savefig(file, format=kind, dpi=150, metadata={"Date": None} if kind == "svg" else None)


class _Drawer:
    """Draws one curve on `axes`: fractions of 1F1B's peak to the right, bubbles in percent upwards."""

    def __init__(self, axes: Axes, curve: Curve) -> None:
        self._axes = axes
        self._curve = curve
        points = [*curve.adaptive, *curve.bound, *curve.reference,
                  *(point for line in curve.giving_back.values() for point in line)]
        fractions = [point.fraction for point in points] or [point.fraction for point in curve.named]
        # Points beyond 1F1B's memory and all limits are left out: they would squeeze the rest.
        self._right = max(*fractions, 1.0) * 1.03
        self._left = min(fractions) - 0.03

    def draw(self) -> None:
        """Draw all points, with a legend for each kind of point."""
        curve = self._curve
        plans = [("adaptive", curve.adaptive, _ADAPTIVE)]
        plans += [(f"adaptive, {name}", points, colour)
                  for (name, points), colour in zip(curve.giving_back.items(), _GIVING_BACK)]
        lines = [self._line(curve.bound, _BOUND_NAME, _BOUND, linestyle="--", linewidth=1.2)]
        lines += [self._line(points, label, colour, marker="o", markersize=5, linestyle=dashes, linewidth=2, zorder=3)
                  for (label, points, colour), dashes in zip(plans, _DASHES)]
        shown = [point for point in curve.named if point.fraction <= self._right]
        marks = []
        for point, marker in zip(shown, cycle(_MARKERS)):
            colour = _V if SCHEDULES[point.name].placement == "v" else _OTHER
            marks.append(self._mark(point, marker, colour, colour))
        others = [self._mark(point, marker, _REFERENCE, "none")
                  for point, marker in zip(curve.reference, cycle(_MARKERS))]
        self._legends({"for these times": lines, "orders for equal times": marks, "reference": others})
        self._style([point for point in curve.named if point.fraction > self._right])

    def _legends(self, groups: Mapping[str, list[Line2D]]) -> None:
        """Put the legends below each other, to the right of the axes."""
        top = 1.0
        for title, lines in groups.items():
            if lines:
                self._axes.figure.legend(handles=lines, title=title, loc="upper left", bbox_to_anchor=(1.02, top),
                                         bbox_transform=self._axes.transAxes, borderaxespad=0, fontsize=8,
                                         title_fontsize=8.5, alignment="left", frameon=False)
                top -= _ROW * (len(lines) + 2)

    def _line(self, points: Sequence[Point], label: str, colour: str, **style: Any) -> Line2D:
        line, = self._axes.plot([point.fraction for point in points], [100 * point.bubble for point in points],
                                color=colour, label=label, **style)
        return line

    def _mark(self, point: Point, marker: str, colour: str, face: str) -> Line2D:
        mark, = self._axes.plot([point.fraction], [100 * point.bubble], linestyle="none", marker=marker, markersize=7.5,
                                markeredgecolor=colour if face == "none" else "white", markerfacecolor=face,
                                markeredgewidth=1.2 if face == "none" else 0.6, label=point.name, zorder=4)
        return mark

    def _style(self, beyond: Sequence[Point]) -> None:
        axes, curve = self._axes, self._curve
        axes.set_xlim(self._left, self._right)
        axes.set_ylim(bottom=0)
        axes.set_xlabel("memory limit or peak, relative to 1F1B's peak of activations")
        axes.set_ylabel("bubble")
        axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}%"))
        axes.grid(color="#e4e4e4", linewidth=0.7)
        axes.set_axisbelow(True)
        axes.spines[["right"]].set_visible(False)
        full = peak_of_1f1b(curve.stages, curve.micro_batches)
        counts = axes.secondary_xaxis("top", functions=(_times(full), _times(1 / full)))
        counts.set_xlabel("chunk activations", fontsize=8.5)
        counts.tick_params(labelsize=8)
        counts.xaxis.set_major_locator(MaxNLocator(integer=True))
        axes.figure.text(0.075, 0.955, f"{curve.stages} ranks, {curve.micro_batches} micro-batches, "
                         f"{curve.times}", fontsize=11, fontweight="bold")
        if beyond:
            names = ",  ".join(f"{point.name} {point.bubble:.1%} at {point.fraction:.3g}" for point in beyond)
            axes.figure.text(0.075, 0.02, f"beyond the right edge:  {names}", fontsize=7.5, color="#555555")


def _times(factor: float) -> Callable[[Any], Any]:
    return lambda values: values * factor
