"""Annealing of candidates, as many side by side as there are lanes: in a race, and in rounds of the best ones."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from math import ceil, log2
from random import Random

import numpy as np

from ds_vshape.schedule.adaptive.lanes import Lanes
from ds_vshape.schedule.adaptive.machine_code import COMPILED
from ds_vshape.schedule.adaptive.memory.annealing import anneal
from ds_vshape.schedule.adaptive.memory.candidates import Candidate, Candidates, Pool
from ds_vshape.schedule.adaptive.memory.layout import MemoryLayout, Orders
from ds_vshape.schedule.adaptive.problem import SLACK
from ds_vshape.schedule.adaptive.trials import Progress

# How many candidates race; one that is alone with its means, though it's slower than the fastest by up to this factor.
_RACERS, _CHANCE = 8, 1.1
# Temperatures in units of the slowest rank's work on one micro-batch, at the start of a round and at its end. A round
# takes the share _ROUND of the time.
_HOT = (0.02, 0.06, 0.2)
_RACE_HOT = 0.05
_COLD = 0.002
_ROUND = 0.1
# Candidates longer than the best by more than this factor aren't annealed after the race.
_CLOSE = 1.005
# Passes that annealing looks at between two looks at the clock: some hundredths of a second.
_PASSES_A_STEP = 2_000_000 if COMPILED else 20_000


class Rounds:
    """The annealing of one search: what it finds is kept in `pool`."""

    def __init__(self, candidates: Candidates, pool: Pool, goal: float, left: Callable[[], float], lanes: Lanes
                 ) -> None:
        self._candidates, self._pool, self._goal, self._left, self._lanes = candidates, pool, goal, left, lanes
        self._random = Random(0)

    @property
    def _done(self) -> bool:
        best = self._pool.best
        return self._left() <= 0 or best is not None and best.makespan <= self._goal * (1 + SLACK)

    def race(self, until: float, progress: Progress) -> None:
        """Anneal the best candidates, among them the best with each means, then the better half of them for twice as
        long, until one is left; and until so much of the time is."""
        racers = self._pool.racers(_RACERS, _CHANCE)
        if len(racers) < 2:
            return
        length = max(0.0, self._left() - until) / ceil(log2(len(racers)))
        while len(racers) > 1 and not self._done:
            after: list[Candidate] = []
            for group in self._lanes.groups(racers):
                progress(1 - self._left())
                after += self._annealed([(racer, _RACE_HOT, True) for racer in group],
                                        length * len(group) / len(racers))
            racers = sorted(after, key=lambda each: each.makespan)[:ceil(len(after) / 2)]

    def run(self, progress: Progress) -> None:
        """Anneal the best candidates until the time is up."""
        while not self._done:
            progress(1 - self._left())
            self._annealed([self._start() for _ in range(self._lanes.count)], _ROUND)

    def _start(self) -> tuple[Candidate, float, bool]:
        """What a round starts with: one of the best, a temperature, and whether its means stay."""
        close = self._pool.close(_CLOSE)
        return self._random.choice([close[0], close[0], *close]), self._random.choice(_HOT), self._random.random() < 0.5

    def _annealed(self, starts: Sequence[tuple[Candidate, float, bool]], length: float) -> list[Candidate]:
        """The candidates after annealing from their temperatures down, side by side, in the share `length` of the
        time."""
        annealed = [_Annealed(*start, self._candidates, self._goal) for start in starts]
        self._lanes.anneal(annealed, self._left, length, self._random)
        found = [each.improved() for each in annealed]
        for each in found:
            self._pool.keep(each)
        return found


class _Annealed:
    """A candidate while it's annealed, from the temperature `hot` on; with `as_it_is`, one that recomputes none or
    offloads none won't."""

    def __init__(self, candidate: Candidate, hot: float, as_it_is: bool, candidates: Candidates, goal: float) -> None:
        self._candidate, self._hot, self._goal, self._work = candidate, hot, goal, candidates.work
        self._layout = candidates.layout(candidate.pieces)
        if as_it_is:
            self._layout = _without(self._layout, *candidate.means)
        self._orders, self._best_orders = _copied(candidate.orders), _copied(candidate.orders)
        self._best = candidate.makespan

    @property
    def done(self) -> bool:
        """Whether nothing can be better."""
        return self._best <= self._goal * (1 + SLACK)

    def steps(self, cooled: float, seed: int) -> Callable[[], None]:
        """What to call for some steps, where the share `cooled` of the way down is done."""
        temperature = self._work * self._hot * (_COLD / self._hot) ** cooled
        tries = max(10, _PASSES_A_STEP // int(self._orders.lengths.sum()))

        def run() -> None:
            self._best = anneal(self._layout, self._orders, self._best_orders, self._best, tries, temperature,
                                self._goal, seed)

        return run

    def improved(self) -> Candidate:
        """The best that it became."""
        if self._best >= self._candidate.makespan:
            return self._candidate
        return Candidate(self._best, self._candidate.pieces, self._best_orders)


def _without(layout: MemoryLayout, recompute: bool, offload: bool) -> MemoryLayout:
    """`layout` where only what is true may be done."""
    if not recompute:
        again, left, moved, offload_s, reload_s = (np.ascontiguousarray(values[:, :, :1]) for values in (
            layout.again, layout.left, layout.moved, layout.offload, layout.reload))
        layout = layout._replace(again=again, left=left, moved=moved, offload=offload_s, reload=reload_s)
    return layout._replace(may_offload=int(layout.may_offload and offload))


def _copied(orders: Orders) -> Orders:
    return Orders._make(values.copy() for values in orders)
