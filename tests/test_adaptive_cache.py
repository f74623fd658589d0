"""Plans on disk: found again, and only for what they were made for."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

from ds_vshape.schedule.activations import Activations
from ds_vshape.schedule.adaptive import Problem, plan
from ds_vshape.schedule.adaptive import planner as planner_module
from ds_vshape.schedule.placement import v
from ds_vshape.schedule.timeline import Times

PROBLEM = Problem(3, 6, Times.uniform(6, 10, 12, 8, 1), Activations.counted(v(3)), (4.0,) * 3)
LIMIT = 0.3


def test_round_trip(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = plan(PROBLEM, LIMIT, cache=tmp_path / "plans")
    assert len(list((tmp_path / "plans").iterdir())) == 1

    def never(*_: object) -> None:
        raise AssertionError("searched again")

    monkeypatch.setattr(planner_module, "_search", never)
    again = plan(PROBLEM, LIMIT, cache=tmp_path / "plans")
    assert replace(again, planning_s=0) == replace(first, planning_s=0)


@pytest.mark.parametrize("problem, limit", [
    (replace(PROBLEM, limits=(4.0, 4.0, 5.0)), LIMIT), (replace(PROBLEM, micro_batches=7), LIMIT),
    (replace(PROBLEM, times=Times.uniform(6, 10, 12, 8, 2)), LIMIT),
    (replace(PROBLEM, times=replace(PROBLEM.times, hops=(1, 1, 1, 1, 2))), LIMIT),
    (replace(PROBLEM, max_pieces=1), LIMIT),
    (PROBLEM, 0.2)])
def test_anything_else_is_planned_anew(tmp_path: Path, problem: Problem, limit: float) -> None:
    plan(PROBLEM, LIMIT, cache=tmp_path)
    plan(problem, limit, cache=tmp_path)
    assert len(list(tmp_path.iterdir())) == 2


@pytest.mark.parametrize("spoil", ["", "[]", "{\"schedule\": 3}", "fewer passes", "too much memory"])
def test_a_spoilt_file_counts_as_missing(tmp_path: Path, spoil: str) -> None:
    first = plan(PROBLEM, LIMIT, cache=tmp_path)
    file, = tmp_path.iterdir()
    data = json.loads(file.read_text())
    if spoil == "fewer passes":
        data["schedule"]["orders"][0].pop()
        spoil = json.dumps(data)
    elif spoil == "too much memory":
        # All forwards first: a schedule, but not within the limit.
        for order in data["schedule"]["orders"]:
            order.sort(key=lambda entry: (entry[0] != "F", entry[1] if entry[0] == "F" else 0))
        spoil = json.dumps(data)
    file.write_text(spoil)
    again = plan(PROBLEM, LIMIT, cache=tmp_path)
    assert max(again.peaks) <= 4 and again.timeline.makespan >= first.lower_bound
    assert json.loads(file.read_text())["schedule"]["micro_batches"] == 6


def test_a_folder_that_cannot_be_written_is_a_warning(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    with pytest.warns(UserWarning, match="the plan is not kept"):
        found = plan(PROBLEM, LIMIT, cache=tmp_path / "file" / "plans")
    assert found.timeline.makespan >= found.lower_bound
