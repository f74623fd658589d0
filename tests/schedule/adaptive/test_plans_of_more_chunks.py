"""Plans for more than two chunks on a rank, and for placements other than a V."""

from __future__ import annotations

import time
from dataclasses import replace
from random import Random

import numpy as np
import pytest
from brute_force import optimum
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from planner_problems import assert_plan_is_right, counted, problems

from ds_vshape.schedule.activations import Activations, peak_activations
from ds_vshape.schedule.adaptive import Problem, plan
from ds_vshape.schedule.adaptive.annealing import anneal
from ds_vshape.schedule.adaptive.blocks import BlockParameters
from ds_vshape.schedule.adaptive.cycles import best_cycles, periods
from ds_vshape.schedule.adaptive.extended import with_micro_batches
from ds_vshape.schedule.adaptive.lanes import Lanes
from ds_vshape.schedule.adaptive.list_scheduler import ListScheduler, Policy
from ds_vshape.schedule.adaptive.reduced import reduced
from ds_vshape.schedule.adaptive.regular import regular_orders
from ds_vshape.schedule.adaptive.seeds import known_schedules
from ds_vshape.schedule.named import build
from ds_vshape.schedule.placement import Placement, interleaved, v
from ds_vshape.schedule.schedule import check
from ds_vshape.schedule.timeline import Times, simulate

PLACEMENTS = st.sampled_from([
    v(1, 4), v(2, 4), v(3, 4), v(2, 6), interleaved(1, 3), interleaved(2), interleaved(3), interleaved(2, 3),
    interleaved(3, 4), interleaved(4, 3)])
UNEQUAL = (10.0, 12.0, 8.0, 1.0)


@given(problems(PLACEMENTS))
@settings(max_examples=60)
def test_every_plan_is_right(problem: Problem) -> None:
    assert_plan_is_right(plan(problem, 0.2), problem)


@pytest.mark.parametrize("times", [(1.0, 1.0, 1.0, 0.0), UNEQUAL])
@pytest.mark.parametrize("name, placement", [
    ("v-zb", v(2, 4)), ("v-zb", v(4, 4)), ("interleaved-zb", interleaved(4)), ("interleaved-zb", interleaved(3, 3)),
    ("interleaved-zb", interleaved(4, 4))], ids=str)
def test_no_slower_than_the_named_order_within_its_memory(name: str, placement: Placement,
                                                          times: tuple[float, float, float, float]) -> None:
    for micro_batches in (placement.ranks, 3 * placement.ranks + 1):
        order = build(name, placement.ranks, micro_batches, placement.chunks_each)
        problem = replace(counted(placement.ranks, micro_batches, times, 1e9, placement),
                          limits=peak_activations(order))
        found = plan(problem, 0.3, clock=time.process_time)
        assert_plan_is_right(found, problem)
        assert found.timeline.makespan <= simulate(order, problem.times).makespan * (1 + 1e-9)


@pytest.mark.quick_cases("4 ranks (v, 4 stages each)")
@pytest.mark.parametrize("placement", [v(4, 4), interleaved(4, 4)], ids=str)
def test_less_memory_costs_some_time(placement: Placement) -> None:
    """Within three quarters and a half of 1F1B's memory, beside a plan with all of it and a batch one by one."""
    makespans = []
    for limit in (8.0, 6.0, 4.0, 2.0):
        problem = counted(4, 12, UNEQUAL, limit, placement)
        found = plan(problem, 2.0, clock=time.process_time)
        assert_plan_is_right(found, problem)
        makespans.append(found.timeline.makespan)
    whole, three_quarters, half, one_by_one = makespans
    assert whole <= three_quarters < 1.12 * whole and half < 1.4 * whole and 1.4 * half < one_by_one


@pytest.mark.parametrize("placement, micro_batches, times, kept", [
    (v(1, 4), 1, (1, 2, 1), 4), (v(1, 4), 2, (1, 1, 1), 5), (v(2, 4), 1, (1, 1, 1), 4),
    (interleaved(2), 1, (2, 1, 1), 2), (interleaved(2), 2, (1, 1, 1), 3), (interleaved(2, 3), 1, (1, 2, 1), 3),
    (interleaved(3), 1, (1, 1, 2), 2)], ids=str)
def test_annealing_finds_the_optimum(placement: Placement, micro_batches: int, times: tuple[int, int, int],
                                     kept: int) -> None:
    """Against trying everything, with W whole; limits count chunks."""
    sizes = Activations((1.0,) * placement.stages, (1.0,) * placement.stages)
    problem = Problem(placement, micro_batches, Times.uniform(placement.stages, *times), sizes,
                      (float(kept),) * placement.ranks, max_pieces=1)
    found = plan(problem, 1.0, clock=time.process_time)
    assert found.timeline.makespan == optimum(placement, micro_batches, times, kept)


