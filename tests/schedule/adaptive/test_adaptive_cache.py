"""Plans on disk: found again, and only for what they were made for."""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Callable
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ds_vshape.schedule.activations import Activations
from ds_vshape.schedule.adaptive import Problem
from ds_vshape.schedule.adaptive import cache as plan_cache
from ds_vshape.schedule.adaptive import plan
from ds_vshape.schedule.adaptive import planner as planner_module
from ds_vshape.schedule.named import build
from ds_vshape.schedule.placement import v
from ds_vshape.schedule.timeline import Times, simulate

PROBLEM = Problem(v(3), 6, Times.uniform(6, 10, 12, 8, 1), Activations.counted(v(3)), (4.0,) * 3)
LIMIT = 0.3
# One that fits the problem, without a search.
GOOD = replace(build("v-half", 3, 6), name="adaptive")


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


def of_passes(corrupt: Callable[[list[list[Any]]], object]) -> Callable[[Path], None]:
    """Change the orders in a file."""
    def change(file: Path) -> None:
        data = json.loads(file.read_text())
        corrupt(data["schedule"]["orders"])
        file.write_text(json.dumps(data))

    return change


def of_schedule(**fields: Any) -> Callable[[Path], None]:
    """Change the schedule's other fields."""
    def change(file: Path) -> None:
        data = json.loads(file.read_text())
        data["schedule"] |= fields
        file.write_text(json.dumps(data))

    return change


def text(content: str | bytes) -> Callable[[Path], None]:
    return lambda file: file.write_bytes(content if isinstance(content, bytes) else content.encode()) and None


def forwards_first(orders: list[list[Any]]) -> None:
    """A schedule, but one that takes more memory than the limit."""
    for order in orders:
        order.sort(key=lambda entry: (entry[0] != "F", entry[1] if entry[0] == "F" else 0))


def second_chunk_first(orders: list[list[Any]]) -> None:
    """Its inputs come from the first."""
    orders[0].sort(key=lambda action: -action[1])


def of_each(change: Callable[[list[Any]], list[Any]]) -> Callable[[list[list[Any]]], object]:
    def corrupt(orders: list[list[Any]]) -> None:
        orders[:] = [[change(entry) for entry in order] for order in orders]

    return corrupt


def cut_small(orders: list[list[Any]]) -> None:
    """Each W in more pieces than a plan may have."""
    for order in orders:
        order[:] = [piece for entry in order if len(entry) < 4 or entry[3][0] == 0 for piece in (
            [[*entry[:3], [number, 9]] for number in range(9)] if entry[0] == "W" else [entry])]


def instead(make: Callable[[Path], object]) -> Callable[[Path], None]:
    """Something else in the file's place."""
    def change(file: Path) -> None:
        file.unlink()
        make(file)

    return change


def full_folder(file: Path) -> None:
    file.mkdir()
    (file / "anything").write_text("mine")


CORRUPTED: dict[str, tuple[Callable[[Path], None], str]] = {
    "empty": (text(""), "Invalid JSON"),
    "cut off": (lambda file: os.truncate(file, 100), "Invalid JSON"),
    "a list": (text("[]"), "should be an object"),
    "no schedule": (text("{}"), "schedule: Field required"),
    "a number": (text('{"schedule": 3}'), "should be an object"),
    "another encoding": (text('{"schedule": "é"}'.encode("utf-16")), "Invalid JSON"),
    "no text": (text(bytes(range(256))), "Invalid JSON"),
    "deep": (text("[" * 10_000), "recursion limit"),
    "deep orders": (text('{"schedule": {"orders": ' + "[" * 10_000), "recursion limit"),
    "huge": (lambda file: os.truncate(file, 2**40), "bytes"),
    "NaN": (of_schedule(micro_batches=float("nan")), "micro_batches"),
    "a huge number": (of_schedule(micro_batches=10**400), "for 3 ranks"),
    "a batch of floats": (of_schedule(micro_batches=6.0), "micro_batches"),
    "another batch": (of_schedule(micro_batches=5), "5 micro-batches, not for 3 ranks (v, 2 stages each) and 6"),
    "another placement": (of_schedule(placement={"name": "v", "chunks": [[0, 5], [1, 4], [3, 2]]}), "for 3 ranks"),
    "a placement of floats": (of_schedule(placement={"name": "v", "chunks": [[0.0, 5], [1, 4], [2, 3]]}), "chunks"),
    "a name that is none": (of_schedule(name=None), "name"),
    "fewer passes": (of_passes(lambda orders: orders[0].pop()), "it needs F with B and W"),
    "a pass twice": (of_passes(lambda orders: orders[0].append(orders[0][-1])), "is on rank 0 and again"),
    "another rank's pass": (of_passes(lambda orders: orders[0].append(orders[1].pop())), "its stage is on rank 1"),
    "one order more": (of_passes(lambda orders: orders.append([])), "orders for 4 ranks"),
    "one order less": (of_passes(list.pop), "orders for 2 ranks"),
    "no orders": (of_passes(list.clear), "orders for 0 ranks"),
    "stages as floats": (of_passes(of_each(lambda entry: [entry[0], float(entry[1]), *entry[2:]])), "orders.0.0"),
    "stages as texts": (of_passes(of_each(lambda entry: [entry[0], str(entry[1]), *entry[2:]])), "orders.0.0"),
    "micro-batches as switches": (of_passes(of_each(lambda entry: [entry[0], entry[1], True])), "orders.0.0"),
    "negative micro-batches": (of_passes(of_each(lambda entry: [entry[0], entry[1], entry[2] - 6])), "orders.0.0"),
    "unknown passes": (of_passes(of_each(lambda entry: ["X", *entry[1:]])), "orders.0.0"),
    "a pass of nothing": (of_passes(lambda orders: orders[0].append([])), "orders.0."),
    "small pieces": (of_passes(cut_small), "more than 4 pieces"),
    "orders that get stuck": (of_passes(second_chunk_first), "can't run"),
    "too much memory": (of_passes(forwards_first), "more memory than the limits"),
    "a folder": (instead(Path.mkdir), "it is not a regular file"),
    "a folder of files": (instead(full_folder), "it is not a regular file"),
    "a FIFO": (instead(os.mkfifo), "it is not a regular file"),
    "a device": (instead(lambda file: file.symlink_to("/dev/zero")), "it is not a regular file"),
    "a link to itself": (instead(lambda file: file.symlink_to(file)), "symbolic links"),
}


