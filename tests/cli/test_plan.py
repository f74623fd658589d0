"""The planner's command line: its contract with other programs, its output and its errors."""

from __future__ import annotations

import io
import json
import math
import os
import re
import shlex
import subprocess
import sys
import tracemalloc
from pathlib import Path
from typing import Any

import pytest

from ds_vshape.cli import main
from ds_vshape.cli.giving_back import GivingBack
from ds_vshape.schedule.named import ADAPTIVE, SCHEDULES, TIMED, build
from ds_vshape.schedule.passes import Kind
from ds_vshape.schedule.placement import Placement, v
from ds_vshape.schedule.schedule import Schedule, check
from ds_vshape.schedule.serial import pass_from_json
from ds_vshape.schedule.timeline import Times, simulate

pytestmark = pytest.mark.usefixtures("cache", "processor_time")


def plan(tmp_path: Path, *arguments: str) -> dict[str, Any]:
    """What the planner writes as JSON."""
    file = tmp_path / "plan.json"
    assert main(["plan", *arguments, "--json", str(file)]) == 0
    return json.loads(file.read_text())


def options(name: str = "v-half", stages: int | str = 4, micro_batches: int | str = 8) -> list[str]:
    return ["--schedule", name, "--stages", str(stages), "--micro-batches", str(micro_batches)]


def write(tmp_path: Path, **ds_config: Any) -> str:
    file = tmp_path / "ds_config.json"
    file.write_text(json.dumps(ds_config))
    return str(file)


