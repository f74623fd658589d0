"""The simulator: when each pass of a schedule starts and ends, given its times.

A rank runs its passes in order, each as soon as its input is there. What crosses ranks arrives a hop later; what
stays on a rank arrives at once.

Beside its passes a rank copies what Fs left to the host and back, in each direction one after another. A copy to the
host starts when its F has ended and those before it have: O takes no time, but waits for the end. A copy back starts
at its R, if those before it have ended; the pass that needs it waits.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise
from typing import NamedTuple

from ds_vshape.schedule.of_stages import check_numbers, check_numbers_of_layers, of_layers
from ds_vshape.schedule.passes import Kind, Pass
from ds_vshape.schedule.pieces import cut
from ds_vshape.schedule.placement import Placement
from ds_vshape.schedule.schedule import Schedule, ScheduleError, variants


@dataclass(frozen=True)
class Times:
    """Seconds (or any one unit) of F, B and W for each stage, and of a hop for each boundary between stages.

    `hops[s]` is the time from stage s to stage s + 1, and as much back; it counts only if they are on different ranks.
    Without any, hops take no time. Where micro-batches differ, as sequences of mixed lengths do, all passes of
    micro-batch i take `scales[i]` times as long, and its copies too; without any, all are alike.

    `recompute[s][k - 1]` is C of the first k layers of stage s, the last of them C of all its layers; without any, C of
    all takes as long as F. `offload[s]` and `reload[s]` are the copies of what F leaves to the host and back; without
    any they take no time. Where the first k layers are recomputed, F leaves less to copy, which takes
    `copied[s][k - 1]` times as long; without any, as long.

    `entry_costs[s]` are the costs of the entries of stage s's W in their order, in any unit: W is cut into pieces
    between them (`pieces.cut`). A stage without entries has nothing to cut. Without any costs at all, pieces are equal.

    Raises ValueError for times of C and of copies that aren't one or more for each stage, and for other costs.
    """

    forward: tuple[float, ...]
    input_grad: tuple[float, ...]
    weight_grad: tuple[float, ...]
    hops: tuple[float, ...] = ()
    scales: tuple[float, ...] = ()
    recompute: tuple[tuple[float, ...], ...] = ()
    offload: tuple[float, ...] = ()
    reload: tuple[float, ...] = ()
    copied: tuple[tuple[float, ...], ...] = ()
    entry_costs: tuple[tuple[float, ...], ...] = ()

    def __post_init__(self) -> None:
        stages = len(self.forward)
        for name, rows in (("times.recompute", self.recompute), ("times.copied", self.copied)):
            if rows:
                check_numbers_of_layers(name, rows, stages)
        for name, seconds in (("times.offload", self.offload), ("times.reload", self.reload)):
            if seconds:
                check_numbers(name, seconds, stages)
        if len(self.entry_costs) not in (0, stages):
            raise ValueError(f"times.entry_costs must be of {stages} stages, not of {len(self.entry_costs)}")
        for stage, costs in enumerate(self.entry_costs):
            check_numbers(f"times.entry_costs[{stage}]", costs, len(costs), "entry")

    @classmethod
    def uniform(cls, stages: int, forward: float = 1, input_grad: float = 1, weight_grad: float = 1,
                hop: float = 0, copy: float = 0) -> Times:
        """The same times for each of `stages` stages, and the same hop at each boundary."""
        return cls((forward,) * stages, (input_grad,) * stages, (weight_grad,) * stages, (hop,) * (stages - 1),
                   offload=(copy,) * stages, reload=(copy,) * stages)

    def of(self, action: Pass) -> float:
        """How long `action` takes; an O or R, its copy of all that F leaves."""
        seconds = self._unscaled(action)
        return seconds * self.scales[action.micro_batch] if self.scales else seconds

    def _unscaled(self, action: Pass) -> float:
        stage = action.stage
        if action.kind is Kind.F:
            return self.forward[stage]
        if action.kind is Kind.B:
            return self.input_grad[stage]
        if action.kind is Kind.W:
            return self.weight_grad[stage] * self._share(stage, action.piece, action.pieces)
        if action.kind is Kind.O:
            return self.offload[stage] if self.offload else 0.0
        if action.kind is Kind.R:
            return self.reload[stage] if self.reload else 0.0
        if action.kind is Kind.C:
            return of_layers(action, self.recompute) if self.recompute else self.forward[stage]
        return self.input_grad[stage] + self.weight_grad[stage]

    def of_copy(self, copy: Pass, recompute: Pass | None) -> float:
        """How long the copy of an O or R takes, where its micro-batch has the C `recompute` too."""
        return self.of(copy) * (of_layers(recompute, self.copied) if recompute and self.copied else 1.0)

    def ends_of_pieces(self, stage: int, pieces: int) -> tuple[float, ...]:
        """The shares of a stage's W that are done when each of `pieces` pieces ends; fewer if it has fewer entries."""
        if not self.entry_costs:
            return tuple(piece / pieces for piece in range(1, pieces + 1))
        costs = self.entry_costs[stage] or (0.0,)
        ends = cut(costs, pieces)
        total = sum(costs)
        # Where nothing takes time, it doesn't matter what share it is.
        return tuple(sum(costs[:end]) / total if total else end / len(costs) for end in ends)

    def _share(self, stage: int, piece: int, pieces: int) -> float:
        """The share of a stage's W that is in a piece: nothing in those that are more than its entries."""
        if pieces == 1:
            return 1.0
        known = self._shares.get((stage, pieces))
        if known is None:
            ends = self.ends_of_pieces(stage, pieces)
            known = *(end - start for start, end in pairwise((0.0, *ends))), *(0.0,) * (pieces - len(ends))
            self._shares[stage, pieces] = known
        return known[piece]

    @cached_property
    def _shares(self) -> dict[tuple[int, int], tuple[float, ...]]:
        """By stage and number of pieces, the share of each that has been asked for."""
        return {}

    def of_stage(self, stage: int) -> float:
        """How long a micro-batch of scale 1 takes on `stage`, forward and backward."""
        return self.forward[stage] + self.input_grad[stage] + self.weight_grad[stage]

    def delays(self, placement: Placement) -> tuple[float, ...]:
        """How long each boundary's outputs are on their way [stage]: `hops`, and nothing within a rank."""
        ranks = map(placement.rank_of, range(placement.stages))
        hops = self.hops or (0.0,) * (placement.stages - 1)
        return tuple(hop * (here != there) for hop, (here, there) in zip(hops, pairwise(ranks), strict=True))


