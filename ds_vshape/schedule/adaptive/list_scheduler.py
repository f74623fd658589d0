"""A list scheduler that knows times and memory: from a rule of priority to the orders of all ranks.

Every rank, whenever it is free, looks at the next pass of each of its six streams (F, B, W of two chunks; a stream goes
in micro-batch order) and runs the most urgent one: that with the earliest target start. Where a pass will be ready
soon, since its input is on the way, waiting for it may be better than running a less urgent one.

Memory never blocks the batch: a forward starts only within the rank's limit, and forwards of the first chunk leave
room for one of the second (`reserve` or more), so the oldest micro-batch can always reach the last stage; from there on
everything frees memory. By induction over micro-batches all of them end.

`filling.fill` is the loop itself. Streams are numbered F, F, B, B, W, W of chunk 0 and 1.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from itertools import chain, pairwise
from typing import TypeAlias

import numpy as np
from numpy.typing import NDArray

from ds_vshape.schedule.adaptive.annealing import left_shift
from ds_vshape.schedule.adaptive.filling import fill
from ds_vshape.schedule.adaptive.layout import Layout
from ds_vshape.schedule.adaptive.problem import SLACK, Problem
from ds_vshape.schedule.passes import Kind, Pass
from ds_vshape.schedule.schedule import Order, Schedule
from ds_vshape.schedule.timeline import Times

F0, F1, B0, B1, W0, W1 = range(6)
KINDS = (Kind.F, Kind.F, Kind.B, Kind.B, Kind.W, Kind.W)
# [rank, stream, micro-batch, piece of W]; F and B have piece 0 alone, what stands at the others means nothing.
TargetStarts: TypeAlias = NDArray[np.float64]


@dataclass(frozen=True)
class Policy:
    """Who comes first.

    `target_starts` say when each pass would ideally start. `patience`: a pass that becomes ready d from now competes as
    if its target start were `patience * d` later. `reserves[r]` is the memory of rank r that forwards of chunk 0 leave
    free. `eagerness`: how long before its target start a pass may run; with 0, and the starts of some schedule as
    target starts, that schedule comes out again.
    """

    target_starts: TargetStarts
    patience: float
    reserves: NDArray[np.float64]
    eagerness: float = float("inf")

    @property
    def pieces(self) -> int:
        """In how many W runs."""
        return int(self.target_starts.shape[-1])


@dataclass(frozen=True)
class PolicyRun:
    """What came of a policy: each rank's streams in order [rank, place], and when the passes started.

    `starts` has the form of a policy's target starts; `waiting` is the sum of the starts of all F and B, which tells
    runs of equal makespan apart.
    """

    makespan: float
    waiting: float
    orders: NDArray[np.int64]
    starts: TargetStarts
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
        self.whole = [[activations.after_forward[stage] for stage in chunks] for chunks in self.chunks]
        self.kept = [[activations.after_backward[stage] for stage in chunks] for chunks in self.chunks]
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
        self.least_reserves = np.array([taken[1] for taken in self.taken])
        # Of the limit without slack, so that rounding never leaves too little for a forward of chunk 0.
        self.most_reserves = np.array([limit - taken[0] for taken, limit in zip(self.taken, problem.limits)])
        self.work = max(sum(map(sum, times)) for times in zip(self.forward, self.input_grad, self.weight_grad))
        self.layouts = cache(self.layout)

    def durations(self, pieces: int) -> NDArray[np.float64]:
        """How long the passes of each rank's streams take [rank, stream, piece], with W in `pieces`."""
        durations = np.zeros((self.problem.ranks, len(KINDS), pieces))
        durations[:, F0:B0, 0] = self.forward
        durations[:, B0:W0, 0] = self.input_grad
        if self.fused:
            durations[:, B0:W0, 0] += self.weight_grad
            return durations
        for rank, chunks in enumerate(self.chunks):
            for chunk, stage in enumerate(chunks):
                ends = (0.0, *self.problem.times.ends_of_pieces(stage, pieces))
                durations[rank, W0 + chunk, 1 - len(ends):] = self.weight_grad[rank][chunk] * np.diff(ends)
        return durations

    def layout(self, pieces: int) -> Layout:
        """The problem in arrays, with W in `pieces`."""
        ranks = self.problem.ranks
        next_rank, next_stream, from_rank, from_stream = (np.full((ranks, 6), -1) for _ in range(4))
        delay = np.zeros((ranks, 6))
        delays = self.problem.times.delays(self.problem.placement)
        way = ([(rank, F0) for rank in range(ranks)] + [(rank, F1) for rank in reversed(range(ranks))]
               + [(rank, B1) for rank in range(ranks)] + [(rank, B0) for rank in reversed(range(ranks))])
        for (rank, stream), (target, fed) in pairwise(way):
            next_rank[rank, stream], next_stream[rank, stream] = target, fed
            from_rank[target, fed], from_stream[target, fed] = rank, stream
            # Within a rank (at the turns, and from F to B of the last stage) there is no boundary, or none that counts.
            if rank != target:
                boundary = min(self.chunks[rank][stream % 2], self.chunks[target][fed % 2])
                delay[rank, stream] = delays[boundary]
        durations, limits, taken, freed, kept, scales = (np.array(values, np.float64) for values in (
            self.durations(pieces), self.limits, self.taken, self.freed, self.kept,
            self.problem.times.scales or (1.0,) * self.problem.micro_batches))
        return Layout(self.problem.micro_batches, pieces, self.fused, durations, next_rank, next_stream, delay,
                      from_rank, from_stream, limits, taken, freed, kept, scales)

    def run(self, policy: Policy, cutoff: float = float("inf")) -> PolicyRun | None:
        """What `policy` comes to; None if the makespan would be above `cutoff`."""
        layout = self.layouts(policy.pieces)
        starts = np.zeros(policy.target_starts.shape)
        orders = np.zeros((self.problem.ranks, layout.batch * (4 if self.fused else 4 + 2 * policy.pieces)), np.int64)
        makespan, waiting = fill(layout, np.ascontiguousarray(policy.target_starts), policy.patience, policy.eagerness,
                                 layout.limits - policy.reserves, cutoff, starts, orders)
        return PolicyRun(makespan, waiting, orders, starts, policy) if makespan < float("inf") else None

    def left_shift(self, orders: NDArray[np.int64], policy: Policy) -> PolicyRun | None:
        """Every pass as early as `orders` allow; None if they wait for each other or exceed a limit."""
        layout = self.layouts(policy.pieces)
        changes = np.concatenate([layout.taken, -layout.freed, -layout.kept], axis=1)
        starts = np.zeros(policy.target_starts.shape)
        begun = left_shift(layout, orders)
        if not len(begun):
            return None
        for rank, order in enumerate(orders):
            change = changes[rank, order]
            for stream in range(len(KINDS)):
                here = np.flatnonzero(order == stream)
                if stream < W0:
                    starts[rank, stream, :, 0] = begun[rank, here]
                elif len(here):
                    starts[rank, stream] = begun[rank, here].reshape(starts.shape[2:])
                    # Nothing is free before the last piece of a W.
                    change[np.delete(here, slice(layout.pieces - 1, None, layout.pieces))] = 0.0
            if change.cumsum().max() > layout.limits[rank]:
                return None
        # The last pass of a rank is the last of its stream, and so of the last micro-batch.
        last = orders[:, -1]
        pieces = np.where(last >= W0, layout.pieces - 1, 0)
        ends = begun[:, -1] + layout.durations[np.arange(len(orders)), last, pieces] * layout.scales[-1]
        return PolicyRun(float(ends.max()), float(starts[:, :W0, :, 0].sum()), orders, starts, policy)

    def orders_of(self, schedule: Schedule) -> NDArray[np.int64] | None:
        """The streams of a V schedule's passes [rank, place], whole backwards split; None if they may not be."""
        rows = []
        for chunks, order in zip(schedule.placement.chunks, schedule.orders):
            row = []
            for action in order:
                chunk = chunks.index(action.stage)
                if action.kind is Kind.F:
                    row.append(F0 + chunk)
                elif action.kind is not Kind.W:
                    row.append(B0 + chunk)
                if action.kind is Kind.W and self.fused:
                    return None
                if action.kind in (Kind.W, Kind.BW) and not self.fused:
                    row.append(W0 + chunk)
            rows.append(row)
        return np.array(rows, np.int64)

    def schedule(self, run: PolicyRun) -> Schedule:
        """The orders of `run` as a schedule; pieces of a W that stand together are put together again."""
        pieces, times = run.policy.pieces, self.problem.times
        kinds = (Kind.F, Kind.F, Kind.BW, Kind.BW) if self.fused else KINDS
        passes = []
        for chunks, order in zip(self.chunks, run.orders.tolist()):
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
            passes.append(_joined(row, times))
        return Schedule("adaptive", self.problem.placement, self.problem.micro_batches, tuple(passes))


