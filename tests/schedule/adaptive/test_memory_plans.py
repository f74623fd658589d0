"""Plans that recompute and offload: properties of all of them, the best there is where that is known, and figures."""

from __future__ import annotations

import inspect
import re
import time
from dataclasses import replace
from itertools import pairwise, product

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from memory_optimum import least_makespan
from planner_problems import problems

from ds_vshape.schedule.activations import Activations, peak_activations
from ds_vshape.schedule.adaptive import LimitError, Plan, Problem, annealing, plan
from ds_vshape.schedule.adaptive.compilation import compile_loops
from ds_vshape.schedule.adaptive.memory import annealing as memory_annealing
from ds_vshape.schedule.builders.everything import with_everything_offloaded, with_everything_recomputed
from ds_vshape.schedule.named import build, names_on
from ds_vshape.schedule.passes import Kind
from ds_vshape.schedule.placement import v
from ds_vshape.schedule.schedule import check
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
        assert not [one for one, other in pairwise(order) if (one.kind, other.kind) == (Kind.O, Kind.R)
                    and (one.stage, one.micro_batch) == (other.stage, other.micro_batch)], "a copy for nothing"
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


@pytest.mark.parametrize("limit", [1.5, 3.0, 4.0, 6.0, 8.0])
def test_no_slower_than_everything_recomputed_or_offloaded(limit: float) -> None:
    """p = 4, m = 8, however short the time; 8 is 1F1B's peak."""
    problem = uniform(4, 8, limit, recompute=True, offload=True)
    found = plan(problem, 0.1, clock=time.process_time)
    assert_memory_plan_is_right(found, problem)
    for name in names_on(v(4)):
        schedule = build(name, 4, 8)
        for change in (with_everything_recomputed, with_everything_offloaded):
            changed = change(schedule)
            if max(peak_activations(changed, problem.activations)) <= limit:
                assert found.timeline.makespan <= simulate(changed, problem.times).makespan


@pytest.mark.parametrize("recompute, offload, least", [(False, False, 2.0), (True, False, 1.1), (False, True, 1.0),
                                                       (True, True, 1.0)])
def test_the_least_limit_can_be_met(recompute: bool, offload: bool, least: float) -> None:
    with pytest.raises(LimitError, match=f"least possible peaks of the ranks are {least:g}, {least:g}"):
        uniform(2, 5, least * 0.99, recompute=recompute, offload=offload)
    problem = uniform(2, 5, least, recompute=recompute, offload=offload)
    found = plan(problem, 0.3, clock=time.process_time)
    assert_memory_plan_is_right(found, problem)
    assert max(found.peaks) == pytest.approx(least)


@pytest.mark.parametrize("recompute, offload, limit", [(True, False, 1.1), (True, False, 2.0), (False, True, 1.0),
                                                       (False, True, 1.5), (True, True, 1.0), (True, True, 1.1)])
def test_one_rank_is_planned_best(recompute: bool, offload: bool, limit: float) -> None:
    assert_planned_best(1, 1, limit, recompute, offload)


@pytest.mark.parametrize("recompute, offload, limit", [(True, False, 1.1), (True, False, 2.1), (False, True, 1.0),
                                                       (False, True, 2.0), (True, True, 1.0), (True, True, 2.1)])
def test_two_ranks_with_one_micro_batch_are_planned_best(recompute: bool, offload: bool, limit: float) -> None:
    assert_planned_best(2, 1, limit, recompute, offload)


@pytest.mark.parametrize("recompute, offload, limit, gap", [
    (True, False, 1.1, 0.0), (True, False, 2.1, 0.0), (False, True, 1.0, 0.0), (False, True, 2.0, 0.0),
    pytest.param(True, True, 1.0, 0.0, marks=pytest.mark.slow),
    pytest.param(True, True, 2.1, 0.5, marks=pytest.mark.slow)])
def test_two_ranks_with_two_micro_batches(recompute: bool, offload: bool, limit: float, gap: float) -> None:
    """All but one are planned best."""
    assert_planned_best(2, 2, limit, recompute, offload, gap)


def assert_planned_best(ranks: int, micro_batches: int, limit: float, recompute: bool, offload: bool,
                        gap: float = 0.0) -> None:
    """As good as trying all orders, up to `gap`, whatever is recomputed and offloaded."""
    problem = replace(uniform(ranks, micro_batches, limit, copy=1.5, recompute=recompute, offload=offload),
                      max_pieces=1)
    found = plan(problem, 0.5, clock=time.process_time)
    assert_memory_plan_is_right(found, problem)
    makespan = found.timeline.makespan
    least = least_makespan(problem, makespan + 1e-6)
    assert least - 1e-5 <= makespan <= least + gap + 1e-5


@pytest.mark.parametrize("part", [r"# How far a pass is moved.*?_RANDOM_BITS = \w+\n", r"@jit\ndef _random\(.*?\n\n\n"])
def test_both_annealings_move_and_draw_alike(part: str) -> None:
    """Machine code on disk depends on one file alone, so each has its own."""
    found = [re.search(part, inspect.getsource(each), re.DOTALL) for each in (annealing, memory_annealing)]
    assert found[0] and found[1] and found[0].group() == found[1].group()


def test_known_figures() -> None:
    """p = 4, m = 8: a quarter of 1F1B's peak of 8, by an offload, takes little more than v-zb."""
    problem = uniform(4, 8, 2.4, offload=True)
    found = plan(problem, 1.5, clock=time.process_time)
    assert_memory_plan_is_right(found, problem)
    assert found.timeline.makespan <= simulate(build("v-zb", 4, 8), problem.times).makespan + 4


@pytest.mark.slow
def test_a_long_batch_is_planned_as_well_as_a_short_one() -> None:
    """p = 4: what 256 micro-batches take more than 16 is the work of 241 at most."""
    short, long = (plan(uniform(4, micro_batches, 2.4, offload=True), 5.0, clock=time.process_time).timeline.makespan
                   for micro_batches in (16, 256))
    assert long <= short + 6 * 241


@pytest.mark.slow
@pytest.mark.parametrize("share, most", [(0.3, 1.03), (0.2, 1.035)])
def test_a_fifth_of_the_memory_takes_little_more_time(share: float, most: float) -> None:
    """p = 8, m = 32: of v-zb's time, at shares of 1F1B's peak. At 0.2 none can take less than 1.024 of it."""
    problem = uniform(8, 32, 16 * share, offload=True)
    fastest = simulate(build("v-zb", 8, 32), problem.times).makespan
    found = plan(problem, 10.0, clock=time.process_time)
    assert_memory_plan_is_right(found, problem)
    assert found.timeline.makespan <= most * fastest
