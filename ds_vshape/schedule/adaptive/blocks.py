"""Wishes from building blocks: one micro-batch's ideal starts, repeated every interval.

A block follows a micro-batch down, up, down and up again, as the paper's does (section 3), but with the real times: each
step takes the pass and its hop, times the stretch of that way; at the three turns (F at the last rank, F to B at rank
0, B at the last rank) it may rest. Passes of a rank may meet in it; the list scheduler parts them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from random import Random

from ds_vshape.schedule.adaptive.list_scheduler import B0, F0, W0, Wishes
from ds_vshape.schedule.adaptive.problem import Problem


@dataclass(frozen=True)
class Shape:
    """A block in a few numbers: stretches of the four ways, rests at the three turns, W after B, and the interval."""

    stretches: tuple[float, float, float, float]
    rests: tuple[float, float, float]
    weight_grad_after: float
    interval: float

    @classmethod
    def random(cls, work: float, random: Random) -> Shape:
        """Any shape, for ranks that work `work` on a micro-batch."""
        stretch = random.choice((1.5, 2.0, 3.0))
        return cls((random.uniform(1, stretch), random.uniform(1, stretch), random.uniform(1, stretch),
                    random.uniform(1, stretch)),
                   (random.uniform(0, work / 2), random.uniform(0, work / 2), random.uniform(0, work / 2)),
                   random.uniform(0, 3 * work), work * random.uniform(1, 1.5))

    def offsets(self, problem: Problem) -> list[list[float]]:
        """The ideal starts of each rank's six streams for micro-batch 0."""
        ranks, times = problem.ranks, problem.times
        stages = 2 * ranks
        offsets = [[0.0] * 6 for _ in range(ranks)]
        now = 0.0
        for stage in range(stages):
            rank, chunk = place(stage, ranks)
            offsets[rank][F0 + chunk] = now
            now += (times.forward[stage] + self.rests[0] if stage == ranks - 1 else
                    (times.forward[stage] + times.hop) * self.stretches[chunk])
        now += self.rests[1] - times.hop
        for stage in reversed(range(stages)):
            rank, chunk = place(stage, ranks)
            offsets[rank][B0 + chunk] = now
            offsets[rank][W0 + chunk] = now + times.input_grad[stage] + self.weight_grad_after
            now += (times.input_grad[stage] + self.rests[2] if stage == ranks else
                    (times.input_grad[stage] + times.hop) * self.stretches[3 - chunk])
        return offsets


def place(stage: int, ranks: int) -> tuple[int, int]:
    """Rank and chunk of `stage` on the V placement."""
    return (stage, 0) if stage < ranks else (2 * ranks - 1 - stage, 1)


def repeat(offsets: Sequence[Sequence[float]], interval: float, micro_batches: int, pieces: int = 1) -> Wishes:
    """The block's starts for all micro-batches, W in `pieces` that all wish the same."""
    return [[[start + interval * micro_batch for micro_batch in range(micro_batches)
              for _ in range(pieces if stream >= W0 else 1)] for stream, start in enumerate(row)] for row in offsets]
