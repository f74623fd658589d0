"""Our schedules beside other schedulers', cell by cell: makespan, longest own span and peak activations.

    python bench/compare_reference.py schedules.json
    python bench/compare_reference.py schedules.json --time-limit 2    # processor seconds for each plan of `adaptive`
    python bench/compare_reference.py schedules.json --time-limit 8 --peaks-of v-min --cache plans

The file holds {"cells": [{"stages": ranks, "micro_batches", "forward", "input_grad", "weight_grad", "hop",
"schedules": {name: {"makespan", "span", "peak"}}}]}: times of one of 2p chunks, peaks in activations of one chunk, all
of them by the rules of `ds_vshape.schedule.timeline`. Ours are simulated here with each cell's times; the orders are
the named schedules', which are made for equal times. Exits with 1 if a cell with equal times and no hop is worse.

With --time-limit, `adaptive` is planned for each cell within the peak of each of the reference's schedules, and within
half of 1F1B's; then a plan that is slower than any of the reference's within its peak exits with 1, too. --peaks-of
takes the peaks of one of the reference's schedules alone. With --cores plans use several cores, for so many processor
seconds on each. With --cache plans are kept in a folder, and a run that was
cut off goes on from there.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from math import isfinite
from pathlib import Path
from statistics import fmean
from typing import Any

import record
from rich.console import Console
from rich.table import Table
from tqdm import tqdm

from ds_vshape.schedule.activations import Activations, peak_activations
from ds_vshape.schedule.adaptive import Problem, plan
from ds_vshape.schedule.chunk_times import ChunkTimes
from ds_vshape.schedule.named import build
from ds_vshape.schedule.placement import v
from ds_vshape.schedule.timeline import Times, simulate

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
                timeline = simulate(schedule, ChunkTimes.uniform(*times).on(schedule.placement))
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


@dataclass(frozen=True)
class Planned:
    """`adaptive` on one cell within one peak, beside what the reference has with no more."""

    ranks: int
    micro_batches: int
    times: tuple[float, float, float, float]
    peak: int
    makespan: float
    lower_bound: float
    planning_s: float
    one_f_one_b: float
    # Makespans of the reference's schedules with just this peak, by kind, and the least of all within it.
    same_peak: Mapping[str, float]
    least: float

    @property
    def worse(self) -> bool:
        """Whether the reference has something faster within this peak."""
        return self.makespan > self.least * (1 + TOLERANCE)

    @property
    def half_of_1f1b(self) -> bool:
        """Whether this is the peak at which `adaptive` should be no slower than 1F1B."""
        return self.peak == self.ranks >= 8 and self.micro_batches >= 2 * self.ranks


def plan_cells(cells: list[Mapping[str, Any]], time_limit: float, peaks_of: str | None, cache: Path | None,
               cores: int) -> Iterator[Planned]:
    """`adaptive` for every cell and peak, or every cell at the peak of the reference's schedule `peaks_of`."""
    for cell in tqdm(cells, unit="cell", disable=None):
        ranks, micro_batches = cell["stages"], cell["micro_batches"]
        times = (cell["forward"], cell["input_grad"], cell["weight_grad"], cell["hop"])
        others = {name: figures for name, figures in cell["schedules"].items() if name != "1f1b"}
        peaks = {int(figures["peak"]) for name, figures in others.items()
                 if peaks_of in (None, name.partition("<")[0])}
        if peaks_of is None and ranks >= 8 and micro_batches >= 2 * ranks:
            peaks.add(ranks)
        for peak in sorted(peaks):
            problem = Problem(v(ranks), micro_batches, Times.uniform(2 * ranks, *times), Activations.counted(v(ranks)),
                              (float(peak),) * ranks)
            found = plan(problem, time_limit, cache=cache, clock=lambda: time.process_time() / cores, cores=cores)
            if max(peak_activations(found.schedule)) > peak:
                raise AssertionError(f"a plan for a peak of {peak} has {peak_activations(found.schedule)}")
            yield Planned(
                ranks, micro_batches, times, peak, found.timeline.makespan, found.lower_bound, found.planning_s,
                cell["schedules"]["1f1b"]["makespan"],
                {name.partition("<")[0]: figures["makespan"] for name, figures in others.items()
                 if figures["peak"] == peak},
                min((figures["makespan"] for figures in others.values() if figures["peak"] <= peak),
                    default=float("inf")))


def planned_summary(planned: list[Planned]) -> Table:
    """The gain over each kind of schedule at its own peak."""
    table = Table(title="adaptive at the peak of the reference's schedule")
    for column in ("schedule", "cells", "mean gain", "least gain", "slower"):
        table.add_column(column, justify="left" if column in ("schedule", "cells") else "right")
    for name in sorted({name for p in planned for name in p.same_peak}):
        for equal, label in ((True, "equal F, B, W"), (False, "unequal")):
            ratios = [p.makespan / p.same_peak[name] for p in planned
                      if name in p.same_peak and (len(set(p.times[:3])) == 1) == equal]
            if ratios:
                table.add_row(name, f"{len(ratios)}, {label}", f"{1 - fmean(ratios):.2%}", f"{1 - max(ratios):.2%}",
                              str(sum(ratio > 1 + TOLERANCE for ratio in ratios)))
    return table


