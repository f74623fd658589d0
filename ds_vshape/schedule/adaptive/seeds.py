"""Schedules that are known before any search: the table's on the same placement, and with more chunks in a V also those
of other steps, run with the real times."""

from __future__ import annotations

from collections.abc import Iterator

from ds_vshape.schedule.activations import peak_activations
from ds_vshape.schedule.adaptive.problem import SLACK, Problem
from ds_vshape.schedule.builders.v_shape import of_steps
from ds_vshape.schedule.named import SCHEDULES, names_on
from ds_vshape.schedule.schedule import Schedule

# Down and up, from little memory to much: of the blocks of more than two chunks, which have no names.
_STEPS = ((1, 1), (2, 1), (3, 1), (3, 2))


def known_schedules(problem: Problem) -> Iterator[Schedule]:
    """Those on the problem's placement that are within the limits."""
    yield from (schedule for schedule in _schedules(problem) if within(schedule, problem))


def _schedules(problem: Problem) -> Iterator[Schedule]:
    placement, micro_batches = problem.placement, problem.micro_batches
    for name in names_on(placement):
        yield SCHEDULES[name].builders[placement.chunks_each](placement.ranks, micro_batches)
    if placement.name == "v" and placement.chunks_each > 2:
        found = (of_steps(placement.ranks, micro_batches, placement.chunks_each, *steps) for steps in _STEPS)
        yield from (schedule for schedule in found if schedule is not None)


def within(schedule: Schedule, problem: Problem) -> bool:
    """Whether `schedule` peaks within the limits."""
    found = peak_activations(schedule, problem.activations)
    return all(peak <= limit * (1 + SLACK) for peak, limit in zip(found, problem.limits))
