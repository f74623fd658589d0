"""Between problems and schedules and their arrays."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from ds_vshape.schedule.adaptive.layout import Floats, way_of
from ds_vshape.schedule.adaptive.memory.annealing import empty_steps, insert_copies
from ds_vshape.schedule.adaptive.memory.keeping import Keeping
from ds_vshape.schedule.adaptive.memory.layout import B, C, F, MemoryLayout, O, Orders, R, W
from ds_vshape.schedule.adaptive.problem import SLACK, Problem
from ds_vshape.schedule.passes import Kind, Pass
from ds_vshape.schedule.schedule import Schedule

_KINDS = {Kind.F: F, Kind.B: B, Kind.BW: B}


def layout_of(problem: Problem, keeping: Keeping, pieces: int) -> MemoryLayout:
    """The problem in arrays, for W in up to `pieces`."""
    times, activations, placement = problem.times, problem.activations, problem.placement

    def each(of_stages: Sequence[Any]) -> Floats:
        """Numbers of stages as [rank, chunk, ...]."""
        return np.array([[of_stages[stage] for stage in on_rank] for on_rank in placement.chunks], np.float64)

    def ways(of_way: Callable[[int, int], Any]) -> Floats:
        """Numbers of stages in each way of keeping as [rank, chunk, way, ...]."""
        return each([[of_way(way, stage) for way in range(len(keeping))] for stage in range(placement.stages)])

    again, offload, reload = (np.ascontiguousarray(values) for values in np.moveaxis(ways(keeping.seconds), -1, 0))
    return MemoryLayout(
        problem.micro_batches, pieces, int(problem.offload),
        np.concatenate([each(times.forward), each(times.input_grad)], axis=1), each(times.weight_grad),
        np.array(times.scales or (1.0,) * problem.micro_batches), *way_of(problem),
        np.array(problem.limits) * (1 + SLACK), each(activations.after_forward), each(activations.after_backward),
        again, ways(keeping.left), ways(keeping.moved), offload, reload)


def pieces_of(schedule: Schedule) -> int:
    """A number that is enough for the pieces of each W of `schedule`."""
    return max(action.pieces for _, action in schedule.passes())


def orders_of(schedule: Schedule, problem: Problem, pieces: int) -> Orders:
    """The F, B and W of `schedule`, where everything waits on the device and nothing is recomputed."""
    batch, ranks, chunks = schedule.micro_batches, problem.ranks, len(problem.placement.chunks[0])
    most = chunks * batch * (3 + pieces)
    ways, leads, cuts = (np.zeros((ranks, chunks, batch), np.int64) for _ in range(3))
    orders = Orders(np.zeros((ranks, most), np.int64), np.zeros((ranks, most), np.int64), np.zeros(ranks, np.int64),
                    np.full((ranks, 4 * chunks, batch * pieces), -1), ways, leads, cuts,
                    np.zeros((ranks, chunks, batch * pieces)))
    unscaled = Keeping(problem).times
    for rank, order in enumerate(schedule.orders):
        place = 0
        for action in order:
            chunk = problem.placement.chunks[rank].index(action.stage)
            if action.kind in _KINDS:
                numbers, stream = [action.micro_batch], _KINDS[action.kind] * chunks + chunk
            elif action.kind is Kind.W:
                last = (action.micro_batch + 1) * pieces - action.pieces + action.piece
                # Empty pieces come with the first that isn't.
                numbers = [*range(action.micro_batch * pieces, last)] if action.piece == 0 else []
                numbers.append(last)
                stream = W * chunks + chunk
                orders.cuts[rank, chunk, action.micro_batch] = action.pieces
                whole = problem.times.weight_grad[action.stage]
                orders.shares[rank, chunk, last] = unscaled.of(action) / whole if whole else 0.0
            else:
                continue
            for number in numbers:
                orders.streams[rank, place], orders.numbers[rank, place] = stream, number
                orders.places[rank, stream, number] = place
                place += 1
        orders.lengths[rank] = place
    return orders


def schedule_of(orders: Orders, layout: MemoryLayout, problem: Problem, keeping: Keeping) -> Schedule:
    """The schedule with these orders, and O and R where they belong. ValueError for orders that exceed a limit."""
    chunks = len(problem.placement.chunks[0])
    steps = empty_steps(orders)
    queue, users = (np.zeros(chunks * problem.micro_batches, np.int64) for _ in range(2))
    rows = []
    for rank, stages in enumerate(problem.placement.chunks):
        if insert_copies(layout, orders, steps, rank, queue, users) >= 0:
            raise ValueError(f"rank {rank} exceeds its limit")
        row = []
        for stream, number in zip(steps.streams[rank, :steps.counts[rank]].tolist(), steps.numbers[rank].tolist()):
            kind, chunk = divmod(stream, chunks)
            stage = stages[chunk]
            if kind == W:
                micro_batch, piece = divmod(number, layout.pieces)
                cut = int(orders.cuts[rank, chunk, micro_batch])
                piece -= layout.pieces - cut
                if piece >= 0:
                    row.append(Pass(Kind.W, stage, micro_batch, piece, cut))
            elif kind == C:
                again = keeping.recompute(int(orders.ways[rank, chunk, number]), stage, number)
                assert again is not None
                row.append(again)
            else:
                whole = kind == B and orders.cuts[rank, chunk, number] == 0
                of_kind = {F: Kind.F, B: Kind.BW if whole else Kind.B, O: Kind.O, R: Kind.R}
                row.append(Pass(of_kind[kind], stage, number))
        rows.append(tuple(row))
    return Schedule("adaptive", problem.placement, problem.micro_batches, tuple(rows))
