"""Blocks without a bubble: every rank runs its six passes in the same order, a fixed step later than the rank before.

While passes go round in an interval of just the slowest rank's work, a rank that has all of its six passes in each
interval never waits. If the order is the same everywhere, an input that goes one rank down and comes back up takes
together a whole number of intervals, so one on each way is enough, and all ranks keep about what 1F1B keeps. That is
the steady state of V-ZB (paper, section 3.3), for any times: which order, and which step, is found by trying them.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import combinations_with_replacement, islice, pairwise, permutations
from math import ceil

import numpy as np
from numpy.typing import NDArray

from ds_vshape.schedule.adaptive.list_scheduler import B0, B1, F0, F1, KINDS, W0, W1, ListScheduler
from ds_vshape.schedule.adaptive.problem import SLACK

_STREAMS = len(KINDS)


@dataclass(frozen=True)
class _Block:
    """A micro-batch's passes among all those of their ranks, of which each runs six in an interval.

    `places` [rank, stream] count from the start of interval 0; the next micro-batch's are six further on. They alone
    say what comes first: passes that take no time start together with others. `last_start` is that of the last pass.
    """

    places: NDArray[np.int64]
    last_start: float


def regular_orders(scheduler: ListScheduler, most: int) -> Iterator[NDArray[np.int64]]:
    """Up to `most` orders [rank, place] that repeat such a block, within the limits; shorter blocks first.

    None where B has to take W with it, or nothing takes time.
    """
    if scheduler.fused or not scheduler.work:
        return
    blocks = [block for block in _blocks(scheduler) if _fits(block, scheduler)]
    blocks.sort(key=lambda block: block.last_start)
    repeated = (_repeated(block, scheduler) for block in blocks[:10 * most])
    yield from islice({orders.tobytes(): orders for orders in repeated}.values(), most)


def _blocks(scheduler: ListScheduler) -> Iterator[_Block]:
    """Blocks of all orders and of those steps from rank to rank at which some input comes just in time, and between."""
    interval, layout = scheduler.work, scheduler.layouts(1)
    durations = layout.durations[:, :, 0]
    just = {0.0}
    for stream in (F0, B0):
        way = float((durations + layout.delay)[:, stream].max())
        just |= {way, interval - way}
    steps = sorted({(one + other) / 2 % interval for one, other in combinations_with_replacement(just, 2)})
    passes = _way(scheduler)
    for rest in permutations((F1, B0, B1, W0, W1)):
        order = (F0, *rest)
        phases = np.zeros(durations.shape)
        for before, stream in pairwise(order):
            phases[:, stream] = phases[:, before] + durations[:, before]
        for step in steps:
            yield _block(order, (phases + step * np.arange(len(phases))[:, None]).tolist(), passes, interval)


def _way(scheduler: ListScheduler) -> list[tuple[int, int, float, float]]:
    """A micro-batch's F and B: rank, stream, how long the pass takes, and how long its output is on the way."""
    layout = scheduler.layouts(1)
    way, rank, stream = [], 0, F0
    while rank >= 0:
        way.append((rank, stream, float(layout.durations[rank, stream, 0]), float(layout.delay[rank, stream])))
        rank, stream = int(layout.next_rank[rank, stream]), int(layout.next_stream[rank, stream])
    return way


def _block(order: tuple[int, ...], phases: list[list[float]], way: list[tuple[int, int, float, float]],
           interval: float) -> _Block:
    """The block in which each pass starts at its phase in the first interval in which it can."""
    places = np.zeros((len(phases), _STREAMS), np.int64)
    ready = last_start = 0.0

    def put(rank: int, stream: int, ready: float) -> float:
        phase = phases[rank][stream]
        number = ceil((ready - phase) / interval - SLACK)
        places[rank, stream] = _STREAMS * number + order.index(stream)
        return phase + interval * number

    for rank, stream, duration, delay in way:
        start = put(rank, stream, ready)
        if stream >= B0:
            last_start = max(last_start, put(rank, stream + 2, start + duration))
        ready = start + duration + delay
    return _Block(places, last_start)


def _fits(block: _Block, scheduler: ListScheduler) -> bool:
    """Whether the repeated block keeps the limits: looked at when forwards start, in the middle of the batch."""
    layout = scheduler.layouts(1)
    for forward in (F0, F1):
        # How many micro-batches have come that far, of each chunk; differences count alone.
        begun, back, done = np.split((block.places[:, forward:forward + 1] - block.places) // _STREAMS, 3, axis=1)
        alive = layout.taken * (begun - back) + layout.kept * (back - done)
        if (alive.sum(axis=1) > layout.limits).any():
            return False
    return True


def _repeated(block: _Block, scheduler: ListScheduler) -> NDArray[np.int64]:
    """The orders of all micro-batches' blocks."""
    batch = scheduler.problem.micro_batches
    places = block.places[:, :, None] + _STREAMS * np.arange(batch)
    return np.repeat(np.arange(_STREAMS), batch)[np.argsort(places.reshape(len(places), -1), axis=1)]
