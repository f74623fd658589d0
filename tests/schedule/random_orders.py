"""Any order that can run, by rules of its own on what a pass needs."""

from __future__ import annotations

import random

from ds_vshape.schedule.passes import BW, B, C, F, Kind, O, Pass, R, W
from ds_vshape.schedule.placement import PLACEMENTS
from ds_vshape.schedule.schedule import Schedule


def needs(action: Pass, schedule: Schedule) -> list[Pass]:
    """All that must be done before `action`, among the passes that the schedule has."""
    s, i = action.stage, action.micro_batch
    backward = [F(s, i), C(s, i), R(s, i), B(s + 1, i), BW(s + 1, i)]
    wanted = {Kind.F: [F(s - 1, i)], Kind.W: [B(s, i)], Kind.B: backward, Kind.BW: backward,
              Kind.C: [F(s, i), R(s, i)], Kind.O: [F(s, i)], Kind.R: [O(s, i)]}[action.kind]
    there = {other for _, other in schedule.passes()}
    return [other for other in wanted if other in there]


def random_schedule(ranks: int, micro_batches: int, placement_name: str, dice: random.Random) -> Schedule:
    """Any order that can run: take ready passes at random, some backwards whole and some split, some recomputed, some
    offloaded."""
    placement = PLACEMENTS[placement_name](ranks)
    action = []
    for stage in range(placement.stages):
        for i in range(micro_batches):
            action += [F(stage, i)] + ([BW(stage, i)] if dice.random() < 0.5 else [B(stage, i), W(stage, i)])
            action += dice.choice(([], [C(stage, i)], [O(stage, i), R(stage, i)], [C(stage, i), O(stage, i),
                                                                                R(stage, i)]))
    everything = Schedule("random", placement, micro_batches, (tuple(action),))
    waits_for = {one: set(needs(one, everything)) for one in action}
    orders: list[list[Pass]] = [[] for _ in range(ranks)]
    while waits_for:
        chosen = dice.choice([one for one, waits in waits_for.items() if not waits])
        orders[placement.rank_of(chosen.stage)].append(chosen)
        del waits_for[chosen]
        for waits in waits_for.values():
            waits.discard(chosen)
    return Schedule("random", placement, micro_batches, tuple(tuple(order) for order in orders))
