"""Interleaved schedules: rank r holds stages r, r + p, ..., and micro-batches go in groups of p.

Each group goes through the first stage of a rank, then the second, and so on. So what a rank waits for at the start and
the end of a batch are passes of one chunk; there are c on each rank.

    schedule           forwards before the first pair   W                    peak                 bubble of one batch
    interleaved-1f1b   (c - 1) p + 2 (p - 1 - r)        with B               (c + 1) p - 1        1/c of 1F1B's
    interleaved-zb     (c - 1) p + p - 1 - r            r backwards later    c p (1F1B's)         1/(3c) of 1F1B's

Peaks count activations of a chunk. `interleaved-1f1b` is Megatron-LM's ("Efficient Large-Scale Language Model Training
on GPU Clusters", section 2.2). `interleaved-zb` is ZB-H1 ("Zero Bubble Pipeline Parallelism", section 2.3) on more than
one chunk: a rank keeps less the further it is from the first, so it may put its Ws off by more, and they fill what was
a bubble. Where p divides m its order is that of torch's ScheduleInterleavedZeroBubble, reordered.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from ds_vshape.schedule.builders.building_block import reorder
from ds_vshape.schedule.builders.one_f_one_b import alternate
from ds_vshape.schedule.passes import BW, B, F, Kind, Pass, W
from ds_vshape.schedule.placement import interleaved
from ds_vshape.schedule.schedule import Order, Schedule


def interleaved_one_f_one_b(ranks: int, micro_batches: int, chunks: int = 2) -> Schedule:
    """1F1B on `chunks` stages a rank, with whole backwards."""

    def order(rank: int, forwards: Sequence[Pass], backwards: Sequence[Pass]) -> Order:
        return alternate(forwards, [BW(b.stage, b.micro_batch) for b in backwards],
                         (chunks - 1) * ranks + 2 * (ranks - 1 - rank))

    return _in_groups("interleaved-1f1b", ranks, micro_batches, chunks, order)


def interleaved_zb(ranks: int, micro_batches: int, chunks: int = 2) -> Schedule:
    """1F1B's activations on `chunks` stages a rank, and a bubble of p - 1 passes where p divides m."""

    def order(rank: int, forwards: Sequence[Pass], backwards: Sequence[Pass]) -> Order:
        order: list[Pass] = []
        weight_grads = iter([W(b.stage, b.micro_batch) for b in backwards])
        done = 0
        for action in alternate(forwards, backwards, (chunks - 1) * ranks + ranks - 1 - rank):
            order.append(action)
            done += action.kind is Kind.B
            if action.kind is Kind.B and done > rank:
                order.append(next(weight_grads))
        return (*order, *weight_grads)

    return reorder(_in_groups("interleaved-zb", ranks, micro_batches, chunks, order), chunks * ranks)


def _in_groups(name: str, ranks: int, micro_batches: int, chunks: int,
               order: Callable[[int, Sequence[Pass], Sequence[Pass]], Order]) -> Schedule:
    """The schedule of the orders that `order` makes of a rank's forwards and backwards, all of them in groups."""
    placement = interleaved(ranks, chunks)
    # An incomplete last group would leave ranks waiting for each other: fill it, and drop what was filled in.
    groups = [range(first, first + ranks) for first in range(0, micro_batches, ranks)]
    orders = []
    for rank, stages in enumerate(placement.chunks):
        filled = order(rank, [F(stage, i) for group in groups for stage in stages for i in group],
                       [B(stage, i) for group in groups for stage in reversed(stages) for i in group])
        orders.append(tuple(action for action in filled if action.micro_batch < micro_batches))
    return Schedule(name, placement, micro_batches, tuple(orders))
