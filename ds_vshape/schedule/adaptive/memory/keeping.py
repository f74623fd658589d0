"""In which ways an activation can be kept between its F and its backward."""

from __future__ import annotations

from dataclasses import replace
from math import ceil

from ds_vshape.schedule.adaptive.problem import Problem
from ds_vshape.schedule.passes import C, O, Pass, R

# Which shares of a stage's layers may be recomputed, besides none and all.
_SHARES = (0.34, 0.67)


class Keeping:
    """The ways to keep an activation in `problem`, the same number of them on each stage.

    `layers[w][s]` is how many of the first layers of stage s are recomputed in way w, as `Pass.layers` counts: 0 is all
    of them. Way 0 recomputes none.
    """

    def __init__(self, problem: Problem) -> None:
        self._problem = problem
        # Of a micro-batch of scale 1.
        self.times = replace(problem.times, scales=())
        sizes, seconds = problem.activations.recomputed, problem.times.recompute
        self.layers: list[list[int]] = [[0] * problem.placement.stages]
        if problem.recompute and sizes:
            if seconds and all(1 < len(row) == len(times) for row, times in zip(sizes, seconds)):
                self.layers += [[ceil(share * len(row)) % len(row) for row in sizes] for share in _SHARES]
            self.layers.append([0] * problem.placement.stages)

    def __len__(self) -> int:
        return len(self.layers)

    def recompute(self, way: int, stage: int, micro_batch: int = 0) -> Pass | None:
        """C in a way of keeping; None if there is none."""
        return C(stage, micro_batch, self.layers[way][stage]) if way else None

    def seconds(self, way: int, stage: int) -> tuple[float, float, float]:
        """How long C takes, and the copies to the host and back, of a micro-batch of scale 1."""
        times, again = self.times, self.recompute(way, stage)
        return (times.of(again) if again else 0.0, times.of_copy(O(stage, 0), again), times.of_copy(R(stage, 0), again))

    def left(self, way: int, stage: int) -> float:
        """What F leaves."""
        return self._problem.activations.left(stage, self.recompute(way, stage))

    def moved(self, way: int, stage: int) -> float:
        """What an offload moves of what F leaves."""
        return -self._problem.activations.change(O(stage, 0), self.recompute(way, stage)).at_end
