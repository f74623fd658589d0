"""Zero-bubble schedules of one stage a rank ("Zero Bubble Pipeline Parallelism", sections 2.2 and 2.3).

1F1B with the backward split, and each W put off until it fills what was a bubble. Rank r may put its W off by r
micro-batches (ZB-H1) or 2r (ZB-H2) more than rank 0, because it would otherwise keep that much less than rank 0:

    schedule   F down, B up   W put off by      peak, in micro-batches   bubble of a rank's own span (unit times)
    zb-h1      1, 2           r                 p                        p - 1 (a third of 1F1B's 3 (p - 1))
    zb-h2      4, 2           2r                2p - 1                   0 from m = 2p - 1 on

    zb-h1, p = 3, m = 4:   rank 0    F0 F1 F2       B0 W0 F3 B1 W1 B2 W2 B3 W3
                           rank 1       F0 F1 B0 F2 B1 W0 F3 B2 W1 B3 W2 W3
                           rank 2          F0 B0 F1 B1 F2 B2 W0 F3 B3 W1 W2 W3
"""

from __future__ import annotations

from ds_vshape.schedule.builders.building_block import BuildingBlock, reorder, repeat
from ds_vshape.schedule.placement import linear
from ds_vshape.schedule.schedule import Schedule

INTERVAL = 3


def zb_h1(ranks: int, micro_batches: int) -> Schedule:
    """1F1B's activations, a third of its bubble."""
    return reorder(repeat(_block(ranks, 1, 2).delayed(range(ranks)), micro_batches, "zb-h1"), ranks)


def zb_h2(ranks: int, micro_batches: int) -> Schedule:
    """Nearly twice 1F1B's activations, and no bubble within a rank's own span."""
    delays = range(0, 2 * ranks, 2)
    return reorder(repeat(_block(ranks, 4, 2).delayed(delays), micro_batches, "zb-h2"), 2 * ranks - 1)


def _block(ranks: int, down: int, up: int) -> BuildingBlock:
    return BuildingBlock.from_offsets(linear(ranks), INTERVAL, [down] * (ranks - 1) + [1] + [up] * (ranks - 1)).split()
