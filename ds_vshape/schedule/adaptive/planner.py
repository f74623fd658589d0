"""The adaptive scheduler: the best schedule that can be found for given times within a given memory.

The paper's schedules assume T_F = T_B = T_W and know three levels of memory; with real times their steady bubbles grow.
Its authors' own search moves whole-number offsets of one block. Here times are any numbers and the limit is any number
for each rank:

    [1] known       the table's schedules on this placement that fit, run with the real times: never worse than those;
                    and blocks of the slowest rank's work alone, where memory has room for them (`regular`)
    [2] blocks      a population of building blocks, put in order by a list scheduler that knows times and memory
    [3] cycles      what a few micro-batches that take turns repeat fastest (`cycles`): the middle of more orders
    [4] a race      of all these orders, annealed: passes of a critical path move, alone or in many micro-batches or
                    ranks alike; those that fall behind drop out
    [5] annealing   of the best ones

The list scheduler treats warm-up and cool-down like the rest, so they adapt with the block; where orders were repeated
as they are, `cool_down` does it for the end. With many micro-batches all of it is done with fewer first, and the middle
repeated (`extended`); with many ranks as well, [2] starts on fewer of them and takes the blocks over (`reduced`). It
goes on until the lower bound is met or the time is up.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path

from ds_vshape.schedule.activations import peak_activations
from ds_vshape.schedule.adaptive import cache as plan_cache
from ds_vshape.schedule.adaptive.problem import SLACK, Plan, Problem
from ds_vshape.schedule.adaptive.seeds import within
from ds_vshape.schedule.builders.fuse import fuse_measured
from ds_vshape.schedule.schedule import Schedule, check
from ds_vshape.schedule.timeline import Timeline, simulate

logger = logging.getLogger(__name__)


def _silent(done: float) -> None:
    """Progress for no one to see."""


def plan(problem: Problem, time_limit: float = 10.0, progress: Callable[[float], None] = _silent,
         cache: Path | None = None, clock: Callable[[], float] = time.perf_counter, cores: int = 1) -> Plan:
    """The best schedule of `problem` found in about `time_limit` seconds.

    `progress` is called with the share of the time that has passed, up to 1. With `cache`, a directory, a plan made
    before for the same problem and time limit is read from there, and a new one written. However short the time, the
    plan is no slower than any of the table's schedules on this placement within the limits. Time is that of `clock`, in
    seconds; with `time.process_time` it doesn't matter how busy the machine is. What the first plan after an
    installation spends on compiling doesn't count. Annealing uses up to `cores` cores. Raises LimitError (when
    `problem` is made) for limits that can't be met.
    """
    began = clock()
    bound = problem.lower_bound
    file = plan_cache.path_of(cache, problem, time_limit, find_spec("numba") is not None) if cache else None
    schedule = plan_cache.read(file, problem) if file else None
    if schedule is not None:
        timeline = simulate(schedule, problem.times)
    else:
        began += _compiling_time(clock, problem.recompute or problem.offload)
        schedule, timeline = _search(problem, bound, lambda: clock() - began, time_limit, progress, cores)
        if file is not None:
            plan_cache.write(file, schedule)
    progress(1.0)
    return Plan(schedule, timeline, peak_activations(schedule, problem.activations), bound, clock() - began)


def _search(problem: Problem, bound: float, elapsed: Callable[[], float], time_limit: float,
            progress: Callable[[float], None], cores: int) -> tuple[Schedule, Timeline]:
    """The best schedule and its timeline."""
    from ds_vshape.schedule.adaptive.lanes import Lanes
    from ds_vshape.schedule.adaptive.search import Search

    finishing = _finishing_time(problem)

    def left() -> float:
        return 1 - (elapsed() + finishing) / time_limit if time_limit > 0 else 0.0

    if problem.recompute or problem.offload:
        from ds_vshape.schedule.adaptive.memory.search import MemorySearch

        return _finished(MemorySearch(problem, bound, left, Lanes(cores)).run(progress), problem)
    search = Search(problem, bound, left, Lanes(cores))
    search.start()
    search.run(progress)
    return _finished(search.fastest()[1], problem)


def _compiling_time(clock: Callable[[], float], memory: bool) -> float:
    """Make sure of the machine code, with `memory` also of that for recomputation and offload; how long that took."""
    # Brings numba, which takes time to import: not before there is something to plan.
    from ds_vshape.schedule.adaptive import compilation

    began = clock()
    if not compilation.is_done(memory):
        logger.warning("compiling the planner's loops, once after an installation; the time limit counts from then on")
    compilation.compile_loops(memory)
    return clock() - began


def _finishing_time(problem: Problem) -> float:
    """Seconds to keep for `_finished` and what comes after it; it goes over each pass a few times."""
    return 5e-5 * 3 * problem.placement.stages * problem.micro_batches


def _finished(schedule: Schedule, problem: Problem) -> tuple[Schedule, Timeline]:
    """`schedule` under its new name, checked, with whole backwards where they cost nothing."""
    times = problem.times
    schedule = replace(schedule, name="adaptive")
    timeline = simulate(schedule, times)
    fused = fuse_measured(schedule, times)
    fused_timeline = simulate(fused, times)
    if fused_timeline.makespan <= timeline.makespan * (1 + SLACK) and within(fused, problem):
        schedule, timeline = fused, fused_timeline
    check(schedule)
    return schedule, timeline
