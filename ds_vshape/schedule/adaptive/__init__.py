"""Schedules that know the real times, under any memory limit; `planner.py` says how.

    planner.py           a problem and a time limit to a plan
    problem.py           what is planned: times, memory, limits
    cache.py             plans on disk
    search.py            the phases of the search
    trials.py            what all phases share: the problem, the clock, the best runs
    seeds.py             schedules of the table that fit
    imitation.py         runs from the starts of others
    regular.py           blocks without a bubble
    blocks.py            building blocks in a few numbers
    population.py        the good ones, and their descendants
    list_scheduler.py    from priorities to orders; filling.py is its loop
    cycles.py            what a few micro-batches repeat; cycle_annealing.py is its loop
    steady_states.py     runs that repeat cycles
    cool_down.py         reorders the end of a batch
    extended.py          few micro-batches to many
    reduced.py           many ranks to few
    rounds.py            a race of runs, and rounds of annealing; annealing.py is the loop
    lanes.py             loops side by side, one for each core
    layout.py            a problem as arrays, for the loops
    memory/              plans that recompute activations or offload them to the host
    machine_code.py      the loops compiled; compilation.py does it before the time counts
"""

from ds_vshape.schedule.adaptive.planner import plan
from ds_vshape.schedule.adaptive.problem import LimitError, Plan, Problem

__all__ = ["LimitError", "Plan", "Problem", "plan"]