@given(problems(PLACEMENTS), st.integers(0, 10_000))
@settings(max_examples=60)
def test_any_block_gives_a_schedule_within_the_limit_and_annealing_keeps_it(problem: Problem, seed: int) -> None:
    scheduler = ListScheduler(problem)
    block = BlockParameters.random(8, Random(seed), problem.placement.chunks_each)
    run = scheduler.run(block.policy(scheduler))
    assert run is not None
    again = scheduler.run(Policy(run.starts, 0.0, scheduler.least_reserves, 0.0))
    assert again is not None and again.makespan == pytest.approx(run.makespan)
    best = run.orders.copy()
    makespan = anneal(scheduler.layouts(run.policy.pieces), run.orders.copy(), best, run.makespan, 300, 3.0, 0.0, seed)
    for orders, expected in ((run.orders, None), (best, makespan)):
        found = scheduler.left_shift(orders, run.policy)
        assert found is not None
        schedule = scheduler.schedule(found)
        check(schedule)
        assert simulate(schedule, problem.times).makespan == pytest.approx(found.makespan)
        assert expected is None or found.makespan == pytest.approx(expected)
        assert all(peak <= limit for peak, limit in
                   zip(peak_activations(schedule, problem.activations), scheduler.limits, strict=True))


@given(problems(PLACEMENTS), st.integers(0, 1000))
@settings(max_examples=30)
def test_a_long_batch_takes_as_many_intervals_as_its_cycle(problem: Problem, seed: int) -> None:
    assume(not ListScheduler(problem).fused)
    ranks = problem.ranks
    settled = ListScheduler(with_micro_batches(problem, 6 * ranks))
    starts = [start for schedule in known_schedules(replace(settled.problem, limits=(1e9,) * ranks))
              if (orders := settled.orders_of(schedule)) is not None for start in periods(orders, [(ranks, 1)], 1)]
    looks = iter(range(10, -1, -1))
    for cycle in best_cycles(settled, starts, lambda: next(looks, 0) / 10, Random(seed), Lanes(1), 1):
        makespans = []
        for count in (150, 250):
            scheduler = ListScheduler(with_micro_batches(problem, count * cycle.group))
            targets = np.zeros((ranks, scheduler.streams, count * cycle.group, 1))
            run = scheduler.left_shift(cycle.of_batch(count * cycle.group),
                                       Policy(targets, 0.0, scheduler.least_reserves))
            if run is None:
                return  # the order that annealing began with exceeds a limit
            check(scheduler.schedule(run))
            makespans.append(run.makespan)
        short, long = makespans
        assert 98 * cycle.interval <= long - short <= 100 * cycle.interval * (1 + 1e-6)


@pytest.mark.parametrize("times", [(1.0, 1.0, 1.0, 0.0), (10.0, 9.0, 7.0, 3.0), UNEQUAL])
@pytest.mark.parametrize("ranks", [1, 2, 3, 4, 8])
def test_regular_blocks_of_two_vs_have_no_bubble(ranks: int, times: tuple[float, float, float, float]) -> None:
    """Each further micro-batch costs just its work, within 1F1B's activations and one more."""
    makespans = []
    for micro_batches in (6 * ranks, 8 * ranks):
        scheduler = ListScheduler(counted(ranks, micro_batches, times, 2 * ranks + 1, v(ranks, 4)))
        policy = Policy(np.zeros((ranks, scheduler.streams, micro_batches, 1)), 0.0, scheduler.least_reserves)
        runs = [scheduler.left_shift(orders, policy) for orders in regular_orders(scheduler, 4)]
        assert runs and all(run is not None for run in runs)
        makespans.append([run.makespan for run in runs if run is not None])
    few, many = makespans
    assert many == pytest.approx([makespan + 2 * ranks * 4 * sum(times[:3]) for makespan in few])


def test_fewer_ranks_stand_for_all_chunks() -> None:
    for placement, expected in ((v(18, 4), v(9, 4)), (interleaved(18, 3), interleaved(9, 3))):
        numbers = tuple(map(float, range(placement.stages)))
        times = replace(Times.uniform(placement.stages), forward=numbers)
        small = reduced(Problem(placement, 200, times, Activations.counted(placement), (12.0,) * 18))
        assert small.placement == expected
        for rank, chosen in enumerate((0, 2, 4, 6, 8, 11, 13, 15, 17)):
            assert tuple(small.times.forward[stage] for stage in small.placement.chunks[rank]) == (
                placement.chunks[chosen])
