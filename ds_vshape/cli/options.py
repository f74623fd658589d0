"""What to plan: from options, and from a ds_config.json for those that aren't given."""

from __future__ import annotations

import argparse
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ds_vshape.cli import giving_back
from ds_vshape.cli.giving_back import MOST_TIME, GivingBack
from ds_vshape.cli.layer_costs import LayerCostsFile
from ds_vshape.cli.partition import check_stages, read_costs
from ds_vshape.config.batch_size import micro_batches_of, whole_number
from ds_vshape.config.compatibility import check_demands
from ds_vshape.config.section import KEY, Partition, load_ds_config, read_section, shown
from ds_vshape.schedule.adaptive import cache
from ds_vshape.schedule.chunk_times import ChunkTimes
from ds_vshape.schedule.memory_limit import check_activation_limit, check_memory_limit, count_of
from ds_vshape.schedule.named import (ADAPTIVE, ADAPTIVE_PLACEMENTS, MOST_RANKS, SCHEDULES, check_placement,
                                       most_micro_batches, placement_of)
from ds_vshape.schedule.placement import Placement
from ds_vshape.schedule.schedule import Schedule

# Bounds of the options: seconds of planning; times of passes and hops, in any unit; the greatest ratio between them,
# which sums over a batch still resolve; counts of chunk activations; the number of limits of a curve, each of which
# takes a plan.
SECONDS = 0.001, 86400.0
TIMES = 1e-9, MOST_TIME
MOST_RATIO = 1e9
MOST_ACTIVATIONS = 1e9
MOST_LIMITS = 100
# How long planning takes where neither the options nor the config say.
_TIME_LIMIT = 10.0
# Options that --curve replaces: it shows all schedules, at all limits.
_NOT_WITH_CURVE = ("schedule", "placement", "chunks", "compare", "memory_limit", "json", "svg", "png", "layer_costs")
_ONLY_WITH_CURVE = ("limits", "reference")


@dataclass(frozen=True)
class Limit:
    """A memory limit: `value` is a fraction of 1F1B's peak, or a count of chunk activations."""

    value: float
    is_count: bool

    @classmethod
    def parse(cls, text: str) -> Limit:
        """0.5 or 6u; argparse.ArgumentTypeError for anything else."""
        is_count = text.endswith("u")
        try:
            value = _number(text.removesuffix("u"))
        except argparse.ArgumentTypeError:
            value = math.nan
        if not 0 < value <= (MOST_ACTIVATIONS if is_count else 2):
            raise argparse.ArgumentTypeError(f"{shown(text)} must be a fraction of 1F1B's peak above 0 and at most 2, "
                                             "or a count of chunk activations above 0 with the suffix u, like 6u")
        return cls(value, is_count)

    def __str__(self) -> str:
        return f"{self.value:g}{'u' * self.is_count}"

    def count(self, ranks: int, micro_batches: int) -> float:
        """The limit in chunk activations."""
        return self.value if self.is_count else count_of(self.value, ranks, micro_batches)

    def check(self, schedule: Schedule) -> None:
        """Raise MemoryLimitError if `schedule` peaks above the limit."""
        (check_activation_limit if self.is_count else check_memory_limit)(schedule, self.value)


