"""A list scheduler that knows times and memory: from a rule of priority to the orders of all ranks.

Every rank, whenever it is free, looks at the next pass of each of its streams (F, B, W of its chunks; a stream goes in
micro-batch order) and runs the most urgent one: that with the earliest target start. Where a pass will be ready soon,
since its input is on the way, waiting for it may be better than running a less urgent one.

Memory never blocks the batch: a forward starts only within the rank's limit, and those of each chunk and the chunks
before it together leave room for one of each later chunk (`reserves` or more), so the oldest micro-batch can always
reach the last stage; from there on everything frees memory. By induction over micro-batches all of them end.

`filling.fill` is the loop itself. `layout.py` says how streams are numbered.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from itertools import chain
from typing import TypeAlias

import numpy as np
from numpy.typing import NDArray

from ds_vshape.schedule.adaptive.annealing import left_shift
from ds_vshape.schedule.adaptive.filling import fill
from ds_vshape.schedule.adaptive.layout import KINDS, B, F, Layout, W, way_of
from ds_vshape.schedule.adaptive.problem import SLACK, Problem
from ds_vshape.schedule.passes import Kind, Pass
from ds_vshape.schedule.schedule import Order, Schedule
from ds_vshape.schedule.timeline import Times

# [rank, stream, micro-batch, piece of W]; F and B have piece 0 alone, what stands at the others means nothing.
TargetStarts: TypeAlias = NDArray[np.float64]


@dataclass(frozen=True)
class Policy:
    """Who comes first.

    `target_starts` say when each pass would ideally start. `patience`: a pass that becomes ready d from now competes as
    if its target start were `patience * d` later. `reserves[r, c]` is the memory of rank r that forwards of chunks 0 to
    c leave free. `eagerness`: how long before its target start a pass may run; with 0, and the starts of some schedule
    as target starts, that schedule comes out again.
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
        # Streams of a rank, and the first of B and of W.
        chunks_each = problem.placement.chunks_each
        self.streams, self.first_b, self.first_w = KINDS * chunks_each, B * chunks_each, W * chunks_each
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
        # One forward of each later chunk.
        self.least_reserves = np.array([[sum(taken[chunk + 1:]) for chunk in range(chunks_each)]
                                        for taken in self.taken])
        self.work = max(sum(map(sum, times)) for times in zip(self.forward, self.input_grad, self.weight_grad))
        self.layouts = cache(self.layout)

    def reserves(self, of_first: NDArray[np.float64]) -> NDArray[np.float64]:
        """Reserves [rank, chunk] where forwards of chunk 0 leave `of_first` [rank] free, and those up to later chunks
        evenly less; no less than they must, and never so much that none can run."""
        # Of the limit without slack, so that rounding never leaves too little for a forward of chunk 0.
        most = np.array([limit - taken[0] for taken, limit in zip(self.taken, self.problem.limits)])
        least = self.least_reserves
        first = np.minimum(most, np.maximum(least[:, 0], of_first))
        share = np.linspace(1.0, 0.0, least.shape[1]) if least.shape[1] > 1 else np.zeros(1)
        reserves: NDArray[np.float64] = least + np.maximum(0.0, first - least[:, 0])[:, None] * share
        reserves[:, 0] = first
        return reserves

    def durations(self, pieces: int) -> NDArray[np.float64]:
        """How long the passes of each rank's streams take [rank, stream, piece], with W in `pieces`."""
        durations = np.zeros((self.problem.ranks, self.streams, pieces))
        durations[:, :self.first_b, 0] = self.forward
        durations[:, self.first_b:self.first_w, 0] = self.input_grad
        if self.fused:
            durations[:, self.first_b:self.first_w, 0] += self.weight_grad
            return durations
        for rank, chunks in enumerate(self.chunks):
            for chunk, stage in enumerate(chunks):
                ends = (0.0, *self.problem.times.ends_of_pieces(stage, pieces))
                durations[rank, self.first_w + chunk, 1 - len(ends):] = self.weight_grad[rank][chunk] * np.diff(ends)
        return durations

    def layout(self, pieces: int) -> Layout:
        """The problem in arrays, with W in `pieces`."""
        durations, limits, taken, freed, kept, scales = (np.array(values, np.float64) for values in (
            self.durations(pieces), self.limits, self.taken, self.freed, self.kept,
            self.problem.times.scales or (1.0,) * self.problem.micro_batches))
        return Layout(self.problem.micro_batches, pieces, self.fused, durations, *way_of(self.problem), limits, taken,
                      freed, kept, scales)

    def run(self, policy: Policy, cutoff: float = float("inf")) -> PolicyRun | None:
        """What `policy` comes to; None if the makespan would be above `cutoff`."""
        layout = self.layouts(policy.pieces)
        starts = np.zeros(policy.target_starts.shape)
        passes = self.first_w if self.fused else self.first_w + (self.streams - self.first_w) * policy.pieces
        orders = np.zeros((self.problem.ranks, layout.batch * passes), np.int64)
        makespan, waiting = fill(layout, np.ascontiguousarray(policy.target_starts), policy.patience, policy.eagerness,
                                 layout.limits[:, None] - policy.reserves, cutoff, starts, orders)
        return PolicyRun(makespan, waiting, orders, starts, policy) if makespan < float("inf") else None

    def left_shift(self, orders: NDArray[np.int64], policy: Policy) -> PolicyRun | None:
        """Every pass as early as `orders` allow; None if they wait for each other or exceed a limit."""
        layout, first_w = self.layouts(policy.pieces), self.first_w
        changes = np.concatenate([layout.taken, -layout.freed, -layout.kept], axis=1)
        starts = np.zeros(policy.target_starts.shape)
        begun = left_shift(layout, orders)
        if not len(begun):
            return None
        for rank, order in enumerate(orders):
            change = changes[rank, order]
            for stream in range(self.streams):
                here = np.flatnonzero(order == stream)
                if stream < first_w:
                    starts[rank, stream, :, 0] = begun[rank, here]
                elif len(here):
                    starts[rank, stream] = begun[rank, here].reshape(starts.shape[2:])
                    # Nothing is free before the last piece of a W.
                    change[np.delete(here, slice(layout.pieces - 1, None, layout.pieces))] = 0.0
            if change.cumsum().max() > layout.limits[rank]:
                return None
        # The last pass of a rank is the last of its stream, and so of the last micro-batch.
        last = orders[:, -1]
        pieces = np.where(last >= first_w, layout.pieces - 1, 0)
        ends = begun[:, -1] + layout.durations[np.arange(len(orders)), last, pieces] * layout.scales[-1]
        return PolicyRun(float(ends.max()), float(starts[:, :first_w, :, 0].sum()), orders, starts, policy)

    def orders_of(self, schedule: Schedule) -> NDArray[np.int64] | None:
        """The streams of a schedule's passes [rank, place], whole backwards split; None if they may not be."""
        rows = []
        for chunks, order in zip(schedule.placement.chunks, schedule.orders):
            row = []
            for action in order:
                chunk = chunks.index(action.stage)
                if action.kind is Kind.F:
                    row.append(chunk)
                elif action.kind is not Kind.W:
                    row.append(self.first_b + chunk)
                if action.kind is Kind.W and self.fused:
                    return None
                if action.kind in (Kind.W, Kind.BW) and not self.fused:
                    row.append(self.first_w + chunk)
            rows.append(row)
        return np.array(rows, np.int64)

    def schedule(self, run: PolicyRun) -> Schedule:
        """The orders of `run` as a schedule; pieces of a W that stand together are put together again."""
        pieces, times = run.policy.pieces, self.problem.times
        kinds = {F: Kind.F, B: Kind.BW if self.fused else Kind.B}
        passes = []
        for chunks, order in zip(self.chunks, run.orders.tolist()):
            counts = [0] * self.streams
            row: list[Pass] = []
            for stream in order:
                number = counts[stream]
                counts[stream] += 1
                kind, chunk = divmod(stream, len(chunks))
                if kind == W:
                    row.append(Pass(Kind.W, chunks[chunk], number // pieces, number % pieces, pieces))
                else:
                    row.append(Pass(kinds[kind], chunks[chunk], number))
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
