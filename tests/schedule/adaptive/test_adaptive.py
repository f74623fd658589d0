"""The adaptive planner: properties of every plan, and its figures against another scheduler's."""

from __future__ import annotations

import json
import time
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from planner_problems import assert_plan_is_right, counted, problems

from ds_vshape.schedule.activations import Activations, peak_activations
from ds_vshape.schedule.adaptive import LimitError, Problem, plan
from ds_vshape.schedule.adaptive.compilation import compile_loops
from ds_vshape.schedule.builders.micro_batch_order import in_order, rising_and_falling
from ds_vshape.schedule.placement import v
from ds_vshape.schedule.timeline import Times, simulate

CELLS = json.loads((Path(__file__).parents[2] / "data" / "adaptive.json").read_text())["cells"]


@pytest.fixture(scope="module", autouse=True)
def compiled() -> None:
    """The loops are compiled before the first test that looks at a clock."""
    compile_loops()


@given(problems())
@settings(max_examples=40)
def test_every_plan_is_right(problem: Problem) -> None:
    assert_plan_is_right(plan(problem, 0.2), problem)


@pytest.mark.parametrize("whole, kept", [(1.0, 3.0), (2.0, 0.0)])
def test_the_least_limit_can_be_met(whole: float, kept: float) -> None:
    """Even where B leaves more than F did (recomputed activations): then backwards run whole."""
    problem = Problem(v(3), 5, Times.uniform(6, 1, 1, 1), Activations((whole,) * 6, (kept,) * 6), (2 * whole,) * 3)
    found = plan(problem, 0.2)
    assert_plan_is_right(found, problem)
    assert max(found.peaks) == 2 * whole


@pytest.mark.parametrize("cell", CELLS, ids=lambda cell: f"p{cell['ranks']}-m{cell['micro_batches']}-"
                         f"{'-'.join(map(str, cell['times']))}-peak{cell['peak']}")
def test_no_slower_than_the_reference(cell: Mapping[str, Any]) -> None:
    problem = counted(cell["ranks"], cell["micro_batches"], cell["times"], cell["peak"])
    # A slow machine gets more time; on most the first is enough.
    for seconds in (1.0, 3.0, 10.0):
        found = plan(problem, seconds, clock=time.process_time)
        if found.timeline.makespan <= cell["makespan"] * (1 + 1e-9):
            break
    assert found.timeline.makespan <= cell["makespan"] * (1 + 1e-9)
    # Whole until the end of the last piece of W, as the reference counts.
    assert max(peak_activations(found.schedule)) <= cell["peak"]


def test_a_slow_link_slows_no_other() -> None:
    """Planned as if all hops were as slow as the slowest, the same batch takes longer."""
    problem = counted(4, 8, (10, 12, 8, 0), 6)
    times = replace(problem.times, hops=(0.5, 15.0, 0.5, 0.0, 0.5, 15.0, 0.5))
    known = plan(replace(problem, times=times), 0.5, clock=time.process_time)
    assert_plan_is_right(known, replace(problem, times=times))
    all_slow = plan(replace(problem, times=replace(times, hops=(15.0,) * 7)), 0.5, clock=time.process_time)
    assert known.timeline.makespan < simulate(all_slow.schedule, times).makespan


def test_knows_which_micro_batches_are_long() -> None:
    """A plan for equal micro-batches waits for the long ones; one that knows them wins half of it back in the order of
    places, and something in any order."""
    problem = counted(4, 8, (10, 10, 10, 0), 8)
    even = plan(problem, 0.5, clock=time.process_time)
    scales = (0.4, 2.1, 0.6, 1.3, 0.3, 1.7, 0.9, 0.7)
    mixed = replace(problem.times, scales=scales)
    ordered = in_order(mixed, rising_and_falling(scales, 0.5))
    added = simulate(even.schedule, mixed).makespan - even.timeline.makespan
    for times, share in ((mixed, 0.9), (ordered, 0.5)):
        known = plan(replace(problem, times=times), 0.5, clock=time.process_time)
        assert_plan_is_right(known, replace(problem, times=times))
        assert known.timeline.makespan - even.timeline.makespan < share * added


def test_more_memory_than_any_batch_needs() -> None:
    found = plan(counted(4, 4, (10, 12, 8, 1), 1000), 1.0, clock=time.process_time)
    assert found.timeline.makespan <= 294


@pytest.mark.parametrize("limit", [0.0, 0.01, 0.5])
def test_the_time_limit_is_kept(limit: float) -> None:
    problem = counted(8, 32, (10, 12, 8, 1), 10)
    began = time.process_time()
    found = plan(problem, limit, clock=time.process_time)
    assert time.process_time() - began < limit + 3
    assert_plan_is_right(found, problem)


def test_progress_goes_up_to_one() -> None:
    seen: list[float] = []
    plan(counted(4, 8, (10, 12, 8, 1), 5), 0.5, seen.append, clock=time.process_time)
    assert seen == sorted(seen) and len(seen) > 5 and 0 <= seen[0] and seen[-1] == 1.0


def test_limits_that_cannot_be_met_say_what_is_least() -> None:
    with pytest.raises(LimitError, match=r"1\.5 on rank 0.*least possible peaks of the ranks are 4, 3"):
        Problem(v(2), 4, Times.uniform(4), Activations((1.0, 2.0, 1.0, 3.0), (0.0,) * 4), (1.5, 3.0))


@pytest.mark.parametrize("change, message", [
    ({"placement": v(3)}, "times.forward must be 6"), ({"micro_batches": 0}, "at least 1"),
    ({"limits": (8.0,)}, "limit for each"),
    ({"times": Times.uniform(3)}, "times.forward must be 4"),
    ({"times": Times.uniform(4, forward=float("nan"))}, "finite"),
    ({"times": replace(Times.uniform(4), hops=(1.0,) * 4)}, "times.hops must be 3"),
    ({"times": Times.uniform(4, hop=-1)}, "times.hops must be 3 finite numbers of 0 or more"),
    ({"times": replace(Times.uniform(4), scales=(1.0,) * 3)}, "times.scales must be 4 .* one for each micro-batch"),
    ({"activations": Activations((1.0,) * 4, (1.0,) * 3)}, "activations.after_backward must be 4")])
def test_bad_problems_are_refused(change: dict[str, Any], message: str) -> None:
    good: dict[str, Any] = {"placement": v(2), "micro_batches": 4, "times": Times.uniform(4),
                            "activations": Activations((1.0,) * 4, (1.0,) * 4), "limits": (4.0, 4.0)}
    with pytest.raises(ValueError, match=message):
        Problem(**(good | change))
