"""The parts of the adaptive planner: list scheduler, windows, and what happens without OR-tools."""

from __future__ import annotations

from collections.abc import Callable
from random import Random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from test_adaptive import assert_plan_is_right, counted
from test_bounds import optimum

from ds_vshape.schedule.activations import Activations
from ds_vshape.schedule.adaptive import Problem, plan, search
from ds_vshape.schedule.adaptive.blocks import Block
from ds_vshape.schedule.adaptive.list_scheduler import ListScheduler, Policy
from ds_vshape.schedule.adaptive.windows import Windows, solver
from ds_vshape.schedule.bounds import lower_bound_of_limits
from ds_vshape.schedule.passes import Kind
from ds_vshape.schedule.placement import v
from ds_vshape.schedule.timeline import Times, peak_activations, simulate

needs_solver = pytest.mark.skipif(solver() is None, reason="OR-tools isn't installed (the extra `planner`)")


@given(st.integers(1, 5), st.integers(1, 9), st.integers(0, 10_000), st.data())
@settings(deadline=None, max_examples=60)
def test_any_block_gives_a_schedule_within_the_limit(ranks: int, micro_batches: int, seed: int,
                                                     data: st.DataObject) -> None:
    problem = counted(ranks, micro_batches, (10, 12, 8, 1), data.draw(st.integers(2, 2 * ranks + 1)))
    scheduler = ListScheduler(problem)
    run = scheduler.run(Block.random(8, Random(seed)).policy(scheduler))
    assert run is not None
    schedule = scheduler.schedule(run)
    assert simulate(schedule, problem.times).makespan == pytest.approx(run.makespan)
    assert max(peak_activations(schedule)) <= problem.limits[0]
    # Strictly in the order found, nothing can be earlier, and nothing is later than the list scheduler had it.
    squeezed = scheduler.squeeze(run.orders, run.policy)
    assert squeezed is not None and squeezed.makespan == pytest.approx(run.makespan)
    # Starts as wishes, with no eagerness, give the same again.
    again = scheduler.run(Policy(run.starts, 0.0, scheduler.least_reserves, run.policy.pieces, 0.0))
    assert again is not None and again.makespan == pytest.approx(run.makespan)
    assert scheduler.run(run.policy, run.makespan * 0.99) is None


def test_orders_that_wait_for_each_other_or_exceed_the_limit_are_none() -> None:
    scheduler = ListScheduler(counted(2, 1, (1, 1, 1, 0), 2))
    right = [[0, 1, 3, 5, 2, 4], [0, 1, 3, 5, 2, 4]]
    policy = Policy([], 0.0, [])
    assert scheduler.squeeze(right, policy) is not None
    assert scheduler.squeeze([[0, 2, 1, 3, 5, 4], right[1]], policy) is None
    two = ListScheduler(counted(1, 2, (1, 1, 1, 0), 2))
    assert two.squeeze([[0, 1, 3, 5, 2, 4] * 2], policy) is not None
    assert two.squeeze([[0, 0, 1, 3, 5, 2, 4, 1, 3, 5, 2, 4]], policy) is None


@needs_solver
@pytest.mark.parametrize("ranks, micro_batches, times, kept", [
    (1, 2, (1, 2, 1), 2), (2, 1, (1, 1, 2), 2), (2, 2, (1, 1, 1), 3), (2, 2, (1, 2, 1), 2), (2, 2, (2, 1, 1), 4)])
def test_the_window_over_all_finds_the_optimum(ranks: int, micro_batches: int, times: tuple[int, int, int],
                                               kept: int) -> None:
    """Against trying everything, with W whole."""
    problem = Problem(ranks, micro_batches, Times.uniform(2 * ranks, *times), Activations.counted(v(ranks)),
                      (float(kept),) * ranks, max_pieces=1)
    scheduler = ListScheduler(problem)
    run = scheduler.run(Block((1.5,) * 4, (0.5,) * 3, 1.0, 1.0, 0.0, 0.0, 1).policy(scheduler))
    module = solver()
    assert run is not None and module is not None
    bound = lower_bound_of_limits(problem.placement, micro_batches, problem.times, problem.activations, problem.limits)
    best = Windows(scheduler, module).improve(run, 0.0, run.makespan, 10.0, bound)
    assert best is not None
    assert bound <= best.makespan == optimum(problem.placement, micro_batches, times, kept)


@needs_solver
def test_windows_never_make_it_worse() -> None:
    problem = counted(4, 8, (10, 12, 8, 1), 5)
    scheduler, module = ListScheduler(problem), solver()
    assert module is not None
    run = scheduler.run(Block.random(2, Random(3)).policy(scheduler))
    for first in range(0, 800, 60):
        assert run is not None
        found = Windows(scheduler, module).improve(run, first, first + 150, 1.0, 0.0)
        if found is not None:
            assert found.makespan <= run.makespan + 1e-9
            assert max(peak_activations(scheduler.schedule(found))) <= 5
            run = found


@pytest.mark.parametrize("peak", [4, 6, 8])
def test_without_or_tools_it_is_no_worse_than_the_papers_schedules(monkeypatch: pytest.MonkeyPatch, peak: int) -> None:
    monkeypatch.setattr(search, "solver", lambda: None)
    problem = counted(4, 12, (10, 12, 8, 1), peak)
    assert_plan_is_right(plan(problem, 1.0), problem)


def test_the_same_steps_give_the_same_schedule(monkeypatch: pytest.MonkeyPatch) -> None:
    """All chance comes from one seed, so only the clock can make a difference."""
    monkeypatch.setattr(search, "solver", lambda: None)

    def after(steps: int) -> Callable[[], float]:
        left = iter([1 - step / steps for step in range(steps + 1)] + [0.0] * 9)
        return lambda: next(left)

    runs = []
    for _ in range(2):
        tried = search.Search(counted(4, 8, (10, 12, 8, 1), 5), 0.0, after(600), 1.0)
        tried.start()
        while not tried.done:
            tried.step()
        assert tried.best is not None
        runs.append(tried.best)
    assert runs[0].orders == runs[1].orders


def test_backwards_are_whole_where_nobody_waits() -> None:
    """With one rank nobody ever does, and with free memory enough many don't."""
    alone = plan(counted(1, 3, (10, 12, 8, 1), 2), 0.2).schedule
    assert {work.kind for work in alone.orders[0]} == {Kind.F, Kind.BW}
