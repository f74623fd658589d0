"""Candidates for a plan: an order of passes, and how each activation is kept, within the limits."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from math import ceil, inf

import numpy as np

from ds_vshape.schedule.adaptive.memory.annealing import (empty_steps, empty_timing, insert_copies, keep_what_fits,
                                                          make_fit, set_way, time_steps)
from ds_vshape.schedule.adaptive.memory.conversion import layout_of, orders_of, pieces_of, schedule_of
from ds_vshape.schedule.adaptive.memory.keeping import Keeping
from ds_vshape.schedule.adaptive.memory.layout import MemoryLayout, Orders, Steps, Timing
from ds_vshape.schedule.adaptive.problem import SLACK, Problem
from ds_vshape.schedule.builders.fuse import unfused
from ds_vshape.schedule.schedule import Schedule


@dataclass(frozen=True)
class Candidate:
    """Orders that keep the limits, for W in up to `pieces`."""

    makespan: float
    pieces: int
    orders: Orders

    @property
    def means(self) -> tuple[bool, bool]:
        """Whether it recomputes anything, and whether it offloads anything."""
        return bool(self.orders.ways.any()), bool(self.orders.leads.any())

    def equals(self, other: Candidate) -> bool:
        """Whether the two are the same."""
        return (self.makespan == other.makespan and self.pieces == other.pieces
                and self.orders.streams.shape == other.orders.streams.shape
                and all(map(np.array_equal, self.orders, other.orders)))


@dataclass(frozen=True)
class Pattern:
    """How activations are kept: the way and the lead of each chunk (0: not offloaded), and which share of them so.

    What is not within the share is kept in way `else_way`, without an offload. A pattern that is `trimmed` keeps on the
    device, and doesn't recompute, whatever fits.
    """

    ways: tuple[int, ...]
    leads: tuple[int, ...]
    share: float = 1.0
    else_way: int = 0
    trimmed: bool = True


class Pool:
    """The best candidates so far, the fastest first; no two alike."""

    def __init__(self, most: int) -> None:
        self._most = most
        self._members: list[Candidate] = []

    def __iter__(self) -> Iterator[Candidate]:
        return iter(self._members)

    def keep(self, found: Candidate) -> None:
        """Put it in if it's among the best, or the best with its means."""
        if any(each.equals(found) for each in self._members):
            return
        ordered = sorted([*self._members, found], key=lambda each: each.makespan)
        first = {each.means: each for each in reversed(ordered)}
        self._members = [each for place, each in enumerate(ordered) if place < self._most or first[each.means] is each]

    @property
    def best(self) -> Candidate | None:
        """The fastest."""
        return self._members[0] if self._members else None

    def racers(self, most: int, factor: float) -> list[Candidate]:
        """The best with each means that is at most this factor slower than the fastest, and then the best of all, up to
        `most`."""
        first = list({each.means: each for each in reversed(self.close(factor))}.values())
        others = [each for each in self._members if not any(each is one for one in first)]
        return sorted([*first, *others[:max(0, most - len(first))]], key=lambda each: each.makespan)

    def close(self, factor: float) -> list[Candidate]:
        """Those that are at most this factor slower than the fastest."""
        return [each for each in self._members if each.makespan <= self._members[0].makespan * factor]