@dataclass(frozen=True)
class PlanOptions:
    """What to plan: schedules by name, with where their stages are, or none for the curve; `times` as the user gives
    them, unless `layer_costs` has them. `partition` is the config's, for the first schedule."""

    schedules: tuple[tuple[str, Placement], ...]
    stages: int
    micro_batches: int
    memory_limit: Limit | None
    times: ChunkTimes
    time_limit: float
    cache: Path | None
    giving_back: GivingBack = GivingBack()
    layer_costs: LayerCostsFile | None = None
    partition: Partition | None = None

    @property
    def bounds(self) -> tuple[int, ...] | None:
        """The first layer of each stage of the first schedule, and the number of layers, where the config has them."""
        return self.partition if isinstance(self.partition, tuple) else None

    @classmethod
    def from_arguments(cls, arguments: argparse.Namespace) -> PlanOptions:
        """Combine options and file; ValueError if neither has a value, or if they disagree."""
        _check_modes(arguments)
        keys = ("schedule", "placement", "chunks", "stages", "micro_batches", "memory_limit")
        given = {key: getattr(arguments, key) for key in keys}
        paths = [path for path in (arguments.config, arguments.config_option) if path is not None]
        if len(paths) > 1:
            raise ValueError(f"give one config file, not both {paths[0]} and {paths[1]}")
        has_limit = arguments.memory_limit is not None or arguments.curve is not None
        config = _from_config(load_ds_config(str(paths[0])), has_limit) if paths else {}
        giving_back = GivingBack.from_arguments(arguments, config.pop("recompute", False), config.pop("offload", False))
        partition, seconds = config.pop("partition", None), config.pop("planning_seconds", _TIME_LIMIT)
        for key, value in config.items():
            if given[key] is None:
                given[key] = value
            elif given[key] != value:
                raise ValueError(f"{_option(key)} says {given[key]}, but {paths[0]} says {value}")
        schedule, where, chunks = given.pop("schedule"), given.pop("placement"), given.pop("chunks")
        if arguments.curve is not None:
            names: tuple[str, ...] = ()
            given["memory_limit"] = None
        else:
            names = tuple(dict.fromkeys([*([] if schedule is None else [schedule]), *(arguments.compare or ())]))
        needed = {"schedule": names or arguments.curve, **given}
        missing = [_option(key) for key in ("schedule", "stages", "micro_batches") if not needed[key]]
        if missing:
            source = f"{paths[0]} lacks" if paths else "a config file or these options are needed; missing:"
            raise ValueError(f"{source} {', '.join(missing)}")
        _check_size(given["stages"], given["micro_batches"], chunks)
        if arguments.curve is None:
            _check_belongs(names, schedule, where, chunks, giving_back)
        schedules = tuple(
            (name, _placement(name, given["stages"], *((chunks, where) if name == schedule else (None, None))))
            for name in names)
        try:
            arguments.times.check(given["stages"])
        except ValueError as error:
            raise ValueError(f"--times: {error}") from None
        layer_costs = _layer_costs(arguments, given["memory_limit"], giving_back, schedules, partition)
        if schedules and schedule is not None:
            check_stages(partition, schedules[0][1], layer_costs)
        return cls(schedules, **given, times=arguments.times, time_limit=arguments.time_limit or seconds,
                   cache=None if arguments.no_cache else cache.folder(), layer_costs=layer_costs,
                   giving_back=giving_back, partition=partition)


def add_options(parser: argparse.ArgumentParser) -> None:
    """Add the options that say what to plan."""
    parser.add_argument("config", nargs="?", type=Path, metavar="DS_CONFIG",
                        help="a ds_config.json; the options below fill what it lacks")
    parser.add_argument("--config", dest="config_option", type=Path, metavar="DS_CONFIG", help="the same")
    parser.add_argument("--schedule", metavar="NAME", help=", ".join((*SCHEDULES, ADAPTIVE)))
    parser.add_argument("--placement", choices=ADAPTIVE_PLACEMENTS,
                        help="where the stages of --schedule adaptive are: down the ranks and back up (v), or always "
                             "down (default: v)")
    parser.add_argument("--chunks", type=_count, metavar="C",
                        help="stages that each rank holds, for --schedule interleaved-1f1b, interleaved-zb, v-zb or "
                             "adaptive (default: 2)")
    parser.add_argument("--stages", type=_count, metavar="P", help="pipeline ranks")
    parser.add_argument("--micro-batches", type=_count, metavar="M", help="micro-batches of a batch, for each replica")
    parser.add_argument("--times", type=_times, default=ChunkTimes(), metavar="F,B,W,HOP",
                        help="times of one of 2P chunks of the model, and of a hop between ranks (default: 1,1,1,0); "
                             "where they differ, those of all 2P chunks and of all P-1 links with colons between: "
                             "12:10:10:14,20,10,0.5 for P = 2")
    parser.add_argument("--layer-costs", type=Path, metavar="FILE",
                        help="instead of --times: JSON with the costs of each layer, {\"costs\": [[F, B, W], ...], "
                             "\"activations\": [[after F, after B], ...], \"hop\": 0.5}; adaptive then plans where the "
                             "layers are cut too, other schedules balance the work of ranks")
    parser.add_argument("--memory-limit", type=Limit.parse, metavar="X",
                        help="the highest peak of activations: a fraction of 1F1B's (0.5), or a count of chunk "
                             "activations (6u); adaptive plans for it, other schedules must be within it")
    giving_back.add_options(parser, _number)
    parser.add_argument("--time-limit", type=_seconds, metavar="SECONDS",
                        help="planning ends after this time with the best plan so far (default: the config's "
                             f"planning_seconds, or {_TIME_LIMIT:g})")
    parser.add_argument("--no-cache", action="store_true",
                        help="ignore cached plans (in $XDG_CACHE_HOME/ds_vshape)")
    parser.add_argument("--compare", type=_names, metavar="A,B,C", help="these schedules side by side")
    parser.add_argument("--limits", type=_limits, metavar="X,Y,Z",
                        help="of the curve (default: from a quarter of 1F1B's peak to all of it)")
    parser.add_argument("--reference", type=Path, metavar="FILE",
                        help="other schedulers' figures for the curve, as bench/compare_reference.py reads them")


