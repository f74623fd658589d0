"""How far apart the ranks' clocks are, by the ends of a few round trips, as in NTP.

Rank 0 notes when it asks and when the answer is there; the other rank answers with its own time, which lies between
the two. So half of the quickest round trip bounds the error, however unlike the two ways are.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist

from ds_vshape.trace.batch import Clock

_ROUNDS = 12


def clocks(ranks: Sequence[int], group: Any, device: torch.device) -> tuple[Clock, ...]:
    """The clocks (time.perf_counter) of the global `ranks` of a pipeline; nothing but on the first of them.

    Collective over the pipeline's `group`.
    """
    tick = torch.zeros(1, dtype=torch.float64, device=device)
    if dist.get_rank() != ranks[0]:
        for _ in range(_ROUNDS):
            dist.recv(tick, ranks[0], group=group)
            tick.item()  # on a device, receives end behind the host
            dist.send(tick.fill_(time.perf_counter()), ranks[0], group=group)
        return ()
    return (Clock(0.0, 0.0), *(_ask(tick, rank, group) for rank in ranks[1:]))


def _ask(tick: torch.Tensor, rank: int, group: Any) -> Clock:
    trips = []
    for _ in range(_ROUNDS):
        asked = time.perf_counter()
        dist.send(tick, rank, group=group)
        dist.recv(tick, rank, group=group)
        theirs = float(tick)
        trips.append((time.perf_counter() - asked, theirs - asked))
    took, ahead = min(trips)
    return Clock(ahead - took / 2, took / 2)