class Candidates:
    """Makes candidates for `problem`."""

    def __init__(self, problem: Problem) -> None:
        self.problem, self.keeping = problem, Keeping(problem)
        self.layout = cache(lambda pieces: layout_of(problem, self.keeping, pieces))
        # The slowest rank's, on one micro-batch.
        self.work = max(sum(problem.times.of_stage(stage) for stage in chunks) for chunks in problem.placement.chunks)

    def of(self, schedule: Schedule, pattern: Pattern) -> Candidate | None:
        """The order of `schedule` with activations kept as in `pattern`; None if that doesn't fit into the limits.

        Whole backwards are split if that fits: no gradient of an input comes later then.
        """
        return self._of(unfused(schedule), pattern) or self._of(schedule, pattern)

    def _of(self, schedule: Schedule, pattern: Pattern) -> Candidate | None:
        pieces = pieces_of(schedule)
        orders = orders_of(schedule, self.problem, pieces)
        ranks, chunks, batch = orders.ways.shape
        for chunk in range(chunks):
            way, lead = pattern.ways[chunk % len(pattern.ways)], pattern.leads[chunk % len(pattern.leads)]
            for number in range(batch):
                inside = int((number + 1) * pattern.share) > int(number * pattern.share)
                orders.leads[:, chunk, number] = lead if inside else 0
                for rank in range(ranks):
                    set_way(orders, rank, chunk, number, way if inside else pattern.else_way)
        return self.fitted(orders, pieces, pattern.trimmed)

    def fitted(self, orders: Orders, pieces: int, trimmed: bool = False) -> Candidate | None:
        """`orders`, which are changed, made to fit into the limits; None if they don't."""
        layout = self.layout(pieces)
        ranks, chunks, batch = orders.ways.shape
        steps = empty_steps(orders)
        queue, users = (np.zeros(chunks * batch, np.int64) for _ in range(2))
        for rank in range(ranks):
            if not make_fit(layout, orders, steps, rank, queue, users):
                return None
            if trimmed:
                waits = orders.places[rank, chunks:2 * chunks, :batch] - orders.places[rank, :chunks, :batch]
                keep_what_fits(layout, orders, steps, rank, queue, users, np.argsort(waits.T.ravel(), kind="stable"))
            insert_copies(layout, orders, steps, rank, queue, users)
        makespan = time_steps(layout, orders, steps, empty_timing(steps), inf)
        return Candidate(makespan, pieces, orders) if makespan < inf else None

    def timed(self, candidate: Candidate) -> tuple[MemoryLayout, Steps, Timing]:
        """The steps of a candidate, and when they start."""
        layout, orders = self.layout(candidate.pieces), candidate.orders
        ranks, chunks, batch = orders.ways.shape
        steps = empty_steps(orders)
        queue, users = (np.zeros(chunks * batch, np.int64) for _ in range(2))
        for rank in range(ranks):
            insert_copies(layout, orders, steps, rank, queue, users)
        timing = empty_timing(steps)
        time_steps(layout, orders, steps, timing, inf)
        return layout, steps, timing

    def schedule(self, candidate: Candidate) -> Schedule:
        """With O and R where they belong."""
        return schedule_of(candidate.orders, self.layout(candidate.pieces), self.problem, self.keeping)

    # -- patterns

    def leads(self) -> list[tuple[int, ...]]:
        """How early activations come back: in time for their copies, and a pass earlier."""
        problem = self.problem
        copies = max(self.keeping.seconds(0, stage)[2] for stage in range(problem.placement.stages))
        passes = self.work / (3 * len(problem.placement.chunks[0]))
        lead = min(2 + ceil(copies / passes - SLACK), problem.micro_batches) if passes else 2
        return [(lead,), (lead + 1,)]

    def least(self) -> Pattern:
        """The pattern in which least memory waits."""
        return Pattern((len(self.keeping) - 1,), (1 if self.problem.offload else 0,), trimmed=False)

    def patterns(self) -> Iterator[Pattern]:
        """Different ones to begin with; those of everything recomputed or offloaded are among them."""
        problem, ways, chunks = self.problem, len(self.keeping), len(self.problem.placement.chunks[0])
        yield Pattern((0,), (0,))
        if problem.offload:
            copies = max(sum(max(self.keeping.seconds(0, stage)[1:]) for stage in stages)
                         for stages in problem.placement.chunks)
            share = min(1.0, 0.95 * self.work / copies) if copies else 1.0
            for lead, in self.leads():
                yield Pattern((0,), (lead,), share, ways - 1, trimmed=False)
                yield Pattern((0,), (lead, *(0,) * (chunks - 1)))
        for way in range(1, ways):
            yield Pattern((way,), (0,))
        if problem.offload and ways > 1:
            lead, = self.leads()[0]
            yield Pattern((0, *(ways - 1,) * (chunks - 1)), (lead, 0))
            yield Pattern((ways - 1,), (lead,))
