"""What the schedules' names mean once the times are known."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ds_vshape.schedule import choose
from ds_vshape.schedule.activations import Activations, peak_activations
from ds_vshape.schedule.adaptive import LimitError, Plan
from ds_vshape.schedule.choose import NAMED_ORDER, PLAN, level_of, limits_at, schedule_for
from ds_vshape.schedule.memory_limit import peak_of_1f1b
from ds_vshape.schedule.named import ADAPTIVE, SCHEDULES, TIMED, build, placement_of
from ds_vshape.schedule.placement import v
from ds_vshape.schedule.schedule import check
from ds_vshape.schedule.timeline import Times, simulate

UNEQUAL = Times.uniform(8, 10, 20, 10, 1)


@pytest.mark.parametrize("name", SCHEDULES)
def test_with_equal_times_a_name_is_its_order(name: str) -> None:
    placement = placement_of(name, 4)
    choice = schedule_for(name, placement, 8, Times.uniform(placement.stages, 3, 3, 3), Activations.counted(placement))
    assert choice.schedule == build(name, 4, 8)
    assert choice.origin == NAMED_ORDER
    assert choice.timeline == simulate(choice.schedule, Times.uniform(placement.stages, 3, 3, 3))
    assert choice.peaks == peak_activations(choice.schedule)
    assert choice.lower_bound <= choice.timeline.makespan


@pytest.mark.parametrize("name", sorted(set(SCHEDULES) - set(TIMED)))
def test_other_names_are_their_orders_at_any_times(name: str) -> None:
    placement = placement_of(name, 4)
    times = Times.uniform(placement.stages, 10, 20, 10, 1)
    choice = schedule_for(name, placement, 8, times, Activations.counted(placement))
    assert (choice.schedule, choice.origin) == (build(name, 4, 8), NAMED_ORDER)


@pytest.mark.parametrize("name", TIMED)
def test_a_level_is_never_slower_or_larger_than_its_order(name: str) -> None:
    order = build(name, 4, 8)
    choice = schedule_for(name, v(4), 8, UNEQUAL, Activations.counted(v(4)), time_limit=0.3)
    check(choice.schedule)
    assert choice.schedule.name == name
    assert max(choice.peaks) <= max(peak_activations(order))
    assert choice.timeline == simulate(choice.schedule, UNEQUAL)
    faster = choice.timeline.makespan < simulate(order, UNEQUAL).makespan
    assert choice.origin == (PLAN if faster else NAMED_ORDER)
    assert faster or choice.schedule == order
    assert choice.lower_bound <= choice.timeline.makespan


@pytest.mark.parametrize("other, origin", [("v-zb", PLAN), ("v-half", NAMED_ORDER), ("v-min", NAMED_ORDER)])
def test_the_faster_of_plan_and_order_is_taken(other: str, origin: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """With a planner that knows one order: a faster one, the same, or a slower one."""
    order = build(other, 4, 8)
    timeline = simulate(order, UNEQUAL)
    found = Plan(order, timeline, peak_activations(order), 1.0, 0.0)
    monkeypatch.setattr(choose, "plan", lambda *arguments, **options: found)
    choice = schedule_for("v-half", v(4), 8, UNEQUAL, Activations.counted(v(4)))
    assert (choice.schedule.name, choice.origin) == ("v-half", origin)
    assert choice.schedule.orders == (order if origin == PLAN else build("v-half", 4, 8)).orders
    assert choice.timeline == simulate(choice.schedule, UNEQUAL)


def test_an_order_that_meets_the_bound_needs_no_plan() -> None:
    # On one rank every order without waits does.
    choice = schedule_for("v-half", v(1), 4, Times.uniform(2, 10, 12, 8), Activations.counted(v(1)), time_limit=100)
    assert choice.origin == NAMED_ORDER
    assert choice.planning_s < 10


def test_sizes_of_stages_count() -> None:
    """Rank 0 holds a large last stage: what it may keep follows from its own two stages."""
    activations = Activations((1, 1, 1, 1, 1, 1, 1, 9), (1,) * 8)
    order = build("v-half", 4, 8)
    level = level_of(order, activations)
    assert level[1:] == (6, 6, 6) and level[0] >= 30
    assert all(peak <= limit for peak, limit in zip(peak_activations(order, activations), level))
    choice = schedule_for("v-half", v(4), 8, UNEQUAL, activations, time_limit=0.3)
    assert choice.peaks == peak_activations(choice.schedule, activations)
    assert all(peak <= limit for peak, limit in zip(choice.peaks, level))


@given(st.integers(1, 6), st.integers(1, 9), st.floats(0.1, 2))
def test_limits_are_fractions_of_what_1f1b_keeps(ranks: int, micro_batches: int, fraction: float) -> None:
    counted = Activations.counted(v(ranks))
    assert limits_at(fraction, ranks, micro_batches, counted) == pytest.approx(
        (fraction * peak_of_1f1b(ranks, micro_batches),) * ranks)
    # The oracle: 1F1B's own order, its stages being pairs of ours.
    sizes = tuple(range(1, 2 * ranks + 1))
    pairs = tuple(sizes[2 * rank] + sizes[2 * rank + 1] for rank in range(ranks))
    most = max(peak_activations(build("1f1b", ranks, micro_batches), Activations(pairs, pairs)))
    limits = limits_at(fraction, ranks, micro_batches, replace(counted, after_forward=sizes))
    assert limits[0] == pytest.approx(fraction * most)


@settings(max_examples=10)
@given(st.integers(2, 4), st.integers(1, 6), st.integers(3, 8))
def test_adaptive_keeps_to_the_limits(ranks: int, micro_batches: int, limit: int) -> None:
    times = Times.uniform(2 * ranks, 10, 14, 9, 2)
    choice = schedule_for(ADAPTIVE, v(ranks), micro_batches, times, Activations.counted(v(ranks)), (limit,) * ranks,
                          time_limit=0.1)
    check(choice.schedule)
    assert (choice.schedule.name, choice.origin) == (ADAPTIVE, PLAN)
    assert max(choice.peaks) <= limit


def test_bad_requests() -> None:
    counted = Activations.counted(v(2))
    with pytest.raises(LimitError, match="least possible"):
        schedule_for(ADAPTIVE, v(2), 4, Times.uniform(4), counted, (1.0, 1.0))
    with pytest.raises(ValueError, match="did you mean 'v-half'"):
        schedule_for("v-haf", v(2), 4, Times.uniform(4), counted)
    with pytest.raises(ValueError, match="at least 1"):
        schedule_for("v-half", v(2), 0, Times.uniform(4), counted)
