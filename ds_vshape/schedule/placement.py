"""Placements: which rank holds which stage.

    linear         stage i on rank i                                       0 1 2 3
    v              down the ranks and back up, once for each two chunks    0 1 2 3 / 7 6 5 4 / 8 9 10 11 / 15 14 13 12
    interleaved    down the ranks, again and again                         0 1 2 3 / 4 5 6 7 / 8 9 10 11

A stage as seen from the rank that holds it is a chunk: chunk 0 is the rank's first stage in model order. A V of more
than two chunks is the wave of Hanayo ("Hanayo: Harnessing Wave-like Pipeline Parallelism").
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property

# How many chunks a rank may have, by the name of the placement; the first is the number if no other is asked for.
MOST_CHUNKS = 16
CHUNKS: dict[str, Sequence[int]] = {
    "linear": (1,), "v": range(2, MOST_CHUNKS + 1, 2), "interleaved": range(2, MOST_CHUNKS + 1)}


@dataclass(frozen=True)
class Placement:
    """`chunks[r]` are the stages that rank r holds, in model order."""

    name: str
    chunks: tuple[tuple[int, ...], ...]

    def __str__(self) -> str:
        return f"{self.ranks} ranks ({self.name}, {self.chunks_each} stages each)"

    @property
    def ranks(self) -> int:
        """How many pipeline ranks there are (p)."""
        return len(self.chunks)

    @cached_property
    def stages(self) -> int:
        """How many stages the model is cut into."""
        return sum(len(stages) for stages in self.chunks)

    @property
    def chunks_each(self) -> int:
        """How many stages a rank holds: as many on each."""
        return len(self.chunks[0])

    @cached_property
    def last_stage(self) -> int:
        """The stage that computes the loss."""
        return self.stages - 1

    @cached_property
    def _rank_of(self) -> dict[int, int]:
        return {stage: rank for rank, stages in enumerate(self.chunks) for stage in stages}

    def rank_of(self, stage: int) -> int:
        """The rank that holds `stage`."""
        return self._rank_of[stage]

    def chunk_of(self, stage: int) -> int:
        """The place of `stage` among the stages of its rank."""
        return self.chunks[self.rank_of(stage)].index(stage)


def linear(ranks: int, chunks: int = 1) -> Placement:
    """One stage a rank, in rank order."""
    _check("linear", chunks)
    return Placement("linear", tuple((rank,) for rank in range(ranks)))


def v(ranks: int, chunks: int = 2) -> Placement:
    """An even number of stages a rank, down and back up: the first and the last stage meet on rank 0."""
    _check("v", chunks)
    return Placement("v", tuple(tuple(chunk * ranks + (ranks - 1 - rank if chunk % 2 else rank)
                                      for chunk in range(chunks)) for rank in range(ranks)))


def interleaved(ranks: int, chunks: int = 2) -> Placement:
    """Two stages a rank or more, round after round: the last rank hands over to rank 0."""
    _check("interleaved", chunks)
    return Placement("interleaved", tuple(tuple(range(rank, chunks * ranks, ranks)) for rank in range(ranks)))


def _check(name: str, chunks: int) -> None:
    if chunks not in CHUNKS[name]:
        raise ValueError(f"{chunks} chunks on a rank: the placement {name} has {either(CHUNKS[name])}")


def either(numbers: Iterable[int]) -> str:
    """"2, 3 or 4", for errors."""
    *others, last = map(str, numbers)
    return f"{', '.join(others)} or {last}" if others else last


# By name: from the numbers of ranks and of chunks on each.
PLACEMENTS: dict[str, Callable[..., Placement]] = {"linear": linear, "v": v, "interleaved": interleaved}
