"""`ds-vshape plan`: what a schedule will cost, before anything is launched.

It builds the schedule that training would run, simulates it, and prints its figures and its picture, or writes all of
it as JSON. What to plan comes from options or from a ds_config.json.
"""

from __future__ import annotations

import argparse
import json
import math
import re
import sys
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from ds_vshape.config import load_ds_config, read_section
from ds_vshape.schedule import drawing
from ds_vshape.schedule.memory_limit import check_activation_limit, check_memory_limit
from ds_vshape.schedule.metrics import Metrics, chunk_times, measure
from ds_vshape.schedule.named import SCHEDULES, build, named
from ds_vshape.schedule.passes import Pass
from ds_vshape.schedule.schedule import Schedule
from ds_vshape.schedule.timeline import Timeline, simulate

_COLOURS = {"F": "cyan", "B": "green", "W": "yellow", "BW": "magenta"}


def add_parser(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add `plan` to the command line."""
    description = (__doc__ or "").partition("\n\n")[2]
    parser = commands.add_parser("plan", help="show what a schedule costs", description=description)
    parser.add_argument("config", nargs="?", type=Path, metavar="DS_CONFIG",
                        help="a ds_config.json; the options below fill what it lacks")
    parser.add_argument("--config", dest="config_option", type=Path, metavar="DS_CONFIG", help="the same")
    parser.add_argument("--schedule", metavar="NAME", help=", ".join(SCHEDULES))
    parser.add_argument("--stages", type=_count, metavar="P", help="pipeline ranks")
    parser.add_argument("--micro-batches", type=_count, metavar="M", help="micro-batches of a batch, for each replica")
    parser.add_argument("--times", type=_times, default=(1.0, 1.0, 1.0, 0.0), metavar="F,B,W,HOP",
                        help="times of one of 2P chunks of the model, and of a hop between ranks (default: 1,1,1,0)")
    parser.add_argument("--memory-limit", type=_Limit.parse, metavar="X",
                        help="the highest peak of activations: a fraction of 1F1B's (0.5), or a count of chunk "
                             "activations (6u)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write schedule and figures there as well")
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    """Plan, check the memory limit, print, and write the JSON file if asked to. Raises ValueError on bad input."""
    request = _Request.from_arguments(arguments)
    began = time.perf_counter()
    schedule = build(request.schedule, request.stages, request.micro_batches)
    planning_s = time.perf_counter() - began
    if request.memory_limit is not None:
        request.memory_limit.check(schedule)
    times = chunk_times(schedule.placement, *request.times)
    timeline = simulate(schedule, times)
    metrics = measure(schedule, times, timeline)
    if arguments.json is not None:
        try:
            arguments.json.write_text(json.dumps(to_json(schedule, metrics, planning_s)) + "\n", encoding="utf-8")
        except OSError as error:
            raise ValueError(f"--json {arguments.json}: {error.strerror}") from None
    _print(schedule, timeline, metrics, planning_s)
    return 0


def to_json(schedule: Schedule, metrics: Metrics, planning_s: float) -> dict[str, Any]:
    """The schedule and its figures for other programs; "stages" is the number of pipeline ranks."""
    return {
        "schedule": schedule.name,
        "stages": schedule.placement.ranks,
        "micro_batches": schedule.micro_batches,
        "placement": [list(stages) for stages in schedule.placement.chunks],
        "orders": [[_entry(work) for work in order] for order in schedule.orders],
        "metrics": {**asdict(metrics), "planning_s": planning_s},
    }


def _entry(work: Pass) -> list[Any]:
    """A pass in the JSON: kind, stage, micro-batch, and for a piece of a W which of how many."""
    whole = [work.kind.value, work.stage, work.micro_batch]
    return whole if work.pieces == 1 else [*whole, [work.piece, work.pieces]]


# ---------------------------------------------------------------- input


@dataclass(frozen=True)
class _Limit:
    """A memory limit: `value` is a fraction of 1F1B's peak, or a count of chunk activations."""

    value: float
    is_count: bool

    @classmethod
    def parse(cls, text: str) -> _Limit:
        """0.5 or 6u; argparse.ArgumentTypeError for anything else."""
        is_count = text.endswith("u")
        value = _number(text.removesuffix("u"))
        if value <= 0 or (value > 2 and not is_count):
            raise argparse.ArgumentTypeError(f"{text!r} must be a fraction of 1F1B's peak above 0 and at most 2, "
                                             f"or a count of chunk activations above 0 with the suffix u, like 6u")
        return cls(value, is_count)

    def check(self, schedule: Schedule) -> None:
        """Raise MemoryLimitError if `schedule` peaks above the limit."""
        (check_activation_limit if self.is_count else check_memory_limit)(schedule, self.value)


@dataclass(frozen=True)
class _Request:
    """What to plan: options where there are any, the config file elsewhere."""

    schedule: str
    stages: int
    micro_batches: int
    memory_limit: _Limit | None
    times: tuple[float, float, float, float]

    @classmethod
    def from_arguments(cls, arguments: argparse.Namespace) -> _Request:
        """Put options and file together; ValueError where both are silent, or where they disagree."""
        given = {key: getattr(arguments, key) for key in ("schedule", "stages", "micro_batches", "memory_limit")}
        paths = [path for path in (arguments.config, arguments.config_option) if path is not None]
        if len(paths) > 1:
            raise ValueError(f"give one config file, not both {paths[0]} and {paths[1]}")
        config = _from_config(load_ds_config(str(paths[0]))) if paths else {}
        for key, value in config.items():
            if given[key] is None:
                given[key] = value
            elif given[key] != value:
                raise ValueError(f"{_option(key)} says {_shown(given[key])}, but {paths[0]} says {_shown(value)}")
        missing = [_option(key) for key in ("schedule", "stages", "micro_batches") if given[key] is None]
        if missing:
            source = f"{paths[0]} lacks" if paths else "a config file or these options are needed; missing:"
            raise ValueError(f"{source} {', '.join(missing)}")
        named(given["schedule"])
        return cls(**given, times=arguments.times)


def _from_config(ds_config: Mapping[str, Any]) -> dict[str, Any]:
    """What a ds_config says about the schedule, by the options' names; "auto" counts as not said."""
    found: dict[str, Any] = {}
    section = read_section(ds_config)
    if section is not None:
        found["schedule"] = section.name
        if section.memory_limit is not None:
            found["memory_limit"] = _Limit(section.memory_limit, is_count=False)
    pipeline = ds_config.get("pipeline")
    stages = _whole(pipeline, "stages", "pipeline.stages") if isinstance(pipeline, Mapping) else None
    if stages is not None:
        found["stages"] = stages
    micro_batches = _micro_batches(ds_config)
    if micro_batches is not None:
        found["micro_batches"] = micro_batches
    return found


def _micro_batches(ds_config: Mapping[str, Any]) -> int | None:
    """Accumulation steps, as DeepSpeed finds them (runtime/config.py, _set_batch_related_parameters), one replica."""
    steps = _whole(ds_config, "gradient_accumulation_steps")
    batch, micro_batch = (_whole(ds_config, key) for key in ("train_batch_size", "train_micro_batch_size_per_gpu"))
    if steps is not None:
        return steps
    if batch is None and micro_batch is None:
        return None
    if batch is None or micro_batch is None:
        return 1
    if batch % micro_batch:
        raise ValueError(f"train_batch_size = {batch} is no multiple of train_micro_batch_size_per_gpu = {micro_batch}")
    return batch // micro_batch


def _whole(section: Mapping[str, Any], key: str, path: str | None = None) -> int | None:
    value = section.get(key)
    if value is None or value == "auto":
        return None
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise ValueError(f"{path or key} = {value!r} in the config: must be a whole number of at least 1")
    return value


def _option(key: str) -> str:
    return "--" + key.replace("_", "-")


def _shown(value: Any) -> str:
    return f"{value.value:g}{'u' * value.is_count}" if isinstance(value, _Limit) else str(value)


def _count(text: str) -> int:
    if not re.fullmatch(r"[1-9]\d*", text):
        raise argparse.ArgumentTypeError(f"{text!r} must be a whole number of at least 1")
    return int(text)


def _number(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not math.isfinite(value):
        raise argparse.ArgumentTypeError(f"{text!r} is no number")
    return value


def _times(text: str) -> tuple[float, float, float, float]:
    values = [_number(part) for part in text.split(",")]
    if len(values) != 4 or min(values[:3]) <= 0 or values[3] < 0:
        raise argparse.ArgumentTypeError(f"{text!r} must be F,B,W,HOP: three times above 0 and one of at least 0")
    return values[0], values[1], values[2], values[3]


# ---------------------------------------------------------------- output


def _print(schedule: Schedule, timeline: Timeline, metrics: Metrics, planning_s: float) -> None:
    # A terminal gets its own width; a pipe or a file gets room for the usual picture.
    console = Console(width=None if sys.stdout.isatty() else 200)
    placement = schedule.placement
    title = (f"{schedule.name}: {placement.ranks} ranks, {placement.stages} stages ({placement.name}), "
             f"{schedule.micro_batches} micro-batches")
    table = Table("figure", "value", "meaning", title=title, title_justify="left")
    for figure, value, meaning in (
            ("makespan", f"{metrics.makespan:g}", "first start to last end"),
            ("longest span", f"{metrics.longest_span:g}", "the longest of a rank's own first start to last end"),
            ("bubble", f"{metrics.bubble:.1%}", "share of all ranks' time without work"),
            ("lower bound", f"{metrics.lower_bound:g}", "no order with this placement and peak has a shorter makespan"),
            ("peak activations", f"{max(metrics.peak_activations):g}", "of one of 2P chunks for one micro-batch"),
            ("of 1F1B's peak", f"{metrics.peak_fraction_of_1f1b:.3g}", "on as many ranks and micro-batches"),
            ("planning", f"{planning_s:.3f} s", "time to build the schedule")):
        table.add_row(figure, value, meaning)
    console.print(table)
    ranks = Table("rank", "stages", "peak activations", "busy", title="ranks", title_justify="left")
    for rank, (stages, spans) in enumerate(zip(placement.chunks, timeline.ranks)):
        busy = sum(span.end - span.start for span in spans) / metrics.makespan
        ranks.add_row(str(rank), ", ".join(map(str, stages)), f"{metrics.peak_activations[rank]:g}", f"{busy:.1%}")
    console.print(ranks)
    picture = Text(drawing.draw(timeline, placement, console.width), no_wrap=True, overflow="ignore", end="\n")
    for kind, pattern in drawing.PASSES.items():
        picture.highlight_regex(pattern, style=_COLOURS[kind])
    console.print(picture, soft_wrap=True, highlight=False)
