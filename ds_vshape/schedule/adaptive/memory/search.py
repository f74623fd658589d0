"""The search for a plan that may recompute and offload.

    baselines   everything recomputed, or everything offloaded, in the table's schedules (builders/everything.py)
    sources     orders by the planner without either: with all the memory they want (`relaxed.unlimited`), within the
                limits, or where what waits takes no memory; and the table's schedules
    candidates  each order with activations kept in different ways, made to fit into the limits
    a race      of all candidates, annealed: those that fall behind drop out
    annealing   of the best ones

With many micro-batches all of it is done with fewer first, and the middle of what it finds repeated (lengthened.py).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import replace
from itertools import count
from math import inf

from ds_vshape.schedule.activations import Activations
from ds_vshape.schedule.adaptive.extended import fewer_micro_batches
from ds_vshape.schedule.adaptive.lanes import Lanes
from ds_vshape.schedule.adaptive.memory import relaxed
from ds_vshape.schedule.adaptive.memory.annealing import (anneal, empty_steps, empty_timing, insert_copies,
                                                          keep_what_fits, make_fit, set_way, time_steps)
from ds_vshape.schedule.adaptive.memory.candidates import Candidate, Candidates, Pattern, Pool
from ds_vshape.schedule.adaptive.memory.lengthened import lengthened
from ds_vshape.schedule.adaptive.memory.rounds import Rounds
from ds_vshape.schedule.adaptive.problem import SLACK, Problem
from ds_vshape.schedule.adaptive.search import Search
from ds_vshape.schedule.adaptive.seeds import known_schedules, within
from ds_vshape.schedule.adaptive.trials import Progress
from ds_vshape.schedule.builders.everything import with_everything_offloaded, with_everything_recomputed
from ds_vshape.schedule.passes import BW, F
from ds_vshape.schedule.placement import v
from ds_vshape.schedule.schedule import Schedule
from ds_vshape.schedule.timeline import Times, simulate

# What is left of the time when each phase ends.
_KNOWN, _ORDER_ALONE, _UNLIMITED, _ELSEWHERE, _RACE = 0.92, 0.85, 0.8, 0.72, 0.3
# A problem of fewer micro-batches is searched first where there are so many times as many; the share of the time for
# that, what is left when its candidates are repeated, and how many micro-batches it has for each rank at least.
_LONG = 2
_FEWER, _LENGTHENED = 0.6, 0.3
_PER_RANK = 3
# How many candidates are kept.
_MOST = 8

# All that is called from here.
MEMORY_LOOPS = (anneal, empty_steps, empty_timing, insert_copies, keep_what_fits, make_fit, set_way, time_steps)


class MemorySearch:
    """Looks for a plan of `problem` until `left`, the share of the time that is left, is 0, or `goal` is reached."""

    def __init__(self, problem: Problem, goal: float, left: Callable[[], float], lanes: Lanes) -> None:
        self._problem, self._goal, self._left, self._lanes = problem, goal, left, lanes
        self.candidates, self.pool = Candidates(problem), Pool(_MOST)
        self._rounds = Rounds(self.candidates, self.pool, goal, left, lanes)
        # With their makespans: baselines, and plans with neither recomputation nor offload.
        self._others: list[tuple[float, Schedule]] = []
        # The best before annealing and after the race: annealing leaves ever less that repeats.
        self._regular: list[Candidate] = []

    @property
    def done(self) -> bool:
        """Whether to stop: out of time, or nothing can be better."""
        return self._left() <= 0 or self._least() <= self._goal * (1 + SLACK)

    def _least(self) -> float:
        best = self.pool.best
        return min(inf if best is None else best.makespan, *(makespan for makespan, _ in self._others), inf)

    def run(self, progress: Progress) -> Schedule:
        """Search to the end."""
        problem = self._problem
        least = self.candidates.least()
        self._try_order(_one_by_one(problem), [least, replace(least, trimmed=True)], until=-inf)
        self._try_baselines()
        fewer = fewer_micro_batches(problem, _PER_RANK)
        if fewer is not None and problem.micro_batches < _LONG * fewer.micro_batches:
            fewer = None
        if fewer is None:
            self._find_candidates(progress)
        else:
            self._take_over(fewer, progress)
        self._regular += self.pool
        self._rounds.race(_RACE if fewer is None else _LENGTHENED / 2, progress)
        self._regular += self.pool
        if not self.done:
            self._rounds.run(progress)
        found = [*self._others]
        if self.pool.best is not None:
            found.append((self.pool.best.makespan, self.candidates.schedule(self.pool.best)))
        return min(found, key=lambda each: each[0])[1]

    # -- phases

    def _try_baselines(self) -> None:
        """However short the time: no plan is slower than these."""
        problem = self._problem
        for schedule in known_schedules(relaxed.unlimited(problem)):
            for change in (*([with_everything_recomputed] if problem.recompute else []),
                           *([with_everything_offloaded] if problem.offload else [])):
                changed = change(schedule)
                if within(changed, problem):
                    self._others.append((simulate(changed, problem.times).makespan, changed))

    def _find_candidates(self, progress: Progress) -> None:
        problem = self._problem
        patterns = list(self.candidates.patterns())
        alone, unlimited = relaxed.order_alone(problem), relaxed.unlimited(problem)
        for schedule in known_schedules(unlimited):
            self._try_order(schedule, patterns, _KNOWN)
        if alone is not None:
            for makespan, schedule in self._searched(alone, _ORDER_ALONE, progress):
                self._others.append((makespan, schedule))
                self._try_order(schedule, patterns[:1], -inf)
        for _, schedule in self._searched(unlimited, _UNLIMITED, progress):
            self._try_order(schedule, patterns, -inf)
        others = list(relaxed.waiting_elsewhere(problem, self.candidates.keeping))
        for place, (way, offloaded, other) in enumerate(others):
            until = _UNLIMITED + (_ELSEWHERE - _UNLIMITED) * (place + 1) / len(others)
            leads = self.candidates.leads() if offloaded else [(0,)]
            for _, schedule in self._searched(other, until, progress):
                self._try_order(schedule, [Pattern((way,), lead) for lead in leads], -inf)

    def _searched(self, problem: Problem, until: float, progress: Progress) -> list[tuple[float, Schedule]]:
        """The best schedule that the planner without recomputation and offload finds until that much time is left.

        Empty if there can't be one as fast as the best candidate.
        """
        began = self._left()
        goal = problem.lower_bound
        if self.done or began <= until or goal >= self._least():
            return []
        search = Search(problem, goal, lambda: (self._left() - until) / (began - until), self._lanes)
        search.start()
        search.run(lambda done: progress(1 - self._left()))
        return [search.fastest()]

    def _take_over(self, fewer: Problem, progress: Progress) -> None:
        """Search with fewer micro-batches, and repeat the middle of what that finds."""
        began = self._left()
        share = max(_FEWER * began, 1e-9)
        search = MemorySearch(fewer, fewer.lower_bound, lambda: 1 - (began - self._left()) / share, self._lanes)
        search.run(lambda done: progress(1 - self._left()))
        for schedule in known_schedules(relaxed.unlimited(self._problem)):
            self._try_order(schedule, self.candidates.patterns(), (_LENGTHENED + 1 - _FEWER) / 2)
        for candidate in (*search._regular, *search.pool):
            for found in lengthened(candidate, search.candidates, self.candidates):
                self.pool.keep(found)
                if self.done or self._left() <= _LENGTHENED:
                    return

    def _try_order(self, schedule: Schedule, patterns: Iterable[Pattern], until: float) -> None:
        """Keep activations as in `patterns`, as far as they fit, while more than `until` of the time is left."""
        for pattern in patterns:
            if self._left() <= until or (self.pool.best is not None and self.done):
                return
            found = self.candidates.of(schedule, pattern)
            if found is not None:
                self.pool.keep(found)


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
    search._rounds.run(lambda done: None)
