"""How far apart the ranks' clocks are: by round trips, as in NTP, and by the batch's own messages.

Rank 0 notes when it asks and when the answer is there; the other rank answers with its own time, which lies between
the two. So half of the quickest round trip bounds the error, however unlike the two ways are. On a busy host that may
be longer than a message takes. But none arrives before it is sent: each narrows the bounds (`refined`), until nothing
of the batch contradicts the clocks.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Sequence
from typing import Any

import torch
import torch.distributed as dist

from ds_vshape.measure.trace.batch import Clock, Delivery

_ROUNDS = 24


def clocks(ranks: Sequence[int], group: Any) -> tuple[Clock, ...]:
    """The clocks (time.perf_counter) of the global `ranks` of a pipeline; nothing but on the first of them.

    Collective over their `group`, which is one over gloo: no device's work comes between.
    """
    tick = torch.zeros(1, dtype=torch.float64)
    if dist.get_rank() != ranks[0]:
        for _ in range(_ROUNDS):
            dist.recv(tick, ranks[0], group=group)
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


def refined(asked: Sequence[Clock], messages: Iterable[Delivery]) -> tuple[Clock, ...]:
    """The clocks of all ranks within their bounds and such that no message arrives before it is sent.

    `messages` have times of their rank's own clock.
    """
    # By how much a rank's clock may at most be ahead of another's.
    most: dict[tuple[int, int], float] = {}
    for delivery in messages:
        pair = delivery.message.channel.source, delivery.message.channel.target
        most[pair] = min(most.get(pair, float("inf")), delivery.arrived - delivery.sent.start)
    low = [clock.offset - clock.uncertainty for clock in asked]
    high = [clock.offset + clock.uncertainty for clock in asked]
    for _ in asked:
        for (source, target), ahead in most.items():
            high[target] = min(high[target], high[source] + ahead)
            low[source] = max(low[source], low[target] - ahead)
    # All the lowest together meet every bound, and all the highest; so do the means of the two.
    return tuple(Clock((first + last) / 2, max(0.0, last - first) / 2) for first, last in zip(low, high))
