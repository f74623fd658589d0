"""Schedules that are known before any search: the table's on the same placement, run with the real times."""

from __future__ import annotations

from collections.abc import Iterator

from ds_vshape.schedule.activations import peak_activations
from ds_vshape.schedule.adaptive.problem import SLACK, Problem
from ds_vshape.schedule.named import SCHEDULES, names_on
from ds_vshape.schedule.schedule import Schedule


def known_schedules(problem: Problem) -> Iterator[Schedule]:
    """Those on the problem's placement that are within the limits."""
    for name in names_on(problem.placement):
        builder = SCHEDULES[name].builders[problem.placement.chunks_each]
        schedule = builder(problem.ranks, problem.micro_batches)
        if within(schedule, problem):
            yield schedule


def within(schedule: Schedule, problem: Problem) -> bool:
    """Whether `schedule` peaks within the limits."""
    found = peak_activations(schedule, problem.activations)
    return all(peak <= limit * (1 + SLACK) for peak, limit in zip(found, problem.limits))
