"""Annealing of good runs: in rounds of the best ones, and in a race of many, of which the slower ones drop out.

Simulated annealing moves single passes, or those of many micro-batches or ranks together (annealing.py). It rarely gets
from one repeating pattern to another, and the best one isn't known in advance, so many patterns race first.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from math import ceil, log2

import numpy as np

from ds_vshape.schedule.adaptive.annealing import anneal
from ds_vshape.schedule.adaptive.cool_down import reschedule_cooldown
from ds_vshape.schedule.adaptive.list_scheduler import W0, ListScheduler, PolicyRun
from ds_vshape.schedule.adaptive.machine_code import COMPILED
from ds_vshape.schedule.adaptive.problem import SLACK
from ds_vshape.schedule.adaptive.trials import Progress, Trials

# Temperatures in units of the slowest rank's work on one micro-batch, at the start of a round and at its end. A round
# takes the share _ROUND of the time.
_HOT = (0.02, 0.06, 0.2)
_COLD = 0.005
_ROUND = 0.15
# Runs longer than the best by more than this factor aren't annealed.
_CHANCE = 1.03
# How often a run's Ws are cut once more before a round.
_FINER = 0.25
# How many runs race, for which share of the time that is left, and from which temperature.
_RACERS = 24
_RACE = 0.6
_RACE_HOT = 0.05
# Passes that annealing looks at between two looks at the clock: some hundredths of a second.
_PASSES_A_STEP = 3_000_000 if COMPILED else 30_000


class AnnealingRounds:
    """The annealing of one search."""

    def __init__(self, trials: Trials) -> None:
        self._trials = trials
        # How often annealing has lately improved a run, by the temperature that it started from.
        self._successes = [1.0] * len(_HOT)

    def anneal_one(self) -> None:
        """A round of annealing of one of the best runs."""
        trials, random = self._trials, self._trials.random
        incumbents = trials.incumbents.values()
        least = min(run.makespan for run in incumbents)
        run = random.choice([run for run in incumbents if run.makespan <= least * _CHANCE])
        may_be_finer = run.policy.pieces * 2 <= trials.problem.max_pieces and not trials.scheduler.fused
        if may_be_finer and random.random() < _FINER:
            run = _finer(run, trials.scheduler)
        hot = random.choices(_HOT, self._successes)[0]
        improved = self._annealed(run, hot, _ROUND)
        index = _HOT.index(hot)
        self._successes[index] = 1.0 if improved.makespan < run.makespan else max(0.1, self._successes[index] / 2)

    def race(self, runs: Iterable[PolicyRun], progress: Progress) -> list[PolicyRun]:
        """Anneal the best of `runs`, then the better half of them for twice as long, until one is left.

        Returns the better half of each heat, the best of the last one at the end.
        """
        trials = self._trials
        survivors: list[PolicyRun] = []
        different = {run.makespan: run for run in runs}
        racers = [reschedule_cooldown(different[makespan], trials.scheduler)
                  for makespan in sorted(different)[:_RACERS]]
        heats = max(1, ceil(log2(len(racers))))
        length = trials.left() * _RACE / heats
        while len(racers) > 1 and not trials.done:
            after = []
            for run in racers:
                trials.report(progress)
                after.append(self._annealed(run, _RACE_HOT, length / len(racers)))
            racers = sorted(after, key=lambda run: run.makespan)[:ceil(len(after) / 2)]
            survivors += reversed(racers)
        return survivors

    def _annealed(self, run: PolicyRun, hot: float, length: float) -> PolicyRun:
        """`run` after annealing from the temperature `hot` down, in the share `length` of the time; kept if good."""
        trials, scheduler = self._trials, self._trials.scheduler
        layout, orders = scheduler.layouts(run.policy.pieces), run.orders.copy()
        best, best_orders = run.makespan, orders.copy()
        tries = max(10, _PASSES_A_STEP // orders.size)
        began = left = trials.left()
        length = min(length, began)
        while left > began - length and left > 0 and best > trials.goal * (1 + SLACK):
            temperature = scheduler.work * hot * (_COLD / hot) ** ((began - left) / length)
            best = anneal(layout, orders, best_orders, best, tries, temperature, trials.goal,
                          trials.random.getrandbits(31))
            left = trials.left()
        improved = scheduler.left_shift(best_orders, run.policy) or run
        trials.keep(improved)
        return improved


def _finer(run: PolicyRun, scheduler: ListScheduler) -> PolicyRun:
    """The same with twice as many pieces of each W."""
    policy = replace(run.policy, target_starts=np.repeat(run.policy.target_starts, 2, axis=-1))
    orders = np.array([np.repeat(row, np.where(row >= W0, 2, 1)) for row in run.orders])
    return scheduler.left_shift(orders, policy) or run
