"""New runs from the starts of others: with the same number of micro-batches, and with more."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from itertools import product

from ds_vshape.schedule.adaptive.blocks import PATIENCES
from ds_vshape.schedule.adaptive.cool_down import reschedule_cooldown
from ds_vshape.schedule.adaptive.extended import extended, lengthened, periods_of
from ds_vshape.schedule.adaptive.list_scheduler import ListScheduler, Policy, PolicyRun, TargetStarts
from ds_vshape.schedule.adaptive.trials import Trials

# `lengthen` takes no more than this share of the time.
_LENGTHENING = 0.06


def imitate(trials: Trials, run: PolicyRun, until: float) -> list[PolicyRun]:
    """`run`, and runs with its starts as target starts, while more than `until` of the time is left; all kept."""
    runs = [run]
    for policy in _targeting(trials.scheduler, run.starts, (0.1, 0.5, float("inf")), (0.0, 1.0, PATIENCES[-1])):
        if trials.left() > until:
            like = trials.run_policy(policy)
            runs += [like] if like is not None else []
    return runs


def lengthen(trials: Trials, runs: Iterable[PolicyRun]) -> None:
    """Try what `runs`, of fewer micro-batches, repeat, in just their orders; the same run once."""
    until = trials.left() - _LENGTHENING
    micro_batches = trials.problem.micro_batches
    periods = periods_of(trials.problem.placement)
    for run in {run.makespan: run for run in runs}.values():
        # Nothing repeats faster than the slowest rank works.
        least = run.makespan + (micro_batches - run.starts.shape[2]) * trials.scheduler.work
        longer = lengthened(run, micro_batches, periods)
        # Checked before each: finding what a run repeats takes time too.
        while not (trials.done or trials.left() < until
                   or trials.best is not None and trials.best.makespan <= least):
            orders = next(longer, None)
            if orders is None:
                break
            found = trials.run_of(orders, run.policy.pieces)
            if found is not None:
                trials.keep(found)


def extend(trials: Trials, run: PolicyRun) -> None:
    """Try what `run`, of fewer micro-batches, repeats, with its starts as target starts."""
    for starts in extended(run, trials.problem.micro_batches, periods_of(trials.problem.placement)):
        for policy in _targeting(trials.scheduler, starts, (0.1, 0.5, 2.0), (0.0, 1.0)):
            like = None if trials.done else trials.run_policy(policy)
            if like is not None:
                trials.keep(reschedule_cooldown(like, trials.scheduler))


def _targeting(scheduler: ListScheduler, starts: TargetStarts, eagernesses: Iterable[float],
               patiences: Iterable[float]) -> Iterator[Policy]:
    """Policies with the target starts `starts`, from the least eager on.

    Eagerness is in units of the slowest rank's work.
    """
    for eagerness, patience in product(eagernesses, patiences):
        yield Policy(starts, patience, scheduler.least_reserves, eagerness * scheduler.work)
