"""The partition of layers into stages and the order of passes, searched together.

`balance` gives all ranks the same amount of work, which is best where a batch has so many micro-batches that only the
steady state counts. In a batch of few, ranks wait while the first micro-batch comes to them and while the last ones
leave, and a limit of memory makes ranks wait that hold much; a partition may win that back by giving such ranks less
work, or their two stages other shares of it. Which one does depends on the order, and the order on the partition:

    [1] a plan for balance's partition: what any other has to be faster than
    [2] local search among partitions: one layer or a few move from one stage to another. A partition is scored by what
        the list scheduler makes of it, with the starts of the best plans so far as target starts and under simple
        rules: thousands of partitions a second
    [3] heats: short plans for the best of these; the slower half drops out, the others get twice the time
    [4] a plan for the winner

[2] and [3] are repeated with the best plan as the new model. Partitions whose lower bound isn't below the best makespan
are left out. With the same clock the result is the same: all chance comes from one seed.

Partition and order together: AdaPtis (arXiv 2509.23722).
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import permutations, takewhile
from random import Random

import numpy as np

from ds_vshape.schedule.adaptive import LimitError, Plan, Problem, plan
from ds_vshape.schedule.adaptive.layout import KINDS, B, F, W
from ds_vshape.schedule.adaptive.list_scheduler import ListScheduler, Policy, TargetStarts
from ds_vshape.schedule.adaptive.problem import SLACK
from ds_vshape.schedule.bounds import lower_bound_of_limits
from ds_vshape.schedule.partition.balance import PartitionError, balance
from ds_vshape.schedule.partition.layers import Layers
from ds_vshape.schedule.passes import Kind
from ds_vshape.schedule.placement import Placement, linear
from ds_vshape.schedule.timeline import Timeline

Bounds = tuple[int, ...]
# What is made small: by how much the least possible peaks exceed the limits, the makespan, the sum of all starts.
Score = tuple[float, float, float]

# The share of the time for the last plan, and how often local search and heats take turns before it; of a turn, local
# search takes this share.
_LAST = 0.3
_TURNS = 2
_LOCAL = 0.4
# Local search ends earlier after so many climbs to partitions that are all known.
_VAIN_CLIMBS = 5
# The time of a plan in the first heat, as a multiple of what a plan takes at least: shorter ones tell no difference.
_LEAST_PLAN = 2.0
# How many partitions take part in heats, and how many of these may have the same number of layers on each rank.
_RACERS, _ALIKE = 8, 2
# How many layers move at once, and how many moves lead away from a partition that no move betters.
_STEPS = (1, 2, 4)
_KICKS = (2, 5)
# Eagerness, in units of the slowest rank's work, and patience of the policies that follow a plan.
_IMITATIONS = ((0.5, 1.0), (float("inf"), 1.0))


@dataclass(frozen=True)
class PartitionProblem:
    """One batch on a placement, whose stages are to be found.

    `limits` are the most that each rank may keep, its layers' `state` included, in the unit of the layers' sizes;
    `hops` and `max_pieces` as in `Times` and `Problem`. Where times are measured, `noise` is their relative error: what
    another partition must gain at least. Raises PartitionError for fewer layers than stages.
    """

    layers: Layers
    placement: Placement
    micro_batches: int
    limits: tuple[float, ...]
    hops: tuple[float, ...] = ()
    max_pieces: int = Problem.max_pieces
    noise: float = 0.0

    def __post_init__(self) -> None:
        if len(self.layers) < self.placement.stages:
            raise PartitionError(f"{len(self.layers)} layers can't fill {self.placement.stages} stages")
        if len(self.limits) != self.ranks:
            raise ValueError(f"there must be a limit for each of {self.ranks} ranks, not {len(self.limits)}")

    @property
    def ranks(self) -> int:
        """How many pipeline ranks there are."""
        return self.placement.ranks

    def on(self, bounds: Bounds) -> Problem:
        """What remains to be planned once the layers are divided; LimitError if no order keeps to the limits."""
        room = tuple(limit - state for limit, state in zip(self.limits, self.layers.states(bounds, self.placement)))
        if min(room) <= 0:
            raise LimitError(f"a limit of {', '.join(map('{:g}'.format, self.limits))} on the ranks leaves no room for "
                             "activations beside what the layers keep")
        return Problem(self.placement, self.micro_batches, self.layers.times(bounds, self.hops),
                       self.layers.activations(bounds), room, self.max_pieces)

    def excess(self, bounds: Bounds) -> float:
        """By how much ranks must exceed their limits in any order, summed; 0 where an order keeps them."""
        return sum(max(0.0, size - limit * (1 + SLACK)) for size, limit in zip(self._least(bounds), self.limits))

    def growth(self, bounds: Bounds) -> float:
        """By what factor the limits must grow for an order to keep them."""
        return max(size / limit for size, limit in zip(self._least(bounds), self.limits))

    def _least(self, bounds: Bounds) -> list[float]:
        """The least possible peaks of the ranks, the layers' state included."""
        whole = self.layers.activations(bounds).after_forward
        return [sum(whole[stage] for stage in chunks) + state for chunks, state in
                zip(self.placement.chunks, self.layers.states(bounds, self.placement))]


