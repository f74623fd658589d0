"""Orders for evaluation: forwards only, on any placement.

    rank 0    F0.0 F0.1 F0.2 F3.0      F3.1      F3.2
    rank 1         F1.0 F2.0 F1.1 F2.1 F1.2 F2.2          (v, p = 2, m = 3)

Nothing is kept for a backward, so the only activations are those that wait between two stages. A rank with a choice
runs its later stage, which takes such an activation out of the pipeline.
"""

from __future__ import annotations

from ds_vshape.schedule.passes import F, Pass
from ds_vshape.schedule.placement import Placement
from ds_vshape.schedule.schedule import Schedule
from ds_vshape.schedule.steady_state import extended


def forward_only(placement: Placement, micro_batches: int) -> Schedule:
    """Every stage's forwards of `micro_batches`, as early as possible with all passes alike.

    `schedule.check` would miss the backwards; each stage runs each micro-batch once, in order, by construction.
    Raises ValueError for less than 1 micro-batch.
    """
    if micro_batches < 1:
        raise ValueError(f"a batch needs at least 1 micro-batch, not {micro_batches}")
    # On a ring of ranks forwards come in groups.
    interval = placement.ranks if placement.name == "interleaved" else 1
    return extended(lambda few: _forward_only(placement, few), micro_batches, 2 * placement.stages, interval)


def _forward_only(placement: Placement, micro_batches: int) -> Schedule:
    orders: list[list[Pass]] = [[] for _ in range(placement.ranks)]
    # done[s] counts the forwards of stage s; the entry at the end is stage -1, the data: all there from the start.
    done = [0] * placement.stages + [micro_batches]
    while done[placement.last_stage] < micro_batches:
        now = [max((stage for stage in chunks if done[stage] < done[stage - 1]), default=None)
               for chunks in placement.chunks]
        for rank, stage in enumerate(now):
            if stage is not None:
                orders[rank].append(F(stage, done[stage]))
        for stage in now:
            if stage is not None:
                done[stage] += 1
    return Schedule("forward-only", placement, micro_batches, tuple(tuple(order) for order in orders))