@pytest.mark.parametrize("name", CORRUPTED)
def test_a_corrupt_file_counts_as_missing_and_is_replaced(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
                                                         caplog: pytest.LogCaptureFixture) -> None:
    """One line says why; nothing hangs, and what comes out is a plan."""
    corrupt, reason = CORRUPTED[name]
    path = plan_cache.path_of(tmp_path, PROBLEM, LIMIT, compiled=find_spec("numba") is not None)
    plan_cache.write(path, GOOD)
    corrupt(path)
    monkeypatch.setattr(planner_module, "_search", lambda *_: (GOOD, simulate(GOOD, PROBLEM.times)))
    again = plan(PROBLEM, LIMIT, cache=tmp_path)
    assert again.schedule == GOOD
    line, = [record.getMessage() for record in caplog.records]
    assert line.startswith(f"{path} counts as missing, and is planned again: ") and reason in line and "\n" not in line
    assert plan_cache.read(path, PROBLEM) == GOOD


def test_a_file_that_may_not_be_read_counts_as_missing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
                                                       caplog: pytest.LogCaptureFixture) -> None:
    def refused(*_: object) -> int:
        raise PermissionError(13, "Permission denied")

    path = plan_cache.path_of(tmp_path, PROBLEM, LIMIT, compiled=False)
    plan_cache.write(path, GOOD)
    monkeypatch.setattr(plan_cache.os, "open", refused)
    assert plan_cache.read(path, PROBLEM) is None
    assert "Permission denied" in caplog.text


def test_what_was_in_the_way_is_kept_if_it_is_a_folder(tmp_path: Path) -> None:
    path = tmp_path / "plan.json"
    full_folder(path)
    plan_cache.write(path, GOOD)
    assert plan_cache.read(path, PROBLEM) == GOOD
    other, = [file for file in tmp_path.iterdir() if file != path]
    assert (other / "anything").read_text() == "mine"


def test_a_missing_file_is_no_news(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    assert plan_cache.read(tmp_path / "plan.json", PROBLEM) is None
    assert not caplog.records


def test_a_user_without_a_home_has_no_cache(monkeypatch: pytest.MonkeyPatch) -> None:
    def nowhere() -> Path:
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setattr(Path, "home", nowhere)
    assert plan_cache.folder() is None


@given(st.binary(max_size=200) | st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=3),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(
        st.sampled_from(["schedule", "name", "placement", "chunks", "micro_batches", "orders"]), inner, max_size=4),
    max_leaves=12).map(lambda data: json.dumps(data).encode()))
@settings(max_examples=50)
def test_whatever_is_in_the_file_is_no_plan(content: bytes) -> None:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "plan.json"
        path.write_bytes(content)
        assert plan_cache.read(path, PROBLEM) is None


def test_a_folder_that_cannot_be_written_is_a_warning(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    with pytest.warns(UserWarning, match="the plan can.t be cached"):
        found = plan(PROBLEM, LIMIT, cache=tmp_path / "file" / "plans")
    assert found.timeline.makespan >= found.lower_bound
