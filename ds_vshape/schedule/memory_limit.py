"""The peak of activations that the user allows, and whether a schedule keeps to it."""

from __future__ import annotations

import math

from ds_vshape.schedule.activations import peak_activations
from ds_vshape.schedule.named import SCHEDULES, build
from ds_vshape.schedule.schedule import Schedule


class MemoryLimitError(ValueError):
    """A schedule that keeps more activations than allowed; the message names those that fit."""


def peak_of_1f1b(ranks: int, micro_batches: int) -> int:
    """1F1B's peak in activations of 1/(2p) of the model: rank 0 keeps p micro-batches, if there are that many."""
    return 2 * min(ranks, micro_batches)


def count_of(fraction: float, ranks: int, micro_batches: int) -> float:
    """A `fraction` of 1F1B's peak in activations of 1/(2p) of the model."""
    return fraction * peak_of_1f1b(ranks, micro_batches)


def fraction_of_1f1b(schedule: Schedule) -> float:
    """The highest peak of a rank over 1F1B's on as many ranks and micro-batches."""
    return max(peak_activations(schedule)) / peak_of_1f1b(schedule.placement.ranks, schedule.micro_batches)


def check_possible(limit: float, ranks: int, micro_batches: int, at_once: float = 2) -> None:
    """Raise MemoryLimitError if no schedule can peak at `limit`, a fraction of 1F1B's peak.

    `at_once` is what each rank has to keep at some time, in activations of 1/(2p) of the model: all its stages of one
    micro-batch, at the turn at its end of the V; or one of them, where the others may be recomputed or offloaded.
    """
    check_fraction(limit, at_once / peak_of_1f1b(ranks, micro_batches), ranks, micro_batches)


def check_fraction(limit: float, least: float, ranks: int, micro_batches: int) -> None:
    """Raise MemoryLimitError if `limit` is below `least`, the least possible peak; both are fractions of 1F1B's."""
    if limit < least - 1e-9:
        raise MemoryLimitError(f"memory_limit = {limit:g}: the least possible peak on {ranks} ranks with "
                               f"{micro_batches} micro-batches is {rounded_up(least)} of 1F1B's")


def rounded_up(fraction: float) -> str:
    """With three decimals, so that a limit of as much can be met."""
    return f"{math.ceil(fraction * 1000 - 1e-6) / 1000:g}"


def check_memory_limit(schedule: Schedule, limit: float | None) -> None:
    """Raise MemoryLimitError if `schedule` peaks above `limit`, a fraction of 1F1B's peak; None is no limit."""
    if limit is not None:
        _check(schedule, limit, f"{limit:g}", " of 1F1B's peak activations")


def check_activation_limit(schedule: Schedule, limit: float) -> None:
    """Raise MemoryLimitError if `schedule` peaks above `limit` activations of 1/(2p) of the model."""
    usual = peak_of_1f1b(schedule.placement.ranks, schedule.micro_batches)
    _check(schedule, limit / usual, f"{limit:g}u", "u of chunk activations", usual)


def _check(schedule: Schedule, limit: float, wording: str, unit: str, scale: float = 1) -> None:
    """`limit` is a fraction of 1F1B's peak; the message speaks of `scale` times that, in `unit`."""
    needed = fraction_of_1f1b(schedule)
    if needed <= limit + 1e-9:
        return
    ranks, micro_batches = schedule.placement.ranks, schedule.micro_batches
    fractions = {name: fraction_of_1f1b(build(name, ranks, micro_batches)) for name in SCHEDULES}
    fitting = [f"{name} ({scale * fraction:.3g})" for name, fraction in fractions.items()
               if fraction <= limit + 1e-9]
    least = min(fractions, key=lambda name: fractions[name])
    raise MemoryLimitError(
        f"memory_limit = {wording}: {schedule.name} needs {scale * needed:.3g}{unit} on {ranks} ranks with "
        f"{micro_batches} micro-batches. Within the limit: {', '.join(fitting) or 'none'}; the least is "
        f"{least} with {scale * fractions[least]:.3g}")
