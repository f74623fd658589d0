"""The fastest cycles of a problem, and runs that repeat them: steady states first, ramps later."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from ds_vshape.schedule.adaptive.cycles import Cycle, best_cycles, periods
from ds_vshape.schedule.adaptive.extended import with_micro_batches
from ds_vshape.schedule.adaptive.imitation import imitate
from ds_vshape.schedule.adaptive.list_scheduler import ListScheduler, PolicyRun
from ds_vshape.schedule.adaptive.population import Population
from ds_vshape.schedule.adaptive.problem import Problem
from ds_vshape.schedule.adaptive.reduced import is_large
from ds_vshape.schedule.adaptive.seeds import known_schedules
from ds_vshape.schedule.adaptive.trials import Trials

# How many cycles are tried.
_MOST = 8
# The share of the time that is left for finding cycles, and how many micro-batches a batch has then for each rank: with
# fewer there is hardly a middle to repeat.
_SHARE = 0.35
_PER_RANK = 2
# Micro-batches for each rank after whose half a list of passes has long come to repeat itself.
_SETTLED = 6
# Sizes of cycles (micro-batches, pieces of W) that known schedules are made into, and those that blocks may have.
_SIZES = ((1, 1), (2, 1), (3, 1), (4, 1), (1, 2), (3, 2))
_BLOCKS = 4
_BLOCK_SIZES = tuple((group, 1) for group in range(1, 9))


def find_cycles(trials: Trials, population: Population) -> list[Cycle]:
    """The best cycles that annealing makes of known schedules and of good blocks, with time for a steady state."""
    problem = trials.problem
    if problem.micro_batches < _PER_RANK * problem.ranks or is_large(problem) or trials.scheduler.fused:
        return []
    until = trials.left() * (1 - _SHARE)
    scheduler = ListScheduler(with_micro_batches(problem, _SETTLED * problem.ranks))
    sizes = [size for size in (*_SIZES, *_of_placement(problem)) if size[1] <= problem.max_pieces]
    starts: list[Cycle] = []
    for orders in map(scheduler.orders_of, known_schedules(scheduler.problem)):
        if orders is not None:
            starts += periods(orders, sizes, len(sizes))
    for block in population.blocks(_BLOCKS):
        run = scheduler.run(replace(block, pieces=1).policy(scheduler))
        starts += periods(run.orders, _BLOCK_SIZES, 1) if run is not None and trials.left() > until else []
    return best_cycles(trials.scheduler, starts, lambda: trials.left() - until, trials.random, trials.lanes,
                       _MOST)


def _of_placement(problem: Problem) -> list[tuple[int, int]]:
    """Interleaved schedules go in groups of as many micro-batches as there are ranks."""
    group = problem.ranks, 1
    return [group] if problem.placement.name == "interleaved" and group not in _SIZES else []


def try_cycles(trials: Trials, cycles: Sequence[Cycle]) -> list[PolicyRun]:
    """Runs that repeat `cycles`, each the best of imitations with other ramps; all kept."""
    runs = []
    for cycle in cycles:
        run = None if trials.done else trials.run_of(cycle.of_batch(trials.problem.micro_batches), cycle.pieces)
        if run is not None:
            trials.keep(run)
            runs.append(min(imitate(trials, run, 0.0), key=lambda run: run.makespan))
    return runs
