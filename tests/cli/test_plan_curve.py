"""The curve of bubble against memory: its points, its bound, and the reference's points beside them."""

from __future__ import annotations

import json
import xml.etree.ElementTree as ElementTree
from pathlib import Path
from typing import Any

import pytest

from ds_vshape.cli import main
from ds_vshape.cli import curve as curves
from ds_vshape.cli.options import Limit, PlanOptions
from ds_vshape.cli.outcome import Outcome, plan_one
from ds_vshape.schedule.named import SCHEDULES
from ds_vshape.schedule.placement import Placement

pytestmark = pytest.mark.usefixtures("cache", "processor_time")
BATCH = ["--stages", "4", "--micro-batches", "8"]


def curve(tmp_path: Path, *arguments: str) -> dict[str, Any]:
    file = tmp_path / "curve.json"
    assert main(["plan", "--curve", str(file), *arguments, "--time-limit", "0.2"]) == 0
    return json.loads(file.read_text())


def named(found: dict[str, Any]) -> dict[str, Any]:
    return {point["name"]: point for point in found["named"]}


def test_points_with_equal_times_are_the_papers(tmp_path: Path) -> None:
    found = curve(tmp_path, *BATCH)
    assert (found["stages"], found["micro_batches"]) == (4, 8)
    assert found["times"] == {"forward": 1, "input_grad": 1, "weight_grad": 1, "hop": 0}
    points = named(found)
    assert set(points) == set(SCHEDULES)
    # 1F1B's bubble is (p - 1) / (m + p - 1); the V schedules' peaks are those of the paper, of 1F1B's 8.
    assert points["1f1b"]["bubble"] == pytest.approx(3 / 11)
    assert [points[name]["memory"] for name in ("1f1b", "v-min", "v-half", "v-zb")] == [8, 4, 6, 8]
    assert [points[name]["fraction"] for name in ("1f1b", "v-min", "v-half", "v-zb")] == [1, 0.5, 0.75, 1]
    # The paper's bound, 6 n + 6 p - 3 k - 1, where it is above the work. At a memory of 2 ours knows more: on rank 3
    # the lifespans of 8 micro-batches, 19 each, two at a time with slopes of 1/2, less a W, and its two ways.
    bounds = {point["memory"]: point["makespan"] for point in found["bound"]}
    assert bounds[2] == (8 * 19 + 1) / 2 - 1 + 3 + 4
    for memory in range(3, 7):
        assert bounds[memory] == 48 + 24 - 3 * memory - 1


def test_adaptive_is_below_every_v_order_of_its_memory_and_above_the_bound(tmp_path: Path) -> None:
    found = curve(tmp_path, *BATCH, "--times", "10,14,9,2")
    assert [point["memory"] for point in found["adaptive"]] == [2, 3, 4, 5, 6, 7, 8]
    assert [point["memory"] for point in found["bound"]] == [2, 3, 4, 5, 6, 7, 8]
    bubbles = [point["bubble"] for point in found["adaptive"]]
    assert bubbles == sorted(bubbles, reverse=True)
    for planned, bound in zip(found["adaptive"], found["bound"]):
        assert bound["makespan"] <= planned["makespan"]
        for name in ("v-min", "v-half", "v-zb", "zb-v", "1f1b-v"):
            point = named(found)[name]
            if point["memory"] <= planned["memory"]:
                assert planned["makespan"] <= point["makespan"]
    for point in [*found["named"], *found["adaptive"], *found["bound"]]:
        assert point["bubble"] == pytest.approx(1 - 2 * 8 * 33 / point["makespan"])
        assert point["fraction"] == point["memory"] / 8