# A tuple, since a plan of many ranks makes hundreds of thousands.
class Span(NamedTuple):
    """A pass with its start and end."""

    action: Pass
    start: float
    end: float


@dataclass(frozen=True)
class Timeline:
    """The spans of each rank, in its order; simulated or measured.

    O and R are spans without a duration, where the rank goes on. How long the copies themselves take is in `offloads`
    (of Os) and `reloads` (of Rs), in the order of each rank's copy engines; without any, no rank copies.
    """

    ranks: tuple[tuple[Span, ...], ...]
    offloads: tuple[tuple[Span, ...], ...] = ()
    reloads: tuple[tuple[Span, ...], ...] = ()

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
    """When something of each micro-batch of a stage is there, and the ranks that wait for it."""

    def __init__(self) -> None:
        self.ends: dict[int, float] = {}
        self.waiting: dict[int, list[int]] = {}


_Needs = tuple[tuple[_Results, float], ...]


class _Optional:
    """The Cs, Os and Rs of a schedule: what they need and give, and the copies of each rank."""

    def __init__(self, schedule: Schedule, times: Times, outputs: Sequence[_Results]) -> None:
        self._times, self._outputs = times, outputs
        self._there = variants(schedule)
        # By stage: what C has made, what is on the host, what O has freed, and what is back.
        self._recomputed, self._offloaded, self._freed, self._reloaded = (
            [_Results() for _ in outputs] for _ in range(4))
        self.copies: dict[Kind, list[list[Span]]] = {
            kind: [[] for _ in schedule.orders] for kind in (Kind.O, Kind.R)}

    def needs(self, action: Pass) -> _Needs:
        """What an action of this rank needs besides what every schedule's does."""
        stage = action.stage
        if action.kind is Kind.O:
            return ((self._offloaded[stage], 0.0),)
        if action.kind is Kind.R:
            return ((self._freed[stage], 0.0),)
        if action.kind is Kind.C:
            return (self._outputs[stage], 0.0), *self._if_there(Kind.R, action, self._reloaded)
        if action.kind.gives_input_gradient:
            return (self._if_there(Kind.C, action, self._recomputed)
                    or self._if_there(Kind.R, action, self._reloaded))
        return ()

    def _if_there(self, kind: Kind, action: Pass, results: Sequence[_Results]) -> _Needs:
        there = (kind, action.stage, action.micro_batch) in self._there
        return ((results[action.stage], 0.0),) if there else ()

    def duration(self, action: Pass) -> float:
        """How long the rank is busy with `action`."""
        return 0.0 if action.kind.is_copy else self._times.of(action)

    def done(self, rank: int, action: Pass, end: float) -> None:
        """`rank` has ended `action`."""
        stage, micro_batch = action.stage, action.micro_batch
        if action.kind is Kind.F:
            offload = self._there.get((Kind.O, stage, micro_batch))
            if offload is not None:
                self._offloaded[stage].ends[micro_batch] = self._copy(rank, offload, end)
        elif action.kind is Kind.O:
            self._freed[stage].ends[micro_batch] = end
        elif action.kind is Kind.R:
            self._reloaded[stage].ends[micro_batch] = self._copy(rank, action, end)
        elif action.kind is Kind.C:
            self._recomputed[stage].ends[micro_batch] = end

    def _copy(self, rank: int, action: Pass, ready: float) -> float:
        """Give the rank's engine one more copy, which can't start before `ready`; when it ends."""
        spans = self.copies[action.kind][rank]
        start = max(ready, spans[-1].end) if spans else ready
        recompute = self._there.get((Kind.C, action.stage, action.micro_batch))
        spans.append(Span(action, start, start + self._times.of_copy(action, recompute)))
        return spans[-1].end


