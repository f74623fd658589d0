"""Blocks without a bubble: every rank runs its six passes in the same order, a fixed step later than the rank before.

While passes go round in an interval of just the slowest rank's work, a rank that has all of its six passes in each
interval never waits. If the order is the same everywhere, an input that goes one rank down and comes back up takes
together a whole number of intervals, so one on each way is enough, and all ranks keep about what 1F1B keeps. That is
the steady state of V-ZB (paper, section 3.3), for any times: which order, and which step, is found by trying them.

Where the stages of a rank are several Vs, their passes take turns in the same order, each of six slots for all of them,
in as many shorter intervals.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import combinations_with_replacement, islice, pairwise, permutations
from math import ceil

import numpy as np
from numpy.typing import NDArray

from ds_vshape.schedule.adaptive.layout import KINDS
from ds_vshape.schedule.adaptive.list_scheduler import ListScheduler
from ds_vshape.schedule.adaptive.problem import SLACK

# F down and up, B down and up the V, and their Ws.
_SLOTS = 2 * KINDS


@dataclass(frozen=True)
class _Block:
    """A micro-batch's passes among all those of their ranks, of which each runs six in an interval.

    `places` [rank, stream] count from the start of interval 0; the next micro-batch's are six further on for each V.
    They alone say what comes first: passes that take no time start together with others. `last_start` is that of the
    last pass.
    """

    places: NDArray[np.int64]
    last_start: float


def regular_orders(scheduler: ListScheduler, most: int) -> Iterator[NDArray[np.int64]]:
    """Up to `most` orders [rank, place] that repeat such a block, within the limits; shorter blocks first.

    None where stages are in no V, where B has to take W with it, or nothing takes time.
    """
    if scheduler.problem.placement.name != "v" or scheduler.fused or not scheduler.work:
        return
    blocks = [block for block in _blocks(scheduler) if _fits(block, scheduler)]
    blocks.sort(key=lambda block: block.last_start)
    repeated = (_repeated(block, scheduler) for block in blocks[:10 * most])
    yield from islice({orders.tobytes(): orders for orders in repeated}.values(), most)


def _blocks(scheduler: ListScheduler) -> Iterator[_Block]:
    """Blocks of all orders and of those steps from rank to rank at which some input comes just in time, and between."""
    layout = scheduler.layouts(1)
    interval = scheduler.work / _vs(scheduler)
    just = {0.0}
    for stream in (0, scheduler.first_b):
        way = float((layout.durations[:, :, 0] + layout.delay)[:, stream].max())
        just |= {way, interval - way}
    steps = sorted({(one + other) / 2 % interval for one, other in combinations_with_replacement(just, 2)})
    passes = _way(scheduler)
    # By slots; that of the slowest V, so that each has time for its pass.
    durations = layout.durations[:, :, 0].reshape(scheduler.problem.ranks, KINDS, -1, 2).max(axis=2).reshape(-1, _SLOTS)
    for rest in permutations(range(1, _SLOTS)):
        order = (0, *rest)
        phases = np.zeros(durations.shape)
        for before, slot in pairwise(order):
            phases[:, slot] = phases[:, before] + durations[:, before]
        for step in steps:
            yield _block(order, (phases + step * np.arange(len(phases))[:, None]).tolist(), passes, interval, scheduler)


def _vs(scheduler: ListScheduler) -> int:
    """How many Vs the stages are in."""
    return scheduler.problem.placement.chunks_each // 2


def _way(scheduler: ListScheduler) -> list[tuple[int, int, float, float]]:
    """A micro-batch's F and B: rank, stream, how long the pass takes, and how long its output is on the way."""
    layout = scheduler.layouts(1)
    way, rank, stream = [], 0, 0
    while rank >= 0:
        way.append((rank, stream, float(layout.durations[rank, stream, 0]), float(layout.delay[rank, stream])))
        rank, stream = int(layout.next_rank[rank, stream]), int(layout.next_stream[rank, stream])
    return way


def _block(order: tuple[int, ...], phases: list[list[float]], way: list[tuple[int, int, float, float]],
           interval: float, scheduler: ListScheduler) -> _Block:
    """The block in which each pass starts at its phase in the first interval in which it can."""
    places = np.zeros((len(phases), scheduler.streams), np.int64)
    ready = last_start = 0.0
    vs, chunks = _vs(scheduler), scheduler.first_b
    # Slots that a V has [rank, slot, interval modulo the number of Vs].
    taken: set[tuple[int, int, int]] = set()

    def put(rank: int, stream: int, ready: float) -> float:
        slot = stream // chunks * 2 + stream % chunks % 2
        phase = phases[rank][slot]
        number = ceil((ready - phase) / interval - SLACK)
        while (rank, slot, number % vs) in taken:
            number += 1
        taken.add((rank, slot, number % vs))
        places[rank, stream] = _SLOTS * number + order.index(slot)
        return phase + interval * number

    for rank, stream, duration, delay in way:
        start = put(rank, stream, ready)
        if stream >= chunks:
            last_start = max(last_start, put(rank, stream + chunks, start + duration))
        ready = start + duration + delay
    return _Block(places, last_start)


def _fits(block: _Block, scheduler: ListScheduler) -> bool:
    """Whether the repeated block keeps the limits: looked at when forwards start, in the middle of the batch."""
    layout, period = scheduler.layouts(1), _SLOTS * _vs(scheduler)
    for forward in range(scheduler.first_b):
        # How many micro-batches have come that far, of each chunk; differences count alone.
        begun, back, done = np.split((block.places[:, forward:forward + 1] - block.places) // period, KINDS, axis=1)
        alive = layout.taken * (begun - back) + layout.kept * (back - done)
        if (alive.sum(axis=1) > layout.limits).any():
            return False
    return True


def _repeated(block: _Block, scheduler: ListScheduler) -> NDArray[np.int64]:
    """The orders of all micro-batches' blocks."""
    batch = scheduler.problem.micro_batches
    places = block.places[:, :, None] + _SLOTS * _vs(scheduler) * np.arange(batch)
    return np.repeat(np.arange(scheduler.streams), batch)[np.argsort(places.reshape(len(places), -1), axis=1)]
