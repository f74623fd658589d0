"""Our schedules beside other schedulers', cell by cell: makespan, longest own span and peak activations.

    python bench/compare_reference.py schedules.json

The file holds {"cells": [{"stages": ranks, "micro_batches", "forward", "input_grad", "weight_grad", "hop",
"schedules": {name: {"makespan", "span", "peak"}}}]}: times of one of 2p chunks, peaks in activations of one chunk, all
of them by the rules of `ds_vshape.schedule.timeline`. Ours are simulated here with each cell's times; the orders are
the named schedules', which are made for equal times. Exits with 1 if a cell with equal times and no hop is worse.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import Any

from rich.console import Console
from rich.table import Table

from ds_vshape.schedule.metrics import chunk_times
from ds_vshape.schedule.named import build
from ds_vshape.schedule.timeline import peak_activations, simulate

# Our name for each schedule of the file that has a counterpart here.
OURS = {"1f1b": "1f1b", "v-min": "v-min", "v-half": "v-half", "zb-v": "v-zb"}
TOLERANCE = 1e-9


@dataclass(frozen=True)
class Figures:
    """Makespan, longest own span, and highest peak of a rank."""

    makespan: float
    span: float
    peak: float


@dataclass(frozen=True)
class Comparison:
    """One schedule of one cell."""

    ranks: int
    micro_batches: int
    times: tuple[float, float, float, float]
    name: str
    ours: Figures
    reference: Figures

    @property
    def equal_times(self) -> bool:
        """Whether F, B and W take the same and a hop nothing."""
        forward, input_grad, weight_grad, hop = self.times
        return forward == input_grad == weight_grad and hop == 0

    @property
    def ratio(self) -> float:
        """Our makespan over the reference's."""
        return self.ours.makespan / self.reference.makespan

    @property
    def verdict(self) -> str:
        """Of the makespans: better, equal or worse."""
        if abs(self.ratio - 1) <= TOLERANCE:
            return "equal"
        return "better" if self.ratio < 1 else "worse"

    @property
    def holds(self) -> bool:
        """Whether ours is no slower and no larger in any of the three figures."""
        pairs = ((self.ours.makespan, self.reference.makespan), (self.ours.span, self.reference.span),
                 (self.ours.peak, self.reference.peak))
        return all(ours <= reference * (1 + TOLERANCE) for ours, reference in pairs)


def compare(cells: list[Mapping[str, Any]]) -> Iterator[Comparison]:
    """Every schedule of every cell that has a counterpart here."""
    for cell in cells:
        ranks, micro_batches = cell["stages"], cell["micro_batches"]
        times = (cell["forward"], cell["input_grad"], cell["weight_grad"], cell["hop"])
        for theirs, ours in OURS.items():
            if theirs in cell["schedules"]:
                figures = cell["schedules"][theirs]
                schedule = build(ours, ranks, micro_batches)
                timeline = simulate(schedule, chunk_times(schedule.placement, *times))
                yield Comparison(ranks, micro_batches, times, ours,
                                 Figures(timeline.makespan, timeline.longest_span, max(peak_activations(schedule))),
                                 Figures(figures["makespan"], figures["span"], figures["peak"]))


def cell_table(comparisons: list[Comparison]) -> Table:
    """A line for each comparison."""
    table = Table(title="ours / reference")
    for column in ("p", "m", "F,B,W,hop", "schedule", "makespan", "longest span", "peak", "ratio", "makespan is"):
        table.add_column(column, justify="left" if column in ("schedule", "makespan is") else "right")
    for c in comparisons:
        table.add_row(str(c.ranks), str(c.micro_batches), ",".join(f"{time:g}" for time in c.times), c.name,
                      f"{c.ours.makespan:g} / {c.reference.makespan:g}", f"{c.ours.span:g} / {c.reference.span:g}",
                      f"{c.ours.peak:g} / {c.reference.peak:g}", f"{c.ratio:.3f}", c.verdict)
    return table


def summary_table(comparisons: list[Comparison]) -> Table:
    """Counts and mean ratio of the makespans for each schedule, equal times and no hop apart from the other cells."""
    table = Table(title="makespans, summed up")
    for column in ("schedule", "cells", "better", "equal", "worse", "mean ratio", "worst ratio", "larger peak"):
        table.add_column(column, justify="left" if column in ("schedule", "cells") else "right")
    for name in OURS.values():
        for equal, label in ((True, "equal times, no hop"), (False, "other times")):
            chosen = [c for c in comparisons if c.name == name and c.equal_times == equal]
            if chosen:
                counts = [str(sum(c.verdict == verdict for c in chosen)) for verdict in ("better", "equal", "worse")]
                table.add_row(name, f"{len(chosen)}, {label}", *counts, f"{fmean(c.ratio for c in chosen):.4f}",
                              f"{max(c.ratio for c in chosen):.4f}",
                              str(sum(c.ours.peak > c.reference.peak for c in chosen)))
    return table


def main() -> int:
    """Compare, print, and tell by the exit status whether equal times are no worse."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("reference", type=Path, help="the JSON file with the reference's figures")
    arguments = parser.parse_args()
    comparisons = list(compare(json.loads(arguments.reference.read_text())["cells"]))
    console = Console(width=None if sys.stdout.isatty() else 140)
    console.print(cell_table(comparisons), summary_table(comparisons))
    broken = [c for c in comparisons if c.equal_times and not c.holds]
    return 1 if broken else 0


if __name__ == "__main__":
    sys.exit(main())
