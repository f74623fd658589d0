"""Bubble against memory limit, as in the paper's Figure 9, for given times.

    named        the schedules of the table, one point each: their orders are made for equal times
    adaptive     the best plan for the times at each limit; also with recomputation, offload, and both, where allowed
    bound        a lower bound for the V placement (schedule/bounds.py; with equal times the paper's bound)
    reference    other schedulers' points, from a file
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from math import ceil, inf
from pathlib import Path
from typing import Any

from rich.table import Table

from ds_vshape.cli.giving_back import GivingBack
from ds_vshape.cli.options import Limit, PlanOptions
from ds_vshape.cli.outcome import plan_one
from ds_vshape.schedule.adaptive import LimitError
from ds_vshape.schedule.bounds import lower_bound
from ds_vshape.schedule.chunk_times import ChunkTimes
from ds_vshape.schedule.memory_limit import peak_of_1f1b
from ds_vshape.schedule.metrics import measure
from ds_vshape.schedule.named import ADAPTIVE, SCHEDULES, build
from ds_vshape.schedule.placement import v

_DEFAULT_LIMITS = 13


@dataclass(frozen=True)
class Point:
    """One schedule, or one bound.

    `memory` is the peak, or the limit, in chunk activations; `fraction` is relative to 1F1B's peak; `makespan`, or the
    bound on it, is in the unit of the times.
    """

    name: str
    memory: float
    fraction: float
    makespan: float
    bubble: float


@dataclass(frozen=True)
class Curve:
    """The points for one batch; `bound[i]` and `adaptive[i]` belong to the i-th feasible limit.

    `giving_back` are the plans that recompute or offload, by what they may do; those have other feasible limits.
    """

    stages: int
    micro_batches: int
    times: ChunkTimes
    named: tuple[Point, ...]
    adaptive: tuple[Point, ...]
    bound: tuple[Point, ...]
    reference: tuple[Point, ...]
    too_small: tuple[float, ...]
    giving_back: dict[str, tuple[Point, ...]] = field(default_factory=dict)

    def to_json(self) -> dict[str, Any]:
        """Everything as plain values; times that are all equal as one number."""
        times = {name: values[0] if len(values) == 1 else values for name, values in vars(self.times).items()}
        return {**asdict(self), "times": times}


@dataclass(frozen=True)
class _Scale:
    """Converts peaks and makespans of a batch to points."""

    ranks: int
    micro_batches: int
    times: ChunkTimes

    @property
    def work(self) -> float:
        """The mean time of a rank's passes: two chunks for each micro-batch."""
        return self.micro_batches * self.times.work(self.ranks) / self.ranks

    def point(self, name: str, memory: float, makespan: float) -> Point:
        """A point by its peak or limit in chunk activations, and its makespan."""
        return Point(name, memory, memory / peak_of_1f1b(self.ranks, self.micro_batches), makespan,
                     1 - self.work / makespan)


def trace(options: PlanOptions, limits: Sequence[Limit] | None, reference: Path | None,
          progress: Callable[[float], None]) -> Curve:
    """Plan at each limit (by default from a quarter of 1F1B's peak to all of it) and collect the other points.

    Limits that no schedule meets are listed, not planned. If a plan for more memory is slower than one for less, or one
    that may recompute or offload slower than one that may not, the latter is used for both. Raises ValueError if
    `reference` can't be read or has no cell for this batch.
    """
    scale = _Scale(options.stages, options.micro_batches, options.times)
    others = tuple(_reference_points(reference, scale)) if reference is not None else ()
    allowed = _allowed(options.giving_back)
    counts = _counts(options, limits, 1 if len(allowed) > 1 else 2)
    placement = v(options.stages)
    times = options.times.on(placement)
    found: dict[str, list[Point]] = {str(each): [] for each in allowed}
    bound: list[Point] = []
    best: dict[str, Point] = {}
    for place, count in enumerate(counts):
        for turn, each in enumerate(allowed):
            part = _part(progress, place * len(allowed) + turn, len(counts) * len(allowed))
            try:
                outcome = plan_one(ADAPTIVE, placement, replace(options, giving_back=each),
                                   Limit(count, is_count=True), part)
            except LimitError:
                continue
            point = scale.point(ADAPTIVE, count, outcome.metrics.makespan)
            # What less memory, or a plan that may do less, has taken.
            known = [best[str(other)] for other in allowed if str(other) in best and each.includes(other)]
            makespan = min((one.makespan for one in (point, *known)))
            best[str(each)] = scale.point(ADAPTIVE, count, makespan)
            found[str(each)].append(best[str(each)])
            if not each.any:
                least = lower_bound(placement, options.micro_batches, times, count)
                bound.append(scale.point("lower bound", count, least))
    adaptive = tuple(found.pop(str(allowed[0])))
    feasible = {point.memory for points in (adaptive, *found.values()) for point in points}
    return Curve(options.stages, options.micro_batches, options.times, tuple(_named_points(scale)), adaptive,
                 tuple(bound), others, tuple(count for count in counts if count not in feasible),
                 {name: tuple(points) for name, points in found.items()})


