"""What each pass depends on, through all ranks: for a pass, the last pass of each other rank that must run before it.

This is the vector clock of distributed systems (Fidge; Mattern), counted in passes. A rank's passes run in its order,
so one number for each other rank says it all.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence

import numpy as np
from numpy.typing import NDArray

Clock = NDArray[np.int32]


class VectorClocks:
    """The vector clocks of passes that exchange messages.

    Args:
        needed_at: the places of the passes that need a message, by rank and place: from which rank and place it comes.
        lengths: how many passes each rank has.

    The messages must not form a cycle, for which `timeline.simulate` raises ScheduleError.
    """

    def __init__(self, needed_at: Sequence[Mapping[int, tuple[int, int]]], lengths: Sequence[int]) -> None:
        ranks = len(lengths)
        neighbours: list[set[int]] = [set() for _ in range(ranks)]
        makers: list[set[int]] = [set() for _ in range(ranks)]
        for rank, needs in enumerate(needed_at):
            for source, place in needs.values():
                makers[source].add(place)
                neighbours[rank].add(source)
                neighbours[source].add(rank)
        # By rank and neighbour, place by place.
        self._last: list[dict[int, list[int]]] = [{other: [] for other in sorted(those)} for those in neighbours]
        clocks: list[Clock] = [np.full(ranks, -1, np.int32) for _ in range(ranks)]
        made: dict[tuple[int, int], Clock] = {}
        waiting: dict[tuple[int, int], list[int]] = defaultdict(list)
        places, runnable = [0] * ranks, list(range(ranks))
        while runnable:
            rank = runnable.pop()
            clock, last = clocks[rank], self._last[rank]
            while places[rank] < lengths[rank]:
                place = places[rank]
                maker = needed_at[rank].get(place)
                if maker is not None:
                    if maker not in made:
                        waiting[maker].append(rank)
                        break
                    np.maximum(clock, made[maker], out=clock)
                for other, column in last.items():
                    column.append(int(clock[other]))
                clock[rank] = place
                places[rank] += 1
                if place in makers[rank]:
                    made[rank, place] = clock.copy()
                    runnable += waiting.pop((rank, place), ())

    def last_before(self, rank: int, place: int, other: int) -> int:
        """The place of the last pass of `other` that the pass at `place` of `rank` depends on; -1 if there is none.

        `other` is a rank that sends to `rank` or receives from it.
        """
        return self._last[rank][other][place]

    def column(self, rank: int, other: int) -> Sequence[int]:
        """`last_before` of all places of `rank`, which never falls."""
        return self._last[rank][other]
