"""The parts of the adaptive planner: list scheduler, annealing, and what happens without numba."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from functools import partial
from random import Random
from threading import Barrier

import numpy as np
import pytest
from brute_force import optimum
from hypothesis import given, settings
from hypothesis import strategies as st
from planner_problems import assert_plan_is_right, counted, entry_costs

from ds_vshape.schedule.activations import Activations, peak_activations
from ds_vshape.schedule.adaptive import Problem, plan, search
from ds_vshape.schedule.adaptive.annealing import anneal
from ds_vshape.schedule.adaptive.blocks import BlockParameters
from ds_vshape.schedule.adaptive.lanes import Lanes
from ds_vshape.schedule.adaptive.list_scheduler import ListScheduler, Policy, PolicyRun
from ds_vshape.schedule.adaptive.machine_code import COMPILED
from ds_vshape.schedule.adaptive.reduced import reduced
from ds_vshape.schedule.bounds import lower_bound_of_limits
from ds_vshape.schedule.passes import Kind
from ds_vshape.schedule.placement import v
from ds_vshape.schedule.timeline import Times, simulate

ROOT = Path(__file__).parents[3]


@given(st.integers(1, 5), st.integers(1, 9), st.integers(0, 10_000), st.data())
@settings(max_examples=60)
def test_any_block_gives_a_schedule_within_the_limit(ranks: int, micro_batches: int, seed: int,
                                                     data: st.DataObject) -> None:
    problem = counted(ranks, micro_batches, (10, 12, 8, 1), data.draw(st.integers(2, 2 * ranks + 1)))
    hops = data.draw(st.lists(st.integers(0, 30), min_size=2 * ranks - 1, max_size=2 * ranks - 1))
    scales = data.draw(st.lists(st.sampled_from((0.5, 1.0, 3.0)), min_size=micro_batches, max_size=micro_batches))
    problem = replace(problem, times=replace(problem.times, hops=tuple(map(float, hops)), scales=tuple(scales),
                                             entry_costs=data.draw(entry_costs(2 * ranks))))
    scheduler = ListScheduler(problem)
    run = scheduler.run(BlockParameters.random(8, Random(seed)).policy(scheduler))
    assert run is not None
    schedule = scheduler.schedule(run)
    assert max(peak_activations(schedule)) <= problem.limits[0]
    # Strictly in the order found, nothing can be earlier; the list scheduler may have waited for a target start.
    shifted = scheduler.left_shift(run.orders, run.policy)
    assert shifted is not None
    assert simulate(schedule, problem.times).makespan == pytest.approx(shifted.makespan)
    assert shifted.makespan <= run.makespan + 1e-9
    # Starts as target starts, with no eagerness, give the same again.
    again = scheduler.run(Policy(run.starts, 0.0, scheduler.least_reserves, 0.0))
    assert again is not None and again.makespan == pytest.approx(run.makespan)
    assert scheduler.run(run.policy, run.makespan * 0.99) is None


def test_fewer_ranks_stand_for_all() -> None:
    """Nine of 18, and between them the mean of the hops on the way; the link between ranks 5 and 6 is slow."""
    slow = 5
    hops = tuple(16.0 if min(stage, 34 - stage) == slow else 1.0 for stage in range(35))
    times = replace(Times.uniform(36, 10, 12, 8), forward=tuple(map(float, range(36))), hops=hops)
    small = reduced(Problem(v(18), 200, times, Activations.counted(v(18)), (12.0,) * 18))
    assert small.ranks == 9 and small.times.forward[:9] == tuple(map(float, (0, 2, 4, 6, 8, 11, 13, 15, 17)))
    assert small.times.hops[:8] == pytest.approx((1, 1, 8.5, 1, 1, 1, 1, 1))
    assert small.times.hops[8] == 0 and small.times.hops[9:] == small.times.hops[:8][::-1]


def test_orders_that_wait_for_each_other_or_exceed_the_limit_are_none() -> None:
    scheduler = ListScheduler(counted(2, 1, (1, 1, 1, 0), 2))
    right = [[0, 1, 3, 5, 2, 4], [0, 1, 3, 5, 2, 4]]
    policy = Policy(np.zeros((2, 6, 1, 1)), 0.0, np.zeros(2))
    assert scheduler.left_shift(np.array(right), policy) is not None
    assert scheduler.left_shift(np.array([[0, 2, 1, 3, 5, 4], right[1]]), policy) is None
    two, policy = ListScheduler(counted(1, 2, (1, 1, 1, 0), 2)), Policy(np.zeros((1, 6, 2, 1)), 0.0, np.zeros(1))
    assert two.left_shift(np.array([[0, 1, 3, 5, 2, 4] * 2]), policy) is not None
    assert two.left_shift(np.array([[0, 0, 1, 3, 5, 2, 4, 1, 3, 5, 2, 4]]), policy) is None


def annealed(scheduler: ListScheduler, run: PolicyRun, tries: int, temperature: float, goal: float = 0.0) -> PolicyRun:
    """`run` after annealing, checked: no longer than before, as long as it says, and within the limits."""
    orders = run.orders.copy()
    best = orders.copy()
    makespan = anneal(scheduler.layouts(run.policy.pieces), orders, best, run.makespan, tries, temperature, goal, 1)
    found = scheduler.left_shift(best, run.policy)
    assert found is not None and found.makespan == pytest.approx(makespan) and makespan <= run.makespan
    schedule = scheduler.schedule(found)
    assert simulate(schedule, scheduler.problem.times).makespan == pytest.approx(makespan)
    assert all(peak <= limit for peak, limit in
               zip(peak_activations(schedule, scheduler.problem.activations), scheduler.limits, strict=True))
    # Where it went on from is a batch within the limits as well.
    assert scheduler.left_shift(orders, run.policy) is not None
    return found


@given(st.integers(1, 5), st.integers(1, 9), st.integers(0, 10_000), st.floats(0.1, 30), st.data())
@settings(max_examples=60)
def test_annealing_keeps_times_and_limits(ranks: int, micro_batches: int, seed: int, temperature: float,
                                          data: st.DataObject) -> None:
    problem = counted(ranks, micro_batches, (10, 12, 8, 1), data.draw(st.integers(2, 2 * ranks + 1)))
    times = replace(problem.times, entry_costs=data.draw(entry_costs(2 * ranks)))
    scheduler = ListScheduler(replace(problem, times=times))
    run = scheduler.run(BlockParameters.random(8, Random(seed)).policy(scheduler))
    assert run is not None
    annealed(scheduler, run, 300, temperature)


@pytest.mark.parametrize("ranks, micro_batches, times, kept", [
    (1, 2, (1, 2, 1), 2), (2, 1, (1, 1, 2), 2), (2, 2, (1, 1, 1), 3), (2, 2, (1, 2, 1), 2), (2, 2, (2, 1, 1), 4)])
def test_annealing_finds_the_optimum(ranks: int, micro_batches: int, times: tuple[int, int, int], kept: int) -> None:
    """Against trying everything, with W whole."""
    problem = Problem(v(ranks), micro_batches, Times.uniform(2 * ranks, *times), Activations.counted(v(ranks)),
                      (float(kept),) * ranks, max_pieces=1)
    scheduler = ListScheduler(problem)
    run = scheduler.run(BlockParameters((1.5,) * 4, (0.5,) * 3, 1.0, 1.0, 0.0, 0.0, 1).policy(scheduler))
    assert run is not None
    bound = lower_bound_of_limits(problem.placement, micro_batches, problem.times, problem.activations, problem.limits)
    found = annealed(scheduler, run, 5000, 1.0, bound)
    assert bound <= found.makespan == optimum(problem.placement, micro_batches, times, kept)


def test_annealing_gains() -> None:
    """From a block that rests at each turn, with memory enough."""
    scheduler = ListScheduler(counted(4, 16, (10, 9, 7, 3), 8))
    run = scheduler.run(BlockParameters((0.2,) * 4, (0.3,) * 3, 0.3, 1.0, 0.2, 1.0, 1).policy(scheduler))
    assert run is not None
    assert annealed(scheduler, run, 20_000, 2.0).makespan < 0.98 * run.makespan


WITHOUT_NUMBA = """
import json, sys
sys.modules["numba"] = None
sys.path.insert(0, "tests/schedule/adaptive")
from planner_problems import assert_plan_is_right, counted
from ds_vshape.schedule.adaptive import annealing, machine_code, plan
from ds_vshape.schedule.adaptive.blocks import BlockParameters
from ds_vshape.schedule.adaptive.list_scheduler import ListScheduler