class NoPartition(LimitError):
    """No partition keeps to the limits; of those that were looked at, one would if they were `growth` times as high."""

    def __init__(self, message: str, growth: float) -> None:
        super().__init__(message)
        self.growth = growth


def limits_of_1f1b(fraction: float, layers: Layers, ranks: int, micro_batches: int) -> tuple[float, ...]:
    """`fraction` of 1F1B's highest peak of activations, with its own balanced stages, as the limit of every rank."""
    placement = linear(ranks)
    whole = layers.activations(balance(layers.costs, placement)).after_forward
    return (fraction * max(min(ranks - rank, micro_batches) * size for rank, size in enumerate(whole)),) * ranks


@dataclass(frozen=True)
class PartitionPlan:
    """The `bounds` of the stages with the plan of their order; and to compare with, balance's bounds and the plan for
    them, None where they can't keep the limits.
    """

    bounds: Bounds
    plan: Plan
    balanced_bounds: Bounds
    balanced: Plan | None


def plan_partition(problem: PartitionProblem, time_limit: float = 10.0,
                   clock: Callable[[], float] = time.perf_counter) -> PartitionPlan:
    """The best partition with its order that can be found in about twice `time_limit` seconds of `clock`.

    It is no slower than balance's partition with an order planned in `time_limit` seconds, which is the first half of
    the time. Raises NoPartition if none is found of which an order keeps to the limits.
    """
    return _Search(problem, time_limit, clock).run()