def simulate(schedule: Schedule, times: Times) -> Timeline:
    """Run `schedule` with `times`; ScheduleError if a rank waits for what never comes."""
    stages, delays = range(schedule.placement.stages), times.delays(schedule.placement)
    outputs, gradients = [_Results() for _ in stages], [_Results() for _ in stages]
    # What each stage's F, W, and B or BW need (`schedule.dependencies`), and how long that is on its way.
    before_f: list[_Needs] = [(), *(((outputs[stage], delay),) for stage, delay in enumerate(delays))]
    before_w: list[_Needs] = [((gradients[stage], 0.0),) for stage in stages]
    before_b: list[_Needs] = [*(((outputs[stage], 0.0), (gradients[stage + 1], delay))
                                for stage, delay in enumerate(delays)), ((outputs[-1], 0.0),)]
    optional = _Optional(schedule, times, outputs) if schedule.gives_back_memory else None
    # What most passes take, by kind and stage.
    usual = {kind: [times.of(Pass(kind, stage, 0)) for stage in stages] for kind in (Kind.F, Kind.B, Kind.W, Kind.BW)
             } if optional is None and not times.scales else {}
    orders = [tuple(order) for order in schedule.orders]
    spans: list[list[Span]] = [[] for _ in orders]
    runnable = list(range(len(orders)))
    while runnable:
        rank = runnable.pop()
        done = spans[rank]
        free = done[-1].end if done else 0.0
        for action in orders[rank][len(done):]:
            stage, micro_batch, kind = action.stage, action.micro_batch, action.kind
            needs: _Needs = ()
            results: _Results | None = None
            if kind is Kind.F:
                needs, results = before_f[stage], outputs[stage]
            elif kind is Kind.W:
                needs = before_w[stage]
            elif kind is Kind.B or kind is Kind.BW:
                needs, results = before_b[stage], gradients[stage]
            if optional is not None:
                needs += optional.needs(action)
            start = free
            for given, delay in needs:
                end = given.ends.get(micro_batch)
                if end is None:
                    given.waiting.setdefault(micro_batch, []).append(rank)
                    break
                if end + delay > start:
                    start = end + delay
            else:
                if usual and action.pieces == 1:
                    free = start + usual[kind][stage]
                else:
                    free = start + (times.of(action) if optional is None else optional.duration(action))
                done.append(Span(action, start, free))
                if results is not None:
                    results.ends[micro_batch] = free
                    if micro_batch in results.waiting:
                        runnable.extend(results.waiting.pop(micro_batch))
                if optional is not None:
                    optional.done(rank, action, free)
                continue
            break
    stuck = [f"rank {rank} at {order[len(spans[rank])]}"
             for rank, order in enumerate(orders) if len(spans[rank]) < len(order)]
    if stuck:
        raise ScheduleError(f"{schedule.name} can't run: " + ", ".join(stuck) + " wait for each other")
    ranks = tuple(map(tuple, spans))
    if optional is None:
        return Timeline(ranks)
    return Timeline(ranks, *(tuple(map(tuple, optional.copies[kind])) for kind in (Kind.O, Kind.R)))