assert not machine_code.COMPILED
for peak in (4, 6, 8):
    problem = counted(4, 12, (10, 12, 8, 1), peak)
    assert_plan_is_right(plan(problem, 1.0), problem)
scheduler = ListScheduler(counted(4, 8, (10, 12, 8, 1), 5))
run = scheduler.run(BlockParameters((0.1,) * 4, (0.2,) * 3, 0.5, 1.0, 0.1, 1.0, 2).policy(scheduler))
best = run.orders.copy()
annealing.anneal(scheduler.layouts(2), run.orders.copy(), best, run.makespan, 200, 3.0, 0.0, 1)
print(json.dumps([run.makespan, run.orders.tolist(), best.tolist()]))
"""


@pytest.mark.slow
def test_without_numba_it_is_no_worse_than_the_papers_schedules() -> None:
    """And all that is compiled elsewhere comes to the same."""
    done = subprocess.run([sys.executable, "-c", WITHOUT_NUMBA], capture_output=True, text=True, cwd=ROOT, check=False)
    assert done.returncode == 0, done.stderr
    scheduler = ListScheduler(counted(4, 8, (10, 12, 8, 1), 5))
    run = scheduler.run(BlockParameters((0.1,) * 4, (0.2,) * 3, 0.5, 1.0, 0.1, 1.0, 2).policy(scheduler))
    assert run is not None
    best = run.orders.copy()
    anneal(scheduler.layouts(2), run.orders.copy(), best, run.makespan, 200, 3.0, 0.0, 1)
    assert json.loads(done.stdout) == [run.makespan, run.orders.tolist(), best.tolist()]


@pytest.mark.parametrize("lanes", [1, 3])
def test_the_same_steps_give_the_same_schedule(lanes: int) -> None:
    """All chance comes from one seed, so only the clock can make a difference, not which thread is faster."""
    def after(steps: int) -> Callable[[], float]:
        left = iter([1 - step / steps for step in range(steps + 1)] + [0.0] * 9)
        return lambda: next(left)

    runs = []
    for _ in range(2):
        tried = search.Search(counted(4, 8, (10, 12, 8, 1), 5), 0.0, after(80), Lanes(lanes))
        tried.start()
        while not tried.done:
            tried.step()
        assert tried.best is not None
        runs.append(tried.best)
    assert (runs[0].orders == runs[1].orders).all()


@pytest.mark.skipif(not COMPILED, reason="without machine code there is one lane")
def test_lanes_run_side_by_side() -> None:
    meet = Barrier(3)
    assert sorted(Lanes(3).run([partial(meet.wait, 20)] * 3)) == [0, 1, 2]
    assert list(Lanes(2).groups("abcde")) == ["ab", "cd", "e"]


@pytest.mark.parametrize("batch", [9, 24])
def test_plans_of_many_cores_are_right(batch: int) -> None:
    problem = counted(4, batch, (10, 9, 7, 1), 4)
    assert_plan_is_right(plan(problem, 0.5, cores=2), problem)


def test_backwards_are_whole_where_no_rank_waits() -> None:
    """With one rank none ever waits, and with enough free memory many ranks don't."""
    alone = plan(counted(1, 3, (10, 12, 8, 1), 2), 0.2).schedule
    assert {action.kind for action in alone.orders[0]} == {Kind.F, Kind.BW}
