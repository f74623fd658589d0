"""One micro-batch after another: the order in which nothing can hang, whatever waits for whom.

The first batch on a device loads kernels, and each load waits until the device is idle. While another rank's message is
on its way, that can be for ever; so each message here is awaited before anything else is done.
"""

from __future__ import annotations

from ds_vshape.schedule.passes import Kind, Pass
from ds_vshape.schedule.schedule import Schedule


def one_by_one(schedule: Schedule) -> Schedule:
    """The same passes: of each micro-batch in turn the forwards, then the backwards, each with its W at once.

    Sums over the micro-batches are taken in the same order, so losses and gradients are those of `schedule`.
    """
    last_stage = schedule.placement.last_stage

    def place(work: Pass) -> tuple[int, int, int]:
        forward = work.kind is Kind.F
        return work.micro_batch, work.stage if forward else 2 * last_stage + 1 - work.stage, work.piece

    def order(passes: tuple[Pass, ...]) -> tuple[Pass, ...]:
        # B before the pieces of its W: a stable sort by kind first.
        return tuple(sorted(sorted(passes, key=lambda work: work.kind is Kind.W), key=lambda work: place(work)[:2]))

    return Schedule(f"{schedule.name}, one micro-batch after another", schedule.placement, schedule.micro_batches,
                    tuple(map(order, schedule.orders)))