def _allowed(giving_back: GivingBack) -> list[GivingBack]:
    """What the plans of a curve may do: neither, and each alone and both together as far as `giving_back` says."""
    found = [replace(giving_back, recompute=recompute, offload=offload)
             for recompute, offload in ((False, False), (True, False), (False, True), (True, True))]
    return [each for each in found if giving_back.includes(each)]


def _part(progress: Callable[[float], None], place: int, parts: int) -> Callable[[float], None]:
    """Reports the progress of part `place`, of `parts` equal ones, as progress of the whole."""
    return lambda done: progress((place + done) / parts)


def _counts(options: PlanOptions, limits: Sequence[Limit] | None, least: int) -> list[float]:
    """The limits in chunk activations, ascending; by default from a quarter of 1F1B's peak, or `least` if that's 1."""
    ranks, micro_batches = options.stages, options.micro_batches
    if limits is not None:
        return sorted({limit.count(ranks, micro_batches) for limit in limits})
    most = peak_of_1f1b(ranks, micro_batches)
    least = max(least, most // 4) if least > 1 else 1
    step = max(1, ceil((most - least) / (_DEFAULT_LIMITS - 1)))
    return [float(count) for count in range(most, least - 1, -step)][::-1]


def _named_points(scale: _Scale) -> Iterable[Point]:
    for name in SCHEDULES:
        schedule = build(name, scale.ranks, scale.micro_batches)
        metrics = measure(schedule, scale.times.on(schedule.placement))
        yield scale.point(name, max(metrics.peak_activations), metrics.makespan)


def _reference_points(file: Path, scale: _Scale) -> Iterable[Point]:
    """The points of the cell for this batch, in any unit of time; bench/compare_reference.py describes the format."""
    try:
        if file.exists() and not file.is_file():
            raise ValueError("not a file")
        cells = json.loads(file.read_text(encoding="utf-8"))["cells"]
        found = [cell for cell in cells if _ratio(cell, scale) is not None]
        if not found:
            raise ValueError("it has no cell for "
                             f"{scale.ranks} ranks, {scale.micro_batches} micro-batches and these times")
        ratio = _ratio(found[0], scale) or 1.0
        return [scale.point(name, _positive(figures["peak"]), _positive(figures["makespan"]) * ratio)
                for name, figures in found[0]["schedules"].items()]
    except OSError as error:
        raise ValueError(f"--reference {file}: {error.strerror}") from None
    except (ValueError, KeyError, TypeError, AttributeError, ArithmeticError, RecursionError) as error:
        reason = f"it has no {error}" if isinstance(error, KeyError) else error
        raise ValueError(f"--reference {file}: {reason}") from None


def _positive(figure: float) -> float:
    if not 0 < figure < inf:
        raise ValueError(f"{figure!r} is not a peak or makespan")
    return figure


def _ratio(cell: Mapping[str, Any], scale: _Scale) -> float | None:
    """Our unit of time relative to that of `cell`; None if the cell is for another batch."""
    if (cell["stages"], cell["micro_batches"]) != (scale.ranks, scale.micro_batches):
        return None
    ratio: float = scale.times.forward[0] / cell["forward"]
    is_equal = all(abs(ratio * cell[key] - our) <= 1e-9 * scale.times.forward[0]
                   for key, ours in vars(scale.times).items() for our in ours)
    return ratio if is_equal else None


def table(curve: Curve) -> Table:
    """Every point, by memory."""
    shown = Table(title=f"bubble against memory: {curve.stages} ranks, {curve.micro_batches} micro-batches, "
                        f"{curve.times}", title_justify="left",
                  caption_justify="left", caption="memory: peak or limit, in chunk activations")
    for column in ("memory", "of 1F1B's peak", "makespan", "bubble"):
        shown.add_column(column, justify="right")
    shown.add_column("schedule")
    groups = (("", curve.bound), ("", curve.adaptive),
              *((f", {name}", points) for name, points in curve.giving_back.items()),
              (" (order for equal times)", curve.named),
              (" (reference)", curve.reference))
    lines = [(point, point.name + kind) for kind, points in groups for point in points]
    for point, name in sorted(lines, key=lambda line: line[0].memory):
        shown.add_row(f"{point.memory:g}", f"{point.fraction:.3f}", f"{point.makespan:g}", f"{point.bubble:.1%}", name,
                      style="bold" if name.startswith(ADAPTIVE) else None)
    for count in curve.too_small:
        shown.add_row(f"{count:g}", "", "", "", "below the minimum of any schedule", style="dim")
    return shown
