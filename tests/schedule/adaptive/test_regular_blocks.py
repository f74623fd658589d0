"""Blocks without a bubble, and rescheduled cool-downs: what the adaptive planner knows before it searches."""

from __future__ import annotations

from dataclasses import replace
from random import Random

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from planner_problems import assert_plan_is_right, counted, problems

from ds_vshape.schedule.activations import Activations, peak_activations
from ds_vshape.schedule.adaptive import Problem, plan
from ds_vshape.schedule.adaptive.blocks import BlockParameters
from ds_vshape.schedule.adaptive.cool_down import reschedule_cooldown
from ds_vshape.schedule.adaptive.list_scheduler import ListScheduler, Policy, PolicyRun
from ds_vshape.schedule.adaptive.regular import regular_orders
from ds_vshape.schedule.schedule import check
from ds_vshape.schedule.placement import v
from ds_vshape.schedule.timeline import Times, simulate


def runs(problem: Problem, most: int = 8) -> list[PolicyRun]:
    """The regular blocks' runs; each is within the limits."""
    scheduler = ListScheduler(problem)
    policy = Policy(np.zeros((problem.ranks, 6, problem.micro_batches, 1)), 0.0, scheduler.least_reserves)
    found = [scheduler.left_shift(orders, policy) for orders in regular_orders(scheduler, most)]
    assert all(run is not None for run in found)
    return [run for run in found if run is not None]


@pytest.mark.parametrize("times", [(10, 9, 7, 3), (10, 12, 8, 1), (10, 20, 10, 1), (10, 10, 10, 0), (7, 11, 3, 2)])
@pytest.mark.parametrize("ranks", [1, 2, 5, 8, 16])
def test_steady_states_have_no_bubble(ranks: int, times: tuple[float, float, float, float]) -> None:
    """Each further micro-batch costs just its work, with 1F1B's activations."""
    few, many = (runs(counted(ranks, micro_batches, times, 2 * ranks)) for micro_batches in (4 * ranks, 6 * ranks))
    assert few and len(few) == len(many)
    action = 2 * sum(times[:3])
    assert [run.makespan for run in many] == pytest.approx([run.makespan + 2 * ranks * action for run in few])


def test_less_memory_has_none() -> None:
    """An input that goes down a rank and comes back up takes a whole interval at least, F as well as B."""
    assert runs(counted(8, 32, (10, 9, 7, 3), 16)) and not runs(counted(8, 32, (10, 9, 7, 3), 13))


# A W that takes no time starts together with the forward that its memory is for.
@example(Problem(v(1), 2, Times((1, 1), (1, 1), (0, 0), (0,)), Activations((1, 1), (1, 0)), (2,), max_pieces=1), 1.0)
@given(problems(), st.floats(1, 6))
@settings(max_examples=60)
def test_any_times_and_sizes(problem: Problem, more: float) -> None:
    problem = replace(problem, limits=tuple(more * limit for limit in problem.limits))
    scheduler = ListScheduler(problem)
    for run in runs(problem, 3):
        schedule = scheduler.schedule(run)
        check(schedule)
        assert simulate(schedule, problem.times).makespan == pytest.approx(run.makespan)
        assert all(peak <= limit for peak, limit in
                   zip(peak_activations(schedule, problem.activations), scheduler.limits, strict=True))


@pytest.mark.parametrize("hop", [0, 2])
def test_passes_that_take_no_time(hop: float) -> None:
    problem = counted(2, 6, (0, 0, 0, hop), 4)
    assert not runs(problem)
    assert_plan_is_right(plan(problem, 0.2), problem)


@given(problems(), st.integers(0, 10_000))
@settings(max_examples=60)
def test_haste_is_never_slower(problem: Problem, seed: int) -> None:
    scheduler = ListScheduler(problem)
    run = scheduler.run(BlockParameters.random(problem.max_pieces, Random(seed)).policy(scheduler))
    assert run is not None
    fast = reschedule_cooldown(run, scheduler)
    assert fast.makespan <= run.makespan
    schedule = scheduler.schedule(fast)
    check(schedule)
    assert simulate(schedule, problem.times).makespan == pytest.approx(fast.makespan)
    assert all(peak <= limit * (1 + 1e-6) for peak, limit in
               zip(peak_activations(schedule, problem.activations), problem.limits, strict=True))


def test_haste_saves_most_of_a_ramp() -> None:
    """Of what the best regular run is above the lower bound, 1818."""
    problem = counted(8, 32, (10, 9, 7, 3), 16)
    run = min(runs(problem), key=lambda run: run.makespan)
    assert run.makespan == 1868 and reschedule_cooldown(run, ListScheduler(problem)).makespan == 1825
