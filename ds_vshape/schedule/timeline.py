"""The simulator: when each pass of a schedule starts and ends, given its times.

A rank runs its passes in order, each as soon as its input is there. What crosses ranks arrives a hop later; what
stays on a rank arrives at once.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise

from ds_vshape.schedule.passes import Kind, Pass
from ds_vshape.schedule.placement import Placement
from ds_vshape.schedule.schedule import Schedule, ScheduleError


@dataclass(frozen=True)
class Times:
    """Seconds (or any one unit) of F, B and W for each stage, and of a hop for each boundary between stages.

    `hops[s]` is the time from stage s to stage s + 1, and as much back; it counts only if they are on different ranks.
    Without any, hops take no time. Where micro-batches differ, as sequences of mixed lengths do, all passes of
    micro-batch i take `scales[i]` times as long; without any, all are alike.
    """

    forward: tuple[float, ...]
    input_grad: tuple[float, ...]
    weight_grad: tuple[float, ...]
    hops: tuple[float, ...] = ()
    scales: tuple[float, ...] = ()

    @classmethod
    def uniform(cls, stages: int, forward: float = 1, input_grad: float = 1, weight_grad: float = 1,
                hop: float = 0) -> Times:
        """The same times for each of `stages` stages, and the same hop at each boundary."""
        return cls((forward,) * stages, (input_grad,) * stages, (weight_grad,) * stages, (hop,) * (stages - 1))

    def of(self, action: Pass) -> float:
        """How long `action` takes."""
        seconds = self._unscaled(action)
        return seconds * self.scales[action.micro_batch] if self.scales else seconds

    def _unscaled(self, action: Pass) -> float:
        stage = action.stage
        if action.kind is Kind.F:
            return self.forward[stage]
        if action.kind is Kind.B:
            return self.input_grad[stage]
        if action.kind is Kind.W:
            return self.weight_grad[stage] / action.pieces
        return self.input_grad[stage] + self.weight_grad[stage]

    def of_stage(self, stage: int) -> float:
        """How long a micro-batch of scale 1 takes on `stage`, forward and backward."""
        return self.forward[stage] + self.input_grad[stage] + self.weight_grad[stage]

    def delays(self, placement: Placement) -> tuple[float, ...]:
        """How long each boundary's outputs are on their way [stage]: `hops`, and nothing within a rank."""
        ranks = map(placement.rank_of, range(placement.stages))
        hops = self.hops or (0.0,) * (placement.stages - 1)
        return tuple(hop * (here != there) for hop, (here, there) in zip(hops, pairwise(ranks), strict=True))


@dataclass(frozen=True)
class Span:
    """A pass with its start and end."""

    action: Pass
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


class _Results:
    """When each micro-batch's output, or input gradient, of a stage is there, and the ranks that wait for it."""

    def __init__(self) -> None:
        self.ends: dict[int, float] = {}
        self.waiting: dict[int, list[int]] = {}


_Needs = tuple[tuple[_Results, float], ...]


def simulate(schedule: Schedule, times: Times) -> Timeline:
    """Run `schedule` with `times`; ScheduleError if a rank waits for what never comes."""
    stages, delays = range(schedule.placement.stages), times.delays(schedule.placement)
    outputs, gradients = [_Results() for _ in stages], [_Results() for _ in stages]
    # What each stage's F, W, and B or BW need (`schedule.dependencies`), and how long that is on its way.
    before_f: list[_Needs] = [(), *(((outputs[stage], delay),) for stage, delay in enumerate(delays))]
    before_w: list[_Needs] = [((gradients[stage], 0.0),) for stage in stages]
    before_b: list[_Needs] = [*(((outputs[stage], 0.0), (gradients[stage + 1], delay))
                                for stage, delay in enumerate(delays)), ((outputs[-1], 0.0),)]
    orders = [tuple(order) for order in schedule.orders]
    spans: list[list[Span]] = [[] for _ in orders]
    runnable = list(range(len(orders)))
    while runnable:
        rank = runnable.pop()
        done = spans[rank]
        free = done[-1].end if done else 0.0
        for action in orders[rank][len(done):]:
            stage, micro_batch = action.stage, action.micro_batch
            if action.kind is Kind.F:
                needs, results = before_f[stage], outputs[stage]
            elif action.kind is Kind.W:
                needs, results = before_w[stage], None
            else:
                needs, results = before_b[stage], gradients[stage]
            start = free
            for given, delay in needs:
                end = given.ends.get(micro_batch)
                if end is None:
                    given.waiting.setdefault(micro_batch, []).append(rank)
                    break
                if end + delay > start:
                    start = end + delay
            else:
                free = start + times.of(action)
                done.append(Span(action, start, free))
                if results is not None:
                    results.ends[micro_batch] = free
                    if micro_batch in results.waiting:
                        runnable.extend(results.waiting.pop(micro_batch))
                continue
            break
    stuck = [f"rank {rank} at {order[len(spans[rank])]}"
             for rank, order in enumerate(orders) if len(spans[rank]) < len(order)]
    if stuck:
        raise ScheduleError(f"{schedule.name} can't run: " + ", ".join(stuck) + " wait for each other")
    return Timeline(tuple(tuple(rank) for rank in spans))
