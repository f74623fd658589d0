"""Annealing of good runs: in rounds of the best ones, and in a race of many, of which the slower ones drop out.

Simulated annealing moves single passes, or those of many micro-batches or ranks together (annealing.py). It rarely gets
from one repeating pattern to another, and the best one isn't known in advance, so many patterns race first.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from math import ceil, log2

import numpy as np

from ds_vshape.schedule.adaptive.annealing import anneal
from ds_vshape.schedule.adaptive.cool_down import reschedule_cooldown
from ds_vshape.schedule.adaptive.list_scheduler import ListScheduler, PolicyRun
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

    def anneal_some(self) -> None:
        """A round of annealing on each lane, of one of the best runs."""
        starts = [self._start_of_round() for _ in range(self._trials.lanes.count)]
        for (run, hot), improved in zip(starts, self._annealed(starts, _ROUND)):
            index = _HOT.index(hot)
            gained = improved.makespan < run.makespan
            self._successes[index] = 1.0 if gained else max(0.1, self._successes[index] / 2)

    def _start_of_round(self) -> tuple[PolicyRun, float]:
        """One of the best runs, and the temperature to anneal it from."""
        trials, random = self._trials, self._trials.random
        incumbents = trials.incumbents.values()
        least = min(run.makespan for run in incumbents)
        run = random.choice([run for run in incumbents if run.makespan <= least * _CHANCE])
        may_be_finer = run.policy.pieces * 2 <= trials.problem.max_pieces and not trials.scheduler.fused
        if may_be_finer and random.random() < _FINER:
            run = _finer(run, trials.scheduler)
        return run, random.choices(_HOT, self._successes)[0]

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
            after: list[PolicyRun] = []
            for group in trials.lanes.groups(racers):
                trials.report(progress)
                after += self._annealed([(run, _RACE_HOT) for run in group], length * len(group) / len(racers))
            racers = sorted(after, key=lambda run: run.makespan)[:ceil(len(after) / 2)]
            survivors += reversed(racers)
        return survivors

    def _annealed(self, starts: Sequence[tuple[PolicyRun, float]], length: float) -> list[PolicyRun]:
        """The runs after annealing from their temperatures down, side by side, in the share `length` of the time; those
        that are good are kept."""
        trials = self._trials
        annealed = [_Annealed(run, hot, trials) for run, hot in starts]
        trials.lanes.anneal(annealed, trials.left, length, trials.random)
        improved = [each.improved() for each in annealed]
        for run in improved:
            trials.keep(run)
        return improved


class _Annealed:
    """A run while it's annealed, from the temperature `hot` on."""

    def __init__(self, run: PolicyRun, hot: float, trials: Trials) -> None:
        self._run, self._hot, self._goal, self._scheduler = run, hot, trials.goal, trials.scheduler
        self._orders, self._best_orders, self._best = run.orders.copy(), run.orders.copy(), run.makespan

    @property
    def done(self) -> bool:
        """Whether nothing can be better."""
        return self._best <= self._goal * (1 + SLACK)

    def steps(self, cooled: float, seed: int) -> Callable[[], None]:
        """What to call for some steps, where the share `cooled` of the way down is done."""
        layout = self._scheduler.layouts(self._run.policy.pieces)
        temperature = self._scheduler.work * self._hot * (_COLD / self._hot) ** cooled
        tries = max(10, _PASSES_A_STEP // self._orders.size)

        def run() -> None:
            self._best = anneal(layout, self._orders, self._best_orders, self._best, tries, temperature, self._goal,
                                seed)

        return run

    def improved(self) -> PolicyRun:
        """The best that it became."""
        return self._scheduler.left_shift(self._best_orders, self._run.policy) or self._run


def _finer(run: PolicyRun, scheduler: ListScheduler) -> PolicyRun:
    """The same with twice as many pieces of each W."""
    policy = replace(run.policy, target_starts=np.repeat(run.policy.target_starts, 2, axis=-1))
    orders = np.array([np.repeat(row, np.where(row >= scheduler.first_w, 2, 1)) for row in run.orders])
    return scheduler.left_shift(orders, policy) or run