def _layer_costs(arguments: argparse.Namespace, limit: Limit | None, giving_back: GivingBack,
                 schedules: Sequence[tuple[str, Placement]], partition: Partition | None) -> LayerCostsFile | None:
    """What layers cost, by the file or the config's `partition`; ValueError with options that it replaces, for a limit
    in chunks, which have no size before the layers are divided, and for fewer layers than a schedule has stages."""
    if arguments.curve is not None:
        return None
    found, source = read_costs(arguments.layer_costs, partition)
    if found is None:
        return None
    if arguments.times != ChunkTimes():
        raise ValueError(f"--times can't be used with {source}, which has the times of layers and hops")
    if limit is not None and limit.is_count:
        raise ValueError(f"--memory-limit {limit} can't be used with {source}, because chunks differ: give a "
                         "fraction of 1F1B's peak")
    if giving_back.any:
        raise ValueError(f"{source} can't be used with recomputation or offload, which need stages of known sizes")
    for name, placement in schedules:
        if len(found.costs) < placement.stages:
            raise ValueError(f"{source}: {len(found.costs)} layers can't fill {placement.stages} stages of {name}")
    return found


def _placement(name: str, stages: int, chunks: int | None, placement: str | None) -> Placement:
    """The placement of the schedule `name` on `stages` ranks; ValueError for a number of chunks and a name of the
    placement that it can't have."""
    option = f"--placement {placement}: " if placement else ""
    try:
        check_placement(name, placement)
        option = f"--chunks {chunks}: " if chunks else ""
        return placement_of(name, stages, chunks, placement)
    except ValueError as error:
        raise ValueError(f"{option}{error}") from None


def _check_size(stages: int, micro_batches: int, chunks: int | None) -> None:
    """Raise ValueError for more ranks or micro-batches than a schedule may have."""
    if stages > MOST_RANKS:
        raise ValueError(f"stages = {stages}: must be at most {MOST_RANKS} pipeline ranks")
    most = most_micro_batches(stages, chunks or 2)
    if micro_batches > most:
        raise ValueError(f"micro-batches = {micro_batches}: must be at most {most} on {stages} pipeline ranks")


def _check_belongs(names: tuple[str, ...], schedule: str | None, placement: str | None, chunks: int | None,
                   giving_back: GivingBack) -> None:
    """Raise ValueError for what has no effect on any of the schedules `names`; `schedule` is the main one."""
    for option, value in (("placement", placement), ("chunks", chunks)):
        if schedule is None and value is not None:
            raise ValueError(f"--{option} {value} needs --schedule: the schedules of --compare have their usual one")
    if giving_back.any and ADAPTIVE not in names:
        option = "recompute" if giving_back.recompute else "offload"
        raise ValueError(f"--{option} needs --schedule {ADAPTIVE}: {', '.join(names)} can't be planned with it")


