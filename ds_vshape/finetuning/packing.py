"""Which samples share a row, so that rows of one length have little padding."""

from __future__ import annotations

from bisect import bisect_left, insort
from collections.abc import Sequence


def pack(lengths: Sequence[int], row: int) -> list[list[int]]:
    """The samples of each row, by their places in `lengths` (tokens); no row has more than `row` tokens.

    Best fit, the longest sample first: each goes where the least room is left after it. It takes at most 11/9 of the
    least possible number of rows, and one more (Johnson, 1974: first and best fit decreasing).

    Raises:
        ValueError: for a sample longer than a row, or without tokens.
    """
    rows: list[list[int]] = []
    # The rows that have so many tokens of room left, and all such numbers in their order.
    with_room: dict[int, list[int]] = {}
    rooms: list[int] = []
    for sample in sorted(range(len(lengths)), key=lambda place: (-lengths[place], place)):
        length = lengths[sample]
        if not 0 < length <= row:
            raise ValueError(f"sample {sample} has {length} tokens: must be from 1 to {row}, the length of a row")
        place = bisect_left(rooms, length)
        if place == len(rooms):
            rows.append([])
            chosen, room = len(rows) - 1, row
        else:
            room = rooms[place]
            chosen = with_room[room].pop()
            if not with_room[room]:
                del with_room[room], rooms[place]
        rows[chosen].append(sample)
        left = room - length
        if left not in with_room:
            with_room[left] = []
            insort(rooms, left)
        with_room[left].append(chosen)
    return rows
