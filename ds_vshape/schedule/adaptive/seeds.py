"""Schedules that are known before any search: the table's V schedules, run with the real times."""

from __future__ import annotations

from collections.abc import Iterator

from ds_vshape.schedule.activations import peak_activations
from ds_vshape.schedule.adaptive.problem import SLACK, Problem
from ds_vshape.schedule.named import SCHEDULES
from ds_vshape.schedule.schedule import Schedule


def known_schedules(problem: Problem) -> Iterator[Schedule]:
    """Those on the V placement that are within the limits."""
    for entry in SCHEDULES.values():
        if entry.placement == "v":
            schedule = entry.builder(problem.ranks, problem.micro_batches)
            if within(schedule, problem):
                yield schedule


def within(schedule: Schedule, problem: Problem) -> bool:
    """Whether `schedule` peaks within the limits."""
    found = peak_activations(schedule, problem.activations)
    return all(peak <= limit * (1 + SLACK) for peak, limit in zip(found, problem.limits))
