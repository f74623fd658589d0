"""Building blocks: offsets, slots of W, lifespans; repeating and reordering."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ds_vshape.schedule.activations import Activations, peak_activations
from ds_vshape.schedule.builders.building_block import BuildingBlock, reorder, repeat
from ds_vshape.schedule.builders.one_f_one_b import one_f_one_b
from ds_vshape.schedule.builders.v_shape import v_block
from ds_vshape.schedule.named import build
from ds_vshape.schedule.passes import B, F, Kind, W
from ds_vshape.schedule.placement import linear, v
from ds_vshape.schedule.schedule import Schedule
from ds_vshape.schedule.timeline import Times, simulate


def test_offsets_follow_the_micro_batch() -> None:
    """The figure of the module's docstring: V-Min with 4 ranks."""
    block = v_block(4, (1, 1, 1, 1), (1, 1, 1)).split()
    assert block.forward == (0, 1, 2, 3, 4, 5, 6, 7)
    assert block.input_grad == (15, 14, 13, 12, 11, 10, 9, 8)
    assert block.weight_grad == (17, 17, 15, 14, 13, 12, 10, 10)
    assert (block.lifespan(0), block.lifespan(7)) == (18, 4)


def test_lifespans_are_the_papers() -> None:
    """4d, 6d and 12d, give or take the turns; an activation of 1F1B-V lives 8d."""
    for ranks in (7, 10, 13):
        for steps, turns, per_rank in (((1, 1, 1, 1), (1, 1, 1), 4), ((4, 2, 4, 2), (3, 1, 3), 12)):
            block = v_block(ranks, steps, turns).split()
            assert abs(max(map(block.lifespan, range(2 * ranks))) - per_rank * ranks) <= 6
        half = v_block(ranks, (2, 1, 2, 1), (2, 4, 1) if ranks % 2 == 0 else (1, 1, 2)).split()
        assert abs(max(map(half.lifespan, range(2 * ranks))) - 6 * ranks) <= 6
        assert abs(v_block(ranks, (1, 1, 3, 3), (1, 2, 3)).lifespan(0) - 8 * ranks) <= 6
    # The paper gives 12d - 2 as V-ZB's longest; with W counted to its end ours lives 12d - 3.
    assert v_block(8, (4, 2, 4, 2), (3, 1, 3)).split().lifespan(0) == 12 * 8 - 3


@pytest.mark.parametrize("ranks", range(1, 13))
def test_repeating_keeps_no_more_than_the_lifespans_say(ranks: int) -> None:
    for steps, turns in (((1, 1, 1, 1), ((1, 3, 1), (1, 1, 1), (1, 5, 1))[ranks % 3]), ((4, 2, 4, 2), (3, 1, 3)),
                         ((2, 1, 2, 1), ((2, 4, 1), (1, 1, 2))[ranks % 2])):
        block = v_block(ranks, steps, turns).split()
        for chunks, peak in zip(block.placement.chunks, peak_activations(repeat(block, 4 * ranks, "repeated"))):
            assert peak <= sum(block.activations(stage) for stage in chunks)


def test_the_block_of_1f1b_gives_1f1b() -> None:
    for ranks in (1, 2, 5):
        block = BuildingBlock.from_offsets(linear(ranks), 3, [1] * ranks + [2] * (ranks - 1))
        assert repeat(block, 7, "1f1b") == one_f_one_b(ranks, 7)


def test_passes_that_meet_are_refused() -> None:
    with pytest.raises(ValueError, match="two passes of rank 0 start at the same time"):
        v_block(3, (1, 1, 1, 1), (1, 1, 1)).split()


def test_a_wrong_number_of_offsets_is_refused() -> None:
    with pytest.raises(ValueError, match="2 stages take 3 offsets, not 2"):
        BuildingBlock.from_offsets(linear(2), 3, [1, 1])


def test_w_put_off_keeps_its_slot() -> None:
    block = BuildingBlock.from_offsets(linear(3), 3, [1, 1, 1, 2, 2]).split()
    later = block.delayed([0, 1, 2])
    assert [b - a for a, b in zip(block.weight_grad, later.weight_grad)] == [0, 3, 6]
    assert (later.forward, later.input_grad) == (block.forward, block.input_grad)


@given(st.integers(1, 9), st.integers(1, 20), st.sampled_from(["v-min", "v-half", "v-zb", "zb-h1", "1f1b-v"]),
       st.integers(0, 12))
@settings(max_examples=60)
def test_reordering_is_never_slower_and_stays_within_the_limit(ranks: int, micro_batches: int, name: str,
                                                               more: int) -> None:
    block = {"v-min": lambda: v_block(ranks, (1, 1, 1, 1), ((1, 3, 1), (1, 1, 1), (1, 5, 1))[ranks % 3]).split(),
             "v-half": lambda: v_block(ranks, (2, 1, 2, 1), ((2, 4, 1), (1, 1, 2))[ranks % 2]).split(),
             "v-zb": lambda: v_block(ranks, (4, 2, 4, 2), (3, 1, 3)).split(),
             "zb-h1": lambda: BuildingBlock.from_offsets(linear(ranks), 3, [1] * ranks + [2] * (ranks - 1)).split(),
             "1f1b-v": lambda: v_block(ranks, (1, 1, 3, 3), ((3, 1, 3), (1, 2, 3), (1, 3, 3))[ranks % 3])}[name]()
    squeezed = repeat(block, micro_batches, name)
    # Activations of a stage, whichever its size.
    unit = Activations((1.0,) * block.placement.stages, (1.0,) * block.placement.stages)
    limit = int(max(peak_activations(squeezed, unit))) + more
    reordered = reorder(squeezed, limit)
    times = Times.uniform(block.placement.stages)
    before, after = simulate(squeezed, times), simulate(reordered, times)
    assert after.makespan <= before.makespan
    assert max(peak_activations(reordered, unit)) <= limit
    for old, new in zip(squeezed.orders, reordered.orders):
        assert sorted(old) == sorted(new)
    starts = {span.action: span.start for spans in before.ranks for span in spans}
    assert all(span.start <= starts[span.action]
               for spans in after.ranks for span in spans if span.action.kind in (Kind.F, Kind.B, Kind.BW))
    for stage in range(block.placement.stages):
        for kind in Kind:
            order = [action.micro_batch for _, action in reordered.passes()
                     if (action.kind, action.stage) == (kind, stage)]
            assert order == sorted(order)


def test_reordering_puts_b_ahead_of_w_and_fills_waits() -> None:
    """Two ranks, three micro-batches, no limit felt: rank 0 runs F0.2 while it would wait for B1.0 to come back."""
    slow = Schedule("slow", linear(2), 3, (
        (F(0, 0), F(0, 1), B(0, 0), W(0, 0), F(0, 2), B(0, 1), W(0, 1), B(0, 2), W(0, 2)),
        (F(1, 0), B(1, 0), W(1, 0), F(1, 1), B(1, 1), W(1, 1), F(1, 2), B(1, 2), W(1, 2))))
    assert reorder(slow, 3).orders[0][:4] == (F(0, 0), F(0, 1), F(0, 2), B(0, 0))
    assert reorder(slow, 2).orders[0] == slow.orders[0]


def test_an_order_that_waits_for_itself_is_refused() -> None:
    with pytest.raises(ValueError, match="wait for each other in a circle"):
        reorder(Schedule("never", v(1), 1, ((F(0, 0), W(0, 0), F(1, 0)),)), 2)


def test_times_of_the_order_are_not_needed() -> None:
    """A schedule is an order: other times change the timeline, not the schedule."""
    assert build("v-half", 3, 5) == build("v-half", 3, 5)
