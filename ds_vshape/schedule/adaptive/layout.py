"""A problem as arrays of numbers, which is what the planner's inner loops work on.

Streams are numbered F, F, B, B, W, W of chunk 0 and 1; the passes of a stream are numbered in micro-batch order, those
of W by pieces.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

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