def test_a_plan_for_less_memory_counts_where_one_for_more_is_slower(tmp_path: Path,
                                                                    monkeypatch: pytest.MonkeyPatch) -> None:
    """A search that found nothing good at 6 of 8."""
    orders = {4: "v-half", 6: "v-min", 8: "v-zb"}

    def planned(name: str, placement: Placement, options: PlanOptions, limit: Limit, progress: Any) -> Outcome:
        return plan_one(orders[int(limit.value)], placement, options, None, progress)

    monkeypatch.setattr(curves, "plan_one", planned)
    found = curve(tmp_path, *BATCH, "--limits", "8u,4u,6u")
    assert [point["makespan"] for point in found["adaptive"]] == [53, 53, 51]


def test_limits_are_the_users(tmp_path: Path) -> None:
    found = curve(tmp_path, *BATCH, "--limits", "0.5,1u,7u,1")
    assert [point["memory"] for point in found["adaptive"]] == [4, 7, 8]
    assert found["too_small"] == [1]


@pytest.mark.slow
def test_many_ranks_get_a_thinner_sweep(tmp_path: Path) -> None:
    found = curve(tmp_path, "--stages", "16", "--micro-batches", "16")
    memories = [point["memory"] for point in found["adaptive"]]
    assert memories[-1] == 32 and memories[0] >= 8 and len(memories) <= 13


# ---------------------------------------------------------------- the reference


def reference(tmp_path: Path, content: Any) -> list[str]:
    file = tmp_path / "reference.json"
    file.write_text(content if isinstance(content, str) else json.dumps(content))
    return ["--reference", str(file)]


def test_bubbles_with_times_of_each_chunk(tmp_path: Path) -> None:
    """1 - work / (ranks x makespan), whatever rank the work is on."""
    found = curve(tmp_path, "--stages", "2", "--micro-batches", "4", "--times", "3:1:1:1,2,1:1:1:3,0.5", "--limits",
                  "4u")
    assert found["times"] == {"forward": [3, 1, 1, 1], "input_grad": 2, "weight_grad": [1, 1, 1, 3], "hop": 0.5}
    for point in [*found["named"], *found["adaptive"]]:
        assert point["bubble"] == pytest.approx(1 - 4 * 20 / (2 * point["makespan"]))


CELL = {"stages": 4, "micro_batches": 8, "forward": 10, "input_grad": 12, "weight_grad": 8, "hop": 1,
        "schedules": {"v-half": {"makespan": 600.0, "span": 600.0, "peak": 6}}}


@pytest.mark.parametrize("times, unit", [("10,12,8,1", 1), ("5,6,4,0.5", 0.5), ("0.1,0.12,0.08,0.01", 0.01)])
def test_the_references_points_are_those_of_this_batch_in_its_unit(times: str, unit: float, tmp_path: Path) -> None:
    others = [{**CELL, "stages": 3}, {**CELL, "micro_batches": 7}, {**CELL, "hop": 2}]
    cells = reference(tmp_path, {"cells": [*others, CELL]})
    found = curve(tmp_path, *BATCH, "--times", times, "--limits", "6u", *cells)
    point, = found["reference"]
    assert (point["name"], point["memory"], point["fraction"]) == ("v-half", 6, 0.75)
    assert point["makespan"] == pytest.approx(600 * unit)
    assert point["bubble"] == pytest.approx(1 - 2 * 8 * 30 / 600)


