"""Times by chunks of the model and links between ranks, whatever the placement: what a person can say.

A model is cut into 2p chunks in model order. With two stages a rank a stage is a chunk; with one it is two of them, and
with four it is half of one.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import fsum

from ds_vshape.schedule.placement import Placement
from ds_vshape.schedule.timeline import Times


def _overlap(chunk: int, stage: int, chunks: int, stages: int) -> float:
    """Which share of a chunk, one of `chunks`, belongs to a stage, one of `stages`."""
    start, end = max(chunk * stages, stage * chunks), min((chunk + 1) * stages, (stage + 1) * chunks)
    return max(0, end - start) / stages


@dataclass(frozen=True)
class ChunkTimes:
    """Times of F, B and W of each of 2p chunks, and of a hop over each link between neighbouring ranks.

    One value alone stands for all of them. `hop[r]` is between ranks r and r + 1, for messages of one chunk's boundary.
    """

    forward: tuple[float, ...] = (1.0,)
    input_grad: tuple[float, ...] = (1.0,)
    weight_grad: tuple[float, ...] = (1.0,)
    hop: tuple[float, ...] = (0.0,)

    @classmethod
    def uniform(cls, forward: float, input_grad: float, weight_grad: float, hop: float) -> ChunkTimes:
        """The same for all chunks and links."""
        return cls((forward,), (input_grad,), (weight_grad,), (hop,))

    def check(self, ranks: int) -> None:
        """ValueError unless there is one value, or one for each of 2 `ranks` chunks and of `ranks` - 1 links."""
        for name, values in (("F", self.forward), ("B", self.input_grad), ("W", self.weight_grad)):
            if len(values) not in (1, 2 * ranks):
                raise ValueError(f"{len(values)} times of {name}: on {ranks} ranks there must be one for all chunks, "
                                 f"or one for each of {2 * ranks}")
        if len(self.hop) not in (1, ranks - 1):
            raise ValueError(f"{len(self.hop)} times of a hop: on {ranks} ranks there must be one for all links, "
                             f"or one for each of {ranks - 1}")

    def on(self, placement: Placement) -> Times:
        """The times of the placement's stages and boundaries; ValueError as `check`.

        From the last rank back to the first, as only the interleaved placement goes, a hop is as long as the longest.
        """
        ranks, stages = placement.ranks, placement.stages
        self.check(ranks)
        links = self.hop * (ranks - 1) if len(self.hop) == 1 else self.hop

        def hop(stage: int) -> float:
            here, there = placement.rank_of(stage), placement.rank_of(stage + 1)
            if here == there:
                return 0.0
            return links[min(here, there)] if abs(here - there) == 1 else max(links)

        def of_stages(chunks: tuple[float, ...]) -> tuple[float, ...]:
            every = chunks * (2 * ranks) if len(chunks) == 1 else chunks
            return tuple(fsum(time * _overlap(chunk, stage, 2 * ranks, stages) for chunk, time in enumerate(every))
                         for stage in range(stages))

        return Times(of_stages(self.forward), of_stages(self.input_grad), of_stages(self.weight_grad),
                     tuple(hop(stage) for stage in range(stages - 1)))

    def work(self, ranks: int) -> float:
        """The time that one micro-batch takes on all 2 `ranks` chunks."""
        return sum(sum(values) * (2 * ranks // len(values))
                   for values in (self.forward, self.input_grad, self.weight_grad))

    def __str__(self) -> str:
        forward, input_grad, weight_grad, hop = (":".join(f"{value:g}" for value in values) for values in (
            self.forward, self.input_grad, self.weight_grad, self.hop))
        return f"F {forward}, B {input_grad}, W {weight_grad}, hop {hop}"
