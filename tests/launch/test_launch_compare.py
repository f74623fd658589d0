"""What the main job reports, and the comparison that fails when losses differ."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import compare
import pytest
from result import JobResult

RESULT = JobResult(schedule="1f1b",
                stages=2,
                micro_batches=4,
                losses=[5.5, 0.1 + 0.2],
                validation_loss=4.25,
                batch_seconds=0.5,
                predicted_bubble=0.2,
                measured_bubble=0.25,
                peak_activations=[4, 2])


def run_compare(monkeypatch: pytest.MonkeyPatch, folder: Path, *results: JobResult) -> int:
    paths = [folder / f"{place}.json" for place in range(len(results))]
    for path, result in zip(paths, results, strict=True):
        result.write(path)
    monkeypatch.setattr("sys.argv", ["compare.py", *map(str, paths)])
    return compare.main()


def test_a_result_comes_back_from_its_file_exactly(tmp_path: Path):
    RESULT.write(tmp_path / "new" / "result.json")
    assert JobResult.read(tmp_path / "new" / "result.json") == RESULT
    raw = json.loads((tmp_path / "new" / "result.json").read_text())
    assert float.fromhex(raw["loss_hex"]) == raw["loss"] == 0.1 + 0.2


def test_equal_runs_pass_and_stand_in_one_table(monkeypatch, tmp_path, capsys):
    close = dataclasses.replace(RESULT, schedule="v-half", losses=[5.5 * (1 + 9e-6), 0.3], measured_bubble=0.125)
    assert run_compare(monkeypatch, tmp_path, RESULT, close) == 0
    printed = capsys.readouterr().out
    for cell in ("1f1b", "v-half", "20.0%", "12.5%", "9.0e-06", "4 2"):
        assert cell in printed


@pytest.mark.parametrize("changed", [
    {"losses": [5.5 * (1 + 1.1e-5), 0.3]},
    {"losses": [5.5, 0.3 * (1 - 1.1e-5)]},
    {"losses": [float("nan"), 0.3]},
    {"validation_loss": 4.26},
])
def test_different_losses_fail_and_are_named(monkeypatch, tmp_path, capsys, changed):
    other = dataclasses.replace(RESULT, schedule="v-half", **changed)
    assert run_compare(monkeypatch, tmp_path, RESULT, RESULT, other) == 1
    assert "more than 1e-05: v-half" in capsys.readouterr().err


def test_runs_of_different_length_are_not_compared(monkeypatch, tmp_path):
    with pytest.raises(ValueError, match="v-half ran 1 batches, 1f1b 2"):
        run_compare(monkeypatch, tmp_path, RESULT, dataclasses.replace(RESULT, schedule="v-half", losses=[5.5]))