def gain_table(planned: list[Planned]) -> Table:
    """Where the gain over v-min with unequal times is, by ranks and times, beside the most that the bounds allow."""
    table = Table(title="gain over v-min at its peak, and the most that the lower bounds allow")
    chosen = [p for p in planned if "v-min" in p.same_peak and len(set(p.times[:3])) > 1]
    every = sorted({p.times for p in chosen})
    table.add_column("p", justify="right")
    for times in every:
        table.add_column(",".join(f"{time:g}" for time in times), justify="right")
    for ranks in sorted({p.ranks for p in chosen}):
        groups = [[p for p in chosen if (p.ranks, p.times) == (ranks, times)] for times in every]
        table.add_row(str(ranks), *(f"{1 - fmean(p.makespan / p.same_peak['v-min'] for p in group):.1%} of "
                                    f"{1 - fmean(p.lower_bound / p.same_peak['v-min'] for p in group):.1%}"
                                    for group in groups))
    if chosen:
        bound = 1 - fmean(p.lower_bound / p.same_peak["v-min"] for p in chosen)
        table.caption = f"the bounds of all {len(chosen)} cells together allow {bound:.1%}"
    return table


def resisting_table(title: str, planned: list[Planned]) -> Table:
    """Cells that are slower than they should be, beside what no schedule can be below."""
    table = Table(title=title)
    for column in ("p", "m", "F,B,W,hop", "peak", "adaptive", "reference", "1F1B", "lower bound"):
        table.add_column(column, justify="right")
    for p in planned:
        table.add_row(str(p.ranks), str(p.micro_batches), ",".join(f"{time:g}" for time in p.times), str(p.peak),
                      f"{p.makespan:g}", f"{p.least:g}", f"{p.one_f_one_b:g}", f"{p.lower_bound:g}")
    return table


def compare_planned(planned: list[Planned], console: Console) -> bool:
    """Print; whether no plan is slower than the reference within its peak."""
    worse = [p for p in planned if p.worse]
    half = [p for p in planned if p.half_of_1f1b]
    slower = [p for p in half if p.makespan > p.one_f_one_b * (1 + TOLERANCE)]
    console.print(planned_summary(planned), gain_table(planned),
                  resisting_table("slower than the reference within the peak", worse),
                  resisting_table(f"slower than 1F1B at half its peak ({len(slower)} of {len(half)})", slower))
    at_bound = sum(p.makespan <= p.lower_bound * (1 + TOLERANCE) for p in planned)
    console.print(f"{len(planned)} plans, {at_bound} of them at the lower bound; the longest took "
                  f"{max(p.planning_s for p in planned):.1f} s")
    return not worse


def main() -> int:
    """Compare, print, and tell by the exit status whether equal times are no worse."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("reference", type=Path, help="the JSON file with the reference's figures")
    parser.add_argument("--time-limit", type=float,
                        help="plan `adaptive`, too, with so many processor seconds for each plan")
    parser.add_argument("--peaks-of", metavar="SCHEDULE", help="plan at the peaks of this one of the reference alone")
    parser.add_argument("--cores", type=int, default=1, help="how many cores a plan uses (default: 1)")
    record.add_json_option(parser)
    parser.add_argument("--cache", type=Path, help="the folder where plans are kept")
    arguments = parser.parse_args()
    cells = json.loads(arguments.reference.read_text())["cells"]
    names = {name.partition("<")[0] for cell in cells for name in cell["schedules"]} - {"1f1b"}
    if arguments.peaks_of not in (None, *names):
        parser.error(f"--peaks-of {arguments.peaks_of}: the reference has {', '.join(sorted(names))}")
    comparisons = list(compare(cells))
    console = Console(width=None if sys.stdout.isatty() else 140)
    console.print(cell_table(comparisons), summary_table(comparisons))
    broken = [c for c in comparisons if c.equal_times and not c.holds]
    fine, planned = True, []
    if arguments.time_limit is not None:
        planned = list(plan_cells(cells, arguments.time_limit, arguments.peaks_of, arguments.cache,
                                  arguments.cores))
        fine = compare_planned(planned, console)
    record.write(arguments.json, {"named": [asdict(c) for c in comparisons], "planned": [
        {**asdict(p), "least": p.least if isfinite(p.least) else None} for p in planned]})
    return 0 if fine and not broken else 1


if __name__ == "__main__":
    sys.exit(main())
