"""Schedules that give memory back before the backward, in all the ways there are."""

from __future__ import annotations

import random

from ds_vshape.schedule.passes import C, Kind, O, Pass, R
from ds_vshape.schedule.schedule import Order, Schedule

NOTHING, RECOMPUTED, MOVED, BOTH = range(4)


def gives_back(schedule: Schedule, seed: int = 0, ways: tuple[int, ...] = (NOTHING, RECOMPUTED, MOVED, BOTH),
               layers: int = 1) -> Schedule:
    """`schedule` with C, O and R in random places, by one of `ways` for each stage and micro-batch; C is of all of the
    stage or of its first `layers`."""
    numbers = random.Random(seed)
    whole = schedule.with_repeats(schedule.repeats)
    return whole.with_orders(tuple(_given_back(tuple(order), numbers, ways, layers) for order in whole.orders))


def _given_back(order: Order, numbers: random.Random, ways: tuple[int, ...], layers: int) -> Order:
    starts = {(action.stage, action.micro_batch): place for place, action in enumerate(order) if action.kind is Kind.F}
    added: list[tuple[float, Pass]] = []
    for place, action in enumerate(order):
        if action.kind.gives_input_gradient:
            key = action.stage, action.micro_batch
            way = numbers.choice(ways)
            actions = [O(*key), R(*key)] if way in (MOVED, BOTH) else []
            actions += [C(*key, numbers.choice((0, layers)))] if way in (RECOMPUTED, BOTH) else []
            # After the F, before the B.
            places = sorted(numbers.uniform(starts[key] + 0.01, place - 0.01) for _ in actions)
            added += zip(places, actions)
    every = [*enumerate(order), *added]
    return tuple(action for _, action in sorted(every, key=lambda entry: entry[0]))
