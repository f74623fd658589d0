"""Placements: which rank holds which stage.

    linear        stage i on rank i                            p stages    0 1 2 3
    v             stages i and 2p-1-i on rank i               2p stages    0 1 2 3 / 7 6 5 4
    interleaved   stages i and i+p on rank i                  2p stages    0 1 2 3 / 4 5 6 7

A stage as seen from the rank that holds it is a chunk: chunk 0 is the rank's first stage in model order.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property


@dataclass(frozen=True)
class Placement:
    """`chunks[r]` are the stages that rank r holds, in model order."""

    name: str
    chunks: tuple[tuple[int, ...], ...]

    @property
    def ranks(self) -> int:
        """How many pipeline ranks there are (p)."""
        return len(self.chunks)

    @cached_property
    def stages(self) -> int:
        """How many stages the model is cut into."""
        return sum(len(stages) for stages in self.chunks)

    @property
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


def linear(ranks: int) -> Placement:
    """One stage a rank, in rank order."""
    return Placement("linear", tuple((rank,) for rank in range(ranks)))


def v(ranks: int) -> Placement:
    """Two stages a rank, down and back up: the first and the last stage meet on rank 0."""
    return Placement("v", tuple((rank, 2 * ranks - 1 - rank) for rank in range(ranks)))


def interleaved(ranks: int) -> Placement:
    """Two stages a rank, round after round: the last rank hands over to rank 0."""
    return Placement("interleaved", tuple((rank, rank + ranks) for rank in range(ranks)))


PLACEMENTS: dict[str, Callable[[int], Placement]] = {"linear": linear, "v": v, "interleaved": interleaved}