def _joined(row: list[Pass], times: Times) -> Order:
    """`row` with each W in as few pieces as keep its order; none of them without an entry.

    The pieces of `row` are those of `Layout`, of which the first may be empty.
    """
    runs: dict[tuple[int, int], list[list[int]]] = {}
    for place, action in enumerate(row):
        if action.pieces > 1:
            run = runs.setdefault((action.stage, action.micro_batch), [])
            if run and run[-1][-1] == place - 1:
                run[-1].append(place)
            else:
                run.append([place])
    replaced: dict[int, tuple[Pass, ...]] = {}
    for (stage, micro_batch), run in runs.items():
        pieces = row[run[0][0]].pieces
        known = times.ends_of_pieces(stage, pieces)
        ends = (0.0,) * (pieces - len(known)) + known
        # How much of the W is done after each run of pieces.
        done = [ends[row[places[-1]].piece] for places in run]
        fewest = next(count for count in range(1, pieces + 1)
                      if {0.0, *times.ends_of_pieces(stage, count)}.issuperset(done))
        new = Pass(Kind.W, stage, micro_batch).cut(len(times.ends_of_pieces(stage, fewest)))
        of_new = list(zip(times.ends_of_pieces(stage, fewest), new))
        before = 0.0
        for places, end in zip(run, done):
            replaced.update((place, ()) for place in places)
            replaced[places[0]] = tuple(action for at, action in of_new if before < at <= end)
            before = end
    return tuple(chain.from_iterable(replaced.get(place, (action,)) for place, action in enumerate(row)))
