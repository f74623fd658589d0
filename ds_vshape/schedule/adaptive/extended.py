"""From a schedule of few micro-batches to one of many: its middle is repeated.

With more micro-batches than fill the pipeline, warm-up and cool-down stay the same and a pattern of one or a few
micro-batches repeats between them. Searching with fewer micro-batches is faster, and finds the same ramps.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import numpy as np

from ds_vshape.schedule.adaptive.list_scheduler import B0, ListScheduler, Policy, Run, Wishes
from ds_vshape.schedule.adaptive.problem import Problem

# Patterns of 1, 2, 3 and 4 micro-batches all fit into this many.
_PERIODS = (1, 2, 3, 4)
_WHOLE_PERIODS = 12


def fewer_micro_batches(problem: Problem) -> Problem | None:
    """`problem` with so many micro-batches less that its ramps are still there; None if it has no more than those."""
    least = max(8, 2 * problem.ranks)
    left_out = (problem.micro_batches - least) // _WHOLE_PERIODS * _WHOLE_PERIODS
    return replace(problem, micro_batches=problem.micro_batches - left_out) if left_out > 0 else None


def extended(run: Run, scheduler: ListScheduler) -> Iterator[Policy]:
    """Policies for the problem of `scheduler` that repeat a part of `run`, which has fewer micro-batches."""
    fewer = run.starts.shape[2]
    for at in sorted({fewer // 2, 2 * fewer // 3, max(1, fewer // 3)}):
        for period in _PERIODS:
            if period <= at < fewer:
                wishes = _repeated(run.starts, at, period, scheduler.problem.micro_batches - fewer)
                for eagerness in (0.1, 0.5, 2.0):
                    for patience in (0.0, 1.0):
                        yield replace(run.policy, wishes=wishes, patience=patience,
                                      reserves=scheduler.least_reserves, eagerness=eagerness * scheduler.work)


def _repeated(starts: Wishes, at: int, period: int, more: int) -> Wishes:
    """`starts` with the `period` micro-batches before number `at` repeated until there are `more`."""
    interval = starts[0, B0, at, 0] - starts[0, B0, at - period, 0]
    number = np.arange(more)
    middle = starts[:, :, at - period + number % period] + (interval * (1 + number // period))[:, None]
    return np.concatenate([starts[:, :, :at], middle, starts[:, :, at:] + interval * more / period], axis=2)
