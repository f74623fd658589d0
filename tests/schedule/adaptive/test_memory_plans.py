"""Plans that recompute and offload: properties of all of them, the best there is where that is known, and figures."""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import replace
from itertools import product

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from planner_problems import problems

from ds_vshape.schedule.activations import Activations, peak_activations
from ds_vshape.schedule.adaptive import LimitError, Plan, Problem, plan
from ds_vshape.schedule.adaptive.compilation import compile_loops
from ds_vshape.schedule.named import build
from ds_vshape.schedule.passes import B, C, F, Kind, O, Pass, R, W
from ds_vshape.schedule.placement import v
from ds_vshape.schedule.schedule import Order, Schedule, check
from ds_vshape.schedule.timeline import Times, simulate


@pytest.fixture(scope="module", autouse=True)
def compiled() -> None:
    """The loops are compiled before the first test that looks at a clock."""
    compile_loops(memory=True)


def uniform(ranks: int, micro_batches: int, limit: float, *, copy: float = 1, input_size: float = 0.1,
            recompute: bool = False, offload: bool = False) -> Problem:
    """All passes take 1, an activation is 1 and a stage's input `input_size`; `limit` in activations."""
    stages = 2 * ranks
    sizes = Activations((1.0,) * stages, (1.0,) * stages, ((input_size,),) * stages)
    return Problem(v(ranks), micro_batches, Times.uniform(stages, copy=copy), sizes, (float(limit),) * ranks,
                   recompute=recompute, offload=offload)


@st.composite
def memory_problems(draw: st.DrawFn) -> Problem:
    """Any times and sizes, different on every stage, and limits from the least upwards."""
    base = draw(problems())
    stages = 2 * base.ranks

    def each(low: float, high: float) -> tuple[float, ...]:
        return tuple(draw(st.lists(st.floats(low, high), min_size=stages, max_size=stages)))

    layers = draw(st.integers(1, 4))
    shares = sorted(draw(st.lists(st.floats(0, 1), min_size=layers, max_size=layers)))
    whole = base.activations.after_forward
    times = replace(base.times, offload=each(0, 4), reload=each(0, 4), recompute=tuple(
        tuple(share * seconds for share in shares) for seconds in base.times.forward))
    sizes = replace(base.activations, recomputed=tuple(
        tuple(size * (1 - 0.9 * share) for share in shares) for size in whole))
    if draw(st.booleans()):
        sizes = replace(sizes, offloadable=tuple(map(min, whole, each(0, 4))))
    allowed = {"recompute": draw(st.booleans()), "offload": draw(st.booleans())}
    unlimited = replace(base, times=times, activations=sizes, limits=(1e9,) * base.ranks, **allowed)
    return replace(unlimited, limits=tuple(least * draw(st.floats(1, 3)) for least in unlimited.least))


def assert_memory_plan_is_right(found: Plan, problem: Problem) -> None:
    schedule = found.schedule
    assert schedule.name == "adaptive" and schedule.placement == v(problem.ranks)
    check(schedule)
    timeline = simulate(schedule, problem.times)
    assert timeline == found.timeline
    assert found.lower_bound <= timeline.makespan * (1 + 1e-9)
    assert found.peaks == peak_activations(schedule, problem.activations)
    assert all(peak <= limit * (1 + 1e-6) for peak, limit in zip(found.peaks, problem.limits))
    kinds = {action.kind for _, action in schedule.passes()}
    assert problem.recompute or Kind.C not in kinds
    assert problem.offload or not kinds & {Kind.O, Kind.R}
    for order in schedule.orders:
        for stage in {action.stage for action in order}:
            for of in ((Kind.F,), (Kind.B, Kind.BW), (Kind.W, Kind.BW)):
                line = [(action.micro_batch, action.piece) for action in order
                        if action.stage == stage and action.kind in of]
                assert line == sorted(line)


@given(memory_problems())
@settings(deadline=None, max_examples=10)
def test_every_plan_is_right(problem: Problem) -> None:
    assert_memory_plan_is_right(plan(problem, 0.2, clock=time.process_time), problem)


@pytest.mark.slow
@given(memory_problems())
@settings(deadline=None, max_examples=8)
def test_no_slower_than_with_fewer_means(problem: Problem) -> None:
    """Than with the order alone, with recomputation alone or with offload alone, in as much time."""
    found = plan(problem, 1.0, clock=time.process_time)
    assert_memory_plan_is_right(found, problem)
    for recompute, offload in product((False, True), repeat=2):
        try:
            fewer = replace(problem, recompute=problem.recompute and recompute, offload=problem.offload and offload)
        except LimitError:
            continue
        assert found.timeline.makespan <= plan(fewer, 1.0, clock=time.process_time).timeline.makespan * 1.01


@pytest.mark.parametrize("recompute, offload, least", [(False, False, 2.0), (True, False, 1.1), (False, True, 1.0),
                                                       (True, True, 1.0)])
