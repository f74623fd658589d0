"""A smaller problem that resembles a large one, so that patterns found for it can be used for the large one.

One run of the list scheduler takes time in proportion to ranks times micro-batches, so a large problem gets few tries.
`BlockParameters` describe its pattern by numbers that hardly depend on either; those that are good on every other rank
with half the memory are good candidates on all of them.
"""

from __future__ import annotations

from itertools import pairwise
from statistics import fmean

from ds_vshape.schedule.activations import Activations
from ds_vshape.schedule.adaptive.problem import Problem
from ds_vshape.schedule.placement import PLACEMENTS
from ds_vshape.schedule.timeline import Times

_LEAST_RANKS = 8
_PER_RANK = 4
# (stage, micro-batch) pairs up to which a problem is tried as it is.
_LARGE = 6000


def is_large(problem: Problem) -> bool:
    """Whether it's worth looking at a smaller one first."""
    return problem.placement.stages * problem.micro_batches > _LARGE


def reduced(problem: Problem) -> Problem:
    """Every other rank of `problem`, with as much less memory above the least, and fewer micro-batches."""
    ranks = min(problem.ranks, max(_LEAST_RANKS, (problem.ranks + 1) // 2))
    chosen = [round(rank * (problem.ranks - 1) / max(1, ranks - 1)) for rank in range(ranks)]
    placement = PLACEMENTS[problem.placement.name](ranks, problem.placement.chunks_each)
    stages = [problem.placement.chunks[chosen[placement.rank_of(stage)]][placement.chunk_of(stage)]
              for stage in range(placement.stages)]

    def pick(values: tuple[float, ...]) -> tuple[float, ...]:
        return tuple(values[stage] for stage in stages)

    times, activations = problem.times, problem.activations
    share = ranks / problem.ranks
    delays = times.delays(problem.placement)
    # A rank stands for those left out behind it, and so does a hop: the mean of theirs.
    hops = tuple(fmean(delays[here:there]) for here, there in pairwise(stages))
    # As many micro-batches a rank, so that ramps and steady state weigh the same; a steady state shows within four.
    micro_batches = max(1, round(min(problem.micro_batches * share, _PER_RANK * ranks)))
    return Problem(placement, micro_batches,
                   Times(pick(times.forward), pick(times.input_grad), pick(times.weight_grad), hops,
                         entry_costs=tuple(times.entry_costs[stage] for stage in stages if times.entry_costs)),
                   Activations(pick(activations.after_forward), pick(activations.after_backward)),
                   tuple(least + max(0.0, limit - least) * share for least, limit in
                         ((problem.least[rank], problem.limits[rank]) for rank in chosen)),
                   problem.max_pieces)
