"""Our schedules against the figures of the paper's authors' scheduler, in data/reference.json with their origin."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from ds_vshape.schedule.activations import peak_activations
from ds_vshape.schedule.chunk_times import ChunkTimes
from ds_vshape.schedule.named import build
from ds_vshape.schedule.timeline import simulate

ROOT = Path(__file__).parents[2]
REFERENCE = Path(__file__).parents[1] / "data" / "reference.json"
CELLS = json.loads(REFERENCE.read_text())["cells"]


@pytest.mark.parametrize("cell", CELLS, ids=lambda cell: f"p{cell['stages']}-m{cell['micro_batches']}")
def test_no_slower_and_no_larger(cell: Mapping[str, Any]) -> None:
    for theirs, ours in (("v-min", "v-min"), ("v-half", "v-half"), ("zb-v", "v-zb"), ("1f1b", "1f1b")):
        reference = cell["schedules"][theirs]
        schedule = build(ours, cell["stages"], cell["micro_batches"])
        times = ChunkTimes.uniform(*(cell[key] for key in ("forward", "input_grad", "weight_grad", "hop"))).on(
            schedule.placement)
        timeline = simulate(schedule, times)
        assert timeline.makespan <= reference["makespan"], ours
        assert timeline.longest_span <= reference["span"], ours
        assert max(peak_activations(schedule)) <= reference["peak"], ours
        if ours == "1f1b":
            # The one schedule that all programs agree on: so the two evaluators agree, too.
            assert (timeline.makespan, timeline.longest_span) == (reference["makespan"], reference["span"])


def test_all_sizes_are_there() -> None:
    sizes = {(cell["stages"], cell["micro_batches"]) for cell in CELLS}
    assert sizes == {(p, m) for p in (2, 3, 4, 6, 8, 16) for m in (p, 2 * p, 3 * p + 1, 4 * p)}


def compare(path: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, str(ROOT / "bench" / "compare_reference.py"), str(path)],
                          capture_output=True, text=True, cwd=ROOT, check=False)


def test_the_command_compares_and_counts(tmp_path: Path) -> None:
    cells = [cell for cell in CELLS if cell["stages"] == 4]
    few = tmp_path / "few.json"
    few.write_text(json.dumps({"cells": cells}))
    fine = compare(few)
    assert fine.returncode == 0, fine.stderr
    assert "v-zb" in fine.stdout and "mean ratio" in fine.stdout
    assert [line.split("│")[2].strip() for line in fine.stdout.splitlines() if "no hop" in line] == [
        "4, equal times, no hop"] * 4


def test_the_command_fails_where_ours_is_worse(tmp_path: Path) -> None:
    cell = json.loads(json.dumps(CELLS[0]))
    cell["schedules"]["v-half"]["makespan"] -= 100
    corrupt = tmp_path / "corrupt.json"
    corrupt.write_text(json.dumps({"cells": [cell]}))
    assert compare(corrupt).returncode == 1
