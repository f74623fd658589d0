"""Divides the layers into stages where a rank holds more than two: by local search.

The tables of balance.py would need a dimension for each chunk of a rank. So bounds are moved here, alone or several in
a row together, as long as that makes the load of the most loaded rank smaller, or leaves it and makes the sum of
squares of the stages' loads smaller. No such move makes the result better, which doesn't prove that nothing does.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from itertools import accumulate, pairwise, product

from ds_vshape.schedule.placement import Placement

# How many bounds in a row move together, and by how many layers.
_ROWS = (1, 2, 3, 4, 6, 8, 12, 16)
_DISTANCES = (1, -1, 2, -2, 4, -4)
# Loads that differ by rounding alone are equal.
_ROUNDING = 1e-9

Measure = tuple[float, float]


def improved(bounds: Sequence[int], costs: Sequence[float], placement: Placement, slack: float) -> tuple[int, ...]:
    """`bounds` after all moves that make them better, in the end also those by which the most loaded rank has up to the
    share `slack` more.

    `bounds` are the first layer of each stage, then the number of layers; `costs` one for each layer.
    """
    sums = [0.0, *accumulate(costs)]

    def measured(bounds: Sequence[int]) -> Measure:
        loads = [sums[stop] - sums[start] for start, stop in pairwise(bounds)]
        return (max(math.fsum(loads[stage] for stage in stages) for stages in placement.chunks),
                math.fsum(load * load for load in loads))

    found = _descended(list(bounds), measured, 0.0)
    least = measured(found)[0]
    return tuple(_descended(found, measured, least * (1 + slack)))


def _descended(bounds: list[int], measured: Callable[[Sequence[int]], Measure], enough: float) -> list[int]:
    """`bounds` after all moves that make the first measure smaller, down to `enough`, or else the second."""
    def order(measure: Measure) -> Measure:
        return max(measure[0], enough), measure[1]

    best, improving = order(measured(bounds)), True
    while improving:
        improving = False
        for row, first, distance in product(_ROWS, range(1, len(bounds) - 1), _DISTANCES):
            last = first + row - 1
            if last >= len(bounds) - 1:
                continue
            if bounds[first] + distance <= bounds[first - 1] or bounds[last] + distance >= bounds[last + 1]:
                continue
            moved = [*bounds[:first], *(bound + distance for bound in bounds[first:last + 1]), *bounds[last + 1:]]
            measure = order(measured(moved))
            if (measure[0] < best[0] * (1 - _ROUNDING)
                    or measure[0] <= best[0] and measure[1] < best[1] * (1 - _ROUNDING)):
                bounds, best, improving = moved, measure, True
    return bounds
