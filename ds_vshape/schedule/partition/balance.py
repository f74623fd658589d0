"""Divides the layers into stages so that all ranks have about the same amount of work.

A schedule runs at the pace of its slowest rank, so the work of ranks must be balanced: with two chunks on each rank, a
heavy head can share a rank with a light first stage. DeepSpeed's methods balance stages, which adds the whole of a
heavy head to the share of rank 0.

Among all cuts into stages of at least one layer, :func:`balance` takes, in this order,

    [1] the least load of the most loaded rank,
    [2] then the least sum of the squares of the stages' loads.

Both by dynamic programming over ranks. The state is how many layers the first and the second chunks of the ranks so
far have taken, from the two ends that their placement gives them:

    linear         0 1 2 ..                     one chunk a rank
    v              0 1 2 ..        .. 7 6 5     from the model's two ends, until they meet
    interleaved    0 1 2 .. | 4 5 6 ..          from the model's start and from a middle, each up to its end

For `linear` and `v` the result is exact in both. For `interleaved` it is exact for each middle, and the best of at most
`MIDDLES` of them, those nearest to half of the work: all that there are up to 2p + MIDDLES - 1 layers. With more than
two chunks on a rank, an even division is improved by local search (balance_many.py).

The time grows with how many layers fit under the limit: 200 layers in 64 stages take a fraction of a second where the
heaviest layer costs as much as ten others, and half a minute where it costs as much as a hundred.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import accumulate, pairwise

import numpy as np
from numpy.typing import NDArray

from ds_vshape.schedule.partition.balance_many import improved
from ds_vshape.schedule.placement import PLACEMENTS, Placement, linear

MIDDLES = 8
# Squares of sums of these are still far from infinite.
MOST_COST = 1e100
# Loads that differ by rounding alone are equal.
_ROUNDING = 1 + 1e-9

Table = NDArray[np.float64]
Recurrence = Callable[[Table, Table, Table], Table]
Cost = float | tuple[float, float, float]


class PartitionError(ValueError):
    """A partition that doesn't fit the layers or the stages; the message says what would."""


def check_bounds(bounds: Sequence[int], stages: int, layers: int) -> tuple[int, ...]:
    """`bounds` themselves: the first layer of each of `stages` stages, then the number of layers.

    Raises PartitionError for a wrong length, other ends than 0 and `layers`, or a stage without a layer.
    """
    if len(bounds) != stages + 1:
        raise PartitionError(f"the partition has {len(bounds)} bounds: {stages} stages need {stages + 1}, the first "
                             "layer of each and the number of layers")
    if bounds[0] != 0 or bounds[-1] != layers:
        raise PartitionError(f"the partition goes from {bounds[0]} to {bounds[-1]}: it must go from 0 to {layers}, the "
                             "number of layers")
    for stage, (start, stop) in enumerate(pairwise(bounds)):
        if start >= stop:
            raise PartitionError(f"the partition's bounds {start}, {stop} leave stage {stage} without a layer: they "
                                 "must increase")
    return tuple(bounds)


def check_costs(costs: Sequence[Cost], layers: int) -> tuple[float, ...]:
    """One number for each layer; where F, B and W are given, their sum.

    Raises PartitionError for a wrong length, a cost that is negative or above MOST_COST, or nothing but zeros.
    """
    if len(costs) != layers:
        raise PartitionError(f"the partition has costs of {len(costs)} layers: the model has {layers}")
    for layer, cost in enumerate(costs):
        for number in cost if isinstance(cost, tuple) else (cost,):
            if not 0 <= number <= MOST_COST:
                raise PartitionError(f"the partition's cost of layer {layer} is {number}: must be a number from 0 on, "
                                     f"up to {MOST_COST:g}")
    sums = tuple(float(sum(cost)) if isinstance(cost, tuple) else float(cost) for cost in costs)
    if not any(sums):
        raise PartitionError("the partition's costs are all 0: at least one layer must cost something")
    return sums


def stage_loads(costs: Sequence[float], bounds: Sequence[int]) -> tuple[float, ...]:
    """The cost of each stage."""
    return tuple(math.fsum(costs[start:stop]) for start, stop in pairwise(bounds))


def rank_loads(costs: Sequence[float], bounds: Sequence[int], placement: Placement) -> tuple[float, ...]:
    """The cost of all stages of each rank."""
    loads = stage_loads(costs, bounds)
    return tuple(math.fsum(loads[stage] for stage in stages) for stages in placement.chunks)


def balance(costs: Sequence[float], placement: Placement, slack: float = 0.0) -> tuple[int, ...]:
    """The best bounds for `costs`, one for each layer, at any scale: stages + 1 numbers, as in `check_bounds`.

    A rank may have up to the share `slack` more than [1] allows where that makes [2] smaller: measured costs differ in
    the last digits, and a hair's breadth in [1] isn't worth stages that differ by layers.

    Raises PartitionError for fewer layers than stages and for what `check_costs` refuses, ValueError for a placement
    other than linear, v and interleaved.
    """
    if placement.name not in PLACEMENTS or PLACEMENTS[placement.name](
            placement.ranks, placement.chunks_each) != placement:
        raise ValueError(f"layers can't be balanced over the placement {placement.chunks}")
    costs = check_costs(costs, len(costs))
    if len(costs) < placement.stages:
        raise PartitionError(f"{len(costs)} layers can't fill {placement.stages} stages")
    if placement.chunks_each > 2:
        return improved(balance(costs, linear(placement.stages)), costs, placement, slack)
    walks = _walks(costs, placement)
    limit, limits = math.inf, []
    for walk in walks:
        limits.append(walk.least_limit(limit))
        limit = min(limit, limits[-1] * (_ROUNDING + slack))
    even = (walk.most_even(limit) for walk, least in zip(walks, limits) if least <= limit)
    return check_bounds(min(even)[1], placement.stages, len(costs))