def test_the_least_limit_can_be_met(recompute: bool, offload: bool, least: float) -> None:
    with pytest.raises(LimitError, match=f"least possible peaks of the ranks are {least:g}, {least:g}"):
        uniform(2, 5, least * 0.99, recompute=recompute, offload=offload)
    problem = uniform(2, 5, least, recompute=recompute, offload=offload)
    found = plan(problem, 0.3, clock=time.process_time)
    assert_memory_plan_is_right(found, problem)
    assert max(found.peaks) == pytest.approx(least)


def actions_of(rank: int, problem: Problem) -> Iterator[dict[Pass, tuple[Pass, ...]]]:
    """All choices of what is recomputed and offloaded: a rank's actions, and after which of its own each comes."""
    activations = [(stage, number) for stage in v(problem.ranks).chunks[rank] for number in
                   range(problem.micro_batches)]
    choices = product((False, True) if problem.recompute else (False,), (False, True) if problem.offload else (False,))
    for chosen in product(list(choices), repeat=len(activations)):
        found: dict[Pass, tuple[Pass, ...]] = {}
        for (stage, number), (recomputed, offloaded) in zip(activations, chosen):
            line = [F(stage, number), *([O(stage, number), R(stage, number)] if offloaded else []),
                    *([C(stage, number)] if recomputed else []), B(stage, number), W(stage, number)]
            for before, action in zip([None, *line], line):
                found[action] = (before,) if before else ()
            for kind in (F, B, W):
                if number:
                    found[kind(stage, number)] += (kind(stage, number - 1),)
        yield found


def orders_of(rank: int, problem: Problem) -> Iterator[Order]:
    """All orders of a rank within its limit: an O only before what takes memory, as it would wait for nothing else."""
    sizes, last = problem.activations, 2 * problem.ranks - 1
    for needs in actions_of(rank, problem):
        again = {(action.stage, action.micro_batch): action for action in needs if action.kind is Kind.C}
        changes = {action: sizes.change(action, again.get((action.stage, action.micro_batch))) for action in needs}

        def extended(order: tuple[Pass, ...], alive: float) -> Iterator[Order]:
            if len(order) == len(needs):
                yield order
            for action, before in needs.items():
                if action in order or not set(before) <= set(order):
                    continue
                if order and order[-1].kind is Kind.O and action.kind in (Kind.B, Kind.W):
                    continue
                # The turns of the V, on the rank that has them.
                if action.kind is Kind.B and action.stage == last and F(last, action.micro_batch) not in order:
                    continue
                at_start, at_end = changes[action]
                if alive + at_start <= problem.limits[rank] + 1e-9:
                    yield from extended((*order, action), alive + at_start + at_end)

        yield from extended((), 0.0)


def least_makespan(problem: Problem) -> float:
    """Of all orders of all ranks."""
    least = float("inf")
    rows = [list(orders_of(rank, problem)) for rank in range(problem.ranks)]
    for orders in product(*rows):
        try:
            found = simulate(Schedule("", v(problem.ranks), problem.micro_batches, orders), problem.times).makespan
        except ValueError:
            continue
        least = min(least, found)
    return least


@pytest.mark.parametrize("recompute, offload, limit", [(True, False, 1.1), (True, False, 2.0), (False, True, 1.0),
                                                       (False, True, 1.5), (True, True, 1.0), (True, True, 1.1)])
def test_one_rank_is_planned_best(recompute: bool, offload: bool, limit: float) -> None:
    """In every order, with everything recomputed and offloaded or not."""
    problem = uniform(1, 1, limit, copy=1.5, recompute=recompute, offload=offload)
    found = plan(problem, 0.3, clock=time.process_time)
    assert found.timeline.makespan == least_makespan(problem)


def test_known_figures() -> None:
    """p = 4, m = 8: a quarter of 1F1B's peak of 8, by an offload, takes little more than v-zb."""
    problem = uniform(4, 8, 2.4, offload=True)
    found = plan(problem, 1.5, clock=time.process_time)
    assert_memory_plan_is_right(found, problem)
    assert found.timeline.makespan <= simulate(build("v-zb", 4, 8), problem.times).makespan + 4


@pytest.mark.slow
@pytest.mark.parametrize("share, most", [(0.3, 1.03), (0.2, 1.03)])
def test_a_fifth_of_the_memory_takes_three_percent_more_time(share: float, most: float) -> None:
    """p = 8, m = 32: of v-zb's time, at shares of 1F1B's peak."""
    problem = uniform(8, 32, 16 * share, offload=True)
    fastest = simulate(build("v-zb", 8, 32), problem.times).makespan
    found = plan(problem, 10.0, clock=time.process_time)
    assert_memory_plan_is_right(found, problem)
    assert found.timeline.makespan <= most * fastest
