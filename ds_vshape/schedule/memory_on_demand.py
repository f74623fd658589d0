"""What a micro-batch costs a rank if it is recomputed or offloaded, and the least time that any mixture takes.

A rank chooses for each stage and micro-batch between a few options: keep what F leaves, recompute its first k layers,
offload it, or both. An option costs time of the rank (C), of the engines for copies, and memory x time: what is alive,
summed up from the start of F to the end of B. The backward can't start before the micro-batch has gone up to the last
stage and come back, a time `trip` from the start of F to the end of B:

    kept          |FFFFF|------------------- whole -----------------------|BBBBB|
    recomputed    |FFFFF|------------------- left ----------------|CCCCC|  BBBBB|     whole in F, C and B
    offloaded     |FFFFF|  out  |----------- stays -------|  back |        BBBBB|     whole but in the middle
    both          |FFFFF|  out  |--------- less stays ----| back  |CCCCC|  BBBBB|     left while it is copied

Sums over all micro-batches bound the makespan from below: those of each engine's time, and memory x time over the
limit. How many micro-batches take which option is relaxed to fractions. By weak duality any weights of these bounds,
which add up to 1, give one that holds for every mixture: the weighted costs, each stage at its cheapest option.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from itertools import combinations
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from ds_vshape.schedule.activations import Activations
from ds_vshape.schedule.passes import Kind, Pass
from ds_vshape.schedule.timeline import Times

# The grid of weights: so many steps from 0 to 1, and so often again around the best, each time with less to go.
_STEPS, _ROUNDS, _SHRINK = 8, 12, 0.6


class Option(NamedTuple):
    """What one micro-batch of a stage costs: seconds of C, of copies to the host and back, and memory x time."""

    recompute: float
    out: float
    back: float
    area: float


def options(stage: int, trip: float, times: Times, activations: Activations, kinds: Collection[Kind]
            ) -> Iterator[Option]:
    """All that a stage can do with a micro-batch if its rank may have passes of `kinds`, of C and O.

    `trip` is the least time from the start of its F to the end of its B.
    """
    whole = activations.after_forward[stage]
    layers = max(1, len(activations.recomputed[stage]) if activations.recomputed else 1)
    recomputed = [Pass(Kind.C, stage, 0, layers=k + 1 if k + 1 < layers else 0) for k in range(layers)]
    for recompute in (None, *(recomputed if Kind.C in kinds else ())):
        again = times.of(recompute) if recompute else 0.0
        left = activations.left(stage, recompute)
        passes = times.forward[stage] + again + times.input_grad[stage]
        yield Option(again, 0.0, 0.0, whole * passes + left * max(0.0, trip - passes))
        if Kind.O in kinds:
            moved = -activations.change(Pass(Kind.O, stage, 0), recompute).at_end
            out, back = (times.of_copy(Pass(kind, stage, 0), recompute) for kind in (Kind.O, Kind.R))
            away = max(0.0, trip - passes - out - back)
            yield Option(again, out, back, whole * passes + left * (out + back) + (left - moved) * away)


def least_of_mixtures(bases: Sequence[float], costs: Sequence[NDArray[np.float64]]) -> float:
    """The least T with T >= bases[j] + sum over stages of costs[stage][option, j] for each j, whatever the options; or
    a little less. Fractions of options count as such."""

    def bound(weights: NDArray[np.float64]) -> NDArray[np.float64]:
        """Of each row of weights."""
        found: NDArray[np.float64] = weights @ np.asarray(bases)
        for of_stage in costs:
            found = found + (weights @ of_stage.T).min(axis=1)
        return found

    grid = _grid(len(bases))
    best, reach = grid[bound(grid).argmax()], 1.0
    for _ in range(_ROUNDS):
        reach *= _SHRINK
        # Between the best so far and each point of the grid: still weights that add up to 1.
        near = np.vstack([best, best + reach * (grid - best)])
        best = near[bound(near).argmax()]
    return float(bound(best[None])[0])


def _grid(size: int) -> NDArray[np.float64]:
    """All rows of `size` multiples of 1 / _STEPS that add up to 1."""
    bars = np.array(list(combinations(range(_STEPS + size - 1), size - 1)))
    edges = np.hstack([np.full((len(bars), 1), -1), bars, np.full((len(bars), 1), _STEPS + size - 1)])
    counts: NDArray[np.int64] = np.diff(edges) - 1
    return counts / _STEPS
