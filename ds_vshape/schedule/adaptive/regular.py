"""Blocks without a bubble: every rank runs its six passes in the same order, a fixed step later than the rank before.

While passes go round in an interval of just the slowest rank's work, a rank that has all of its six passes in each
interval never waits. If the order is the same everywhere, an input that goes one rank down and comes back up takes
together a whole number of intervals, so one on each way is enough, and all ranks keep about what 1F1B keeps. That is
the steady state of V-ZB (paper, section 3.3), for any times: which order, and which step, is found by trying them.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import combinations_with_replacement, islice, pairwise, permutations
from math import ceil

import numpy as np
from numpy.typing import NDArray

from ds_vshape.schedule.adaptive.blocks import repeat
from ds_vshape.schedule.adaptive.list_scheduler import B0, B1, F0, F1, KINDS, W0, W1, ListScheduler
from ds_vshape.schedule.adaptive.problem import SLACK

# A block's starts [rank, stream].
Starts = NDArray[np.float64]


def regular_orders(scheduler: ListScheduler, most: int) -> Iterator[NDArray[np.int64]]:
    """Up to `most` orders [rank, place] that repeat such a block; shorter blocks first.

    They keep the limits whenever a forward starts. Where a B leaves more than it frees, some may exceed them in
    between, and left_shift refuses those. None where B has to take W with it, or nothing takes time.
    """
    if scheduler.fused or not scheduler.work:
        return
    blocks = [starts for starts in _blocks(scheduler) if _fits(starts, scheduler)]
    blocks.sort(key=lambda starts: float(starts.max()))
    repeated = (_repeated(starts, scheduler) for starts in blocks[:10 * most])
    yield from islice({orders.tobytes(): orders for orders in repeated}.values(), most)


def _blocks(scheduler: ListScheduler) -> Iterator[Starts]:
    """Blocks of all orders and of those steps from rank to rank at which some input comes just in time, and between."""
    interval, layout = scheduler.work, scheduler.layouts(1)
    durations = layout.durations
    just = {0.0}
    for stream in (F0, B0):
        way = float((durations + layout.delay)[:, stream].max())
        just |= {way, interval - way}
    steps = sorted({(one + other) / 2 % interval for one, other in combinations_with_replacement(just, 2)})
    passes = _way(scheduler)
    for order in permutations((F1, B0, B1, W0, W1)):
        phases = np.zeros(durations.shape)
        for before, stream in pairwise((F0, *order)):
            phases[:, stream] = phases[:, before] + durations[:, before]
        for step in steps:
            yield _block((phases + step * np.arange(len(phases))[:, None]).tolist(), passes, interval)


def _way(scheduler: ListScheduler) -> list[tuple[int, int, float, float]]:
    """A micro-batch's F and B: rank, stream, how long the pass takes, and how long its output is on the way."""
    layout = scheduler.layouts(1)
    way, rank, stream = [], 0, F0
    while rank >= 0:
        way.append((rank, stream, float(layout.durations[rank, stream]), float(layout.delay[rank, stream])))
        rank, stream = int(layout.next_rank[rank, stream]), int(layout.next_stream[rank, stream])
    return way


def _block(phases: list[list[float]], way: list[tuple[int, int, float, float]], interval: float) -> Starts:
    """The block in which each pass starts at its phase in the first interval in which it can."""
    starts = np.zeros((len(phases), len(KINDS)))
    ready = 0.0
    for rank, stream, duration, delay in way:
        start = _next(ready, phases[rank][stream], interval)
        starts[rank, stream] = start
        if stream >= B0:
            starts[rank, stream + 2] = _next(start + duration, phases[rank][stream + 2], interval)
        ready = start + duration + delay
    return starts


def _next(ready: float, phase: float, interval: float) -> float:
    """The first moment from `ready` on that is a whole number of intervals from `phase`."""
    return phase + interval * ceil((ready - phase) / interval - SLACK)


def _fits(starts: Starts, scheduler: ListScheduler) -> bool:
    """Whether the repeated block keeps the limits: looked at when forwards start, in the middle of the batch."""
    layout = scheduler.layouts(1)
    ends = starts + layout.durations
    for forward in (F0, F1):
        now = starts[:, forward:forward + 1]
        # How many micro-batches have come that far, of each chunk; differences count alone.
        begun, back, done = (np.floor((now - moments) / scheduler.work + SLACK)
                             for moments in (starts[:, F0:B0], ends[:, B0:W0], ends[:, W0:]))
        alive = layout.taken * (begun - back) + layout.kept * (back - done)
        if (alive.sum(axis=1) > layout.limits).any():
            return False
    return True


def _repeated(starts: Starts, scheduler: ListScheduler) -> NDArray[np.int64]:
    """The orders of all micro-batches' blocks."""
    batch = scheduler.problem.micro_batches
    moments = repeat(starts, scheduler.work, batch).reshape(len(starts), -1)
    streams = np.repeat(np.arange(len(KINDS)), batch)
    return streams[np.argsort(moments, axis=1, kind="stable")]
