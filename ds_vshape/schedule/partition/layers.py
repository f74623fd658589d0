"""What the layers of a model cost, and what stages of them cost: sums of consecutive layers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields
from functools import cached_property
from itertools import accumulate, pairwise

from ds_vshape.schedule.activations import Activations
from ds_vshape.schedule.placement import Placement
from ds_vshape.schedule.timeline import Times


@dataclass(frozen=True)
class Layers:
    """The costs of each layer, for one micro-batch.

    `forward`, `input_grad` and `weight_grad` are the times of F, B and W, in any one unit; `after_forward` and
    `after_backward` the sizes of what F leaves until B and of what B leaves until W, in any one unit; `state`, in that
    unit too, what the layer's rank keeps all the time (weights, gradients, optimizer), or nothing where it doesn't
    count. Raises ValueError for lengths that differ, and for values that aren't finite numbers of 0 or more.
    """

    forward: tuple[float, ...]
    input_grad: tuple[float, ...]
    weight_grad: tuple[float, ...]
    after_forward: tuple[float, ...]
    after_backward: tuple[float, ...]
    state: tuple[float, ...] = ()

    def __post_init__(self) -> None:
        for field in fields(self):
            values = getattr(self, field.name)
            if field.name == "state" and not values:
                continue
            if len(values) != len(self.forward) or not all(0 <= value < float("inf") for value in values):
                raise ValueError(f"{field.name} must be {len(self.forward)} finite numbers of 0 or more, one for each "
                                 f"layer, not {values}")

    @classmethod
    def alike_in_memory(cls, forward: Sequence[float], input_grad: Sequence[float],
                        weight_grad: Sequence[float]) -> Layers:
        """Layers whose times alone are known: each leaves a unit of activations until the end of W."""
        ones = (1.0,) * len(forward)
        return cls(tuple(forward), tuple(input_grad), tuple(weight_grad), ones, ones)

    def __len__(self) -> int:
        return len(self.forward)

    @cached_property
    def costs(self) -> tuple[float, ...]:
        """The time of each layer's F, B and W together."""
        return tuple(map(sum, zip(self.forward, self.input_grad, self.weight_grad)))

    @cached_property
    def _sums(self) -> dict[str, list[float]]:
        """Of the first n layers, for each n."""
        return {field.name: [0.0, *accumulate(getattr(self, field.name))] for field in fields(self)}

    def times(self, bounds: Sequence[int], hops: tuple[float, ...] = ()) -> Times:
        """Of the stages with these bounds (`balance.check_bounds`); `hops` as in `Times`."""
        return Times(self._of_stages("forward", bounds), self._of_stages("input_grad", bounds),
                     self._of_stages("weight_grad", bounds), hops)

    def activations(self, bounds: Sequence[int]) -> Activations:
        """Of the stages with these bounds."""
        return Activations(self._of_stages("after_forward", bounds), self._of_stages("after_backward", bounds))

    def states(self, bounds: Sequence[int], placement: Placement) -> tuple[float, ...]:
        """What each rank keeps all the time."""
        stages = self._of_stages("state", bounds) if self.state else (0.0,) * placement.stages
        return tuple(sum(stages[stage] for stage in chunks) for chunks in placement.chunks)

    def _of_stages(self, name: str, bounds: Sequence[int]) -> tuple[float, ...]:
        sums = self._sums[name]
        # Rounding must not make a stage without activations negative.
        return tuple(max(0.0, sums[stop] - sums[start]) for start, stop in pairwise(bounds))
