"""Fewer weight gradients that wait at once.

The paper counts a micro-batch's activations as one size from F to the end of W. Where layers are recomputed that isn't
so: F leaves a layer's input alone, and what B leaves to W is many times as much. Then the waiting Ws are the memory.

    p = 8, m = 32, B twice as long as F and W, B leaves 16 times what F does

                 as made for equal sizes        with 2 that wait
    v-half       makespan 297, peak 70          302, 40
    v-zb         makespan 270, peak 256         284, 46
"""

from __future__ import annotations

from ds_vshape.schedule.passes import Kind, Pass
from ds_vshape.schedule.schedule import Order, Schedule
from ds_vshape.schedule.steady_state import changed


def with_few_pending(schedule: Schedule, most: int | None = None) -> Schedule:
    """`schedule` with Ws run earlier, so that no rank begins a B while more than `most` - 1 other Ws wait.

    Without `most`, as many may wait as a rank has stages: those of one micro-batch.
    A W depends on its own B alone and nothing depends on it, so that moving it forward breaks no order; what comes
    after it on the rank may come later than before.
    """
    most = most or schedule.placement.stages // schedule.placement.ranks
    return changed(schedule, lambda some: some.with_orders(tuple(_with_few_pending(order, most)
                                                                 for order in some.orders)))


def _with_few_pending(order: Order, most: int) -> Order:
    pieces: dict[tuple[int, int], list[Pass]] = {}
    for action in order:
        if action.kind is Kind.W:
            pieces.setdefault((action.stage, action.micro_batch), []).append(action)
    waiting: list[tuple[int, int]] = []
    done: list[Pass] = []
    for action in order:
        of = action.stage, action.micro_batch
        if action.kind is Kind.B:
            while len(waiting) >= most:
                done += pieces[waiting.pop(0)]
            waiting.append(of)
            done.append(action)
        elif action.kind is not Kind.W:
            done.append(action)
        elif of in waiting:
            done.append(pieces[of].pop(0))
            if not pieces[of]:
                waiting.remove(of)
    return tuple(done)
