"""1F1B, plain and interleaved: warm up with forwards, then one forward and one backward in turn.

    rank 0    F0 F1       B0 B0 F2 B1 B1    B2 B2
    rank 1       F0 B0 B0 F1 B1 B1 F2 B2 B2          (p = 2, m = 3; a backward takes two slots)

Rank r runs p - 1 - r forwards before its first pair, so it keeps p - r micro-batches, however many there are.

Interleaved (Megatron-LM, "Efficient Large-Scale Language Model Training on GPU Clusters", section 2.2): rank r holds
stages r and r + p, and micro-batches go in groups of p, each group through the first stage and then the second. The
bubble halves; memory and traffic grow.
"""

from __future__ import annotations

from collections.abc import Sequence

from ds_vshape.schedule.passes import BW, F, Pass
from ds_vshape.schedule.placement import interleaved, linear
from ds_vshape.schedule.schedule import Order, Schedule


def one_f_one_b(ranks: int, micro_batches: int) -> Schedule:
    """1F1B on p stages with whole backwards."""
    batch = range(micro_batches)
    orders = tuple(_alternate([F(stage, i) for i in batch], [BW(stage, i) for i in batch], ranks - 1 - stage)
                   for stage in range(ranks))
    return Schedule("1f1b", linear(ranks), micro_batches, orders)


def interleaved_one_f_one_b(ranks: int, micro_batches: int) -> Schedule:
    """1F1B on 2p stages, two a rank, with whole backwards."""
    # An incomplete last group would leave ranks waiting for each other: fill it, and drop what was filled in.
    groups = [range(first, first + ranks) for first in range(0, micro_batches, ranks)]
    orders = []
    for rank in range(ranks):
        chunks = (rank, rank + ranks)
        forwards = [F(stage, i) for group in groups for stage in chunks for i in group]
        backwards = [BW(stage, i) for group in groups for stage in reversed(chunks) for i in group]
        # Before its first backward a rank does a group's first half, and two more for each rank that comes after it.
        order = _alternate(forwards, backwards, ranks + 2 * (ranks - 1 - rank))
        orders.append(tuple(action for action in order if action.micro_batch < micro_batches))
    return Schedule("interleaved-1f1b", interleaved(ranks), micro_batches, tuple(orders))


def _alternate(forwards: Sequence[Pass], backwards: Sequence[Pass], warm_up: int) -> Order:
    """`warm_up` forwards, then a forward and a backward in turn, then the backwards that are left."""
    warm_up = min(warm_up, len(forwards))
    order = list(forwards[:warm_up])
    for forward, backward in zip(forwards[warm_up:], backwards):
        order += forward, backward
    return tuple(order) + tuple(backwards[len(forwards) - warm_up:])
