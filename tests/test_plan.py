"""The planner's command line: its contract with other programs, its output and its errors."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from ds_vshape.cli import main
from ds_vshape.schedule.named import SCHEDULES, build
from ds_vshape.schedule.passes import Kind, Pass
from ds_vshape.schedule.placement import Placement
from ds_vshape.schedule.schedule import Schedule, check
from ds_vshape.schedule.timeline import Times, simulate


def plan(tmp_path: Path, *arguments: str) -> dict[str, Any]:
    """What the planner writes as JSON."""
    file = tmp_path / "plan.json"
    assert main(["plan", *arguments, "--json", str(file)]) == 0
    return json.loads(file.read_text())


def options(name: str = "v-half", stages: int = 4, micro_batches: int = 8) -> list[str]:
    return ["--schedule", name, "--stages", str(stages), "--micro-batches", str(micro_batches)]


def write(tmp_path: Path, **ds_config: Any) -> str:
    file = tmp_path / "ds_config.json"
    file.write_text(json.dumps(ds_config))
    return str(file)


def error_of(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    """The one line that the planner says before it ends with status 2."""
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


@pytest.mark.parametrize("name", SCHEDULES)
def test_json_holds_the_schedule_and_its_figures(name: str, tmp_path: Path) -> None:
    """Read the file as another program would, and simulate it again with the times given for one of 2P chunks."""
    written = plan(tmp_path, *options(name, 3, 5), "--times", "10,12,8,1")
    assert set(written) == {"schedule", "stages", "micro_batches", "placement", "orders", "metrics"}
    assert set(written["metrics"]) == {"makespan", "longest_span", "bubble", "peak_activations",
                                       "peak_fraction_of_1f1b", "lower_bound", "planning_s"}
    assert (written["schedule"], written["stages"], written["micro_batches"]) == (name, 3, 5)
    placement = Placement("read", tuple(map(tuple, written["placement"])))
    orders = tuple(tuple(Pass(Kind(kind), stage, i) for kind, stage, i in order) for order in written["orders"])
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
        kept = [alive := alive + share * ((work.kind is Kind.F) - work.kind.gives_weight_gradients) for work in order]
        peaks.append(max(kept))
    assert metrics["peak_activations"] == peaks
    assert metrics["peak_fraction_of_1f1b"] == max(peaks) / 6
    assert metrics["planning_s"] >= 0


def test_1f1b_is_the_measure_of_memory(tmp_path: Path) -> None:
    assert plan(tmp_path, *options("1f1b", 4, 8))["metrics"]["peak_fraction_of_1f1b"] == 1
    assert plan(tmp_path, *options("1f1b", 4, 8))["metrics"]["peak_activations"] == [8, 6, 4, 2]
    # With fewer micro-batches than ranks 1F1B doesn't reach p either.
    assert plan(tmp_path, *options("v-zb", 4, 2))["metrics"]["peak_fraction_of_1f1b"] == 1


# ---------------------------------------------------------------- the config in place of options


def test_a_config_says_all_that_the_options_say(tmp_path: Path) -> None:
    wanted = build("v-half", 4, 8)
    file = write(tmp_path, pipeline_schedule={"name": "v-half", "memory_limit": 0.75}, pipeline={"stages": 4},
                 gradient_accumulation_steps=8)
    for arguments in ([file], ["--config", file]):
        written = plan(tmp_path, *arguments)
        assert written["orders"] == [[[work.kind.value, work.stage, work.micro_batch] for work in order]
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
    ({"pipeline_schedule": "v-half", "pipeline": {"stages": 0}}, "pipeline.stages = 0"),
    ({"pipeline_schedule": "v-half", "gradient_accumulation_steps": 1.5}, "gradient_accumulation_steps = 1.5"),
    ({"pipeline_schedule": "v-half", "train_batch_size": 7, "train_micro_batch_size_per_gpu": 2}, "is no multiple of"),
])
def test_a_bad_config_gets_one_clear_error(tmp_path: Path, capsys: pytest.CaptureFixture[str],
                                           ds_config: dict[str, Any], message: str) -> None:
    ds_config = {"pipeline": {"stages": 4}, **ds_config}
    filling = [] if "gradient_accumulation_steps" in ds_config or "train_batch_size" in ds_config else [
        "--micro-batches", "8"]
    assert message in error_of([write(tmp_path, **ds_config), *filling], capsys)


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
    ([*options(), "--memory-limit", "much"], "'much' is no number"),
    ([*options(), "--memory-limit", "nan"], "is no number"),
    ([*options(), "--times", "1,1,1"], "must be F,B,W,HOP"),
    ([*options(), "--times", "1,0,1,0"], "must be F,B,W,HOP"),
    ([*options(), "--times", "1,1,1,-1"], "must be F,B,W,HOP"),
    (options("v-hlf"), "did you mean 'v-half'"),
    (options(stages=0), "--stages: '0' must be a whole number"),
    (options(micro_batches=-3), "--micro-batches"),
    ([*options(), "--json", "/nowhere/at/all.json"], "--json /nowhere/at/all.json"),
])
def test_bad_options_get_one_clear_error(arguments: list[str], message: str,
                                         capsys: pytest.CaptureFixture[str]) -> None:
    assert message in error_of(arguments, capsys)


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


def test_the_module_is_the_command_and_imports_neither_torch_nor_deepspeed() -> None:
    script = ("import sys, runpy; sys.argv = ['ds_vshape', 'plan', '--schedule', 'v-zb', '--stages', '2', "
              "'--micro-batches', '3']\n"
              "try:\n    runpy.run_module('ds_vshape', run_name='__main__')\n"
              "except SystemExit as end:\n    assert end.code == 0, end.code\n"
              "print(sorted({'torch', 'deepspeed'} & set(sys.modules)))")
    ended = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert ended.returncode == 0, ended.stderr
    assert ended.stdout.splitlines()[-1] == "[]"
    assert "rank 1" in ended.stdout
