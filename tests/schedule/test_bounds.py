"""The lower bound against the optimum, found by trying everything, and against all that we can run."""

from __future__ import annotations

import pytest
from brute_force import optimum
from hypothesis import given, settings
from hypothesis import strategies as st

from ds_vshape.schedule.activations import Activations, peak_activations
from ds_vshape.schedule.bounds import lower_bound, lower_bound_of_limits
from ds_vshape.schedule.named import SCHEDULES, build
from ds_vshape.schedule.placement import PLACEMENTS, Placement, linear, v
from ds_vshape.schedule.timeline import Times, simulate


@pytest.mark.parametrize("placement, micro_batches, times, kept", [
    (placement, m, times, kept)
    for placement, m in ((v(1), 2), (v(2), 1), (v(2), 2), (linear(2), 2), (linear(2), 3), (linear(3), 2))
    for times in ((1, 1, 1), (1, 2, 1), (2, 1, 1), (1, 1, 2))
    for kept in range(2 if placement.name == "v" else 1, placement.stages // placement.ranks * m + 1)],
    ids=lambda value: f"{value.name}{value.ranks}" if isinstance(value, Placement) else str(value))
def test_never_above_the_optimum(placement: Placement, micro_batches: int, times: tuple[int, int, int],
                                 kept: int) -> None:
    best = optimum(placement, micro_batches, times, kept)
    peak = kept * 2 * placement.ranks / placement.stages
    bound = lower_bound(placement, micro_batches, Times.uniform(placement.stages, *times), peak)
    assert bound <= best
    assert bound >= 0.6 * best


def test_met_where_the_optimum_is_known() -> None:
    """One rank works without a pause; and V-ZB's first two micro-batches on two ranks."""
    assert lower_bound(v(1), 2, Times.uniform(2), 2) == optimum(v(1), 2, (1, 1, 1), 2) == 12
    assert lower_bound(v(2), 2, Times.uniform(4), 4) == optimum(v(2), 2, (1, 1, 1), 4) == 13


@given(st.integers(1, 6), st.integers(1, 12), st.sampled_from(sorted(SCHEDULES)), st.data())
@settings(max_examples=80)
def test_no_schedule_is_below(ranks: int, micro_batches: int, name: str, data: st.DataObject) -> None:
    schedule = build(name, ranks, micro_batches)
    stages = schedule.placement.stages
    lengths = st.lists(st.floats(0.1, 5), min_size=stages, max_size=stages).map(tuple)
    hops = st.lists(st.floats(0, 3), min_size=stages - 1, max_size=stages - 1).map(tuple)
    of_micro_batches = st.lists(st.floats(0.1, 5), min_size=micro_batches, max_size=micro_batches).map(tuple)
    scales = data.draw(st.just(()) | of_micro_batches)
    times = Times(data.draw(lengths), data.draw(lengths), data.draw(lengths), data.draw(hops), scales)
    bound = lower_bound(schedule.placement, micro_batches, times, max(peak_activations(schedule)))
    assert bound <= simulate(schedule, times).makespan * (1 + 1e-9)


@given(st.integers(1, 6), st.integers(1, 12), st.sampled_from(sorted(SCHEDULES)), st.data())
@settings(max_examples=80)
def test_no_schedule_is_below_with_sizes_of_its_own(ranks: int, micro_batches: int, name: str,
                                                    data: st.DataObject) -> None:
    """Where layers are recomputed B leaves more than F does."""
    schedule = build(name, ranks, micro_batches)
    stages = schedule.placement.stages
    numbers = st.lists(st.floats(0.1, 5), min_size=stages, max_size=stages).map(tuple)
    times = Times(data.draw(numbers), data.draw(numbers), data.draw(numbers))
    activations = Activations(data.draw(numbers), data.draw(numbers))
    limits = peak_activations(schedule, activations)
    bound = lower_bound_of_limits(schedule.placement, micro_batches, times, activations, limits)
    assert bound <= simulate(schedule, times).makespan * (1 + 1e-9)


def test_memory_for_one_micro_batch_makes_them_wait_for_each_other() -> None:
    """Rank 0 has one activation from F to W: eight times there and back, where the work alone is 24; the bound leaves
    half of each W out."""
    assert 8 * (4 + 4) + 4 <= lower_bound(linear(4), 8, Times.uniform(4), 2) <= 8 * (4 + 4 + 1)


def test_memory_bounds_v_min_of_many_ranks() -> None:
    """By hand, of rank 15: the way to it, 64 micro-batches' lifespans in room for 12 activations, and the way back."""
    times = Times.uniform(32, 10, 9, 7, hop=3)
    schedule = build("v-min", 16, 64)
    lifespans = 33 * (10 + 9) + 60 * 3 + 7
    by_hand = 15 * 13 + (64 * lifespans + 11 * 11 * (10 + 9) / 2) / 12 - 7 + 15 * 12 + 7
    assert max(peak_activations(schedule)) == 12
    assert by_hand == pytest.approx(lower_bound(v(16), 64, times, 12))
    assert by_hand < simulate(schedule, times).makespan


@pytest.mark.parametrize("ranks", [2, 3, 4, 8, 16])
def test_the_papers_bound(ranks: int) -> None:
    for micro_batches in (ranks, 4 * ranks):
        for peak in range(2, 2 * ranks):
            if peak < 2 * micro_batches:
                paper = 6 * micro_batches + 6 * ranks - 3 * peak - 1
                assert lower_bound(v(ranks), micro_batches, Times.uniform(2 * ranks), peak) >= paper


@pytest.mark.parametrize("name", PLACEMENTS)
def test_one_micro_batch_takes_its_way(name: str) -> None:
    placement = PLACEMENTS[name](3)
    stages = placement.stages
    crossings = sum(placement.rank_of(s) != placement.rank_of(s + 1) for s in range(stages - 1))
    times = Times.uniform(stages, 2, 3, 5, hop=7)
    assert lower_bound(placement, 1, times, 6) == stages * (2 + 3) + 5 + 2 * 7 * crossings


def test_a_peak_below_one_stage_is_refused() -> None:
    with pytest.raises(ValueError, match="can't hold the activations of one stage"):
        lower_bound(linear(4), 8, Times.uniform(4), 1)