def _walks(costs: Sequence[float], placement: Placement) -> list[_Walk]:
    """The walks through the layers among which the best cut is: one, or one for each middle."""
    ranks, layers = placement.ranks, len(costs)
    if placement.stages == ranks:
        return [_Walk(ranks, _sums(costs), _sums(()), [(layers, 0)], lambda cuts: [a for a, _ in cuts])]
    if placement.name == "v":
        meetings = [(a, layers - a) for a in range(ranks, layers - ranks + 1)]
        return [_Walk(ranks, _sums(costs), _sums(costs[::-1]), meetings,
                      lambda cuts: [a for a, _ in cuts] + [layers - b for _, b in cuts[-2::-1]])]
    sums = _sums(costs)
    middles = sorted(range(ranks, layers - ranks + 1), key=lambda middle: abs(sums[middle] - sums[-1] / 2))
    return [_Walk(ranks, _sums(costs[:middle]), _sums(costs[middle:]), [(middle, layers - middle)],
                  _interleaved_bounds) for middle in middles[:MIDDLES]]


def _interleaved_bounds(cuts: list[tuple[int, int]]) -> list[int]:
    middle, _ = cuts[-1]
    return [a for a, _ in cuts] + [middle + b for _, b in cuts[1:]]


def _sums(costs: Sequence[float]) -> Table:
    return np.array([0.0, *accumulate(costs)])


@dataclass(frozen=True)
class _Walk:
    """One rank after the other takes layers from two sides, until they have taken one of `ends` (a, b).

    `first[a]` is the cost of the first a layers on the side of the first chunks, `second[b]` that of the first b on the
    side of the second ones; `second` is only a zero where ranks have one chunk. `bounds` turns the cuts, (a, b) before
    the first rank and after each, into the bounds of stages.
    """

    ranks: int
    first: Table
    second: Table
    ends: list[tuple[int, int]]
    bounds: Callable[[list[tuple[int, int]]], list[int]]

    def least_limit(self, enough: float) -> float:
        """The least load of the most loaded rank [1]; where that is above `enough`, anything above it."""
        a, b = self.ends[0]
        # Bounds from below: a fair share, and the layers at the ends, which the first rank has in any case.
        limit = max((self.first[a] + self.second[b]) / self.ranks, self.first[1] + self.second[1:2].sum()) * _ROUNDING
        while True:
            # The tables leave out what must break the limit, so that a result above it need not be the least.
            table = self._tables(limit, _largest)[-1]
            found = min(float(table[end]) for end in self.ends)
            if found <= limit or limit > enough:
                return found
            limit = min(found, limit * 1.2)

    def most_even(self, limit: float) -> tuple[float, list[int]]:
        """The least sum of squares of the stages' loads [2] while no rank is above `limit`, and its bounds."""
        def squares(before: Table, first: Table, second: Table) -> Table:
            return np.where(first + second <= limit, before + first * first + second * second, np.inf)

        *tables, last = self._tables(limit, squares)
        end = min(self.ends, key=lambda end: last[end])
        cuts = [end]
        for table in reversed(tables):
            a, b = cuts[-1]
            # At least one layer on each side that has any.
            sources = table[:a, :max(b, 1)]
            sums = squares(sources, (self.first[a] - self.first[:a])[:, None], self.second[b] - self.second[:max(b, 1)])
            row, column = np.unravel_index(sums.argmin(), sums.shape)
            cuts.append((int(row), int(column)))
        return float(last[end]), self.bounds(cuts[::-1])

    def _tables(self, limit: float, step: Recurrence) -> list[Table]:
        """For each number of ranks from 0 on, the best value by (a, b); inf where nothing leads.

        `step` gives the values after a rank of those before it and the costs of its two chunks. Chunks of which even
        the cheapest place in the model breaks `limit` are left out.
        """
        table = np.full((len(self.first), len(self.second)), np.inf)
        table[0, 0] = 0.0
        tables = [table]
        first_sizes, second_sizes = _sizes(self.first), _sizes(self.second)
        for _ in range(self.ranks):
            before, after = tables[-1], np.full_like(table, np.inf)
            rows, columns = (slice(int(where.min()), int(where.max()) + 1) for where in np.nonzero(before < np.inf))
            for x, first_least in first_sizes:
                top = slice(rows.start, min(rows.stop, len(self.first) - x))
                first = (self.first[x:] - self.first[:len(self.first) - x])[top, None]
                for y, second_least in second_sizes:
                    if first_least + second_least > limit:
                        break
                    left = slice(columns.start, min(columns.stop, len(self.second) - y))
                    second = (self.second[y:] - self.second[:len(self.second) - y])[left]
                    target = after[top.start + x:top.stop + x, left.start + y:left.stop + y]
                    np.minimum(target, step(before[top, left], first, second), out=target)
            tables.append(after)
        return tables


def _largest(before: Table, first: Table, second: Table) -> Table:
    return np.maximum(before, first + second)


def _sizes(sums: Table) -> list[tuple[int, float]]:
    """How many layers a chunk may have, from few to many, and the least cost of that many in a row."""
    layers = len(sums) - 1
    if layers == 0:
        return [(0, 0.0)]
    return [(size, float((sums[size:] - sums[:-size]).min())) for size in range(1, layers + 1)]
