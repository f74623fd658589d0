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
    of rank r that forwards of chunk 0 leave free. `pieces`: W runs in so many. `eagerness`: how long before its ideal
    start a pass may run; with 0, and with wishes that are the starts of some schedule, that schedule comes out again.
    """

    wishes: Wishes
    patience: float
    reserves: Sequence[float]
    pieces: int = 1
    eagerness: float = float("inf")


@dataclass(frozen=True)
class Run:
    """What came of a policy: each rank's streams in order, a number each time, and when the passes started.

    `starts` has the form of a policy's wishes; `waiting` is the sum of the starts of all F and B, by which runs of
    equal makespan are told apart.
    """

    makespan: float
    waiting: float
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
        # Where B leaves more than F did, B and W apart may not fit. Whole backwards always do: W's streams are empty.
        self.fused = any(sum(map(max, whole, kept)) > limit
                         for whole, kept, limit in zip(self.whole, self.kept, self.limits))
        # What a forward must find free: B and W apart may take more than it does.
        self.taken = self.whole if self.fused else [list(map(max, whole, kept))
                                                    for whole, kept in zip(self.whole, self.kept)]
        # What B gives back.
        self.freed = self.taken if self.fused else [[size - left for size, left in zip(taken, kept)]
                                                    for taken, kept in zip(self.taken, self.kept)]
        self.least_reserves = [taken[1] for taken in self.taken]
        # Of the limit without slack, so that rounding never leaves too little for a forward of chunk 0.
        self.most_reserves = [limit - taken[0] for taken, limit in zip(self.taken, problem.limits)]
        self.work = max(sum(map(sum, times)) for times in zip(self.forward, self.input_grad, self.weight_grad))
        last = problem.ranks - 1
        hop = times.hop
        # Where a stream's passes go next: rank, stream, and how long that takes. B of stage 0 ends the way.
        self.ways = [(
            (rank + 1, F0, hop) if rank < last else (rank, F1, 0.0),
            (rank - 1, F1, hop) if rank else (rank, B1, 0.0),
            (rank - 1, B0, hop) if rank else (rank, -1, 0.0),
            (rank + 1, B1, hop) if rank < last else (rank, B0, 0.0)) for rank in range(problem.ranks)]

    def durations(self, pieces: int) -> list[list[float]]:
        """How long a pass of each rank's streams takes, with W in `pieces`."""
        if self.fused:
            return [[*forward, *map(sum, zip(input_grad, weight_grad)), 0.0, 0.0] for forward, input_grad, weight_grad
                    in zip(self.forward, self.input_grad, self.weight_grad)]
        return [[*forward, *input_grad, *(time / pieces for time in weight_grad)] for forward, input_grad, weight_grad
                in zip(self.forward, self.input_grad, self.weight_grad)]

    def run(self, policy: Policy, cutoff: float = float("inf")) -> Run | None:
        """What `policy` comes to; None if the makespan would be above `cutoff`."""
        ranks, batch = len(self.chunks), self.problem.micro_batches
        pieces, patience, eagerness, fused = policy.pieces, policy.patience, policy.eagerness, self.fused
        limits, taken, ways = self.limits, self.taken, self.ways
        durations = self.durations(pieces)
        freed, kept = self.freed, self.kept
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
                    best, pick, at = wish[W1][place], W1, now
            if pick < 0:
                continue
            if at > now:
                # Its arrival wakes this rank again, but for what came from the rank itself.
                heappush(events, (at, rank))
                continue
            if best - eagerness > now:
                heappush(events, (best - eagerness, rank))
                continue
            # Run it.
            end = now + durations[rank][pick]
            if end > cutoff:
                return None
            orders[rank].append(pick)
            left -= 1
            free[rank] = end
            heappush(events, (end, rank))
            place = count[pick]
            count[pick] += 1
            if pick >= W0:
                starts[rank][pick].append(now)
                if count[pick] % pieces == 0:
                    living[pick - W0] -= kept[rank][pick - W0]
                continue
            starts[rank][pick].append(now)
            if pick <= F1:
                living[pick] += taken[rank][pick]
            else:
                living[pick - B0] -= freed[rank][pick - B0]
            target, stream, delay = ways[rank][pick]
            if stream >= 0:
                arrival = end + delay
                arrived[target][stream].append(arrival)
                if free[target] < arrival and target != rank:
                    heappush(events, (arrival, target))
        if left:
            raise AssertionError("a batch got stuck under its memory limit")
        waiting = sum(sum(line) for row in starts for line in row[:W0])
        return Run(max(free), waiting, orders, starts, policy)

    def squeeze(self, orders: list[list[int]], policy: Policy) -> Run | None:
        """Every pass as early as `orders` allow; None if they wait for each other or exceed a limit."""
        durations, pieces = self.durations(policy.pieces), policy.pieces
        ranks = len(orders)
        inputs: list[list[list[float]]] = [[[], [], [], []] for _ in range(ranks)]
        inputs[0][F0] = [0.0] * self.problem.micro_batches
        starts: list[list[list[float]]] = [[[], [], [], [], [], []] for _ in range(ranks)]
        places, free, alive = [0] * ranks, [0.0] * ranks, [0.0] * ranks
        ready = list(range(ranks))
        while ready:
            rank = ready.pop()
            order, own = orders[rank], starts[rank]
            while places[rank] < len(order):
                stream = order[places[rank]]
                number = len(own[stream])
                start = free[rank]
                if stream < W0:
                    if number >= len(inputs[rank][stream]):
                        break
                    start = max(start, inputs[rank][stream][number])
                elif number >= len(own[stream - W0 + B0]) * pieces:
                    break
                own[stream].append(start)
                end = free[rank] = start + durations[rank][stream]
                places[rank] += 1
                if stream <= F1:
                    alive[rank] += self.taken[rank][stream]
                    if alive[rank] > self.limits[rank]:
                        return None
                elif stream <= B1:
                    alive[rank] -= self.freed[rank][stream - B0]
                elif (number + 1) % pieces == 0:
                    alive[rank] -= self.kept[rank][stream - W0]
                if stream < W0:
                    target, fed, delay = self.ways[rank][stream]
                    if fed >= 0:
                        inputs[target][fed].append(end + delay)
                        ready.append(target)
        if any(place < len(order) for place, order in zip(places, orders)):
            return None
        return Run(max(free), sum(sum(line) for row in starts for line in row[:W0]), orders, starts, policy)

    def schedule(self, run: Run) -> Schedule:
        """The orders of `run` as a schedule; pieces of a W that stand together are put together again."""
        pieces = run.policy.pieces
        kinds = (Kind.F, Kind.F, Kind.BW, Kind.BW) if self.fused else KINDS
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
