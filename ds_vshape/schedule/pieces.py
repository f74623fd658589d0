"""Where a W is cut into pieces: between its entries.

An entry is what one operator with weights leaves to W. They are computed in their order, and none can be cut, so a big
head beside small layers is a piece of its own however many pieces there are:

    entries     1 1 1 1 8            1 1 1 1 1 1
    2 pieces    1 1 1 1 | 8          1 1 1 | 1 1 1
    4 pieces    1 | 1 | 1 1 | 8      1 | 1 | 1 1 | 1 1
"""

from __future__ import annotations

from functools import lru_cache
from itertools import accumulate


@lru_cache(maxsize=4096)
def cut(costs: tuple[float, ...], pieces: int) -> tuple[int, ...]:
    """After how many of the entries with these `costs` each piece ends; as many pieces as entries, if those are fewer.

    No piece is without an entry. Of all such cuts it has the least sum of the squares of the pieces' costs.
    """
    sums = (0.0, *accumulate(costs))
    count = len(costs)
    # For each number of entries: the least sum of squares of the pieces so far, and where the last of them ends.
    least = [0.0] + [float("inf")] * count
    ends: list[tuple[int, ...]] = [()] * (count + 1)
    for piece in range(min(pieces, count)):
        after = [float("inf")] * (count + 1)
        ends_after: list[tuple[int, ...]] = [()] * (count + 1)
        for end in range(piece + 1, count + 1):
            squares, start = min((least[start] + (sums[end] - sums[start]) ** 2, start) for start in range(piece, end))
            after[end], ends_after[end] = squares, (*ends[start], end)
        least, ends = after, ends_after
    return ends[count]