def _check_modes(arguments: argparse.Namespace) -> None:
    if arguments.curve is None:
        wrong = [_option(key) for key in _ONLY_WITH_CURVE if getattr(arguments, key) is not None]
        rule = "needs --curve"
    else:
        wrong = [_option(key) for key in _NOT_WITH_CURVE if getattr(arguments, key) is not None]
        rule = "can't be used with --curve, which shows all schedules at the limits of --limits"
    if wrong:
        raise ValueError(f"{wrong[0]} {rule}")


def _from_config(ds_config: Mapping[str, Any], has_limit: bool) -> dict[str, Any]:
    """The ds_config's values, by the names of options; "auto" counts as missing.

    A limit in bytes is refused unless the caller `has_limit` from an option.
    """
    found: dict[str, Any] = {}
    section = read_section(ds_config)
    if section is not None:
        check_demands(section)
        found["schedule"] = section.name
        found.update({key: value for key in ("placement", "chunks") if (value := getattr(section, key)) is not None})
        found.update(recompute=section.recompute, offload=section.offload, partition=section.partition)
        if "planning_seconds" in section.model_fields_set:
            found["planning_seconds"] = section.planning_seconds
        if isinstance(section.memory_limit, float):
            found["memory_limit"] = Limit(section.memory_limit, is_count=False)
        elif section.memory_limit is not None and not has_limit:
            given = ds_config[KEY]["memory_limit"]
            raise ValueError(f"{KEY}.memory_limit = {shown(given)}: the sizes of activations "
                             "are only known in training; give --memory-limit as a fraction of 1F1B's peak")
    pipeline = ds_config.get("pipeline")
    stages = whole_number(pipeline, "stages", "pipeline.stages") if isinstance(pipeline, Mapping) else None
    if stages is not None:
        found["stages"] = stages
    micro_batches = micro_batches_of(ds_config)
    if micro_batches is not None:
        found["micro_batches"] = micro_batches
    return found


def _option(key: str) -> str:
    return "--" + key.replace("_", "-")


def _count(text: str) -> int:
    if not re.fullmatch(r"[1-9]\d{0,18}", text):
        raise argparse.ArgumentTypeError(f"{shown(text)} must be a whole number of at least 1")
    return int(text)


def _number(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not math.isfinite(value):
        raise argparse.ArgumentTypeError(f"{shown(text)} is not a number")
    return value


def _seconds(text: str) -> float:
    value = _number(text)
    low, high = SECONDS
    if not low <= value <= high:
        raise argparse.ArgumentTypeError(f"{shown(text)} must be above 0: from {low:g} to {high:g}")
    return value


def _times(text: str) -> ChunkTimes:
    values = [tuple(_number(one) for one in part.split(":")) for part in text.split(",")]
    if len(values) != 4 or min(map(min, values[:3])) <= 0 or min(values[3]) < 0:
        raise argparse.ArgumentTypeError(f"{shown(text)} must be F,B,W,HOP: three times above 0 and one of at least 0, "
                                         "each for all chunks or links, or one for each with colons between")
    every = [value for part in values for value in part if value]
    shortest, longest = min(every), max(every)
    if not TIMES[0] <= shortest <= longest <= min(TIMES[1], MOST_RATIO * shortest):
        raise argparse.ArgumentTypeError(f"{shown(text)} must be times from {TIMES[0]:g} to {TIMES[1]:g} (a hop may "
                                         f"take 0), the longest at most {MOST_RATIO:g} times the shortest")
    return ChunkTimes(*values)


def _names(text: str) -> tuple[str, ...]:
    names = tuple(part.strip() for part in text.split(","))
    if not all(names):
        raise argparse.ArgumentTypeError(f"{shown(text)} must be names of schedules with commas between")
    return names


def _limits(text: str) -> tuple[Limit, ...]:
    parts = text.split(",")
    if len(parts) > MOST_LIMITS:
        raise argparse.ArgumentTypeError(f"{len(parts)} limits: must be at most {MOST_LIMITS}")
    return tuple(map(Limit.parse, parts))
