"""Problems without recomputation and offload whose orders suit one with them."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

from ds_vshape.schedule.activations import Activations
from ds_vshape.schedule.adaptive.memory.keeping import Keeping
from ds_vshape.schedule.adaptive.problem import LimitError, Problem


def order_alone(problem: Problem) -> Problem | None:
    """The same with neither; None if that can't keep the limits."""
    return _possible(problem)


def unlimited(problem: Problem) -> Problem:
    """As much memory as v-zb takes, or 1F1B on its fullest rank."""
    sizes = problem.activations
    larger = tuple(map(max, sizes.after_forward, sizes.after_backward))
    most = min(problem.ranks, problem.micro_batches) * max(sum(larger[stage] for stage in chunks)
                                                           for chunks in problem.placement.chunks)
    return replace(problem, limits=tuple(max(limit, most) for limit in problem.limits), recompute=False, offload=False)


def waiting_elsewhere(problem: Problem, keeping: Keeping) -> Iterator[tuple[int, bool, Problem]]:
    """For each way of keeping all activations alike, and whether they are offloaded: what waits takes only what stays
    on the device, and C belongs to B.

    Of the limit, what passes and copies take besides is left out: the whole activation of one running pass, and with
    copies that of one or two more.
    """
    times, sizes = problem.times, problem.activations
    stages = range(problem.placement.stages)
    for way in reversed(range(len(keeping))):
        for offloaded in (False, True) if problem.offload else (False,):
            if way == 0 and not offloaded:
                continue
            waiting = tuple(keeping.left(way, stage) - offloaded * keeping.moved(way, stage) for stage in stages)
            back = tuple(times.input_grad[stage] + keeping.seconds(way, stage)[0] for stage in stages)
            for running in (2, 1, 3) if offloaded else (1,):
                taken = [running * max(sizes.after_forward[stage] - waiting[stage] for stage in chunks)
                         for chunks in problem.placement.chunks]
                limits = tuple(limit - least for limit, least in zip(problem.limits, taken))
                if min(limits) <= 0:
                    continue
                found = _possible(problem, times=replace(times, input_grad=back), limits=limits,
                                  activations=Activations(waiting, sizes.after_backward))
                if found is not None:
                    yield way, offloaded, found
                    break


def _possible(problem: Problem, **changes: Any) -> Problem | None:
    """`problem` with these changes and neither recomputation nor offload; None if that can't keep the limits."""
    try:
        return replace(problem, recompute=False, offload=False, **changes)
    except LimitError:
        return None