@pytest.mark.parametrize("content, message", [
    ({"cells": [{**CELL, "stages": 3}]}, "it has no cell for 4 ranks, 8 micro-batches and these times"),
    ({"rows": []}, "it has no 'cells'"),
    ({"cells": [{"stages": 4}]}, "it has no 'micro_batches'"),
    ([], "--reference"),
    ({"cells": 3}, "--reference"),
    ({"cells": [3]}, "--reference"),
    ({"cells": [{**CELL, "forward": 0}]}, "--reference"),
    ({"cells": [{**CELL, "schedules": []}]}, "--reference"),
    ({"cells": [{**CELL, "schedules": {"v-half": {"makespan": 0, "peak": 6}}}]}, "0 is not a peak or makespan"),
    ({"cells": [{**CELL, "schedules": {"v-half": {"makespan": 1, "peak": float("nan")}}}]}, "nan is not a peak"),
    ({"cells": [{**CELL, "schedules": {"v-half": {"makespan": 1e308, "peak": float("inf")}}}]}, "inf is not a peak"),
    ("[" * 100_000, "--reference"),
    ("9" * 5000, "--reference"),
    ("{", "--reference"),
])
def test_a_reference_that_is_of_no_use_is_refused_before_planning(content: Any, message: str, tmp_path: Path,
                                                                 capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["--times", "10,12,8,1", "--time-limit", "1000", *reference(tmp_path, content)]
    assert main(["plan", "--curve", str(tmp_path / "curve.json"), *BATCH, *arguments]) == 2
    assert message in capsys.readouterr().err
    assert main(["plan", "--curve", "x.json", *BATCH, "--reference", "/nowhere/at/all.json"]) == 2
    assert "--reference /nowhere/at/all.json: No such file" in capsys.readouterr().err


# ---------------------------------------------------------------- what people see


def test_the_table_has_every_point(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    cells = reference(tmp_path, {"cells": [CELL]})
    found = curve(tmp_path, *BATCH, "--times", "10,12,8,1", "--limits", "1u,6u", *cells)
    shown = capsys.readouterr().out
    rows = [[cell.strip() for cell in line.strip("│").split("│")] for line in shown.splitlines() if line[:1] == "│"]
    assert len(rows) == len(SCHEDULES) + 2 + 1 + 1
    planned, = found["adaptive"]
    assert ["6", "0.750", f"{planned['makespan']:g}", f"{planned['bubble']:.1%}", "adaptive"] in rows
    assert ["6", "0.750", "600", "20.0%", "v-half (reference)"] in rows
    assert ["1", "", "", "", "below the minimum of any schedule"] in rows


def test_the_picture_names_every_point(tmp_path: Path) -> None:
    file = tmp_path / "curve.svg"
    assert main(["plan", "--curve", str(file), *BATCH, "--times", "10,12,8,1", "--limits", "0.5,0.75,1", "--time-limit",
                 "0.2", *reference(tmp_path, {"cells": [CELL]})]) == 0
    texts = ["".join(element.itertext()).strip() for element in ElementTree.parse(file).getroot().iter()
             if element.tag.endswith("}text")]
    for name in ("adaptive", "lower bound of orders (V)", "1f1b", "v-min", "v-zb", "zb-v", "reference"):
        assert name in texts
    assert texts.count("v-half") == 2  # ours and the reference's
    assert any("beyond the right edge" in text and "gpipe" in text and "zb-h2" in text for text in texts)
    assert "4 ranks, 8 micro-batches, F 10, B 12, W 8, hop 1" in texts
    png = tmp_path / "curve.png"
    assert main(["plan", "--curve", str(png), *BATCH, "--limits", "1u"]) == 0
    assert png.read_bytes().startswith(b"\x89PNG\r\n\x1a\n")


@pytest.mark.slow
def test_with_recomputation_and_offload_no_limit_takes_longer(tmp_path: Path) -> None:
    """And some limits can be kept that no order keeps alone."""
    found = curve(tmp_path, "--stages", "2", "--micro-batches", "3", "--recompute", "--offload", "--limits",
                  "1u,2u,3u")
    alone = {point["memory"]: point["makespan"] for point in found["adaptive"]}
    assert set(alone) == {2, 3} and found["too_small"] == []
    lines = {name: {point["memory"]: point["makespan"] for point in points}
             for name, points in found["giving_back"].items()}
    assert set(lines) == {"recomputing", "offloading", "recomputing and offloading"}
    both = lines.pop("recomputing and offloading")
    assert set(both) == {1, 2, 3}
    for line in (alone, *lines.values()):
        assert all(both[memory] <= makespan for memory, makespan in line.items())
