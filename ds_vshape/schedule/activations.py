"""How much memory a schedule's activations take: sizes by stage, and the peak of each rank."""

from __future__ import annotations

from dataclasses import dataclass

from ds_vshape.schedule.passes import Kind, Pass
from ds_vshape.schedule.placement import Placement
from ds_vshape.schedule.schedule import Schedule


@dataclass(frozen=True)
class Activations:
    """Sizes for each stage and one micro-batch, in bytes or any one unit.

    `whole` is what F leaves until B; `kept` is what B leaves until W ends: inputs and output gradients of the split
    operators. A W in pieces gives back equal shares of it.
    """

    whole: tuple[float, ...]
    kept: tuple[float, ...]

    @classmethod
    def counted(cls, placement: Placement) -> Activations:
        """The paper's way (Table 1): whole until the end of W, in units of 1/(2p) of the model for one micro-batch."""
        sizes = (2 * placement.ranks / placement.stages,) * placement.stages
        return cls(sizes, sizes)

    def change(self, work: Pass) -> float:
        """What `work` adds to the memory of its rank, when it starts (F) or when it has ended (all others)."""
        stage = work.stage
        if work.kind is Kind.F:
            return self.whole[stage]
        if work.kind is Kind.B:
            return self.kept[stage] - self.whole[stage]
        if work.kind is Kind.W:
            return -self.kept[stage] / work.pieces
        return -self.whole[stage]


def peaks(schedule: Schedule, activations: Activations) -> tuple[float, ...]:
    """The most that is alive at once on each rank, in the unit of `activations`."""
    found = []
    for order in schedule.orders:
        alive = peak = 0.0
        for work in order:
            alive += activations.change(work)
            peak = max(peak, alive)
        found.append(peak)
    return tuple(found)
