"""Weight gradients that wait: moving them earlier keeps a schedule valid, and where they are the memory it falls."""

from __future__ import annotations

from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ds_vshape.schedule.activations import Activations, peak_activations
from ds_vshape.schedule.builders.pending import with_few_pending
from ds_vshape.schedule.named import SCHEDULES, build
from ds_vshape.schedule.passes import Kind, Pass
from ds_vshape.schedule.schedule import Order, Schedule, check
from ds_vshape.schedule.timeline import Times, simulate


def most_waiting(order: Order) -> int:
    """How many micro-batches' Ws wait at most, counted by hand."""
    left: Counter[tuple[int, int]] = Counter()
    most = 0
    for action in order:
        if action.kind is Kind.B:
            left[action.stage, action.micro_batch] = -1
        elif action.kind is Kind.W:
            if left[action.stage, action.micro_batch] == -1:
                left[action.stage, action.micro_batch] = action.pieces
            left[action.stage, action.micro_batch] -= 1
        most = max(most, sum(pieces != 0 for pieces in left.values()))
    return most


def cut(schedule: Schedule, pieces: int) -> Schedule:
    """`schedule` with each W in pieces, which run one after another."""
    orders = tuple(tuple(piece for action in order
                         for piece in (action.cut(pieces) if action.kind is Kind.W else (action,)))
                   for order in schedule.orders)
    return Schedule(schedule.name, schedule.placement, schedule.micro_batches, orders)


@given(name=st.sampled_from(sorted(SCHEDULES)), ranks=st.integers(1, 6), micro_batches=st.integers(1, 12),
       most=st.integers(1, 4), pieces=st.sampled_from([1, 3]))
def test_is_valid_and_keeps_the_limit(name: str, ranks: int, micro_batches: int, most: int, pieces: int) -> None:
    schedule = cut(build(name, ranks, micro_batches), pieces)
    fewer = with_few_pending(schedule, most)
    check(fewer)
    simulate(fewer, Times.uniform(schedule.placement.stages))

    def others(order: Order) -> list[Pass]:
        return [action for action in order if action.kind is not Kind.W]

    for before, after in zip(schedule.orders, fewer.orders, strict=True):
        assert sorted(map(str, before)) == sorted(map(str, after))
        assert others(before) == others(after), "only Ws move"
        assert most_waiting(after) <= min(most, most_waiting(before))
    if all(most_waiting(order) <= most for order in schedule.orders):
        assert fewer == schedule
    for before, after in zip(peak_activations(schedule), peak_activations(fewer), strict=True):
        assert after <= before


@pytest.mark.parametrize("name", ["zb-h1", "v-half", "v-zb"])
def test_recomputed_layers_take_less(name: str) -> None:
    """With F leaving 1 and B leaving 16, as for a recomputed transformer block."""
    schedule = build(name, 4, 16)
    stages = schedule.placement.stages
    recomputed = Activations((1.0,) * stages, (16.0,) * stages)
    times = Times.uniform(stages, 1, 2, 1)
    before, after = schedule, with_few_pending(schedule)
    assert max(peak_activations(after, recomputed)) <= 0.7 * max(peak_activations(before, recomputed))
    assert max(peak_activations(after, recomputed)) <= 0.6 * 16 * max(peak_activations(schedule))
    assert simulate(after, times).makespan <= 1.1 * simulate(before, times).makespan
