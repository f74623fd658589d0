"""What many micro-batches repeat: cycles of a few of them, found before the batch's ramps are.

A building block repeats after every micro-batch. With times that differ, and memory that isn't a whole number of
blocks, two or three micro-batches that take turns often go round faster: 60.7 each instead of 69 for 8 ranks at F 10,
B 9, W 7, hop 1 within V-Min's peak. Starting with the paper's blocks, cycles of several lengths are annealed, those
behind drop out, and each is then the middle of a batch.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import partial
from itertools import islice
from random import Random

import numpy as np
from numpy.typing import NDArray

from ds_vshape.schedule.adaptive.cycle_annealing import anneal_cycle
from ds_vshape.schedule.adaptive.lanes import Lanes
from ds_vshape.schedule.adaptive.layout import passes_of
from ds_vshape.schedule.adaptive.list_scheduler import ListScheduler
from ds_vshape.schedule.adaptive.machine_code import COMPILED
from ds_vshape.schedule.adaptive.problem import SLACK

Orders = NDArray[np.int64]

# How many cycles race.
_RACERS = 24
# In units of the slowest rank's work on one micro-batch: hot enough to get out of a block, cold enough to stay good.
_TEMPERATURE = 0.04
# Rounds, after each of which all but a third of the cycles drop out, and tries for each pass in all of them.
_ROUNDS = 3
_TRIES = 3000
# Passes' tries between two looks at the clock: some hundredths of a second.
_STEP = 400_000 if COMPILED else 4_000


@dataclass(frozen=True)
class Cycle:
    """The orders [rank, place] of one period of `group` micro-batches, W in `pieces`, which can begin every `interval`.

    The first pass of each stream in it is that of the micro-batch (or piece) numbered with its `leads` [rank, stream].
    """

    interval: float
    group: int
    pieces: int
    orders: Orders
    leads: Orders

    def of_batch(self, micro_batches: int) -> Orders:
        """The orders [rank, place] of a batch that goes round and round, without the micro-batches that it hasn't."""
        rows = []
        streams = self.leads.shape[1]
        share = passes_of(streams, self.pieces)
        for order, leads in zip(self.orders, self.leads):
            numbers = np.zeros(len(order), np.int64)
            for stream in range(streams):
                here = order == stream
                numbers[here] = leads[stream] + np.arange(here.sum())
            period = self.group * share[order]
            least = int((-(numbers // period)).min())
            most = int(((micro_batches * share[order] - numbers) // period).max())
            all_numbers = numbers + period * np.arange(least - 1, most + 2)[:, None]
            of_batch = (all_numbers >= 0) & (all_numbers < micro_batches * share[order])
            rows.append(np.broadcast_to(order, all_numbers.shape)[of_batch])
        return np.array(rows)


class _Racer:
    """A cycle while it's annealed."""

    def __init__(self, scheduler: ListScheduler, start: Cycle) -> None:
        self.layout = scheduler.layouts(start.pieces)
        self.start = start
        self.now = start.orders.copy(), start.leads.copy()
        self.best = start.orders.copy(), start.leads.copy()
        self.interval = float("inf")
        self.tries_left = 0
        self.goal = scheduler.work * start.group
        self.temperature = scheduler.work * _TEMPERATURE

    @property
    def pace(self) -> float:
        """The interval of one micro-batch."""
        return self.interval / self.start.group

    @property
    def done(self) -> bool:
        """Whether there is no bubble left, or no try in this round."""
        return self.tries_left <= 0 or self.interval <= self.goal * (1 + SLACK)

    def run(self, tries: int, seed: int) -> None:
        """So many tries."""
        self.interval = anneal_cycle(self.layout, self.start.group, *self.now, *self.best, self.interval, tries,
                                     self.temperature, self.goal, seed)
        self.tries_left -= tries

    def step(self, seed: int) -> Callable[[], None]:
        """What to call for some of the tries that are left."""
        return partial(self.run, min(self.tries_left, max(10, _STEP // self.start.orders.size)), seed)

    def cycle(self) -> Cycle:
        """The best so far."""
        return Cycle(self.interval, self.start.group, self.start.pieces, *self.best)


def best_cycles(scheduler: ListScheduler, starts: Iterable[Cycle], left: Callable[[], float], random: Random,
                lanes: Lanes, most: int) -> list[Cycle]:
    """Up to `most` cycles, the fastest first, that annealing makes of `starts` until `left`, a share of time, is 0."""
    racers = [_Racer(scheduler, start) for start in starts]
    for racer in racers:
        if left() > 0:
            racer.run(0, 0)
    # No two alike.
    kept = {(racer.interval, racer.start.group, racer.start.pieces): racer for racer in racers
            if racer.interval < float("inf")}
    racers = every = sorted(kept.values(), key=lambda racer: racer.pace)[:_RACERS]
    for round_ in range(_ROUNDS):
        if not racers:
            break
        length = left() / (_ROUNDS - round_) / len(racers)
        for group in lanes.groups(racers):
            until = left() - length * len(group)
            for racer in group:
                racer.tries_left = _TRIES * racer.start.orders.size // _ROUNDS
            while (running := [racer for racer in group if not racer.done]) and left() > max(until, 0.0):
                lanes.run([racer.step(random.getrandbits(31)) for racer in running])
        racers = sorted(racers, key=lambda racer: racer.pace)[:(len(racers) + 2) // 3]
    found = {(racer.interval, racer.start.group): racer.cycle() for racer in sorted(every, key=lambda one: one.pace)}
    return list(found.values())[:most]


def periods(orders: Orders, sizes: Iterable[tuple[int, int]], most: int) -> Iterator[Cycle]:
    """Up to `most` cycles to begin with, of `sizes` (micro-batches, pieces), from the middle of a batch's `orders`.

    `orders` [rank, place] are of whole W. A cycle is one only if each rank has as many passes of each stream there.
    """
    found = (_middle(orders, group, pieces) for group, pieces in sizes)
    yield from islice((cycle for cycle in found if cycle is not None), most)


def _middle(orders: Orders, group: int, pieces: int) -> Cycle | None:
    """`group` micro-batches in the middle of a batch, if each rank has as many passes of each stream there."""
    streams = int(orders.max()) + 1
    micro_batches = int((orders[0] == 0).sum())
    at = micro_batches // 2
    if at + group >= micro_batches:
        return None
    periods, leads = [], []
    for order in orders:
        begin, end = np.flatnonzero(order == 0)[[at, at + group]]
        period, before = order[begin:end], np.bincount(order[:begin], minlength=streams)
        if (np.bincount(period, minlength=streams) != group).any():
            return None
        share = passes_of(streams, pieces)
        periods.append(np.repeat(period, share[period]))
        leads.append((before - at) * share)
    return Cycle(float("inf"), group, pieces, np.array(periods), np.array(leads))
