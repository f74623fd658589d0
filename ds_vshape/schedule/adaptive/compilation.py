"""The planner's loops compiled before a plan's time begins to count.

Machine code is kept on disk, so this is needed once after an installation; a short time limit would be over meanwhile.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from ds_vshape.schedule.activations import Activations
from ds_vshape.schedule.adaptive import annealing, cycle_annealing, filling
from ds_vshape.schedule.adaptive.blocks import BlockParameters
from ds_vshape.schedule.adaptive.list_scheduler import ListScheduler
from ds_vshape.schedule.adaptive.machine_code import COMPILED
from ds_vshape.schedule.adaptive.memory.search import MEMORY_LOOPS, run_loops
from ds_vshape.schedule.adaptive.problem import Problem
from ds_vshape.schedule.placement import v
from ds_vshape.schedule.timeline import Times


def is_done(memory: bool = False) -> bool:
    """Whether all loops are there, in this process or on disk; with `memory` also those of plans that recompute or
    offload."""
    loops = [filling.fill, annealing.left_shift, annealing.anneal, cycle_annealing.anneal_cycle]
    return not COMPILED or all(map(is_compiled, loops + memory * list(MEMORY_LOOPS)))


def is_compiled(loop: Any) -> bool:
    """Whether there is code for `loop`. After an update it may be that of an older one, which numba alone can tell."""
    if loop.signatures:
        return True
    folder = loop.stats.cache_path
    if folder is None:
        return False
    code = loop.py_func.__code__
    return any(Path(folder).glob(f"{Path(code.co_filename).stem}.{code.co_name}-{code.co_firstlineno}.*nbi"))


def compile_loops(memory: bool = False) -> None:
    """Run each of these loops once on a batch that is soon done; without numba they just run."""
    scheduler = ListScheduler(Problem(v(2), 2, Times.uniform(4), Activations.counted(v(2)), (4.0, 4.0)))
    run = scheduler.run(BlockParameters.fastest(0.0).policy(scheduler))
    assert run is not None
    scheduler.left_shift(run.orders, run.policy)
    annealing.anneal(scheduler.layouts(1), run.orders.copy(), run.orders, run.makespan, 1, 1.0, 0.0, 1)
    period, leads = np.array([[0, 1, 3, 2, 5, 4]] * 2), np.zeros((2, 6), np.int64)
    cycle_annealing.anneal_cycle(scheduler.layouts(1), 1, period, leads, period.copy(), leads.copy(), 1.0, 1, 1.0, 0.0,
                                 1)
    if memory:
        run_loops()
