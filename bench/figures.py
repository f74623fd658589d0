"""Draws the figures of README.md from the JSON files of its tables; needs matplotlib (the extra `plots`).

    python bench/figures.py runs/bench/2026-11-28            # what bench/all.py has written there
    python bench/figures.py bench/measured                   # the figures of README.md again

Draws each figure whose tables are all in the folder, as SVG, into the same folder or that of --output.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

try:
    from matplotlib import rc_context
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from matplotlib.lines import Line2D
    from matplotlib.patches import Patch
except ImportError:
    sys.exit('bench/figures.py needs matplotlib: pip install "ds-vshape[plots]"')

MIB = 2 ** 20
# Of numbers of micro-batches, and of ranks.
_COLOURS = ("#2f62b5", "#d9772f", "#4c9a2a", "#8f2d8f", "#0f8a8a", "#c1121f", "#6d4fa3", "#8c8c8c")
_GRID, _FRAME = "#e4e4e4", "#8c8c8c"


@dataclass(frozen=True)
class Picture:
    """A figure: the tables it takes, and what draws their results on axes of its own for each."""

    tables: tuple[str, ...]
    title: str
    width: float
    draw: Callable[[Figure, Mapping[str, Any]], None]


def draw_speeds(figure: Figure, results: Mapping[str, Any]) -> None:
    """For each table of run.py and each contender: speed over the first one, by micro-batches, and as simulated."""
    panels = figure.subplots(1, len(results), sharex=True, squeeze=False)[0]
    for axes, runs in zip(panels, results.values()):
        names = list(runs[0]["summary"])[1:]
        for place, run in enumerate(runs):
            shift = 0.22 * (place - (len(runs) - 1) / 2)
            for row, name in enumerate(names):
                found, height = run["summary"][name], row + shift
                style = {"color": _COLOURS[place], "markersize": 6, "linestyle": "none"}
                if found["over_simulated"] is not None:
                    limit = found["speed"] * found["over_simulated"]
                    axes.plot([found["speed"], limit], [height, height], color=_COLOURS[place], linewidth=0.9)
                    axes.plot([limit], [height], marker="|", **style)
                axes.plot([found["speed"]], [height], marker="o", **style)
        axes.axvline(1, color=_FRAME, linewidth=1)
        axes.set_yticks(range(len(names)), names, fontsize=8.5)
        axes.set_ylim(len(names) - 0.4, -0.6)
        axes.set_title(f"{runs[0]['ranks']} ranks, {runs[0]['workload'].partition(',')[0]}", fontsize=9)
        axes.set_xlabel(f"speed over {next(iter(runs[0]['summary']))}", fontsize=8.5)
        _style(axes, "x")
    counts = [run["micro_batches"] for run in next(iter(results.values()))]
    handles = [Line2D([], [], color=colour, marker="o", linestyle="none", label=f"{count} micro-batches")
               for colour, count in zip(_COLOURS, counts)]
    handles.append(Line2D([], [], color="black", marker="|", linestyle="none", label="the schedule's makespan alone"))
    _legend(figure, handles)


def draw_memory(figure: Figure, results: Mapping[str, Any]) -> None:
    """Of memory.py: a bar for each contender and rank, and a line across it where its peak was predicted."""
    (rows,) = results.values()
    kinds = {"off": "activations kept", "on": "blocks recomputed"}
    found = [kind for kind in kinds if any(row["checkpointing"] == kind for row in rows)]
    ranks = len(rows[0]["ranks"])
    width = 0.8 / ranks
    panels = figure.subplots(1, len(found), sharey=True, squeeze=False)[0]
    for axes, kind in zip(panels, found):
        shown = [row for row in rows if row["checkpointing"] == kind]
        for place, row in enumerate(shown):
            for rank, measured in enumerate(row["ranks"]):
                middle = place + width * (rank - (ranks - 1) / 2)
                axes.bar([middle], [measured["peak"] / MIB], width * 0.85, color=_COLOURS[rank % len(_COLOURS)])
                if "predicted" in measured:
                    axes.plot([middle - width / 2, middle + width / 2], [measured["predicted"] / MIB] * 2,
                              color="black", linewidth=1.2)
        names = [row["contender"].replace(" ", "\n").replace("@", "\n@") for row in shown]
        axes.set_xticks(range(len(shown)), names, fontsize=7.5)
        axes.set_title(kinds[kind], fontsize=9)
        _style(axes, "y")
    panels[0].set_ylabel("MiB above the start of a batch", fontsize=8.5)
    handles: list[Any] = [Patch(color=_COLOURS[rank % len(_COLOURS)], label=f"rank {rank}") for rank in range(ranks)]
    handles.append(Line2D([], [], color="black", linewidth=1.2, label="predicted"))
    _legend(figure, handles)


def draw_bandwidths(figure: Figure, results: Mapping[str, Any]) -> None:
    """Of bandwidth.py: time of a batch by bandwidth, and the least possible one of ZeRO; beside it, memory."""
    (found,) = results.values()
    curves, bars = figure.subplots(1, 2, width_ratios=(2, 1))
    jobs = found["jobs"]
    widths = [job["megabits"] for job in jobs]
    names = list(jobs[0]["results"])
    for colour, name in zip(_COLOURS, names):
        curves.plot(widths, [job["results"][name]["median"] for job in jobs], color=colour, marker="o", markersize=4,
                    linewidth=1.4, label=name)
        if name in jobs[0]["hidden"]:
            curves.plot(widths, [job["hidden"][name] for job in jobs], color=colour, linewidth=1, linestyle="dashed")
    curves.set(xscale="log", yscale="log")
    curves.set_xticks(widths, [f"{width:g}" for width in widths])
    curves.minorticks_off()
    least, most = curves.get_ylim()
    seconds = [second for second in (0.5, 1, 2, 5, 10, 20, 50) if least <= second <= most]
    curves.set_yticks(seconds, [f"{second:g}" for second in seconds])
    curves.set_xlabel("Mbit/s between two hosts", fontsize=8.5)
    curves.set_ylabel("seconds of a batch; dashed: all messages of ZeRO hidden", fontsize=8.5)
    _style(curves, "both")
    bars.barh(range(len(names)), [found["memory"][name] / MIB for name in names], color=_COLOURS[:len(names)])
    bars.set_yticks(range(len(names)), names, fontsize=7.5)
    bars.invert_yaxis()
    bars.set_xlabel("MiB of the fullest rank", fontsize=8.5)
    _style(bars, "x")


FIGURES = {
    "speed.svg": Picture(("sleeping", "sleeping-20ms"), "Speed of schedules on sleeping layers", 9.5, draw_speeds),
    "bandwidth.svg": Picture(("bandwidth",), "Pipelines beside ZeRO, by the bandwidth between two hosts", 9.5,
                             draw_bandwidths),
    "memory.svg": Picture(("memory",), "Peak memory of each rank, measured and predicted", 11.0, draw_memory),
}


def _style(axes: Axes, axis: Any) -> None:
    axes.grid(axis=axis, color=_GRID, linewidth=0.7)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    axes.tick_params(axis=axis, labelsize=8)


def _legend(figure: Figure, handles: list[Any]) -> None:
    figure.legend(handles=handles, loc="lower center", ncols=len(handles), fontsize=8, frameon=False)


def save(picture: Picture, results: Mapping[str, Any], file: Path) -> None:
    """Write the figure of these `results` by table; the same results give the same file."""
    with rc_context({"svg.fonttype": "none", "svg.hashsalt": "ds_vshape", "font.family": "sans-serif"}):
        figure = Figure(figsize=(picture.width, 4.2), facecolor="white")
        figure.suptitle(picture.title, fontsize=11, fontweight="bold")
        picture.draw(figure, results)
        figure.subplots_adjust(left=0.135, right=0.98, top=0.85, bottom=0.2, wspace=0.3)
        figure.savefig(file, format="svg", metadata={"Date": None, "Creator": None})


def draw_all(folder: Path, output: Path) -> list[Path]:
    """Draw what `folder` has the tables for; the files."""
    drawn = []
    for name, picture in FIGURES.items():
        files = [folder / f"{table}.json" for table in picture.tables]
        if all(file.exists() for file in files):
            results = {file.stem: json.loads(file.read_text())["results"] for file in files}
            save(picture, results, output / name)
            drawn.append(output / name)
    return drawn


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="of the tables' JSON files")
    parser.add_argument("--output", type=Path, metavar="FOLDER", help="for the figures; default: the same")
    options = parser.parse_args()
    output = options.output or options.folder
    if not output.is_dir():
        parser.error(f"{output}: must be a folder that exists")
    drawn = draw_all(options.folder, output)
    if not drawn:
        wanted = "; ".join(f"{name} takes {', '.join(f'{table}.json' for table in picture.tables)}"
                           for name, picture in FIGURES.items())
        parser.error(f"{options.folder}: has the tables of no figure: {wanted}")
    for file in drawn:
        print(file)


if __name__ == "__main__":
    main()