def error_of(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    """The one line that the planner prints before it ends with status 2."""
    try:
        status = main(["plan", *arguments])
    except SystemExit as end:  # argparse ends so on what it can't read
        status = end.code
    captured = capsys.readouterr()
    assert status == 2
    assert captured.out == ""
    line, = [line for line in captured.err.splitlines() if "error: " in line]
    return line


# ---------------------------------------------------------------- JSON


@pytest.mark.parametrize("name", [*SCHEDULES, ADAPTIVE])
def test_json_holds_the_schedule_and_its_figures(name: str, tmp_path: Path) -> None:
    """Read the file as another program would, and simulate it again with the times given for one of 2P chunks."""
    written = plan(tmp_path, *options(name, 3, 5), "--times", "10,12,8,1", "--time-limit", "0.2")
    assert set(written) == {"schedule", "stages", "micro_batches", "placement", "orders", "metrics"}
    assert set(written["metrics"]) == {"makespan", "longest_span", "bubble", "peak_activations",
                                       "peak_fraction_of_1f1b", "lower_bound", "planning_s"}
    assert (written["schedule"], written["stages"], written["micro_batches"]) == (name, 3, 5)
    placement = Placement("read", tuple(map(tuple, written["placement"])))
    orders = tuple(tuple(map(pass_from_json, order)) for order in written["orders"])
    schedule = Schedule("read", placement, 5, orders)
    check(schedule)
    share = 2 * 3 // placement.stages
    timeline = simulate(schedule, Times.uniform(placement.stages, 10 * share, 12 * share, 8 * share, hop=1))
    metrics = written["metrics"]
    assert metrics["makespan"] == timeline.makespan
    assert metrics["longest_span"] == timeline.longest_span
    assert metrics["bubble"] == pytest.approx(1 - 5 * 2 * 30 / timeline.makespan)
    assert metrics["lower_bound"] <= metrics["makespan"]
    alive, peaks = 0, []
    for order in orders:
        kept = [alive := alive + share * ((action.kind is Kind.F) - action.frees_activations) for action in order]
        peaks.append(max(kept))
    assert metrics["peak_activations"] == peaks
    assert metrics["peak_fraction_of_1f1b"] == max(peaks) / 6
    assert metrics["planning_s"] >= 0


def test_1f1b_is_the_measure_of_memory(tmp_path: Path) -> None:
    assert plan(tmp_path, *options("1f1b", 4, 8))["metrics"]["peak_fraction_of_1f1b"] == 1
    assert plan(tmp_path, *options("1f1b", 4, 8))["metrics"]["peak_activations"] == [8, 6, 4, 2]
    # With fewer micro-batches than ranks 1F1B doesn't reach p either.
    assert plan(tmp_path, *options("v-zb", 4, 2))["metrics"]["peak_fraction_of_1f1b"] == 1


# ---------------------------------------------------------------- planned for the times


@pytest.mark.parametrize("name", TIMED)
def test_a_level_of_memory_by_name_is_planned_for_unequal_times(name: str, tmp_path: Path,
                                                                capsys: pytest.CaptureFixture[str]) -> None:
    arguments = [*options(name, 3, 5), "--times", "10,20,10,1", "--time-limit", "0.5"]
    planned = plan(tmp_path, *arguments)
    order = build(name, 3, 5)
    timeline = simulate(order, Times.uniform(6, 10, 20, 10, hop=1))
    assert planned["schedule"] == name
    assert planned["metrics"]["makespan"] <= timeline.makespan
    assert max(planned["metrics"]["peak_activations"]) <= max(plan(tmp_path, *options(name, 3, 5))["metrics"][
        "peak_activations"])
    capsys.readouterr()
    main(["plan", *arguments])
    origin = "plan for these times" if planned["metrics"]["makespan"] < timeline.makespan else "named order"
    assert origin in capsys.readouterr().out


@pytest.mark.parametrize("where, chunks, expected", [
    ("v", 4, ((0, 3, 4, 7), (1, 2, 5, 6))), ("interleaved", 3, ((0, 2, 4), (1, 3, 5)))])
def test_more_stages_on_a_rank(where: str, chunks: int, expected: tuple[tuple[int, ...], ...], tmp_path: Path) -> None:
    arguments = [*options(ADAPTIVE, 2, 5), "--placement", where, "--chunks", str(chunks), "--memory-limit", "0.75"]
    planned = plan(tmp_path, *arguments, "--times", "10,12,8,1", "--time-limit", "0.3")
    placement = Placement("read", tuple(map(tuple, planned["placement"])))
    assert placement.chunks == expected
    schedule = Schedule("read", placement, 5, tuple(tuple(map(pass_from_json, order)) for order in planned["orders"]))
    check(schedule)
    share = 4 / placement.stages
    times = Times.uniform(placement.stages, 10 * share, 12 * share, 8 * share, 1)
    assert planned["metrics"]["makespan"] == pytest.approx(simulate(schedule, times).makespan)
    assert planned["metrics"]["peak_fraction_of_1f1b"] <= 0.75


def test_times_of_each_chunk_and_link(tmp_path: Path) -> None:
    """The embedding before the first chunk, the head behind the last, and a slow link between ranks 1 and 2."""
    times = "14:10:10:10:10:16,20,10,1:7"
    planned = plan(tmp_path, *options(ADAPTIVE, 3, 5), "--times", times, "--memory-limit", "0.7", "--time-limit", "0.3")
    placement = Placement("read", tuple(map(tuple, planned["placement"])))
    schedule = Schedule("read", placement, 5, tuple(tuple(map(pass_from_json, order)) for order in planned["orders"]))
    assert placement.chunks == ((0, 5), (1, 4), (2, 3))
    known = Times((14, 10, 10, 10, 10, 16), (20,) * 6, (10,) * 6, (1, 7, 0, 7, 1))
    assert planned["metrics"]["makespan"] == simulate(schedule, known).makespan
    # One stage of 1F1B is two chunks.
    halves = Times((24, 20, 26), (40,) * 3, (20,) * 3, (1, 7))
    assert plan(tmp_path, *options("1f1b", 3, 5), "--times", times)["metrics"]["makespan"] == simulate(
        build("1f1b", 3, 5), halves).makespan
    # Back from the last rank to the first as slow as the slowest link.
    around = Times(known.forward, known.input_grad, known.weight_grad, (1, 7, 7, 1, 7))
    assert plan(tmp_path, *options("interleaved-1f1b", 3, 5), "--times", times)["metrics"]["makespan"] == simulate(
        build("interleaved-1f1b", 3, 5), around).makespan


def test_v_min_gains_from_knowing_the_times(tmp_path: Path) -> None:
    """Its order for equal times waits in every interval otherwise."""
    times = "10,20,10,1"
    known = plan(tmp_path, *options("v-min", 4, 8), "--times", times, "--time-limit", "1")["metrics"]["makespan"]
    assert known < simulate(build("v-min", 4, 8), Times.uniform(8, 10, 20, 10, hop=1)).makespan


@pytest.mark.parametrize("limit, most", [("0.5", 4), ("5u", 5), ("0.7", 5), ("1", 8)])
def test_adaptive_keeps_to_its_limit(limit: str, most: int, tmp_path: Path) -> None:
    written = plan(tmp_path, *options(ADAPTIVE), "--times", "10,12,8,1", "--memory-limit", limit, "--time-limit", "0.3")
    assert written["schedule"] == ADAPTIVE
    assert max(written["metrics"]["peak_activations"]) <= most


def test_adaptive_without_a_limit_has_1f1bs_peak(tmp_path: Path) -> None:
    arguments = [*options(ADAPTIVE), "--time-limit", "0.3"]
    assert plan(tmp_path, *arguments)["metrics"]["peak_fraction_of_1f1b"] <= 1
    assert plan(tmp_path, *arguments)["orders"] == plan(tmp_path, *arguments, "--memory-limit", "1")["orders"]


def test_a_limit_that_nothing_meets_says_the_least(capsys: pytest.CaptureFixture[str]) -> None:
    line = error_of([*options(ADAPTIVE), "--memory-limit", "1u"], capsys)
    assert "can't be met" in line and "2, 2, 2, 2" in line


def test_plans_are_kept_unless_told_otherwise(tmp_path: Path, cache: Path) -> None:
    arguments = [*options(ADAPTIVE), "--memory-limit", "0.5", "--times", "10,12,8,1", "--time-limit", "0.5"]
    plan(tmp_path, *arguments, "--no-cache")
    assert not cache.exists()
    first = plan(tmp_path, *arguments)
    assert len(list(cache.iterdir())) == 1
    assert plan(tmp_path, *arguments)["orders"] == first["orders"]


def test_named_orders_are_never_planned(tmp_path: Path, cache: Path) -> None:
    for name in TIMED:
        plan(tmp_path, *options(name))
    plan(tmp_path, *options("1f1b"), "--times", "10,12,8,1")
    assert not cache.exists()


# ---------------------------------------------------------------- side by side


def test_compare_shows_a_line_for_each(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "all.json"
    assert main(["plan", "--compare", "1f1b,v-half,v-zb,v-half", "--stages", "4", "--micro-batches", "8",
                 "--memory-limit", "6u", "--json", str(file)]) == 0
    rows = {cells[0]: cells[1:] for cells in table_rows(capsys.readouterr().out)}
    # Makespans of the lower bounds and of (m + p - 1) 6, and bubbles by their definition.
    assert rows["1f1b"] == ["66", "1.000", "27.3%", "54", "8", "1", rows["1f1b"][6], "named order", "no"]
    assert rows["v-half"] == ["53", "0.803", "9.4%", "53", "6", "0.75", rows["v-half"][6], "named order", "yes"]
    assert rows["v-zb"] == ["51", "0.773", "5.9%", "51", "8", "1", rows["v-zb"][6], "named order", "no"]
    written = json.loads(file.read_text())
    assert [one["schedule"] for one in written] == ["1f1b", "v-half", "v-zb"]
    without_time = [{**one, "metrics": {**one["metrics"], "planning_s": None}} for one in written]
    for one, name in zip(without_time, ("1f1b", "v-half", "v-zb")):
        alone = plan(tmp_path, *options(name))
        assert one == {**alone, "metrics": {**alone["metrics"], "planning_s": None}}


def test_compare_starts_with_the_schedule_of_the_config(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = write(tmp_path, pipeline_schedule="v-half", pipeline={"stages": 4}, gradient_accumulation_steps=8)
    assert main(["plan", file, "--compare", "1f1b"]) == 0
    assert [cells[0] for cells in table_rows(capsys.readouterr().out)] == ["v-half", "1f1b"]


def table_rows(shown: str) -> list[list[str]]:
    """The cells of a printed table's rows."""
    return [[cell.strip() for cell in line.strip("│").split("│")]
            for line in shown.splitlines() if line.startswith("│")]


# ---------------------------------------------------------------- the config in place of options


def test_a_config_says_all_that_the_options_say(tmp_path: Path) -> None:
    wanted = build("v-half", 4, 8)
    file = write(tmp_path, pipeline_schedule={"name": "v-half", "memory_limit": 0.75}, pipeline={"stages": 4},
                 gradient_accumulation_steps=8)
    for arguments in ([file], ["--config", file]):
        written = plan(tmp_path, *arguments)
        assert written["orders"] == [[[action.kind.value, action.stage, action.micro_batch] for action in order]
                                     for order in wanted.orders]


@pytest.mark.parametrize("sizes, micro_batches", [
    ({"gradient_accumulation_steps": 3}, 3),
    ({"train_batch_size": 12, "train_micro_batch_size_per_gpu": 2}, 6),
    ({"train_batch_size": 12, "train_micro_batch_size_per_gpu": 2, "gradient_accumulation_steps": 3}, 3),
    ({"train_batch_size": 12}, 1),
    ({"train_micro_batch_size_per_gpu": 2}, 1),
])
def test_micro_batches_of_a_config(tmp_path: Path, sizes: dict[str, int], micro_batches: int) -> None:
    file = write(tmp_path, pipeline_schedule="v-zb", **sizes)
    assert plan(tmp_path, file, "--stages", "2")["micro_batches"] == micro_batches


def test_options_fill_what_a_config_lacks(tmp_path: Path) -> None:
    file = write(tmp_path, pipeline_schedule="v-zb", pipeline={"stages": "auto"}, gradient_accumulation_steps="auto")
    written = plan(tmp_path, file, "--stages", "2", "--micro-batches", "3")
    assert (written["schedule"], written["stages"], written["micro_batches"]) == ("v-zb", 2, 3)


def test_what_config_and_options_both_lack_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = write(tmp_path, pipeline_schedule="v-zb")
    assert error_of([file], capsys).endswith("lacks --stages, --micro-batches")
    assert error_of(["--stages", "4"], capsys).endswith("missing: --schedule, --micro-batches")


@pytest.mark.parametrize("arguments, message", [
    (["--stages", "8"], "--stages says 8, but .* says 4"),
    (["--schedule", "v-min"], "--schedule says v-min, but .* says v-half"),
    (["--memory-limit", "6u"], r"--memory-limit says 6u, but .* says 0\.75"),
])
def test_options_that_contradict_a_config_are_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str],
                                                     arguments: list[str], message: str) -> None:
    file = write(tmp_path, pipeline_schedule={"name": "v-half", "memory_limit": 0.75}, pipeline={"stages": 4},
                 gradient_accumulation_steps=8)
    assert re.search(message, error_of([file, *arguments], capsys))


@pytest.mark.parametrize("ds_config, message", [
    ({"pipeline_schedule": "v-haf"}, "did you mean 'v-half'"),
    ({"pipeline_schedul": "v-half"}, "did you mean 'pipeline_schedule'"),
    ({"pipeline_schedule": {"name": "v-half", "memory_limit": 0}}, "memory_limit = 0"),
    ({"pipeline_schedule": {"name": "v-half", "offload": True}}, "offload = true: must be false without"),
    ({"pipeline_schedule": "v-half", "pipeline": {"stages": 0}}, "pipeline.stages = 0"),
    ({"pipeline_schedule": "v-half", "gradient_accumulation_steps": 1.5}, "gradient_accumulation_steps = 1.5"),
    ({"pipeline_schedule": "v-half", "train_batch_size": 7, "train_micro_batch_size_per_gpu": 2},
     "is not a multiple of"),
])
def test_a_bad_config_gets_one_clear_error(tmp_path: Path, capsys: pytest.CaptureFixture[str],
                                           ds_config: dict[str, Any], message: str) -> None:
    ds_config = {"pipeline": {"stages": 4}, **ds_config}
    filling = [] if "gradient_accumulation_steps" in ds_config or "train_batch_size" in ds_config else [
        "--micro-batches", "8"]
    assert message in error_of([write(tmp_path, **ds_config), *filling], capsys)


def test_a_config_with_bytes_needs_a_limit_in_counts(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = write(tmp_path, pipeline_schedule={"name": ADAPTIVE, "memory_limit": "6GiB", "times": "profile"},
                 pipeline={"stages": 3}, gradient_accumulation_steps=4)
    assert "give --memory-limit as a fraction" in error_of([file], capsys)
    assert plan(tmp_path, file, "--memory-limit", "0.7", "--time-limit", "0.2")["schedule"] == ADAPTIVE


def test_two_configs_and_no_such_config_are_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = write(tmp_path, pipeline_schedule="v-half")
    assert "give one config file" in error_of([file, "--config", file], capsys)
    assert "no such file" in error_of([str(tmp_path / "none.json")], capsys)


# ---------------------------------------------------------------- memory limit and bad options


@pytest.mark.parametrize("limit", ["0.75", "1", "6u", "8u", "6.5u"])
def test_a_limit_that_holds_changes_nothing(limit: str, tmp_path: Path) -> None:
    assert plan(tmp_path, *options(), "--memory-limit", limit)["orders"] == plan(tmp_path, *options())["orders"]


def test_a_limit_that_is_exceeded_names_value_peak_and_what_fits(capsys: pytest.CaptureFixture[str]) -> None:
    line = error_of([*options("v-zb"), "--memory-limit", "0.75"], capsys)
    assert "0.75" in line and "v-zb needs 1 " in line
    assert "1f1b-v (0.75), v-min (0.5), v-half (0.75)" in line and "gpipe" not in line
    line = error_of([*options("v-half"), "--memory-limit", "5u"], capsys)
    assert "5u: v-half needs 6u" in line and "Within the limit: v-min (4)" in line


@pytest.mark.parametrize("arguments, message", [
    ([*options(), "--memory-limit", "0"], "--memory-limit: '0' must be"),
    ([*options(), "--memory-limit", "-1u"], "--memory-limit"),
    ([*options(), "--memory-limit", "3"], "like 6u"),
    ([*options(), "--memory-limit", "much"], "'much' must be a fraction of 1F1B's peak above 0 and at most 2, or"),
    ([*options(), "--memory-limit", "70GiB"], "'70GiB' must be a fraction"),
    ([*options(), "--memory-limit", "nan"], "'nan' must be a fraction"),
    (["--compare", "v-zb,1f1b", *options()[2:], "--chunks", "4"], "--chunks 4 needs --schedule"),
    (["--compare", "adaptive", *options()[2:], "--placement", "v"], "--placement v needs --schedule"),
    ([*options(ADAPTIVE), "--memory-limit", "0.1"], "--memory-limit 0.1: a limit of 0.8 on rank 0, "),
    ([*options(ADAPTIVE), "--memory-limit", "1u"], "peaks of the ranks are 2, 2, 2, 2, where 1F1B's is 8"),
    ([*options(), "--times", "1,1,1"], "must be F,B,W,HOP"),
    ([*options(), "--times", "1,0,1,0"], "must be F,B,W,HOP"),
    ([*options(), "--times", "1:1:0,1,1,0"], "must be F,B,W,HOP"),
    ([*options(), "--times", "1:1,1,1,0"], "2 times of F: on 4 ranks there must be one"),
    ([*options(), "--times", "1,1,1,1:1:1:1"], "4 times of a hop: on 4 ranks there must be one"),
    ([*options(), "--times", "1,1,1,-1"], "must be F,B,W,HOP"),
    (options("v-hlf"), "did you mean 'v-half'"),
    (options(stages=0), "--stages: '0' must be a whole number"),
    (options(micro_batches=-3), "--micro-batches"),
    ([*options(), "--json", "/nowhere/at/all.json"], "--json /nowhere/at/all.json"),
    ([*options(), "--time-limit", "0"], "--time-limit: '0' must be above 0"),
    ([*options(), "--compare", "v-half,"], "must be names of schedules with commas"),
    ([*options(), "--compare", "v-hlf"], "did you mean 'v-half'"),
    ([*options(), "--limits", "0.5"], "--limits needs --curve"),
    ([*options(), "--reference", "x.json"], "--reference needs --curve"),
    ([*options(), "--curve", "x.json"], "--schedule can't be used with --curve"),
    (["--compare", "v-half", "--curve", "x.json"], "--compare can't be used with --curve"),
    (["--curve", "x.pdf"], "must end in .svg, .png or .json"),
    (["--curve", "x.json", "--stages", "4"], "missing: --micro-batches"),
])
def test_bad_options_get_one_clear_error(arguments: list[str], message: str,
                                         capsys: pytest.CaptureFixture[str]) -> None:
    assert message in error_of(arguments, capsys)


# ---------------------------------------------------------------- bounds


NEVER = ["--time-limit", "86400", "--no-cache", "--times", "1,2,1,0"]
HUGE = "9" * 5000


@pytest.mark.parametrize("arguments, message", [
    (options(stages=1025), "stages = 1025: must be at most 1024"),
    (options(stages=10**6), "stages = 1000000: must be at most 1024"),
    (options(stages=1024, micro_batches=129), "micro-batches = 129: must be at most 128 on 1024"),
    (options(micro_batches=10**7), "micro-batches = 10000000: must be at most 32768 on 4"),
    (options(ADAPTIVE, micro_batches=10**7), "micro-batches = 10000000: must be at most 32768 on 4"),
    (["--compare", "1f1b,v-half", "--stages", "4", "--micro-batches", "10000000"], "must be at most 32768"),
    (["--curve", "x.json", "--stages", "1000000", "--micro-batches", "8"], "stages = 1000000: must be at most 1024"),
    (["--curve", "x.json", "--stages", "4", "--micro-batches", "10000000"], "must be at most 32768"),
    (options(stages=HUGE), "must be a whole number"),
    (options(micro_batches=HUGE), "must be a whole number"),
    *(([*options(ADAPTIVE), "--times", times], "must be times from 1e-09 to 1e+09") for times in (
        "1e300,1,1,0", "1e308,1e308,1e308,0", "1e-320,1,1,0", "1,1,1,1e308", "1,1,1,1e-320", "1,1,1,1.1e9",
        "1e-9,1e-9,1e-9,2", "1e9,1,1,1e-3", "1:1:1:1:1:1:1:1e300,1,1,0")),
    ([*options(), "--times", "1e999,1,1,0"], "is not a number"),
    ([*options(), "--times", HUGE + ",1,1,0"], "is not a number"),
    ([*options(), "--memory-limit", "1e300u"], "like 6u"),
    ([*options(), "--memory-limit", "1.1e9u"], "like 6u"),
    ([*options(), "--memory-limit", "1e999u"], "must be a fraction"),
    ([*options(ADAPTIVE), "--memory-limit", "1e-320"], "can't be met"),
    ([*options(ADAPTIVE), "--memory-limit", "1e-320u"], "can't be met"),
    ([*options(), "--time-limit", "1e-320"], "must be above 0: from 0.001 to 86400"),
    ([*options(), "--time-limit", "1e308"], "from 0.001 to 86400"),
    ([*options(), "--time-limit", "inf"], "is not a number"),
    (["--curve", "x.json", "--limits", ",".join(["0.5"] * 101), *options()[2:]], "101 limits: must be at most 100"),
    ([*options(micro_batches=20_000), "--svg", "x.svg"], "a picture of 4 rows with about 480000 passes"),
    ([*options("1f1b", 1024, 4), "--png", "x.png"], "a picture of 1024 rows"),
])
def test_numbers_beyond_their_bounds_are_refused_at_once(arguments: list[str], message: str, tmp_path: Path,
                                                         capsys: pytest.CaptureFixture[str],
                                                         monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    line = error_of(arguments, capsys)
    assert message in line and len(line) < 1000
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("ds_config, message", [
    ({"pipeline": {"stages": 10**6}, "gradient_accumulation_steps": 8}, "stages = 1000000: must be at most 1024"),
    ({"pipeline": {"stages": 4}, "gradient_accumulation_steps": 10**7}, "micro-batches = 10000000: must be at most"),
    ({"pipeline": {"stages": 4}, "train_batch_size": 10**18, "train_micro_batch_size_per_gpu": 1}, "must be at most"),
    ({"pipeline": {"stages": 1.5}, "gradient_accumulation_steps": 8}, "pipeline.stages = 1.5 in the config"),
])
def test_so_are_those_of_a_config(ds_config: dict[str, Any], message: str, tmp_path: Path,
                                  capsys: pytest.CaptureFixture[str]) -> None:
    assert message in error_of([write(tmp_path, pipeline_schedule="v-half", **ds_config)], capsys)


@pytest.mark.parametrize("arguments", [
    [*options(micro_batches=2), "--times", "1e-9,1,1,1"],
    [*options(micro_batches=2), "--times", "1e9,1,1,1"],
    [*options(micro_batches=2), "--times", "1e-9,1e-9,1e-9,0"],
    [*options(micro_batches=2), "--times", "1e9,1e9,1e9,1e9"],
    [*options(ADAPTIVE, 2, 2), "--times", "1,1,1,1e9", "--memory-limit", "1e9u"],
    options("1f1b", 1, 1),
])
def test_numbers_at_their_bounds(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", *arguments, "--time-limit", "0.001", "--no-cache"]) == 0
    shown = capsys.readouterr().out
    assert "makespan" in shown and "nan" not in shown and "inf" not in shown
    assert all(len(line) <= 200 for line in shown.splitlines())


@pytest.mark.slow
def test_a_hop_as_long_as_millions_of_passes_is_cut_off(capsys: pytest.CaptureFixture[str]) -> None:
    """The picture takes as much memory as it has columns."""
    tracemalloc.start()
    assert main(["plan", *options(), "--times", "1,1,1,1e7"]) == 0
    most = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert most < 50e6
    assert "... cut off at time" in capsys.readouterr().out


# ---------------------------------------------------------------- costs of layers

LAYERS = {"costs": [[1, 0, 2], *[[10, 12, 8]] * 6, 240], "activations": [[0, 1], *[[17, 16]] * 6, 17], "hop": 1}


def layers_file(tmp_path: Path, content: Any) -> list[str]:
    file = tmp_path / "layers.json"
    file.write_text(json.dumps(content))
    return ["--layer-costs", str(file)]


def test_layers_are_cut_for_the_order(tmp_path: Path) -> None:
    """A head of eight layers: v-half gets stages of balanced work, adaptive those that it plans for."""
    given = layers_file(tmp_path, LAYERS)
    known = plan(tmp_path, *options("v-half", 2, 4), *given, "--time-limit", "0.5")
    found = plan(tmp_path, *options(ADAPTIVE, 2, 4), *given, "--memory-limit", "0.6", "--time-limit", "1")
    assert known["partition"] == [0, 1, 4, 7, 8]
    assert found["metrics"]["peak_fraction_of_1f1b"] <= 0.6
    orders = tuple(tuple(map(pass_from_json, order)) for order in found["orders"])
    schedule = Schedule(ADAPTIVE, Placement("v", ((0, 3), (1, 2))), 4, orders)
    rows = [(10, 12, 8) if 0 < layer < 7 else (1, 0, 2) if layer == 0 else (80, 80, 80) for layer in range(8)]
    bounds = found["partition"]
    stages = [[sum(times) for times in zip(*rows[start:stop])] for start, stop in zip(bounds, bounds[1:])]
    times = Times(*zip(*stages), (1,) * 3)
    check(schedule)
    assert found["metrics"]["makespan"] == pytest.approx(simulate(schedule, times).makespan)


def config_of(tmp_path: Path, name: str, partition: Any, **section: Any) -> str:
    return write(tmp_path, pipeline_schedule={"name": name, "partition": partition, **section},
                 pipeline={"stages": 2}, gradient_accumulation_steps=4)


@pytest.mark.parametrize("name", ["v-half", ADAPTIVE])
def test_costs_in_a_config_are_those_of_a_file(name: str, tmp_path: Path) -> None:
    costs = {"costs": LAYERS["costs"]}
    of_config = plan(tmp_path, config_of(tmp_path, name, costs), "--time-limit", "1")
    of_file = plan(tmp_path, *options(name, 2, 4), *layers_file(tmp_path, costs), "--time-limit", "1")
    assert of_config["partition"] == of_file["partition"]
    assert of_config["metrics"]["makespan"] == of_file["metrics"]["makespan"]


@pytest.mark.parametrize("name", ["v-half", ADAPTIVE])
def test_bounds_in_a_config_are_the_stages(name: str, tmp_path: Path) -> None:
    """With the costs of layers, an order takes as long as the simulator says for these very stages."""
    bounds = [0, 3, 4, 6, 8]
    found = plan(tmp_path, config_of(tmp_path, name, bounds), *layers_file(tmp_path, LAYERS), "--time-limit", "1",
                 "--compare", "1f1b")
    first, other = found
    assert first["partition"] == bounds and other["partition"] != bounds
    orders = tuple(tuple(map(pass_from_json, order)) for order in first["orders"])
    rows = [(10, 12, 8) if 0 < layer < 7 else (1, 0, 2) if layer == 0 else (80, 80, 80) for layer in range(8)]
    stages = [[sum(times) for times in zip(*rows[start:stop])] for start, stop in zip(bounds, bounds[1:])]
    makespan = simulate(Schedule(name, v(2), 4, orders), Times(*zip(*stages), (1,) * 3)).makespan
    assert first["metrics"]["makespan"] == pytest.approx(makespan)


@pytest.mark.parametrize("partition", [[0, 3, 4, 6, 8], "profile", "parameters"])
def test_stages_that_count_as_alike_are_named(partition: Any, tmp_path: Path,
                                              capsys: pytest.CaptureFixture[str]) -> None:
    file = config_of(tmp_path, "v-half", partition)
    said = f"pipeline_schedule.partition = {partition!r}: all stages count as alike here"
    assert main(["plan", file]) == 0
    assert said in capsys.readouterr().out
    assert main(["plan", file, "--curve", str(tmp_path / "curve.json"), "--limits", "1", "--time-limit", "0.1"]) == 0
    assert said in capsys.readouterr().out
    assert main(["plan", file, "--times", "1:1:1:5,1,1,0"]) == 0
    assert "count as alike" not in capsys.readouterr().out


@pytest.mark.parametrize("partition, more, message", [
    ([0, 3, 8], [], "pipeline_schedule.partition = [0, 3, 8]: the partition has 3 bounds: 4 stages need 5"),
    ([0, 3, 3, 6, 8], [], "pipeline_schedule.partition = [0, 3, 3, 6, 8]: the partition's bounds 3, 3 leave stage 1"),
    ([0, 3, 4, 6, 9], ["file"], "pipeline_schedule.partition = [0, 3, 4, 6, 9]: the partition goes from 0 to 9: it must"
                                " go from 0 to 8"),
    ("parameters", ["file"], "--layer-costs can't be used with pipeline_schedule.partition = 'parameters', which"),
    ({"costs": [1] * 8}, ["file"], "--layer-costs can't be used with pipeline_schedule.partition, which has the costs"),
    ({"costs": [1] * 8}, ["--times", "1,2,1,0"], "--times can't be used with pipeline_schedule.partition, which has"),
    ({"costs": [1] * 3}, [], "pipeline_schedule.partition: 3 layers can't fill 4 stages of v-half"),
    ({"costs": [1, 1, 1, -1]}, [], "pipeline_schedule.partition: the partition's cost of layer 3 is -1"),
])
def test_a_partition_that_cannot_be(partition: Any, more: list[str], message: str, tmp_path: Path,
                                    capsys: pytest.CaptureFixture[str]) -> None:
    more = layers_file(tmp_path, LAYERS) if more == ["file"] else more
    assert message in error_of([config_of(tmp_path, "v-half", partition), *more], capsys)


def test_a_config_says_how_long_planning_takes(tmp_path: Path) -> None:
    """Times that no order fits exactly, for which the planner goes on until its time is over."""
    file = write(tmp_path, pipeline_schedule={"name": ADAPTIVE, "memory_limit": 0.5, "planning_seconds": 0.3},
                 pipeline={"stages": 4}, gradient_accumulation_steps=16)
    times = ["--times", "10.3,12.7,8.1,1.9", "--no-cache"]
    assert plan(tmp_path, file, *times)["metrics"]["planning_s"] < 3
    assert plan(tmp_path, file, *times, "--time-limit", "4")["metrics"]["planning_s"] > 3


@pytest.mark.parametrize("content, more, message", [
    (LAYERS, ["--times", "1,2,1,0"], "--times can't be used with --layer-costs"),
    (LAYERS, ["--memory-limit", "6u"], "--memory-limit 6u can't be used with --layer-costs"),
    (LAYERS, ["--memory-limit", "0.1"], "memory_limit = 0.1: v-half needs"),
    (LAYERS, ["--memory-limit", "0.1", "--compare", ADAPTIVE], "--memory-limit 0.1: a limit of "),
    ({"costs": [1, -1, 1, 1]}, [], "layers.json: costs.1 = -1: "),
    ({"costs": [1, [1, "a", 1], 1, 1]}, [], "layers.json: costs.1.1 = 'a': Input should be a valid number; must be"),
    ({"costs": [1, [1, 1, math.nan], 1, 1]}, [], "layers.json: costs.1.2 = nan: Input should be a finite number"),
    ({"costs": [1, 1, 1, [0, 0, 1e300]]}, [], "layers.json: costs.3.2 = 1e+300: Input should be less than or equal"),
    ({"costs": [0, 0, [0, 0, 0], 0]}, [], "layers.json: costs are all 0"),
    ({"costs": [1, 1, 1, 1], "activations": [0, [0, 0], 0, 0]}, [], "layers.json: activations are all 0"),
    ({"costs": [1, 1, 1, 1], "hops": 1}, [], "layers.json: hops = 1: "),
    ({"costs": [1, 1, 1, 1], "activations": [1]}, [], "layers.json: activations of 1 layers, but costs of 4"),
    ({"costs": [1, 1, 1]}, [], "layers.json: 3 layers can't fill 4 stages of v-half"),
    ([1, 2], [], "layers.json: the file = [1, 2]: "),
])
def test_bad_costs_of_layers_get_one_clear_error(content: Any, more: list[str], message: str, tmp_path: Path,
                                                 capsys: pytest.CaptureFixture[str]) -> None:
    words = [*options("v-half", 2, 4), *layers_file(tmp_path, content), "--time-limit", "0.1", *more]
    assert message in error_of(words, capsys)


# ---------------------------------------------------------------- files


@pytest.mark.parametrize("option", ["--json", "--svg", "--png", "--curve"])
@pytest.mark.parametrize("file, message", [
    ("", "Is a directory"), ("no/folder", "No such file"), ("x" * 300, "File name too long"),
    ("file/in/a/file", "Not a directory"), ("null\0byte", "null byte"), ("loop", "symbolic links")])
def test_files_that_cannot_be_written_are_refused_before_planning(option: str, file: str, message: str, tmp_path: Path,
                                                                  capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "file").write_text("kept")
    ending = "." + ("json" if option == "--curve" else option[2:])
    (tmp_path / f"loop{ending}").symlink_to(f"loop{ending}")
    if not file:
        (tmp_path / f"folder{ending}").mkdir()
        file = "folder"
    arguments = options(ADAPTIVE)[2:] if option == "--curve" else options(ADAPTIVE)
    line = error_of([*arguments, *NEVER, option, str(tmp_path / file) + ending], capsys)
    assert f"{option} " in line and message in line
    assert (tmp_path / "file").read_text() == "kept"


def test_a_file_that_is_there_is_kept_until_the_plan_is(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "plan.json"
    file.write_text("kept")
    error_of([*options("v-zb"), "--memory-limit", "0.5", "--json", str(file)], capsys)
    assert file.read_text() == "kept"
    error_of([*options("v-zb"), "--memory-limit", "0.5", "--json", str(tmp_path / "new.json")], capsys)
    assert not (tmp_path / "new.json").exists()


def test_no_file_is_written_twice_or_read_too(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = write(tmp_path, pipeline_schedule="v-half", pipeline={"stages": 4}, gradient_accumulation_steps=8)
    before = Path(config).read_text()
    assert "is an input too" in error_of([config, "--json", config], capsys)
    assert Path(config).read_text() == before
    both = str(tmp_path / "both.svg")
    assert "is the output of --json too" in error_of([*options(), "--json", both, "--svg", both], capsys)


@pytest.mark.parametrize("target, status", [("/dev/full", 2), ("closed", 1)])
def test_an_output_that_takes_nothing(target: str, status: int) -> None:
    command = [sys.executable, "-m", "ds_vshape", "plan", *options()]
    if target == "closed":
        command = ["bash", "-c", f"{shlex.join(command)} | true; exit ${{PIPESTATUS[0]}}"]
    with open(target if target != "closed" else os.devnull, "wb") as output:
        ended = subprocess.run(command, stdout=output, stderr=subprocess.PIPE, text=True, check=False)
    assert "Traceback" not in ended.stderr and "Exception" not in ended.stderr
    assert ended.returncode in (status, 0 if target == "closed" else status)


# ---------------------------------------------------------------- what people see


def test_prints_figures_peaks_and_picture(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", *options()]) == 0
    shown = capsys.readouterr().out
    for text in ("v-half: 4 ranks, 8 stages (v), 8 micro-batches", "makespan", "lower bound", "9.4%", "0.75"):
        assert text in shown
    rows = [line for line in shown.splitlines() if line.startswith("rank ")]
    assert len(rows) == 4
    assert rows[0].startswith("rank 0  F0 F1 F2 F3 F4 ......f0 b0 w0 f1 b1 w1")
    assert all(len(line) <= 200 for line in shown.splitlines())


def test_planning_shows_its_progress_on_a_terminal_only(monkeypatch: pytest.MonkeyPatch,
                                                        capsys: pytest.CaptureFixture[str]) -> None:
    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    arguments = ["plan", *options("v-min", 4, 8), "--times", "10,20,10,1", "--time-limit", "0.5", "--no-cache"]
    assert main(arguments) == 0
    assert capsys.readouterr().err == ""
    monkeypatch.setattr(sys, "stderr", terminal := Terminal())
    assert main(arguments) == 0
    shares = [int(share) for share in re.findall(r"planning v-min\s+(\d+)%", terminal.getvalue())]
    assert shares[0] == 0 and shares == sorted(shares) and len(shares) > 2


def test_the_module_is_the_command_and_imports_no_torch_deepspeed_or_matplotlib() -> None:
    script = ("import sys, runpy; sys.argv = ['ds_vshape', 'plan', '--schedule', 'adaptive', '--stages', '2', "
              "'--micro-batches', '3', '--times', '1,2,1,0.1', '--time-limit', '0.2', '--no-cache']\n"
              "try:\n    runpy.run_module('ds_vshape', run_name='__main__')\n"
              "except SystemExit as end:\n    assert end.code == 0, end.code\n"
              "print(sorted({'torch', 'deepspeed', 'matplotlib'} & set(sys.modules)))")
    ended = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert ended.returncode == 0, ended.stderr
    assert ended.stdout.splitlines()[-1] == "[]"
    assert "rank 1" in ended.stdout


# ---------------------------------------------------------------- recomputation and offload


def test_plans_that_offload_and_recompute(tmp_path: Path) -> None:
    """Within less than the two chunks that orders alone need, as another program would read it."""
    written = plan(tmp_path, *options(ADAPTIVE, 2, 3), "--memory-limit", "1.5u", "--offload", "--copy-times", "0.5,2",
                   "--recompute", "--input-size", "0.2", "--time-limit", "0.2")
    assert max(written["metrics"]["peak_activations"]) <= 1.5
    placement = Placement("v", tuple(map(tuple, written["placement"])))
    schedule = Schedule("adaptive", placement, 3, tuple(tuple(map(pass_from_json, order))
                                                       for order in written["orders"]))
    check(schedule)
    times = Times((1.0,) * 4, (1.0,) * 4, (1.0,) * 4, offload=(0.5,) * 4, reload=(2.0,) * 4)
    assert simulate(schedule, times).makespan == pytest.approx(written["metrics"]["makespan"])
    assert written["metrics"]["lower_bound"] <= written["metrics"]["makespan"]


def test_a_config_may_let_plans_offload_and_recompute(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """They keep to a limit that no order alone can."""
    given = {"pipeline": {"stages": 2}, "gradient_accumulation_steps": 3}
    section = {"name": ADAPTIVE, "times": "profile", "memory_limit": 0.375}
    assert "least possible peaks of the ranks are 2, 2" in error_of(
        [write(tmp_path, pipeline_schedule=section, **given)], capsys)
    file = write(tmp_path, pipeline_schedule={**section, "recompute": True, "offload": True}, **given)
    written = plan(tmp_path, file, "--copy-times", "0.5", "--input-size", "0.2", "--time-limit", "0.2")
    assert max(written["metrics"]["peak_activations"]) <= 1.5


def test_copies_of_more_stages_on_a_rank_are_as_short_as_their_stages() -> None:
    giving_back = GivingBack(offload=True, copies=(2.0, 3.0))
    times = giving_back.times(Times.uniform(8), v(2, 4))
    assert (times.offload, times.reload) == ((1.0,) * 8, (1.5,) * 8)


@pytest.mark.parametrize("wrong, message", [
    (["--input-size", "0.1"], "--input-size needs --recompute"),
    (["--copy-times", "1"], "--copy-times needs --offload"),
    (["--offload", "--copy-times", "1,2,3"], "one or two times"), (["--offload", "--copy-times", "1e10"], "0 to 1e+09"),
    (["--schedule", "v-half", "--offload"], "--offload needs --schedule adaptive: v-half"),
    (["--recompute", "--input-size", "2"], "from 0 to 1"),
    (["--memory-limit", "1u"], "least possible")])
def test_wrong_options_of_recomputation_and_offload(wrong: list[str], message: str,
                                                    capsys: pytest.CaptureFixture[str]) -> None:
    assert message in error_of([*options(ADAPTIVE), *wrong], capsys)
