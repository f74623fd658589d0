"""1F1B: warm up with forwards, then one forward and one backward in turn.

    rank 0    F0 F1       B0 B0 F2 B1 B1    B2 B2
    rank 1       F0 B0 B0 F1 B1 B1 F2 B2 B2          (p = 2, m = 3; a backward takes two slots)

Rank r runs p - 1 - r forwards before its first pair, so it keeps p - r micro-batches, however many there are.
"""

from __future__ import annotations

from collections.abc import Sequence

from ds_vshape.schedule.passes import BW, F, Pass
from ds_vshape.schedule.placement import linear
from ds_vshape.schedule.schedule import Order, Schedule


def one_f_one_b(ranks: int, micro_batches: int) -> Schedule:
    """1F1B on p stages with whole backwards."""
    batch = range(micro_batches)
    orders = tuple(alternate([F(stage, i) for i in batch], [BW(stage, i) for i in batch], ranks - 1 - stage)
                   for stage in range(ranks))
    return Schedule("1f1b", linear(ranks), micro_batches, orders)


def alternate(forwards: Sequence[Pass], backwards: Sequence[Pass], warm_up: int) -> Order:
    """`warm_up` forwards, then a forward and a backward in turn, then the backwards that are left."""
    warm_up = min(warm_up, len(forwards))
    order = list(forwards[:warm_up])
    for forward, backward in zip(forwards[warm_up:], backwards):
        order += forward, backward
    return tuple(order) + tuple(backwards[len(forwards) - warm_up:])
