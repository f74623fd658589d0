"""Recomputes or offloads everything, as a training does without a plan: any schedule with less memory and more time.

    some order    F0 F1 F2 B0 F3 B1 B2 B3
    recomputed    F0 F1 F2 C0 B0 F3 C1 B1 C2 B2 C3 B3
    offloaded     F0 O0 F1 O1 R0 F2 B0 O2 R1 F3 R2 B1 B2 B3      O before the next F, R a pass before the backward

A plan decides for each micro-batch; what it finds should be no slower than these within the same memory.
"""

from __future__ import annotations

from collections import defaultdict

from ds_vshape.schedule.passes import Kind, Pass
from ds_vshape.schedule.schedule import Order, Schedule
from ds_vshape.schedule.steady_state import changed


def with_everything_recomputed(schedule: Schedule) -> Schedule:
    """`schedule`, which has no C, with a C of all layers right before each B and BW."""
    return changed(schedule, lambda some: some.with_orders(tuple(map(_recomputed, some.orders))))


def with_everything_offloaded(schedule: Schedule, behind: int = 1, ahead: int = 1) -> Schedule:
    """`schedule`, which has no O, with all offloaded that is away long enough.

    Args:
        behind: O stands right before the F that comes so many Fs of the rank after its own: so many copies may be on
            their way to the host, whose memory isn't free yet.
        ahead: R stands so many passes of the rank before C, B or BW, whichever is first to need it.

    Where R wouldn't stand at least a pass after O, nothing is offloaded.
    """
    return changed(schedule, lambda some: some.with_orders(tuple(_offloaded(order, behind, ahead)
                                                                 for order in some.orders)))


def _recomputed(order: Order) -> Order:
    found: list[Pass] = []
    for action in order:
        if action.kind.gives_input_gradient:
            found.append(Pass(Kind.C, action.stage, action.micro_batch))
        found.append(action)
    return tuple(found)


def _offloaded(order: Order, behind: int, ahead: int) -> Order:
    forwards = [place for place, action in enumerate(order) if action.kind is Kind.F]
    needed: dict[tuple[int, int], int] = {}
    for place, action in enumerate(order):
        if action.kind is Kind.C or action.kind.gives_input_gradient:
            needed.setdefault((action.stage, action.micro_batch), place)
    # What stands right before each place.
    before: dict[Kind, dict[int, list[Pass]]] = {Kind.O: defaultdict(list), Kind.R: defaultdict(list)}
    for place, freed in zip(forwards, forwards[behind:]):
        stage, micro_batch = order[place].stage, order[place].micro_batch
        taken = needed[stage, micro_batch] - ahead
        if freed < taken:
            before[Kind.O][freed].append(Pass(Kind.O, stage, micro_batch))
            before[Kind.R][taken].append(Pass(Kind.R, stage, micro_batch))
    return tuple(step for place, action in enumerate(order)
                 for step in (*before[Kind.O][place], *before[Kind.R][place], action))
