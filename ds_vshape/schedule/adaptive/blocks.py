"""Policies from building blocks: one micro-batch's ideal starts, repeated every interval.

A block follows a micro-batch down, up, down and up again, with more chunks more often, as the paper's does (section 3),
but with the real times: each step takes the pass and its hop, times the stretch of that way; at the turns between ways
(F at the last rank, F to B at rank 0, B at the last rank) it may rest. Passes of a rank may meet in it; the list
scheduler parts them. Few numbers describe a block whatever the number of ranks, so a search among them works for many
ranks as for few.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from random import Random

import numpy as np
from numpy.typing import NDArray

from ds_vshape.schedule.adaptive.layout import KINDS, B, F, W
from ds_vshape.schedule.adaptive.list_scheduler import ListScheduler, Policy, TargetStarts
from ds_vshape.schedule.adaptive.problem import Problem

# 0 waits for the most urgent pass however long that takes; with the greatest, no rank waits while it has work.
PATIENCES = (0.0, 0.3, 1.0, 2.0, 5.0, 100.0)
PIECES = (1, 2, 4, 8)


@dataclass(frozen=True)
class BlockParameters:
    """A building block in a few numbers.

    `ways` are the stretches of the ways less 1: forward through each chunk, and back. `rests` at the turns between
    them, `weight_grad_after` (W after the end of B), `interval` (below 1, other micro-batches matter less than what
    kind of pass it is) and `shifts` (of each stream of each rank; or empty) are in units of the slowest rank's work on
    one micro-batch. The last rank leaves the share `reserve` of its memory free of chunk 0, rank 0 nothing, those
    between in proportion; less is left free of later chunks. `patience` and `pieces` are those of the policy.
    """

    ways: tuple[float, ...]
    rests: tuple[float, ...]
    weight_grad_after: float
    interval: float
    reserve: float
    patience: float
    pieces: int
    shifts: tuple[float, ...] = ()

    @classmethod
    def fastest(cls, patience: float, chunks: int = 2) -> BlockParameters:
        """Every micro-batch as fast as it can."""
        return cls((0.0,) * (2 * chunks), (0.0,) * (2 * chunks - 1), 0.0, 1.0, 0.0, patience, 1)

    @classmethod
    def random(cls, max_pieces: int, random: Random, chunks: int = 2) -> BlockParameters:
        """Any block."""
        return cls(tuple(random.uniform(0, 1.5) for _ in range(2 * chunks)),
                   tuple(random.uniform(0, 0.5) for _ in range(2 * chunks - 1)),
                   random.choice((random.uniform(0, 3), 10.0)),
                   random.choice((random.uniform(1, 1.5), random.uniform(0, 1))),
                   random.uniform(0, 0.5), random.choice(PATIENCES),
                   random.choice([pieces for pieces in PIECES if pieces <= max_pieces]))

    @classmethod
    def known(cls, max_pieces: int, chunks: int = 2) -> Iterator[BlockParameters]:
        """The paper's V blocks with real times (its Tables 8 and 9), and simple rules: B first, or in turn."""
        ways, rests = 2 * chunks, 2 * chunks - 1
        rested = tuple(1 / 3 if turn == chunks - 1 else 0.0 for turn in range(rests))
        for pieces in (pieces for pieces in PIECES[:3] if pieces <= max_pieces):
            for patience in (0.3, 1.0, 100.0):
                yield cls((0.0,) * ways, rested, 0.0, 1.0, 0.0, patience, pieces)
                yield cls((1.0, 0.0) * chunks, rested, 0.0, 1.0, 0.0, patience, pieces)
                yield cls((3.0, 1.0) * chunks, rested, 0.0, 1.0, 0.0, patience, pieces)
                yield cls((0.0,) * ways, (0.0,) * rests, 10.0, 0.2, 0.0, patience, pieces)
                yield cls((0.0,) * ways, (0.0,) * rests, 10.0, 1.0, 0.0, patience, pieces)

    def mutated(self, random: Random) -> BlockParameters:
        """This block with some numbers a little different."""
        sigma = random.choice((0.02, 0.1, 0.3))

        def moved(value: float) -> float:
            return abs(value + random.gauss(0, sigma)) if random.random() < 0.3 else value

        return replace(self, ways=tuple(map(moved, self.ways)), rests=tuple(map(moved, self.rests)),
                       weight_grad_after=moved(self.weight_grad_after), interval=moved(self.interval),
                       reserve=min(0.8, moved(self.reserve)),
                       patience=random.choice(PATIENCES) if random.random() < 0.05 else self.patience)

    def shifted(self, ranks: int, random: Random) -> BlockParameters:
        """This block with a few streams of single ranks moved."""
        shifts = list(self.shifts or (0.0,) * (self._streams * ranks))
        for _ in range(random.choice((1, 2, 5))):
            shifts[random.randrange(len(shifts))] += random.gauss(0, 0.3)
        return replace(self, shifts=tuple(shifts))

    def for_ranks(self, ranks: int) -> BlockParameters:
        """This block on another number of ranks: each takes the shifts of the one at the same height."""
        own = len(self.shifts) // self._streams
        chosen = [rank * own // ranks for rank in range(ranks)] if own else []
        return replace(self, shifts=tuple(shift for rank in chosen
                                          for shift in self.shifts[self._streams * rank:self._streams * (rank + 1)]))

    def mixed(self, other: BlockParameters, random: Random) -> BlockParameters:
        """A block between this and `other`, or somewhat beyond."""

        def between(own: float, others: float) -> float:
            return abs(own + (others - own) * random.uniform(-0.3, 1.3))

        return replace(self, ways=tuple(map(between, self.ways, other.ways)),
                       rests=tuple(map(between, self.rests, other.rests)),
                       weight_grad_after=between(self.weight_grad_after, other.weight_grad_after),
                       interval=between(self.interval, other.interval),
                       reserve=min(0.8, between(self.reserve, other.reserve)),
                       patience=random.choice((self.patience, other.patience)),
                       pieces=random.choice((self.pieces, other.pieces)))

    def policy(self, scheduler: ListScheduler) -> Policy:
        """The block repeated, for the problem of `scheduler`."""
        problem, work = scheduler.problem, scheduler.work
        reserves = np.array(scheduler.limits) * self.reserve * np.arange(problem.ranks) / max(1, problem.ranks - 1)
        pieces = 1 if scheduler.fused else self.pieces
        return Policy(repeat(self._offsets(problem, work), work * self.interval, problem.micro_batches, pieces),
                      self.patience, scheduler.reserves(reserves))

    @property
    def _streams(self) -> int:
        return KINDS * (len(self.ways) // 2)

    def _offsets(self, problem: Problem, work: float) -> NDArray[np.float64]:
        """The ideal starts of each rank's streams for micro-batch 0."""
        ranks, times, chunks = problem.ranks, problem.times, len(self.ways) // 2
        delays = (*times.delays(problem.placement), 0.0)
        shifts = self.shifts or (0.0,) * (self._streams * ranks)
        offsets = work * np.reshape(shifts, (ranks, self._streams))
        now = 0.0
        for stage in range(problem.placement.stages):
            rank, chunk = problem.placement.rank_of(stage), stage // ranks
            offsets[rank, F * chunks + chunk] += now
            if stage == problem.placement.last_stage:
                now += times.forward[stage] * (1 + self.ways[chunk]) + self.rests[chunk] * work
            elif (stage + 1) % ranks == 0:
                now += times.forward[stage] + delays[stage] + self.rests[chunk] * work
            else:
                now += (times.forward[stage] + delays[stage]) * (1 + self.ways[chunk])
        for stage in reversed(range(problem.placement.stages)):
            rank, chunk, way = problem.placement.rank_of(stage), stage // ranks, -1 - stage // ranks
            offsets[rank, B * chunks + chunk] += now
            offsets[rank, W * chunks + chunk] += now + times.input_grad[stage] + self.weight_grad_after * work
            if stage % ranks == 0 and stage > 0:
                now += times.input_grad[stage] + delays[stage - 1] + self.rests[-chunk] * work
            elif stage > 0:
                now += (times.input_grad[stage] + delays[stage - 1]) * (1 + self.ways[way])
        return offsets


def repeat(offsets: NDArray[np.float64], interval: float, micro_batches: int, pieces: int = 1) -> TargetStarts:
    """The block's starts [rank, stream] for all micro-batches, W in `pieces` that all wish the same."""
    lines = offsets[:, :, None] + interval * np.arange(micro_batches)
    return np.repeat(lines[..., None], pieces, axis=-1)
