"""Extends a schedule of few micro-batches to many by repeating its middle.

With more micro-batches than fill the pipeline, warm-up and cool-down stay the same and a pattern of one or a few
micro-batches repeats between them. Searching with fewer micro-batches is faster, and finds the same ramps. The repeated
part is copied (`lengthened`), or gives target starts to the list scheduler (`extended`).
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import replace
from math import lcm

import numpy as np
from numpy.typing import NDArray

from ds_vshape.schedule.adaptive.layout import KINDS, passes_of
from ds_vshape.schedule.adaptive.list_scheduler import PolicyRun, TargetStarts
from ds_vshape.schedule.adaptive.problem import Problem
from ds_vshape.schedule.placement import Placement

# Lengths of patterns in micro-batches.
_PERIODS = (1, 2, 3, 4, 6)
# Where patterns are looked for, as shares of a batch's passes.
_MIDDLES = (0.35, 0.4, 0.45, 0.5, 0.55, 0.6, 0.65)


def fewer_micro_batches(problem: Problem, per_rank: int = 2) -> Problem | None:
    """`problem` with fewer micro-batches, but enough for the whole ramps, `per_rank` or more; None if it has no more
    than these."""
    least = max(8, per_rank * problem.ranks)
    whole = lcm(*periods_of(problem.placement))
    left_out = (problem.micro_batches - least) // whole * whole
    return with_micro_batches(problem, problem.micro_batches - left_out) if left_out > 0 else None


def periods_of(placement: Placement) -> tuple[int, ...]:
    """Lengths of patterns in micro-batches: interleaved schedules go in groups of as many as there are ranks."""
    return tuple(dict.fromkeys((*_PERIODS, placement.ranks))) if placement.name == "interleaved" else _PERIODS


def with_micro_batches(problem: Problem, micro_batches: int) -> Problem:
    """`problem` with another number of them, all alike: the scales are for just as many as there were."""
    return replace(problem, micro_batches=micro_batches, times=replace(problem.times, scales=()))


def extended(run: PolicyRun, micro_batches: int, periods: Iterable[int]) -> Iterator[TargetStarts]:
    """Starts for `micro_batches` micro-batches that repeat a part of `run`, which has fewer; parts are of `periods`."""
    fewer = run.starts.shape[2]
    for at in sorted({fewer // 2, 2 * fewer // 3, max(1, fewer // 3)}):
        for period in periods:
            if period <= at < fewer:
                yield _repeated(run.starts, at, period, micro_batches - fewer)


def _repeated(starts: TargetStarts, at: int, period: int, more: int) -> TargetStarts:
    """`starts` with the `period` micro-batches before number `at` repeated until there are `more`."""
    first_b = starts.shape[1] // KINDS
    interval = starts[0, first_b, at, 0] - starts[0, first_b, at - period, 0]
    number = np.arange(more)
    middle = starts[:, :, at - period + number % period] + (interval * (1 + number // period))[:, None]
    return np.concatenate([starts[:, :, :at], middle, starts[:, :, at:] + interval * more / period], axis=2)


def lengthened(run: PolicyRun, micro_batches: int,
               periods: Iterable[int] = _PERIODS) -> Iterator[NDArray[np.int64]]:
    """Orders [rank, place] for `micro_batches` micro-batches: those of `run`, with a part near the middle repeated.

    A rank repeats a part with equally many passes of each stream. There are none if annealing has left no such part.
    """
    streams, fewer, pieces = run.starts.shape[1:]
    share = passes_of(streams, pieces)
    found: set[bytes] = set()
    for period in periods:
        parts = [_regular(order, period * share) for order in run.orders]
        for middle in _MIDDLES if all(parts) else ():
            rows = []
            for order, of_rank in zip(run.orders, parts):
                begin, end = min(of_rank, key=lambda part: abs(part[0] - middle * len(order)))
                repeated = np.tile(order[begin:end], (micro_batches - fewer) // period)
                rows.append(np.concatenate([order[:begin], repeated, order[begin:]]))
            orders = np.array(rows)
            if orders.tobytes() not in found:
                found.add(orders.tobytes())
                yield orders


def _regular(order: NDArray[np.int64], counts: NDArray[np.int64]) -> list[tuple[int, int]]:
    """The parts of `order` from one F or B to another of its stream that have `counts` passes of each stream."""
    parts = []
    for stream in range(2 * len(counts) // KINDS):
        places: list[int] = np.flatnonzero(order == stream).tolist()
        parts += [(begin, end) for begin, end in zip(places, places[counts[stream]:])
                  if (np.bincount(order[begin:end], minlength=len(counts)) == counts).all()]
    return parts
