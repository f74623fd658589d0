"""The search for a plan that may recompute and offload.

    sources     orders by the planner without either: with all the memory they want (`relaxed.unlimited`), within the
                limits, or where what waits takes no memory; and the table's schedules
    candidates  each order with activations kept in different ways, made to fit into the limits
    a race      of all candidates, annealed: those that fall behind drop out
    annealing   of the best ones
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cache
from itertools import count
from math import ceil, inf, log2
from random import Random

import numpy as np

from ds_vshape.schedule.activations import Activations
from ds_vshape.schedule.adaptive.lanes import Lanes
from ds_vshape.schedule.adaptive.machine_code import COMPILED
from ds_vshape.schedule.adaptive.memory import relaxed
from ds_vshape.schedule.adaptive.memory.annealing import (anneal, empty_steps, empty_timing, insert_copies,
                                                          keep_what_fits, make_fit, set_way, time_steps)
from ds_vshape.schedule.adaptive.memory.conversion import layout_of, orders_of, pieces_of, schedule_of
from ds_vshape.schedule.adaptive.memory.keeping import Keeping
from ds_vshape.schedule.adaptive.memory.layout import MemoryLayout, Orders
from ds_vshape.schedule.adaptive.problem import SLACK, Problem
from ds_vshape.schedule.adaptive.search import Search
from ds_vshape.schedule.adaptive.seeds import known_schedules
from ds_vshape.schedule.adaptive.trials import Progress
from ds_vshape.schedule.passes import BW, F
from ds_vshape.schedule.placement import v
from ds_vshape.schedule.schedule import Schedule
from ds_vshape.schedule.timeline import Times

# What is left of the time when each phase ends.
_ORDER_ALONE, _UNLIMITED, _ELSEWHERE, _CANDIDATES, _RACE = 0.85, 0.8, 0.72, 0.7, 0.3
# How many candidates race.
_RACERS = 4
# Temperatures in units of the slowest rank's work on one micro-batch, at the start of a round and at its end. A round
# takes the share _ROUND of the time.
_HOT = (0.02, 0.06, 0.2)
_RACE_HOT = 0.05
_COLD = 0.002
_ROUND = 0.1
# Passes that annealing looks at between two looks at the clock: some hundredths of a second.
_PASSES_A_STEP = 1_000_000 if COMPILED else 20_000

# All that is called from here.
MEMORY_LOOPS = (anneal, empty_steps, empty_timing, insert_copies, keep_what_fits, make_fit, set_way, time_steps)


@dataclass(frozen=True)
class Candidate:
    """Orders that keep the limits, for W in up to `pieces`."""

    makespan: float
    pieces: int
    orders: Orders


@dataclass(frozen=True)
class Pattern:
    """How activations are kept: the way and the lead of each chunk (0: not offloaded), and which share of them so.

    What is not within the share is kept in way `else_way`, without an offload.
    """

    ways: tuple[int, ...]
    leads: tuple[int, ...]
    share: float = 1.0
    else_way: int = 0
    trimmed: bool = True


class MemorySearch:
    """Looks for a plan of `problem` until `left`, the share of the time that is left, is 0, or `goal` is reached."""

    def __init__(self, problem: Problem, goal: float, left: Callable[[], float], lanes: Lanes) -> None:
        self._problem, self._goal, self._left, self._lanes = problem, goal, left, lanes
        self._keeping = Keeping(problem)
        self._layout = cache(lambda pieces: layout_of(problem, self._keeping, pieces))
        self._random = Random(0)
        self._candidates: list[Candidate] = []
        # Of a plan with neither recomputation nor offload.
        self._alone: list[tuple[float, Schedule]] = []
        self._work = max(sum(problem.times.of_stage(stage) for stage in chunks) for chunks in problem.placement.chunks)

    @property
    def done(self) -> bool:
        """Whether to stop: out of time, or nothing can be better."""
        return self._left() <= 0 or self._best() <= self._goal * (1 + SLACK)

    def _best(self) -> float:
        return min((makespan for makespan in (*[each.makespan for each in self._candidates[:1]],
                                              *[makespan for makespan, _ in self._alone])), default=inf)

    def run(self, progress: Progress) -> Schedule:
        """Search to the end."""
        problem = self._problem
        least = self._least_pattern()
        self._try_order(_one_by_one(problem), [least, replace(least, trimmed=True)], until=-inf)
        alone, unlimited = relaxed.order_alone(problem), relaxed.unlimited(problem)
        for schedule in known_schedules(unlimited):
            self._try_order(schedule, self._patterns(), _ORDER_ALONE + (1 - _ORDER_ALONE) / 2)
        if alone is not None:
            self._alone = self._searched(alone, _ORDER_ALONE, progress)
            for _, schedule in self._alone:
                self._try_order(schedule, [Pattern((0,), (0,))], _CANDIDATES)
        self._try_searched(unlimited, _UNLIMITED, self._patterns(), progress)
        others = list(relaxed.waiting_elsewhere(problem, self._keeping))
        for place, (way, offloaded, other) in enumerate(others):
            until = _UNLIMITED + (_ELSEWHERE - _UNLIMITED) * (place + 1) / len(others)
            leads = self._leads() if offloaded else [(0,)]
            self._try_searched(other, until, [Pattern((way,), lead) for lead in leads], progress)
        self._race(progress)
        while not self.done:
            progress(1 - self._left())
            self._anneal_one()
        found = [*self._alone]
        for best in self._candidates[:1]:
            found.append((best.makespan, schedule_of(best.orders, self._layout(best.pieces), problem, self._keeping)))
        return min(found, key=lambda each: each[0])[1]

    # -- orders

    def _searched(self, problem: Problem, until: float, progress: Progress) -> list[tuple[float, Schedule]]:
        """The best schedule that the planner without recomputation and offload finds until that much time is left.

        Empty if there can't be one as fast as the best candidate.
        """
        began = self._left()
        goal = problem.lower_bound
        if self.done or began <= until or goal >= self._best():
            return []
        search = Search(problem, goal, lambda: (self._left() - until) / (began - until), self._lanes)
        search.start()
        search.run(lambda done: progress(1 - self._left()))
        return [search.fastest()]

    def _try_searched(self, problem: Problem, until: float, patterns: list[Pattern], progress: Progress) -> None:
        for _, schedule in self._searched(problem, until, progress):
            self._try_order(schedule, patterns, -inf)

    # -- how activations are kept

    def _leads(self) -> list[tuple[int, ...]]:
        """How early activations come back: in time for their copies, and a pass earlier."""
        times, problem = self._keeping, self._problem
        copies = max(times.seconds(0, stage)[2] for stage in range(problem.placement.stages))
        passes = self._work / (3 * len(problem.placement.chunks[0]))
        lead = min(2 + ceil(copies / passes - SLACK), problem.micro_batches) if passes else 2
        return [(lead,), (lead + 1,)]

    def _patterns(self) -> list[Pattern]:
        problem, ways = self._problem, len(self._keeping)
        found = [Pattern((0,), (0,))]
        if problem.offload:
            copies = max(sum(max(self._keeping.seconds(0, stage)[1:]) for stage in chunks)
                         for chunks in problem.placement.chunks)
            share = min(1.0, 0.95 * self._work / copies) if copies else 1.0
            for lead, in self._leads():
                found.append(Pattern((0,), (lead,), share, ways - 1, trimmed=False))
                found.append(Pattern((0,), (lead, *(0,) * (len(problem.placement.chunks[0]) - 1)), 1.0))
        found += [Pattern((way,), (0,)) for way in range(1, ways)]
        if problem.offload and ways > 1:
            lead, = self._leads()[0]
            found.append(Pattern((0, *(ways - 1,) * (len(problem.placement.chunks[0]) - 1)), (lead, 0)))
            found.append(Pattern((ways - 1,), (lead,)))
        return found

    def _least_pattern(self) -> Pattern:
        """The one in which least memory waits."""
        ways = len(self._keeping)
        return Pattern((ways - 1,), (1 if self._problem.offload else 0,), trimmed=False)

    def _try_order(self, schedule: Schedule, patterns: list[Pattern], until: float) -> None:
        """Keep activations as in `patterns`, as far as they fit, while more than `until` of the time is left."""
        pieces = pieces_of(schedule)
        layout, orders = self._layout(pieces), orders_of(schedule, self._problem, pieces)
        for pattern in patterns:
            if self._left() <= until or (self._candidates and self.done):
                return
            found = self._fitted(layout, orders, pattern)
            if found is not None:
                self._keep(found)

    def _fitted(self, layout: MemoryLayout, source: Orders, pattern: Pattern) -> Candidate | None:
        """`source` with activations kept as in `pattern`, made to fit into the limits; None if it doesn't."""
        orders = _copied(source)
        ranks, chunks, batch = orders.ways.shape
        for chunk in range(chunks):
            way, lead = pattern.ways[chunk % len(pattern.ways)], pattern.leads[chunk % len(pattern.leads)]
            for number in range(batch):
                inside = int((number + 1) * pattern.share) > int(number * pattern.share)
                orders.leads[:, chunk, number] = lead if inside else 0
                for rank in range(ranks):
                    set_way(orders, rank, chunk, number, way if inside else pattern.else_way)
        steps = empty_steps(orders)
        queue, users = (np.zeros(chunks * batch, np.int64) for _ in range(2))
        for rank in range(ranks):
            if not make_fit(layout, orders, steps, rank, queue, users):
                return None
            if pattern.trimmed:
                waits = orders.places[rank, chunks:2 * chunks, :batch] - orders.places[rank, :chunks, :batch]
                keep_what_fits(layout, orders, steps, rank, queue, users, np.argsort(waits.T.ravel(), kind="stable"))
            insert_copies(layout, orders, steps, rank, queue, users)
        makespan = time_steps(layout, orders, steps, empty_timing(steps), inf)
        return Candidate(makespan, layout.pieces, orders) if makespan < inf else None

    def _keep(self, found: Candidate) -> None:
        """Among the candidates, if it's none that is there; the fastest comes first."""
        if not any(each.makespan == found.makespan and _are_equal(each.orders, found.orders)
                   for each in self._candidates):
            self._candidates.append(found)
            self._candidates.sort(key=lambda each: each.makespan)
            del self._candidates[2 * _RACERS:]

    # -- annealing

    def _race(self, progress: Progress) -> None:
        """Anneal the best candidates, then the better half of them for twice as long, until one is left."""
        racers = self._candidates[:_RACERS]
        if len(racers) < 2:
            return
        length = max(0.0, self._left() - _RACE) / ceil(log2(len(racers)))
        while len(racers) > 1 and not self.done:
            after = []
            for racer in racers:
                progress(1 - self._left())
                after.append(self._annealed(racer, _RACE_HOT, length / len(racers), as_it_is=True))
            racers = sorted(after, key=lambda each: each.makespan)[:ceil(len(after) / 2)]

    def _anneal_one(self) -> None:
        best = self._candidates[0]
        close = [each for each in self._candidates if each.makespan <= best.makespan * 1.005]
        self._annealed(self._random.choice([best, best, *close]), self._random.choice(_HOT), _ROUND,
                       as_it_is=self._random.random() < 0.5)

    def _annealed(self, candidate: Candidate, hot: float, length: float, as_it_is: bool) -> Candidate:
        """`candidate` after annealing from the temperature `hot` down, in the share `length` of the time.

        With `as_it_is`, what recomputes none or offloads none won't.
        """
        layout = self._layout(candidate.pieces)
        orders, best_orders = _copied(candidate.orders), _copied(candidate.orders)
        if as_it_is:
            layout = _without(layout, recompute=bool(orders.ways.any()), offload=bool(orders.leads.any()))
        best = candidate.makespan
        tries = max(10, _PASSES_A_STEP // int(orders.lengths.sum()))
        began = left = self._left()
        length = min(length, began)
        while left > began - length and left > 0 and best > self._goal * (1 + SLACK):
            temperature = self._work * hot * (_COLD / hot) ** ((began - left) / length)
            best = anneal(layout, orders, best_orders, best, tries, temperature, self._goal,
                          self._random.getrandbits(31))
            left = self._left()
        if best >= candidate.makespan:
            return candidate
        found = Candidate(best, candidate.pieces, best_orders)
        self._keep(found)
        return found


def _without(layout: MemoryLayout, recompute: bool, offload: bool) -> MemoryLayout:
    """`layout` where only what is true may be done."""
    if not recompute:
        again, left, moved, offload_s, reload_s = (np.ascontiguousarray(values[:, :, :1]) for values in (
            layout.again, layout.left, layout.moved, layout.offload, layout.reload))
        layout = layout._replace(again=again, left=left, moved=moved, offload=offload_s, reload=reload_s)
    return layout._replace(may_offload=int(layout.may_offload and offload))


def _copied(orders: Orders) -> Orders:
    return Orders._make(values.copy() for values in orders)


def _are_equal(one: Orders, other: Orders) -> bool:
    return one.streams.shape == other.streams.shape and all(map(np.array_equal, one, other))


def _one_by_one(problem: Problem) -> Schedule:
    """One micro-batch after another, which keeps any limit that can be kept."""
    batch = range(problem.micro_batches)
    return Schedule("one by one", problem.placement, problem.micro_batches, tuple(
        tuple(action(stage, number) for number in batch
              for action, stages in ((F, chunks), (BW, chunks[::-1])) for stage in stages)
        for chunks in problem.placement.chunks))


def run_loops() -> None:
    """Run each of MEMORY_LOOPS once, on a batch that is soon done."""
    sizes = Activations((1.0,) * 4, (1.0,) * 4, ((0.5,),) * 4)
    problem = Problem(v(2), 2, Times.uniform(4), sizes, (4.0, 4.0), recompute=True, offload=True)
    search = MemorySearch(problem, 0.0, count(1.0, -0.4).__next__, Lanes(1))
    search._try_order(_one_by_one(problem), [Pattern((1,), (1,))], -inf)
    search._annealed(search._candidates[0], _COLD, 0.5, as_it_is=False)
