"""Holds a schedule against the peak of activations that the user allows."""

from __future__ import annotations

from ds_vshape.schedule.named import SCHEDULES, build
from ds_vshape.schedule.schedule import Schedule
from ds_vshape.schedule.timeline import peak_activations


class MemoryLimitError(ValueError):
    """A schedule that keeps more activations than allowed; the message names those that fit."""


def fraction_of_1f1b(schedule: Schedule) -> float:
    """The highest peak of a rank over 1F1B's on as many ranks and micro-batches."""
    usual = build("1f1b", schedule.placement.ranks, schedule.micro_batches)
    return max(peak_activations(schedule)) / max(peak_activations(usual))


def check_memory_limit(schedule: Schedule, limit: float | None) -> None:
    """Raise MemoryLimitError if `schedule` peaks above `limit`, a fraction of 1F1B's peak."""
    if limit is None or fraction_of_1f1b(schedule) <= limit:
        return
    ranks, micro_batches = schedule.placement.ranks, schedule.micro_batches
    fractions = {name: fraction_of_1f1b(build(name, ranks, micro_batches)) for name in SCHEDULES}
    fitting = [f"{name} ({fraction:.3g})" for name, fraction in fractions.items() if fraction <= limit]
    least = min(fractions, key=lambda name: fractions[name])
    raise MemoryLimitError(
        f"memory_limit = {limit:g}: {schedule.name} needs {fraction_of_1f1b(schedule):.3g} of 1F1B's peak activations on {ranks} "
        f"ranks with {micro_batches} micro-batches. Within the limit: {', '.join(fitting) or 'none'}; the least is "
        f"{least} with {fractions[least]:.3g}")
