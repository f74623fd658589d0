"""Schedules of more than two chunks on a rank, beside torch's own and the bounds."""

from __future__ import annotations

import itertools
import random
import textwrap

import pytest
from torch_orders import TORCH_SCHEDULES

from ds_vshape.schedule import drawing
from ds_vshape.schedule.activations import peak_activations
from ds_vshape.schedule.bounds import lower_bound
from ds_vshape.schedule.builders.interleaved import interleaved_zb
from ds_vshape.schedule.builders.v_shape import of_steps
from ds_vshape.schedule.chunk_times import ChunkTimes
from ds_vshape.schedule.named import build, placement_of
from ds_vshape.schedule.partition.balance import balance, rank_loads
from ds_vshape.schedule.placement import Placement, interleaved, v
from ds_vshape.schedule.schedule import check
from ds_vshape.schedule.timeline import Times, simulate

STAIRCASES = {
    "v-zb": """
        F0a F1a ....F0b F0c F1b F1c F0d B0d W0d F1d B0c B0b B1d W0c B0a W1d B1c B1b W0b W0a B1a W1c W1b W1a
        ....F0a F0b F1a F1b F0c F0d F1c F1d B0d B0c W0d W0c B0b B0a B1d B1c W0b W1d B1b B1a W1c W0a W1b W1a
    """,
    "interleaved-1f1b": """
        F0a F1a F0b F1b F0c F1c F0d F1d ........BW0d--- ....BW1d--- BW0c--- BW1c--- BW0b--- BW1b--- BW0a--- BW1a---
        ....F0a F1a F0b F1b F0c F1c F0d BW0d--- F1d BW1d--- BW0c--- BW1c--- BW0b--- BW1b--- BW0a--- BW1a--- ........
    """,
}


@pytest.mark.parametrize("name", STAIRCASES)
def test_four_chunks_as_drawn(name: str) -> None:
    schedule = build(name, 2, 2, 4)
    rows = drawing.draw(simulate(schedule, Times.uniform(8)), schedule.placement).splitlines()
    assert [row[8:] for row in rows[1:3]] == textwrap.dedent(STAIRCASES[name]).strip().splitlines()


@pytest.mark.parametrize("chunks", [2, 4])
@pytest.mark.parametrize("micro_batches", [8, 16, 32])
def test_no_slower_and_no_larger_than_torchs(micro_batches: int, chunks: int) -> None:
    torchs = TORCH_SCHEDULES["torch interleavedzerobubble" + (":4" if chunks == 4 else "")].order(4, micro_batches)
    equal = Times.uniform(4 * chunks)
    for name in ("interleaved-zb", "v-zb"):
        ours = build(name, 4, micro_batches, chunks)
        assert simulate(ours, equal).makespan <= simulate(torchs, equal).makespan, name
        assert max(peak_activations(ours)) <= max(peak_activations(torchs)), name


@pytest.mark.parametrize("ranks", range(1, 9))
def test_no_order_of_1f1bs_memory_is_faster(ranks: int) -> None:
    for name, make in (("v-zb", v), ("interleaved-zb", interleaved)):
        for micro_batches in (2 * ranks, 3 * ranks):
            schedule = build(name, ranks, micro_batches, 4)
            bound = lower_bound(make(ranks, 4), micro_batches, Times.uniform(4 * ranks), 2 * ranks)
            assert simulate(schedule, Times.uniform(4 * ranks)).makespan == bound == 12 * micro_batches + ranks - 1
            assert max(peak_activations(schedule)) <= 2 * ranks


@pytest.mark.parametrize("chunks", range(6, 17, 2))
def test_more_chunks_in_a_v_wait_for_little_but_the_ramp(chunks: int) -> None:
    """Beyond the p - 1 units of the ramp nothing, or a percent with very many chunks; within 1F1B's memory."""
    for ranks in range(1, 9):
        for micro_batches in (ranks, 2 * ranks, 3 * ranks):
            schedule = build("v-zb", ranks, micro_batches, chunks)
            check(schedule)
            least = 3 * chunks * micro_batches + ranks - 1
            makespan = simulate(schedule, Times.uniform(chunks * ranks)).makespan
            assert makespan == least if chunks < 10 and micro_batches > ranks else makespan <= 1.02 * least
            assert max(peak_activations(schedule)) <= 2 * ranks + 1e-9


@pytest.mark.parametrize("ranks, down, up, memory, time", [
    (4, 1, 1, 1 / 2, 1.15), (4, 3, 1, 3 / 4, 1.07), (8, 2, 1, 5 / 8, 1.13), (8, 3, 1, 11 / 16, 1.09)])
def test_shorter_steps_need_less_memory(ranks: int, down: int, up: int, memory: float, time: float) -> None:
    """As shares of 1F1B's memory and of the work alone, with four stages on a rank."""
    schedule = of_steps(ranks, 3 * ranks, 4, down, up)
    assert schedule is not None
    check(schedule)
    assert max(peak_activations(schedule)) == memory * 2 * ranks
    makespan = simulate(schedule, Times.uniform(4 * ranks)).makespan
    assert makespan <= time * 36 * ranks


def test_an_incomplete_group_keeps_1f1bs_memory() -> None:
    for micro_batches in range(1, 14):
        assert max(peak_activations(interleaved_zb(4, micro_batches, 3))) <= 8 + 1e-9


def test_times_of_chunks_are_shared_out() -> None:
    """Of four chunks of the model, whose two ranks hold three stages each: two thirds of a chunk are a stage."""
    times = ChunkTimes((3.0, 6.0, 9.0, 12.0)).on(interleaved(2, 3))
    assert times.forward == pytest.approx((2, 1 + 2, 4, 6, 3 + 4, 8))
    assert ChunkTimes((3.0, 6.0, 9.0, 12.0)).on(v(2, 4)).forward == (1.5, 1.5, 3, 3, 4.5, 4.5, 6, 6)


@pytest.mark.parametrize("placement", [v(2, 4), interleaved(2, 3), interleaved(2, 4)], ids=str)
def test_layers_are_balanced_about_as_well_as_can_be(placement: Placement) -> None:
    """Beside all cuts; the search may end a little above the best."""
    pick = random.Random(0)
    found, best = [], []
    for _ in range(20):
        costs = [pick.choice([1.0, 1.0, 1.0, 2.0, 5.0]) for _ in range(placement.stages + 4)]
        cuts = ((0, *inner, len(costs)) for inner in itertools.combinations(range(1, len(costs)), placement.stages - 1))
        best.append(min(max(rank_loads(costs, cut, placement)) for cut in cuts))
        found.append(max(rank_loads(costs, balance(costs, placement), placement)))
        assert found[-1] <= 1.25 * best[-1]
    assert sum(found) <= 1.03 * sum(best)


@pytest.mark.parametrize("name, chunks, message", [
    ("v-half", 4, "v-half has 2 stages"), ("v-zb", 3, "v-zb has 2, 4, .* or 16 stages"),
    ("1f1b", 2, "1f1b has 1 stage"),
    ("adaptive", 3, "adaptive has 2, 4, .* or 16 stages on a rank with the placement v"),
    ("interleaved-zb", 17, "interleaved-zb has 2, 3, .* or 16 stages")])
def test_what_a_schedule_cannot_have(name: str, chunks: int, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        placement_of(name, 4, chunks)
