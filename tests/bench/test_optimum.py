"""The proofs of bench/optimum.py: against trying everything, against the planner, and against known blocks."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from brute_force import optimum
from optimum import Cell, annealed, least_makespan, repeats

from ds_vshape.schedule.placement import v

BENCH = Path(__file__).parents[2] / "bench"


@pytest.mark.quick_cases("2-1-times1-2", "2-2-times3-4")
@pytest.mark.parametrize("ranks, micro_batches, times, peak", [
    (1, 2, (1, 2, 1), 2), (2, 1, (1, 1, 2), 2), (2, 2, (1, 2, 1), 2), (2, 2, (2, 1, 1), 4)])
def test_the_least_makespan(ranks: int, micro_batches: int, times: tuple[int, int, int], peak: int) -> None:
    planned, found, proved = least_makespan(Cell(ranks, peak, (*times, 0)).problem(micro_batches), 60)
    assert planned == found == proved == optimum(v(ranks), micro_batches, times, peak)


def test_a_plan_that_no_other_beats() -> None:
    """With hops, and where the lower bound proves nothing."""
    planned, found, proved = least_makespan(Cell(3, 4, (10, 20, 10, 1)).problem(4), 120)
    assert found == proved <= planned <= 1.005 * found


@pytest.mark.parametrize("ranks, peak, group, infeasible, feasible", [(4, 4, 1, 68, 69), (2, 2, 2, 120, 160)])
@pytest.mark.quick_cases("4-4-1-68-69")
def test_blocks_that_repeat(ranks: int, peak: int, group: int, infeasible: int, feasible: int) -> None:
    """Where the work is 52 for each micro-batch, and V-Min's own block on four ranks begins every 72."""
    cell = Cell(ranks, peak, (10, 9, 7, 3))
    assert repeats(cell, group, infeasible, 300) == "infeasible"
    assert repeats(cell, group, feasible, 300) == "feasible"


@pytest.mark.slow
def test_the_planner_repeats_as_fast_as_can_be() -> None:
    """One micro-batch as fast as is proved above; two that take turns need less still, each; too little memory none."""
    assert annealed(Cell(4, 4, (10, 9, 7, 3)), 1, 10) == 69
    assert annealed(Cell(4, 4, (10, 9, 7, 3)), 2, 10) == 2 * 64.5
    assert annealed(Cell(4, 3, (10, 9, 7, 3)), 1, 10) is None


def test_a_block_without_bubble_needs_memory() -> None:
    assert repeats(Cell(4, 8, (10, 9, 7, 3)), 1, 52, 120) == "feasible"
    assert repeats(Cell(4, 5, (10, 9, 7, 3)), 1, 52, 120) == "infeasible"
    assert repeats(Cell(4, 8, (10, 9, 7, 3)), 1, 51, 120) == "infeasible"


def test_without_or_tools() -> None:
    program = f"import sys; sys.modules['ortools'] = None; sys.path.insert(0, {str(BENCH)!r}); import optimum"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, env=os.environ)
    assert done.returncode == 1 and 'pip install "ds-vshape[proofs]"' in done.stderr
