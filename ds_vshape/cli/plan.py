"""`ds-vshape plan`: what a schedule will cost, before anything is launched.

It makes the schedule that training would run, simulates it, and prints its figures and its picture, or writes them as
JSON, SVG or PNG; it sets schedules side by side; or it draws the bubble against the memory limit. What to plan comes
from options or from a ds_config.json.
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from pathlib import Path

from ds_vshape.cli import curve, report
from ds_vshape.cli.extras import check_installed
from ds_vshape.cli.files import check_writable, write_json, writing
from ds_vshape.cli.options import Limit, PlanOptions, add_options
from ds_vshape.cli.outcome import Outcome, plan_one
from ds_vshape.cli.partition import counted_alike
from ds_vshape.cli.progress import progress_bar
from ds_vshape.schedule.adaptive import LimitError
from ds_vshape.schedule.chunk_times import ChunkTimes
from ds_vshape.schedule.memory_limit import peak_of_1f1b
from ds_vshape.schedule.named import ADAPTIVE
from ds_vshape.schedule.partition.partition_and_order import limits_of_1f1b

_PICTURES = ("svg", "png")
# The most in one picture: matplotlib draws some hundred passes a second, and at most 2^16 pixels in height.
_MOST_PASSES, _MOST_ROWS = 40_000, 512


def add_parser(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add `plan` to the command line."""
    description = (__doc__ or "").partition("\n\n")[2]
    parser = commands.add_parser("plan", help="show what a schedule costs", description=description)
    add_options(parser)
    parser.add_argument("--json", type=Path, metavar="FILE",
                        help="also write schedule and figures to FILE; with --compare, a list of them")
    parser.add_argument("--svg", type=Path, metavar="FILE",
                        help="draw the timeline, with the memory of each rank, to FILE")
    parser.add_argument("--png", type=Path, metavar="FILE", help="the same as PNG")
    parser.add_argument("--curve", type=_curve_file, metavar="FILE",
                        help="bubble against memory limit, as FILE.svg, FILE.png or FILE.json")
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    """Plan, check the memory limit, print, and write the files asked for. Raises ValueError on bad input."""
    options = PlanOptions.from_arguments(arguments)
    outputs = {f"--{kind}": file for kind in ("json", *_PICTURES, "curve") if (file := getattr(arguments, kind))}
    inputs = (arguments.config, arguments.config_option, arguments.reference, arguments.layer_costs)
    check_writable(outputs, [file for file in inputs if file is not None])
    if arguments.curve is not None:
        _trace_curve(options, arguments.curve, arguments.limits, arguments.reference)
        return 0
    pictures = {kind: file for kind in _PICTURES if (file := getattr(arguments, kind)) is not None}
    if pictures:
        _need_matplotlib()
        _check_size(options)
    outcomes = []
    for name, placement in options.schedules:
        try:
            with progress_bar(f"planning {name}") as progress:
                outcomes.append(plan_one(name, placement, options, options.memory_limit, progress))
        except LimitError as error:
            raise ValueError(f"--memory-limit {options.memory_limit}: {error}, where 1F1B's is "
                             f"{_peak_of_1f1b(options):g}") from None
    first, limit = outcomes[0], options.memory_limit
    if arguments.compare is None and limit is not None and first.schedule.name != ADAPTIVE:
        if options.layer_costs is None:
            limit.check(first.schedule)
        elif not first.within(limit):
            raise ValueError(f"memory_limit = {limit}: {first.schedule.name} needs "
                             f"{first.metrics.peak_fraction_of_1f1b:.3g} of 1F1B's peak with these layers")
    if arguments.json is not None:
        write_json("--json", arguments.json,
                    first.to_json() if arguments.compare is None else [outcome.to_json() for outcome in outcomes])
    if pictures:
        _draw(outcomes, options, pictures)
    if arguments.compare is None:
        report.print_outcome(first)
    else:
        report.print_comparison(outcomes, limit)
    if options.partition is not None and options.layer_costs is None and options.times == ChunkTimes():
        report.console().print(f"{counted_alike(options.partition)}, because what their layers cost is measured in "
                               "training; --layer-costs says it, or --times of each chunk", highlight=False)
    return 0


def _peak_of_1f1b(options: PlanOptions) -> float:
    """1F1B's peak, in the unit of limits: chunk activations, or that of a file with the costs of layers."""
    sizes = options.stages, options.micro_batches
    return peak_of_1f1b(*sizes) if options.layer_costs is None else limits_of_1f1b(1, options.layer_costs.layers,
                                                                                     *sizes)[0]


def _draw(outcomes: Sequence[Outcome], options: PlanOptions, files: Mapping[str, Path]) -> None:
    """One picture with a panel for each outcome, in each of `files` (by kind)."""
    from ds_vshape.schedule import pictures

    full = peak_of_1f1b(options.stages, options.micro_batches)
    limit = None if options.memory_limit is None else options.memory_limit.count(options.stages, options.micro_batches)
    panels = [pictures.Panel(outcome.title, outcome.figures, (placement := outcome.schedule.placement),
                             outcome.timeline, options.giving_back.sizes(placement), limit, full)
              for outcome in outcomes]
    label = f"time ({options.times}; of one of 2p chunks)"
    for kind, file in files.items():
        with writing(f"--{kind}", file):
            pictures.save(panels, file, kind, label)


def _trace_curve(options: PlanOptions, file: Path, limits: Sequence[Limit] | None, reference: Path | None) -> None:
    """Plan at each limit, write `file` and print the points."""
    kind = file.suffix.removeprefix(".")
    if kind in _PICTURES:
        _need_matplotlib()
    with progress_bar("planning at each limit") as progress:
        traced = curve.trace(options, limits, reference, progress)
    if kind in _PICTURES:
        from ds_vshape.cli import curve_picture

        with writing("--curve", file):
            curve_picture.save(traced, file, kind)
    else:
        write_json("--curve", file, traced.to_json())
    report.console().print(curve.table(traced))
    if options.partition is not None:
        report.console().print(counted_alike(options.partition), highlight=False)


def _curve_file(text: str) -> Path:
    if Path(text).suffix not in (".json", *(f".{kind}" for kind in _PICTURES)):
        raise argparse.ArgumentTypeError(f"{text!r} must end in .svg, .png or .json")
    return Path(text)


def _need_matplotlib() -> None:
    """Raise ValueError before any planning if matplotlib is missing."""
    check_installed("matplotlib", "SVG and PNG are drawn by matplotlib", "plots")


def _check_size(options: PlanOptions) -> None:
    """Raise ValueError before any planning for a picture that would take minutes, or exceed matplotlib's height."""
    passes = 3 * options.micro_batches * sum(max(2, placement.chunks_each) * options.stages
                                             for _, placement in options.schedules)
    rows = options.stages * len(options.schedules)
    if passes > _MOST_PASSES or rows > _MOST_ROWS:
        raise ValueError(f"a picture of {rows} rows with about {passes} passes: must be at most {_MOST_ROWS} rows and "
                         f"{_MOST_PASSES} passes; --json has no such limit")
