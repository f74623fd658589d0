"""GPipe: all forwards, then all backwards.

    rank 0    F0 F1 F2          B0 B0 B1 B1 B2 B2
    rank 1       F0 F1 F2 B0 B0 B1 B1 B2 B2          (p = 2, m = 3; a backward takes two slots)

The simplest order and the most memory: every rank keeps all m micro-batches. The backwards go in micro-batch order,
as in every schedule here, so that gradients add up in the same order.
"""

from __future__ import annotations

from ds_vshape.schedule.passes import BW, F
from ds_vshape.schedule.placement import linear
from ds_vshape.schedule.schedule import Schedule


def gpipe(ranks: int, micro_batches: int) -> Schedule:
    """m forwards and then m whole backwards on each of p stages."""
    batch = range(micro_batches)
    orders = tuple(tuple(F(stage, i) for i in batch) + tuple(BW(stage, i) for i in batch) for stage in range(ranks))
    return Schedule("gpipe", linear(ranks), micro_batches, orders)
