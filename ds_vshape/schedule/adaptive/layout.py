"""A problem as arrays of numbers, which is what the planner's inner loops work on.

With n chunks on each rank, streams are numbered kind * n + chunk, with the kinds F, B and W from 0: F, F, B, B, W, W
for two chunks. The passes of a stream are numbered in micro-batch order, those of W by pieces.
"""

from __future__ import annotations

from itertools import pairwise
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from ds_vshape.schedule.adaptive.problem import Problem

F, B, W = range(3)
KINDS = 3
Floats = NDArray[np.float64]
Ints = NDArray[np.int64]


class Layout(NamedTuple):
    """A problem in arrays, for W in `pieces` (none at all where B takes W with it).

    A rank's passes of a stream take `durations` [rank, stream, piece], where F and B have piece 0 alone, and those of
    micro-batch i `scales[i]` times as long. A stage with fewer entries than `pieces` has them in the last pieces, and
    the first ones take no time. A pass's output goes to `next_rank` and `next_stream`, where it arrives `delay` later;
    -1 is nowhere. `from_rank` and `from_stream` are the other way; -1 is the batch itself. A forward takes memory, B
    gives back `freed` and the last piece of W `kept`. All others but the limits are [rank, stream] or [rank, chunk].
    """

    batch: int
    pieces: int
    fused: bool
    durations: Floats
    next_rank: Ints
    next_stream: Ints
    delay: Floats
    from_rank: Ints
    from_stream: Ints
    limits: Floats
    taken: Floats
    freed: Floats
    kept: Floats
    scales: Floats


class Way(NamedTuple):
    """Where a micro-batch comes from and goes to [rank, stream], as in `Layout`; W goes nowhere."""

    next_rank: Ints
    next_stream: Ints
    delay: Floats
    from_rank: Ints
    from_stream: Ints


def way_of(problem: Problem) -> Way:
    """Through all forwards, and back through all backwards."""
    placement, delays = problem.placement, problem.times.delays(problem.placement)
    shape = (placement.ranks, KINDS * placement.chunks_each)
    next_rank, next_stream, from_rank, from_stream = (np.full(shape, -1) for _ in range(4))
    delay = np.zeros(shape)
    stages = range(placement.stages)
    for (kind, stage), (next_kind, after) in pairwise([*((F, stage) for stage in stages),
                                                       *((B, stage) for stage in reversed(stages))]):
        rank, stream = placement.rank_of(stage), kind * placement.chunks_each + placement.chunk_of(stage)
        target, fed = placement.rank_of(after), next_kind * placement.chunks_each + placement.chunk_of(after)
        next_rank[rank, stream], next_stream[rank, stream] = target, fed
        from_rank[target, fed], from_stream[target, fed] = rank, stream
        if stage != after:
            delay[rank, stream] = delays[min(stage, after)]
    return Way(next_rank, next_stream, delay, from_rank, from_stream)


def passes_of(streams: int, pieces: int) -> Ints:
    """How many passes of each stream a micro-batch has [stream], with W in `pieces`."""
    return np.repeat((1, 1, pieces), streams // KINDS)
