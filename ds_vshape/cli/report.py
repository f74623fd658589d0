"""What the planner prints: the figures and the picture of one schedule, or the figures of several."""

from __future__ import annotations

import sys
from collections.abc import Sequence

from rich.console import Console
from rich.table import Table
from rich.text import Text

from ds_vshape.cli.options import Limit
from ds_vshape.cli.outcome import Outcome
from ds_vshape.schedule import drawing

_COLOURS = {"F": "cyan", "B": "green", "W": "yellow", "BW": "magenta", "C": "red", "O": "blue", "R": "bright_blue"}


def console() -> Console:
    """Standard output: a terminal gets its own width; a pipe or a file gets room for the usual picture."""
    return Console(width=None if sys.stdout.isatty() else 200)


def print_outcome(outcome: Outcome) -> None:
    """Figures, ranks, and the timeline as text."""
    out = console()
    schedule, timeline, metrics = outcome.schedule, outcome.timeline, outcome.metrics
    placement = schedule.placement
    table = Table("figure", "value", "meaning", title=outcome.title, title_justify="left")
    for figure, value, meaning in (
            ("makespan", f"{metrics.makespan:g}", "first start to last end"),
            ("longest span", f"{metrics.longest_span:g}", "the longest of a rank's own first start to last end"),
            ("bubble", f"{metrics.bubble:.1%}", "share of the makespan in which ranks are idle"),
            ("lower bound", f"{metrics.lower_bound:g}", "no order with this placement and peak has a shorter makespan"),
            ("peak activations", f"{outcome.peak:g}", "of one of 2P chunks for one micro-batch"),
            ("of 1F1B's peak", f"{metrics.peak_fraction_of_1f1b:.3g}", "on as many ranks and micro-batches"),
            ("planning", f"{outcome.planning_s:.3f} s", f"time to make the schedule: {outcome.origin}")):
        table.add_row(figure, value, meaning)
    out.print(table)
    ranks = Table("rank", "stages", *(["layers"] if outcome.bounds else []), "peak activations", "busy", title="ranks",
                  title_justify="left")
    for rank, (stages, spans) in enumerate(zip(placement.chunks, timeline.ranks)):
        busy = sum(span.end - span.start for span in spans) / metrics.makespan
        layers = [", ".join(f"{outcome.bounds[stage]} to {outcome.bounds[stage + 1] - 1}"
                            for stage in stages)] if outcome.bounds else []
        ranks.add_row(str(rank), ", ".join(map(str, stages)), *layers, f"{metrics.peak_activations[rank]:.4g}",
                      f"{busy:.1%}")
    out.print(ranks)
    picture = Text(drawing.draw(timeline, placement, out.width), no_wrap=True, overflow="ignore", end="\n")
    for kind, pattern in drawing.PASSES.items():
        picture.highlight_regex(pattern, style=_COLOURS[kind])
    out.print(picture, soft_wrap=True, highlight=False)


def print_comparison(outcomes: Sequence[Outcome], limit: Limit | None) -> None:
    """A row for each; with a `limit`, whether it is within it."""
    first = outcomes[0]
    table = Table(title=f"{first.schedule.placement.ranks} ranks, {first.schedule.micro_batches} micro-batches",
                  caption="lower bound: no order with the same placement and peak has a shorter makespan",
                  title_justify="left", caption_justify="left")
    table.add_column("schedule")
    for column in ("makespan", f"of {first.schedule.name}'s", "bubble", "lower bound", "peak activations",
                   "of 1F1B's peak", "planning"):
        table.add_column(column, justify="right")
    table.add_column("order")
    if limit is not None:
        table.add_column(f"within {limit}")
    for outcome in outcomes:
        metrics = outcome.metrics
        row = [outcome.schedule.name, f"{metrics.makespan:g}", f"{metrics.makespan / first.metrics.makespan:.3f}",
               f"{metrics.bubble:.1%}", f"{metrics.lower_bound:g}", f"{outcome.peak:g}",
               f"{metrics.peak_fraction_of_1f1b:.3g}", f"{outcome.planning_s:.3f} s", outcome.origin]
        if limit is not None:
            row.append("yes" if outcome.within(limit) else "no")
        table.add_row(*row)
    console().print(table)
