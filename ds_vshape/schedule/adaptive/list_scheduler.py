"""A list scheduler that knows times and memory: from a rule of priority to the orders of all ranks.

Every rank, whenever it is free, looks at the next pass of each of its six streams (F, B, W of two chunks; a stream goes
in micro-batch order) and runs the most urgent one: that which wishes to start first. Where a pass will be ready soon,
for its input is on the way, waiting for it may be better than running a less urgent one.

Memory never blocks the batch: a forward starts only within the rank's limit, and forwards of the first chunk leave
room for one of the second (`reserve` or more), so the oldest micro-batch can always reach the last stage; from there on
everything frees memory. By induction over micro-batches all of them end.

This is called thousands of times in a plan, so it works on lists of numbers; streams are numbered F, F, B, B, W, W of
chunk 0 and 1.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from heapq import heappop, heappush
from itertools import chain

from ds_vshape.schedule.adaptive.problem import SLACK, Problem
from ds_vshape.schedule.passes import Kind, Pass
from ds_vshape.schedule.schedule import Order, Schedule

F0, F1, B0, B1, W0, W1 = range(6)
KINDS = (Kind.F, Kind.F, Kind.B, Kind.B, Kind.W, Kind.W)
Wishes = Sequence[Sequence[Sequence[float]]]


@dataclass(frozen=True)
class Policy:
    """Who comes first.

    `wishes[r][stream][i]` is when rank r's pass of the stream for micro-batch i would ideally start; those of W have a
    place for each piece. `patience`: a pass
    that becomes ready d from now competes as if its ideal start were `patience * d` later. `reserves[r]` is the memory
    of rank r that forwards of chunk 0 leave free. `pieces`: W runs in so many. `fused`: the backward runs whole (BW),
    as 1F1B's does; W's streams are then empty.
    """

    wishes: Wishes
    patience: float
    reserves: Sequence[float]
    pieces: int = 1
    fused: bool = False


@dataclass(frozen=True)
class Run:
    """What came of a policy: each rank's streams in order, a number each time, and when the passes started.

    `starts` has the form of a policy's wishes; `ends` is the sum of the
    ranks' own ends, by which two runs of equal makespan are told apart.
    """

    makespan: float
    ends: float
    orders: list[list[int]]
    starts: Wishes
    policy: Policy


class ListScheduler:
    """Runs policies on one problem."""

    def __init__(self, problem: Problem) -> None:
        times, activations = problem.times, problem.activations
        self.problem = problem
        self.chunks = problem.placement.chunks
        self.forward = [[times.forward[stage] for stage in chunks] for chunks in self.chunks]
        self.input_grad = [[times.input_grad[stage] for stage in chunks] for chunks in self.chunks]
        self.weight_grad = [[times.weight_grad[stage] for stage in chunks] for chunks in self.chunks]
        self.whole = [[activations.whole[stage] for stage in chunks] for chunks in self.chunks]
        self.kept = [[activations.kept[stage] for stage in chunks] for chunks in self.chunks]
        self.limits = [limit * (1 + SLACK) for limit in problem.limits]
        last = problem.ranks - 1
        hop = times.hop
        # Where a stream's passes go next: rank, stream, and how long that takes. B of stage 0 ends the way.
        self.ways = [(
            (rank + 1, F0, hop) if rank < last else (rank, F1, 0.0),
            (rank - 1, F1, hop) if rank else (rank, B1, 0.0),
            (rank - 1, B0, hop) if rank else (rank, -1, 0.0),
            (rank + 1, B1, hop) if rank < last else (rank, B0, 0.0)) for rank in range(problem.ranks)]

    def splits(self) -> bool:
        """Whether B and W apart are within the limits: what B leaves until W may be more than what F leaves."""
        return all(sum(map(max, self.whole[rank], self.kept[rank])) <= limit for rank, limit in enumerate(self.limits))

    def run(self, policy: Policy, cutoff: float = float("inf")) -> Run | None:
        """What `policy` comes to; None if the makespan would be above `cutoff`."""
        ranks, batch = len(self.chunks), self.problem.micro_batches
        pieces, patience, fused = policy.pieces, policy.patience, policy.fused
        limits, ways = self.limits, self.ways
        durations, taken, freed = [], [], []
        for rank in range(ranks):
            forward, input_grad, weight_grad = self.forward[rank], self.input_grad[rank], self.weight_grad[rank]
            whole, kept = self.whole[rank], self.kept[rank]
            if fused:
                durations.append((*forward, *map(sum, zip(input_grad, weight_grad)), 0.0, 0.0))
                taken.append(whole)
                freed.append((0.0, 0.0, *whole, 0.0, 0.0))
            else:
                # B must fit, too, where it leaves more than F did: the forward already counts the greater.
                most = list(map(max, whole, kept))
                durations.append((*forward, *input_grad, *(time / pieces for time in weight_grad)))
                taken.append(most)
                freed.append((0.0, 0.0, *(size - left for size, left in zip(most, kept)), *kept))
        wishes = policy.wishes
        counts = [[0] * 6 for _ in range(ranks)]
        arrived: list[list[list[float]]] = [[[], [], [], []] for _ in range(ranks)]
        arrived[0][F0] = [0.0] * batch
        alive = [[0.0, 0.0] for _ in range(ranks)]
        free = [0.0] * ranks
        orders: list[list[int]] = [[] for _ in range(ranks)]
        starts: list[list[list[float]]] = [[[], [], [], [], [], []] for _ in range(ranks)]
        first_room = [limit - reserve for limit, reserve in zip(limits, policy.reserves)]
        left = batch * (4 * ranks if fused else 4 * ranks + 2 * ranks * pieces)
        makespan = 0.0
        weight_grads = 0 if fused else pieces
        events = [(0.0, rank) for rank in range(ranks)]
        never = float("inf")
        while events:
            now, rank = heappop(events)
            if now < free[rank]:
                continue
            count, wish, inputs, living = counts[rank], wishes[rank], arrived[rank], alive[rank]
            best, pick, at = never, -1, now
            # The most urgent stream.
            for stream in (B1, B0):
                place = count[stream]
                line = inputs[stream]
                if place < len(line):
                    urgency = wish[stream][place]
                    if line[place] > now:
                        urgency += patience * (line[place] - now)
                    if urgency < best:
                        best, pick, at = urgency, stream, line[place]
            place = count[F1]
            if place < len(inputs[F1]) and living[0] + living[1] + taken[rank][1] <= limits[rank]:
                urgency = wish[F1][place]
                start = inputs[F1][place]
                if start > now:
                    urgency += patience * (start - now)
                if urgency < best:
                    best, pick, at = urgency, F1, start
            place = count[F0]
            if place < len(inputs[F0]):
                size = taken[rank][0]
                if living[0] + size <= first_room[rank] and living[0] + living[1] + size <= limits[rank]:
                    urgency = wish[F0][place]
                    start = inputs[F0][place]
                    if start > now:
                        urgency += patience * (start - now)
                    if urgency < best:
                        best, pick, at = urgency, F0, start
            if weight_grads:
                place = count[W0]
                if place < count[B0] * pieces and wish[W0][place] < best:
                    best, pick, at = wish[W0][place], W0, now
                place = count[W1]
                if place < count[B1] * pieces and wish[W1][place] < best:
                    pick, at = W1, now
            if pick < 0:
                continue
            if at > now:
                # Its arrival wakes this rank again, but for what came from the rank itself.
                heappush(events, (at, rank))
                continue
            # Run it.
            end = now + durations[rank][pick]
            if end > cutoff:
                return None
            orders[rank].append(pick)
            left -= 1
            free[rank] = end
            heappush(events, (end, rank))
            if end > makespan:
                makespan = end
            place = count[pick]
            count[pick] += 1
            if pick >= W0:
                starts[rank][pick].append(now)
                if count[pick] % pieces == 0:
                    living[pick - W0] -= freed[rank][pick]
                continue
            starts[rank][pick].append(now)
            if pick <= F1:
                living[pick] += taken[rank][pick]
            else:
                living[pick - B0] -= freed[rank][pick]
            target, stream, delay = ways[rank][pick]
            if stream >= 0:
                arrival = end + delay
                arrived[target][stream].append(arrival)
                if free[target] < arrival and target != rank:
                    heappush(events, (arrival, target))
        if left:
            raise AssertionError("a batch got stuck under its memory limit")
        return Run(makespan, sum(free), orders, starts, policy)

    def schedule(self, run: Run) -> Schedule:
        """The orders of `run` as a schedule; pieces of a W that stand together are put together again."""
        pieces = run.policy.pieces
        kinds = (Kind.F, Kind.F, Kind.BW, Kind.BW) if run.policy.fused else KINDS
        passes = []
        for chunks, order in zip(self.chunks, run.orders):
            counts = [0] * 6
            row: list[Pass] = []
            for stream in order:
                number = counts[stream]
                counts[stream] += 1
                stage = chunks[stream % 2]
                if stream >= W0:
                    row.append(Pass(Kind.W, stage, number // pieces, number % pieces, pieces))
                else:
                    row.append(Pass(kinds[stream], stage, number))
            passes.append(_joined(row))
        return Schedule("adaptive", self.problem.placement, self.problem.micro_batches, tuple(passes))


def _joined(row: list[Pass]) -> Order:
    """`row` with each W in as few equal pieces as keep its order."""
    runs: dict[tuple[int, int], list[list[int]]] = {}
    for place, work in enumerate(row):
        if work.pieces > 1:
            run = runs.setdefault((work.stage, work.micro_batch), [])
            if run and run[-1][-1] == place - 1:
                run[-1].append(place)
            else:
                run.append([place])
    replaced: dict[int, list[Pass]] = {}
    for run in runs.values():
        work = row[run[0][0]]
        size = work.pieces
        while any(len(places) % size for places in run):
            size -= 1
            while work.pieces % size:
                size -= 1
        new = iter(Pass(Kind.W, work.stage, work.micro_batch).cut(work.pieces // size))
        for places in run:
            replaced[places[0]] = [next(new) for _ in range(len(places) // size)]
            replaced.update((place, []) for place in places[1:])
    return tuple(chain.from_iterable(replaced.get(place, [work]) for place, work in enumerate(row)))
