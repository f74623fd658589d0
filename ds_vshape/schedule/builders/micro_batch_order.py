"""In which order a schedule takes micro-batches that take different times, as those of mixed lengths do.

A pass of a long micro-batch on one rank makes the next rank wait if that has a short one to do meanwhile, so neighbours
should be alike; and short ones at both ends of the batch make its ramps short:

    place           0   1   2   3   4   5   6   7
    share 1         1   2   3   4   5   6   7   8        times rise
    share 1/2       2   4   6   8   7   5   3   1        rise and fall, half of the micro-batches each
    share 0         8   7   6   5   4   3   2   1        fall

Which of these is best depends on the schedule's own ramps, so some are simulated, and the order of the data as well.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace

from ds_vshape.schedule.schedule import Schedule
from ds_vshape.schedule.timeline import Times, simulate

# The shares of micro-batches by which times rise, the most frequent winner first; and how many passes may be simulated
# to choose one: some tens of milliseconds.
_SHARES = (0.5, 0.75, 0.25, 1.0, 0.0)
_MOST_PASSES = 20_000


def micro_batch_order(schedule: Schedule, times: Times) -> tuple[int, ...]:
    """The micro-batch that takes each place in `schedule`, where micro-batch i takes `times.scales[i]` times as long.

    The same for the same arguments; the order of the data, 0 to m-1, where nothing is won by another one.
    """
    given = tuple(range(schedule.micro_batches))
    if len(set(times.scales)) < 2:
        return given
    orders = [given, *(rising_and_falling(times.scales, share) for share in _SHARES)]
    affordable = _MOST_PASSES // sum(map(len, schedule.orders))
    if affordable < 2:
        return orders[1]
    return min(orders[:affordable], key=lambda order: simulate(schedule, in_order(times, order)).makespan)


def in_order(times: Times, order: Sequence[int]) -> Times:
    """`times` of a batch whose micro-batch order[i] takes place i."""
    return replace(times, scales=tuple(times.scales[micro_batch] for micro_batch in order))


def rising_and_falling(scales: Sequence[float], share: float) -> tuple[int, ...]:
    """Micro-batches in an order in which `share` of them rise in their scales, and then the others fall."""
    rising: list[int] = []
    falling: list[int] = []
    for micro_batch, rises in zip(sorted(range(len(scales)), key=lambda i: scales[i]), _spread(share)):
        (rising if rises else falling).append(micro_batch)
    return (*rising, *reversed(falling))


def _spread(share: float) -> Iterator[bool]:
    """An endless sequence of which `share` are true, evenly spread."""
    owed = 0.0
    while True:
        owed += share
        yield owed >= 1
        owed -= owed >= 1
