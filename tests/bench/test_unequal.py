"""bench/unequal.py: torch's orders as torch makes them, and plans that are no slower and no larger."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import unequal
from torch_orders import TORCH_SCHEDULES
from unequal import Cell, Planner, compare, torch_runs

from ds_vshape.schedule.activations import peak_activations
from ds_vshape.schedule.placement import v
from ds_vshape.schedule.schedule import ScheduleError
from ds_vshape.schedule.timeline import Times, simulate


def test_torchs_orders_are_as_long_and_as_large_as_their_papers_say() -> None:
    """With chunks whose passes take 1: each rank has 6 for a micro-batch, and 1F1B waits for 3 of them."""
    orders = {name: kind.order(4, 16) for name, kind in TORCH_SCHEDULES.items()}
    spans = {name: simulate(order, Times.uniform(order.placement.stages, *[8 / order.placement.stages] * 3)).makespan
             for name, order in orders.items()}
    peaks = {name: max(peak_activations(order)) for name, order in orders.items()}
    assert spans["torch 1f1b"] == 6 * (16 + 3) and peaks["torch 1f1b"] == 8
    assert spans["torch interleaved1f1b"] == 6 * 16 + 6 * 3 / 2 and peaks["torch interleaved1f1b"] == 11
    assert spans["torch zbvzerobubble"] == 6 * 16 + 3 and peaks["torch zbvzerobubble"] == 8


def test_dualpipev_needs_two_micro_batches_for_each_rank() -> None:
    TORCH_SCHEDULES["torch dualpipev"].order(4, 8)
    with pytest.raises(ScheduleError):
        TORCH_SCHEDULES["torch dualpipev"].order(4, 7)
    assert "torch dualpipev" not in torch_runs(Cell("5-8-3", 8, 8, 32))


def test_costs_of_a_cell() -> None:
    head = Cell("head", 4, 8, 32).layers
    assert len(head) == 34 and head.costs[-1] == 8 * 16 and head.costs[0] < 1
    assert head.after_forward[0] == 0 and head.after_forward[-1] == 1
    cell, placement = Cell("slow-rank", 4, 8, 32), v(4)
    times = cell.times(cell.balanced(placement), placement)
    assert [times.forward[stage] for stage in placement.chunks[1]] == pytest.approx([24, 24])
    assert [times.forward[stage] for stage in placement.chunks[2]] == [20, 20]


def test_plans_are_no_slower_at_no_more_memory(tmp_path: Path) -> None:
    for case in unequal.CASES:
        found = compare(Cell(case, 2, 4, 8), Planner(0.2, tmp_path))
        best = found.torchs[found.best]
        assert found.same.makespan <= best.makespan and found.same.peak <= best.peak
        assert found.least is not None and found.least.makespan <= unequal.SLACK * best.makespan
        # Kept, and read again.
        assert compare(Cell(case, 2, 4, 8), Planner(0.2, tmp_path)) == found


@pytest.mark.slow
def test_all_contenders_of_a_cell_are_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Losses are compared; torch's layers and ours keep as many bytes for as long."""
    file = tmp_path / "found.json"
    monkeypatch.setattr(sys, "argv", ["unequal.py", "--cases", "head", "--ranks", "2", "--micro-batches", "4",
                                      "--layers", "6", "--seconds", "0.2", "--rounds", "1", "--json", str(file)])
    unequal.main()
    (cell,) = json.loads(file.read_text())["results"]
    assert set(cell["measured"]) == set(cell["simulated"]) and len(cell["measured"]) == 7
    for name, measured in cell["measured"].items():
        assert measured["rise"] / unequal.MIB == pytest.approx(cell["simulated"][name]["peak"], abs=2.5), name
