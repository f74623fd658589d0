"""What repeats fastest: its interval against long batches and against a proof, and its orders against the checker."""

from __future__ import annotations

from dataclasses import replace
from random import Random

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from optimum import Cell, repeats
from planner_problems import assert_plan_is_right, counted, problems

from ds_vshape.schedule.activations import peak_activations
from ds_vshape.schedule.adaptive import Problem, plan
from ds_vshape.schedule.adaptive.cycle_annealing import anneal_cycle
from ds_vshape.schedule.adaptive.cycles import Cycle, best_cycles, periods
from ds_vshape.schedule.adaptive.extended import lengthened, with_micro_batches
from ds_vshape.schedule.adaptive.lanes import Lanes
from ds_vshape.schedule.adaptive.list_scheduler import ListScheduler, Policy, PolicyRun
from ds_vshape.schedule.adaptive.seeds import known_schedules
from ds_vshape.schedule.schedule import check
from ds_vshape.schedule.timeline import simulate

F0, F1, B0, B1, W0, W1 = range(6)
IN_TURN = [F0, F1, B1, B0, W1, W0]


def in_turn(ranks: int, group: int = 1, pieces: int = 1) -> Cycle:
    """One micro-batch after the other, which needs no more memory than one."""
    period = [*IN_TURN[:4], *[W1] * pieces, *[W0] * pieces] * group
    return Cycle(float("inf"), group, pieces, np.array([period] * ranks), np.zeros((ranks, 6), np.int64))


def annealed(problem: Problem, start: Cycle, seed: int = 0, passes: int = 100) -> Cycle:
    """The best of so many looks at the clock."""
    looks = iter(range(passes, -1, -1))
    [cycle] = best_cycles(ListScheduler(problem), [start], lambda: next(looks, 0) / passes, Random(seed), Lanes(2), 1)
    return cycle


def makespan(problem: Problem, cycle: Cycle, micro_batches: int) -> float:
    """Of a batch that repeats `cycle`, checked, and within the limits."""
    scheduler = ListScheduler(with_micro_batches(problem, micro_batches))
    target_starts = np.zeros((problem.ranks, 6, micro_batches, cycle.pieces))
    run = scheduler.left_shift(cycle.of_batch(micro_batches), Policy(target_starts, 0.0, scheduler.least_reserves))
    assert run is not None
    schedule = scheduler.schedule(run)
    check(schedule)
    assert all(peak <= limit for peak, limit in
               zip(peak_activations(schedule, problem.activations), scheduler.limits, strict=True))
    return simulate(schedule, scheduler.problem.times).makespan


@pytest.mark.slow
@given(problems(), st.integers(1, 3), st.sampled_from((1, 2)), st.integers(0, 1000))
@settings(max_examples=40)
def test_a_long_batch_takes_as_many_intervals(problem: Problem, group: int, pieces: int, seed: int) -> None:
    """Whatever the times and sizes: annealing's interval is what each further period takes in the simulator."""
    assume(not ListScheduler(problem).fused)
    cycle = annealed(problem, in_turn(problem.ranks, group, pieces), seed, 10)
    # As long as no rank is slower than the others by a hair, which would show after very many periods alone.
    short, long = (makespan(problem, cycle, group * periods) for periods in (150, 250))
    assert long - short <= 100 * cycle.interval * (1 + 1e-6)
    assert long - short >= 98 * cycle.interval


@pytest.mark.parametrize("ranks, times, group, expected", [
    (4, (10, 9, 7, 3), 1, 69), (4, (10, 9, 7, 3), 2, 64.5), (8, (10, 9, 7, 3), 3, 60 + 2 / 3),
    (8, (10, 12, 8, 1), 3, 65 + 1 / 3)])
def test_micro_batches_that_take_turns(ranks: int, times: tuple[int, int, int, int], group: int,
                                       expected: float) -> None:
    """Within V-Min's peak, where V-Min itself starts a micro-batch every 72 or 76."""
    problem = counted(ranks, 6 * ranks, times, ranks)
    scheduler = ListScheduler(problem)
    [orders] = [scheduler.orders_of(schedule) for schedule in known_schedules(problem) if schedule.name == "v-min"]
    assert orders is not None
    [start] = periods(orders, [(group, 1)], 1)
    cycle = annealed(problem, start)
    assert cycle.interval / group == pytest.approx(expected)
    few, many = (makespan(problem, cycle, ranks * group * count) for count in (4, 5))
    assert many - few == pytest.approx(ranks * cycle.interval)


def test_nothing_repeats_faster() -> None:
    """The proof of bench/optimum.py begins where annealing ends."""
    cell = Cell(3, 3, (10, 9, 7, 3))
    cycle = annealed(counted(3, 24, (10, 9, 7, 3), 3), in_turn(3))
    assert repeats(cell, 1, round(cycle.interval), 120) == "feasible"
    assert repeats(cell, 1, round(cycle.interval) - 1, 120) == "infeasible"


def test_orders_that_wait_for_themselves() -> None:
    """Rank 0 wants its B before its F has come back."""
    problem = counted(2, 4, (1, 1, 1, 0), 4)
    layout = ListScheduler(problem).layouts(1)
    orders, leads = np.array([[B0, F0, F1, B1, W1, W0], IN_TURN]), np.zeros((2, 6), np.int64)
    assert anneal_cycle(layout, 1, orders, leads, orders.copy(), leads.copy(), 1e9, 0, 1.0, 0.0, 1) == float("inf")


def test_a_middle_that_is_not_regular_is_none() -> None:
    orders = np.array([[F0, F1, B1, B0, F0, F1, B1, B0, W1, W1, W0, W0]])
    assert not list(periods(orders, [(1, 1)], 1))


@given(problems())
@settings(max_examples=20)
def test_batches_that_are_long_enough_for_cycles(problem: Problem) -> None:
    problem = with_micro_batches(problem, 4 * problem.ranks)
    assert_plan_is_right(plan(problem, 0.3), problem)


@pytest.mark.parametrize("name, times", [
    ("v-min", (10, 10, 10, 0)), ("v-half", (10, 12, 8, 1)), ("v-zb", (10, 9, 7, 3))])
def test_a_batch_made_longer_repeats_its_middle(name: str, times: tuple[int, int, int, int]) -> None:
    """As the named schedule does by itself; and what has no regular part is left alone."""
    few, many = (ListScheduler(counted(4, micro_batches, times, 8)) for micro_batches in (16, 28))

    def run_of(scheduler: ListScheduler, orders: NDArray[np.int64] | None = None) -> PolicyRun:
        if orders is None:
            [orders] = [scheduler.orders_of(schedule) for schedule in known_schedules(scheduler.problem)
                        if schedule.name == name]
        assert orders is not None
        batch = scheduler.problem.micro_batches
        run = scheduler.left_shift(orders, Policy(np.zeros((4, 6, batch, 1)), 0.0, scheduler.least_reserves))
        assert run is not None
        check(scheduler.schedule(run))
        return run

    run = run_of(few)
    longer = [run_of(many, orders).makespan for orders in lengthened(run, 28)]
    assert min(longer) == run_of(many).makespan
    one_by_one = np.array([[stream for stream in range(6) for _ in range(16)]] * 4)
    assert not list(lengthened(replace(run, orders=one_by_one), 28))