class _Search:
    """One search; `scores` are those of all partitions that were looked at."""

    def __init__(self, problem: PartitionProblem, time_limit: float, clock: Callable[[], float]) -> None:
        self._problem, self._time_limit, self._clock = problem, time_limit, clock
        self._began = clock()
        self._random = Random(0)
        self._scores: dict[Bounds, Score] = {}
        self._plans: dict[Bounds, Plan] = {}
        self._models: list[TargetStarts] = []

    def run(self) -> PartitionPlan:
        layers, placement = self._problem.layers, self._problem.placement
        balanced = balance(layers.costs, placement, self._problem.noise)
        of_balanced = None
        if not self._problem.excess(balanced):
            of_balanced = self._planned(balanced, self._time_limit)
            self._follow(of_balanced)
        # The time counts without what the first plan has spent on compiling.
        self._began = self._clock()
        turn = self._time_limit * (1 - _LAST) / _TURNS
        for number in range(_TURNS):
            self._search_locally(turn * (number + _LOCAL))
            self._race(turn * (number + 1))
            if self._plans:
                self._scores.clear()
                self._models.clear()
                for bounds in sorted(self._plans, key=self._makespan)[:2]:
                    self._follow(self._plans[bounds])
        if not self._plans:
            least = min(self._scores, key=lambda bounds: (self._problem.growth(bounds), self._scores[bounds]))
            try:
                self._planned(least, 0.0)
            except LimitError as error:
                raise NoPartition(str(error), self._problem.growth(least)) from None
        best = min(self._plans, key=lambda bounds: (
            self._makespan(bounds) * (1 if bounds == balanced else 1 + self._problem.noise), bounds != balanced))
        self._planned(best, self._time_limit - self._elapsed())
        return PartitionPlan(best, self._plans[best], balanced, of_balanced)

    def _elapsed(self) -> float:
        return self._clock() - self._began

    def _makespan(self, bounds: Bounds) -> float:
        return self._plans[bounds].timeline.makespan

    def _planned(self, bounds: Bounds, seconds: float) -> Plan:
        """A plan for `bounds`; of those made before the best is kept."""
        found = plan(self._problem.on(bounds), max(0.0, seconds), clock=self._clock)
        before = self._plans.get(bounds)
        if before is None or found.timeline.makespan < before.timeline.makespan:
            self._plans[bounds] = found
        return found

    # -- [2]

    def _search_locally(self, until: float) -> None:
        """Climb from the balances, then from the best partitions after some random moves."""
        for bounds in self._starts():
            self._climb(bounds, until)
        vain = 0
        while self._elapsed() < until and vain < _VAIN_CLIMBS:
            known = len(self._scores)
            elite = sorted(self._scores, key=self._scores.__getitem__)[:_RACERS]
            bounds = self._random.choice(elite)
            for _ in range(self._random.randint(*_KICKS)):
                bounds = self._random.choice(list(self._neighbours(bounds)) or [bounds])
            self._climb(bounds, until)
            vain = vain + 1 if len(self._scores) == known else 0

    def _starts(self) -> Iterator[Bounds]:
        """Partitions that are known to be good for something."""
        layers, placement = self._problem.layers, self._problem.placement
        yield from sorted(self._plans, key=self._makespan)[:_RACERS]
        if any(layers.after_forward):
            yield balance(layers.after_forward, placement)
        yield balance((1.0,) * len(layers), placement)

    def _climb(self, bounds: Bounds, until: float) -> None:
        """Take moves to better partitions as long as there are some; all chance comes from here."""
        better: Bounds | None = bounds
        while better is not None:
            bounds, score = better, self._score(better)
            moves = list(self._neighbours(bounds))
            self._random.shuffle(moves)
            better = next((moved for moved in takewhile(lambda _: self._elapsed() < until, moves)
                           if self._score(moved) < score), None)

    def _neighbours(self, bounds: Bounds) -> Iterator[Bounds]:
        """Partitions in which one stage has a few layers less and another one as many more."""
        for source, target in permutations(range(len(bounds) - 1), 2):
            for step in _STEPS:
                if bounds[source + 1] - bounds[source] <= step:
                    break
                moved = list(bounds)
                for place in range(min(source, target) + 1, max(source, target) + 1):
                    moved[place] += -step if source < target else step
                yield tuple(moved)

    def _score(self, bounds: Bounds) -> Score:
        if bounds not in self._scores:
            excess = self._problem.excess(bounds)
            self._scores[bounds] = (excess, 0.0, 0.0) if excess else (0.0, *self._listed(bounds))
        return self._scores[bounds]

    def _listed(self, bounds: Bounds) -> tuple[float, float]:
        """What the list scheduler makes of a partition: the least makespan, and the sum of its starts."""
        scheduler = ListScheduler(self._problem.on(bounds))
        found = (float("inf"), float("inf"))
        for policy in self._policies(scheduler):
            run = scheduler.run(policy, found[0] * (1 + SLACK))
            if run is not None:
                found = min(found, (run.makespan, run.waiting))
        return found

    def _policies(self, scheduler: ListScheduler) -> Iterator[Policy]:
        nothing = np.zeros((self._problem.ranks, scheduler.streams, self._problem.micro_batches, 1))
        yield Policy(nothing, 1.0, scheduler.least_reserves)
        for starts in self._models:
            for eagerness, patience in _IMITATIONS:
                yield Policy(starts, patience, scheduler.least_reserves, eagerness * scheduler.work)

    def _follow(self, found: Plan) -> None:
        """Score partitions by the order of `found` too."""
        self._models.append(_starts_of(found.timeline, self._problem))

    # -- [3]

    def _race(self, until: float) -> None:
        """Short plans for the best partitions, while there is time until `until`."""
        least = min(map(self._makespan, self._plans), default=float("inf"))
        # At most two with as many layers on each rank: the best are often all but the same.
        racers: list[Bounds] = []
        alike: Counter[tuple[int, ...]] = Counter()
        unplanned = self._scores.keys() - self._plans.keys()
        for bounds in sorted(unplanned, key=lambda bounds: (self._scores[bounds], bounds)):
            sizes = tuple(sum(bounds[stage + 1] - bounds[stage] for stage in chunks)
                          for chunks in self._problem.placement.chunks)
            if not self._scores[bounds][0] and alike[sizes] < _ALIKE and self._bound(bounds) < least * (1 - SLACK):
                racers.append(bounds)
                alike[sizes] += 1
            if len(racers) == _RACERS:
                break
        self._hold_heats(racers, until)

    def _hold_heats(self, racers: list[Bounds], until: float) -> None:
        """Plan for as many of the first `racers` as there is time for, then for the better half of them again."""
        if not racers:
            return
        began = self._elapsed()
        self._planned(racers[0], 0.0)
        now = self._elapsed()
        while len(racers) > 1 and (until - now) / len(racers).bit_length() < len(racers) * _LEAST_PLAN * (now - began):
            racers = racers[:len(racers) // 2]
        length = (until - now) / len(racers).bit_length()
        while racers and self._elapsed() < until:
            for bounds in racers:
                self._planned(bounds, length / len(racers))
            racers = sorted(racers, key=self._makespan)[:len(racers) // 2]

    def _bound(self, bounds: Bounds) -> float:
        problem = self._problem.on(bounds)
        return lower_bound_of_limits(problem.placement, problem.micro_batches, problem.times, problem.activations,
                                     problem.limits)


def _starts_of(timeline: Timeline, problem: PartitionProblem) -> TargetStarts:
    """When each pass starts; the first piece of a W in pieces."""
    each = problem.placement.chunks_each
    starts = np.zeros((problem.ranks, KINDS * each, problem.micro_batches, 1))
    for rank, (chunks, spans) in enumerate(zip(problem.placement.chunks, timeline.ranks)):
        for span in reversed(spans):
            action, chunk = span.action, chunks.index(span.action.stage)
            if action.kind is not Kind.W:
                kind = F if action.kind is Kind.F else B
                starts[rank, kind * each + chunk, action.micro_batch, 0] = span.start
            if action.kind in (Kind.W, Kind.BW):
                # Of a whole backward somewhere after its B.
                start = span.start if action.kind is Kind.W else span.end
                starts[rank, W * each + chunk, action.micro_batch, 0] = start
    return starts
