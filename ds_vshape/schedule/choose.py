"""Which schedule a name stands for, once the times are known.

    adaptive          the best plan for the times within the memory limit
    v-min, v-half,    levels of memory (paper, Table 1). Their orders are made for passes that all take the same time;
    v-zb, zb-v        for other times the best plan at the same level is compared with the order, and the faster of
                      the two is taken
    all other names   the order of that name
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from time import perf_counter

from ds_vshape.schedule.activations import Activations, Working, peak_activations
from ds_vshape.schedule.adaptive import Plan, Problem, plan
from ds_vshape.schedule.bounds import lower_bound_of_limits
from ds_vshape.schedule.named import ADAPTIVE, TIMED, build, names_on
from ds_vshape.schedule.placement import Placement
from ds_vshape.schedule.schedule import Schedule
from ds_vshape.schedule.timeline import Timeline, Times, simulate
from ds_vshape.schedule.within import one_at_a_time, plan_within

# The origins of a choice.
NAMED_ORDER, PLAN = "named order", "plan for these times"

Limits = tuple[float, ...]
# Of the time for a plan within limits that hold for running passes: the share of the first try, and the least of each
# later one.
_FIRST, _LAST = 0.7, 0.1
_UNLIMITED = 1e300


@dataclass(frozen=True)
class Choice:
    """A schedule and what it is predicted to cost.

    `peaks` of each rank in the unit of the activations, `lower_bound` of the makespan at this memory and `timeline` in
    the unit of the times, `planning_s` seconds; `origin` is NAMED_ORDER or PLAN.
    """

    schedule: Schedule
    timeline: Timeline
    peaks: tuple[float, ...]
    lower_bound: float
    planning_s: float
    origin: str


def limits_at(fraction: float, ranks: int, micro_batches: int, activations: Activations) -> Limits:
    """`fraction` of 1F1B's highest peak as every rank's limit, in the unit of `activations` (of c stages a rank).

    1F1B's rank r holds stages c r to c (r + 1) - 1 in one, for p - r micro-batches at once, whole until its backward
    ends.
    """
    whole = activations.after_forward
    each = len(whole) // ranks
    peak = max(min(ranks - rank, micro_batches) * sum(whole[each * rank:each * (rank + 1)]) for rank in range(ranks))
    return (fraction * peak,) * ranks


def level_of(order: Schedule, activations: Activations) -> Limits:
    """The memory that `order` stands for, rank by rank in the unit of `activations`.

    As the paper counts: its highest peak of k activations is k/2 micro-batches of a rank's stages. Where stages
    differ the order itself may take more on a rank; then that is the level.
    """
    counted = max(peak_activations(order))
    return tuple(max(peak, counted / 2 * sum(activations.after_forward[stage] for stage in stages))
                 for peak, stages in zip(peak_activations(order, activations), order.placement.chunks))


def schedule_for(name: str, placement: Placement, micro_batches: int, times: Times, activations: Activations,
                 limits: Limits | None = None, working: Working | None = None, *, recompute: bool = False,
                 offload: bool = False, time_limit: float = 10.0,
                 progress: Callable[[float], None] = lambda fraction: None, cache: Path | None = None,
                 cores: int = 1) -> Choice:
    """The schedule `name` for a batch of `micro_batches` on `placement`, a legal one for it, when passes take `times`.

    `times` and `activations` are those of the placement's stages. `limits` hold for `adaptive`
    (without them, 1F1B's peak does), with `working` also for what passes need while they run; its plan may `recompute`
    and `offload`. The other names bring their own peak, which `memory_limit` checks. Planning takes at most about
    `time_limit` seconds on up to `cores` cores, tells `progress` the fraction done, and keeps its results in the folder
    `cache`. Raises ValueError for an unknown name and counts below 1, and LimitError for limits that can't be met.
    """
    began = perf_counter()
    if name == ADAPTIVE:
        if limits is None:
            limits = limits_at(1.0, placement.ranks, micro_batches, activations)
        problem_of = partial(Problem, placement, micro_batches, times, activations, recompute=recompute,
                             offload=offload)
        if working is not None:
            return _choose_within(limits, working, problem_of, time_limit, progress, cache, cores)
        problem = problem_of(limits)
        return _chosen(plan(problem, time_limit, progress, cache, cores=cores), name)
    order = build(name, placement.ranks, micro_batches, placement.chunks_each)
    timeline, level = simulate(order, times), level_of(order, activations)
    bound = lower_bound_of_limits(placement, micro_batches, times, activations, level)
    choice = Choice(order, timeline, peak_activations(order, activations), bound, perf_counter() - began, NAMED_ORDER)
    if name not in TIMED or _alike(times) or timeline.makespan <= bound:
        return choice
    found = plan(Problem(placement, micro_batches, times, activations, level), time_limit, progress, cache, cores=cores)
    better = _chosen(found, name) if found.timeline.makespan < timeline.makespan else choice
    return replace(better, planning_s=perf_counter() - began)


def _choose_within(limits: Limits, working: Working, problem_of: Callable[[Limits], Problem], time_limit: float,
                   progress: Callable[[float], None], cache: Path | None, cores: int) -> Choice:
    """An adaptive schedule within `limits` that hold for running passes, too."""
    began = perf_counter()

    def planned(left: Limits) -> Schedule:
        remaining = max(time_limit - (perf_counter() - began), time_limit * _LAST)
        share = remaining * (_FIRST if remaining > time_limit / 2 else 1)
        return plan(problem_of(left), share, progress, cache, cores=cores).schedule

    # What no limit forbids.
    free = problem_of((_UNLIMITED,) * len(limits))
    usual = _usual(free)
    smallest = one_at_a_time(free.placement, free.activations, free.micro_batches, recompute=free.recompute,
                             offload=free.offload)
    schedule = replace(plan_within(limits, free.least, usual, smallest, free.activations, working, planned),
                       name=ADAPTIVE)
    return Choice(schedule, simulate(schedule, free.times), peak_activations(schedule, free.activations),
                  lower_bound_of_limits(schedule.placement, free.micro_batches, free.times, free.activations, limits),
                  perf_counter() - began, PLAN)


def _usual(problem: Problem) -> Schedule:
    """A schedule of the table on the placement of `problem`."""
    placement = problem.placement
    known = names_on(placement)
    name = TIMED[0] if TIMED[0] in known else known[0]
    return build(name, problem.ranks, problem.micro_batches, placement.chunks_each)


def _chosen(found: Plan, name: str) -> Choice:
    return Choice(replace(found.schedule, name=name), found.timeline, found.peaks, found.lower_bound, found.planning_s,
                  PLAN)


def _alike(times: Times) -> bool:
    """Whether every pass takes the same and hops take nothing, as the named orders suppose."""
    of_passes = {*times.forward, *times.input_grad, *times.weight_grad}
    return not any(times.hops) and len(of_passes) == 1 and len({*times.scales}) < 2
