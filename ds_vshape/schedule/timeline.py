"""The simulator: when each pass of a schedule starts and ends, given its times.

A rank runs its passes in order, each as soon as its input is there. What crosses ranks arrives `hop` later; what
stays on a rank arrives at once.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

from ds_vshape.schedule.passes import Kind, Pass
from ds_vshape.schedule.schedule import Schedule, ScheduleError, dependencies, whole_backwards


@dataclass(frozen=True)
class Times:
    """Seconds (or any one unit) of F, B and W for each stage, and of a hop between two ranks."""

    forward: tuple[float, ...]
    input_grad: tuple[float, ...]
    weight_grad: tuple[float, ...]
    hop: float = 0.0

    @classmethod
    def uniform(cls, stages: int, forward: float = 1, input_grad: float = 1, weight_grad: float = 1,
                hop: float = 0) -> Times:
        """The same times for each of `stages` stages."""
        return cls((forward,) * stages, (input_grad,) * stages, (weight_grad,) * stages, hop)

    def of(self, work: Pass) -> float:
        """How long `work` takes."""
        stage = work.stage
        if work.kind is Kind.F:
            return self.forward[stage]
        if work.kind is Kind.B:
            return self.input_grad[stage]
        if work.kind is Kind.W:
            return self.weight_grad[stage] / work.pieces
        return self.input_grad[stage] + self.weight_grad[stage]

    def of_stage(self, stage: int) -> float:
        """How long a micro-batch takes on `stage`, forward and backward."""
        return self.forward[stage] + self.input_grad[stage] + self.weight_grad[stage]


@dataclass(frozen=True)
class Span:
    """A pass with its start and end."""

    work: Pass
    start: float
    end: float


@dataclass(frozen=True)
class Timeline:
    """The spans of each rank, in its order; simulated or measured."""

    ranks: tuple[tuple[Span, ...], ...]

    @cached_property
    def makespan(self) -> float:
        """From the first start on any rank to the last end on any rank."""
        spans = [span for rank in self.ranks for span in rank]
        return max(span.end for span in spans) - min(span.start for span in spans) if spans else 0.0

    @cached_property
    def longest_span(self) -> float:
        """The longest time from a rank's own first start to its own last end."""
        return max((rank[-1].end - rank[0].start for rank in self.ranks if rank), default=0.0)

    @cached_property
    def work(self) -> float:
        """The time of all passes of all ranks together."""
        return sum(span.end - span.start for rank in self.ranks for span in rank)

    @property
    def bubble(self) -> float:
        """The share of the ranks' time that no pass fills: 1 - work / (ranks x makespan)."""
        return 1 - self.work / (len(self.ranks) * self.makespan) if self.makespan else 0.0


def simulate(schedule: Schedule, times: Times) -> Timeline:
    """Run `schedule` with `times`; ScheduleError if a rank waits for what never comes."""
    placement = schedule.placement
    whole = whole_backwards(schedule)
    ends: dict[Pass, float] = {}
    spans: list[list[Span]] = [[] for _ in schedule.orders]
    waiting: dict[Pass, list[int]] = {}
    runnable = list(range(len(schedule.orders)))
    while runnable:
        rank = runnable.pop()
        order, done = schedule.orders[rank], spans[rank]
        while len(done) < len(order):
            work = order[len(done)]
            start = done[-1].end if done else 0.0
            for need in dependencies(work, placement.last_stage, whole):
                if need not in ends:
                    waiting.setdefault(need, []).append(rank)
                    break
                start = max(start, ends[need] + (times.hop if placement.rank_of(need.stage) != rank else 0.0))
            else:
                end = ends[work] = start + times.of(work)
                done.append(Span(work, start, end))
                runnable.extend(waiting.pop(work, ()))
                continue
            break
    stuck = [f"rank {rank} at {order[len(spans[rank])]}"
             for rank, order in enumerate(schedule.orders) if len(spans[rank]) < len(order)]
    if stuck:
        raise ScheduleError(f"{schedule.name} can't run: " + ", ".join(stuck) + " wait for each other")
    return Timeline(tuple(tuple(rank) for rank in spans))


def peak_activations(schedule: Schedule, sizes: Sequence[float] | None = None) -> tuple[float, ...]:
    """The most activations alive at once on each rank, from the start of F to the end of W (its last piece, or BW).

    `sizes` are those of each stage; without it each counts 1, or 2 where a rank holds one stage only: the unit is
    the activations of 1/(2p) of the model for one micro-batch, as in the paper's Table 1 (there M/2d).
    """
    placement = schedule.placement
    if sizes is None:
        sizes = [2 * placement.ranks / placement.stages] * placement.stages
    peaks = []
    for order in schedule.orders:
        alive = peak = 0.0
        for work in order:
            if work.kind is Kind.F:
                alive += sizes[work.stage]
                peak = max(peak, alive)
            elif work.frees_activations:
                alive -= sizes[work.stage]
        peaks.append(peak)
    return tuple(peaks)
