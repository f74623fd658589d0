"""What pipelines report to DeepSpeed's monitors: wandb's own file of an offline run, and csv, against the engine."""

from __future__ import annotations

import csv
import os
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from PIL import Image
from pipelines import LENGTH, SAMPLES, Job, data
from ranks import run_ranks
from wandb_log import history

from ds_vshape.measure.rank_memory import RankMemory
from ds_vshape.schedule.schedule import Schedule
from ds_vshape.schedule.timeline import Timeline

STAGES, REPLICAS, MICRO_BATCHES, BATCHES, EVERY = 2, 2, 4, 6, 2
OF_A_BATCH = REPLICAS * MICRO_BATCHES * SAMPLES


@dataclass(frozen=True)
class Seen:
    """What a rank knows of its training: of each batch the timelines, and the seconds that it took."""

    timelines: list[tuple[Timeline, Timeline]]
    seconds: list[float]
    memory: tuple[RankMemory, ...]
    schedule: Schedule
    # Trained numbers, and those whose weight gradients are deferred.
    trained: int
    split: int


def tracked(rank: int, folder: str) -> Seen:
    os.environ.update(WANDB_MODE="offline", WANDB_DIR=folder, WANDB_SILENT="true")
    monitors = {
        "wandb": {"enabled": True, "project": "pipelines"},
        "csv_monitor": {"enabled": True, "output_path": folder, "job_name": "job"},
    }
    engine = Job("v-half", STAGES, MICRO_BATCHES, {**monitors, "steps_per_print": EVERY}).engine()
    timelines, seconds = [], []
    for batch in range(BATCHES):
        began = time.perf_counter()
        engine.train_batch(data(engine, batch))
        seconds.append(time.perf_counter() - began)
        timelines.append(engine.timelines())
    if rank == 0:
        import wandb
        wandb.finish()
    sizes = {name: parameter.numel() for name, parameter in engine.module.named_parameters()}
    norms = sum(size for name, size in sizes.items() if ".norm." in name)
    return Seen(timelines, seconds, engine.memory_report(), engine.schedule(), sum(sizes.values()),
                sum(sizes.values()) - norms)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("tracking")


@pytest.fixture(scope="module")
def ranks(folder: Path) -> list[Seen]:
    return run_ranks(STAGES * REPLICAS, tracked, str(folder))


@pytest.fixture(scope="module")
def logged(ranks: list[Seen], folder: Path) -> dict[str, dict[int, Any]]:
    """By name, the values over samples."""
    found: dict[str, dict[int, Any]] = {}
    for step in history(folder):
        for name, value in step.items():
            if not name.startswith("_"):
                found.setdefault(name, {})[step["_step"]] = value
    return found


def pipeline(logged: dict[str, dict[int, Any]], name: str) -> dict[int, Any]:
    """By the number of the batch."""
    return {samples // OF_A_BATCH: value for samples, value in logged[f"Train/Pipeline/{name}"].items()}


def test_wandb_has_what_deepspeed_reports_as_well(logged: dict[str, dict[int, Any]]) -> None:
    every = [OF_A_BATCH * batch for batch in range(1, BATCHES + 1)]
    assert list(logged["Train/Samples/train_loss"]) == list(logged["Train/Samples/lr"]) == every


def test_times(ranks: list[Seen], logged: dict[str, dict[int, Any]]) -> None:
    """Those of the batch before each report; the second batch, which is measured for activations, has none."""
    names = ["makespan_predicted", "makespan_measured", "bubble", "bubble_rank_0", "bubble_rank_1"]
    found = {name: pipeline(logged, name) for name in names}
    for batch in (4, 6):
        predicted, measured = ranks[0].timelines[batch - 1]
        assert found["makespan_predicted"][batch] == pytest.approx(predicted.makespan)
        assert found["makespan_measured"][batch] == pytest.approx(measured.makespan)
        assert found["bubble"][batch] == pytest.approx(measured.bubble)
        for rank, spans in enumerate(measured.ranks):
            idle = measured.makespan - sum(span.end - span.start for span in spans)
            assert found[f"bubble_rank_{rank}"][batch] == pytest.approx(idle / measured.makespan)
    assert all(set(values) == {4, 6} for values in found.values())


def test_rates(ranks: list[Seen], logged: dict[str, dict[int, Any]]) -> None:
    """Between what the test's own clock says around batches and what the passes alone took."""
    samples, tokens = (pipeline(logged, name) for name in ("samples_per_second", "tokens_per_second"))
    assert list(samples) == list(tokens) == [2, 4, 6]
    for report in samples:
        batches = range(report - EVERY, report)
        around = sum(ranks[0].seconds[batch] for batch in batches)
        within = sum(ranks[0].timelines[batch][1].makespan for batch in batches)
        assert EVERY * OF_A_BATCH / around <= samples[report] <= EVERY * OF_A_BATCH / within
        assert tokens[report] == pytest.approx(LENGTH * samples[report])


def test_sizes(ranks: list[Seen], logged: dict[str, dict[int, Any]]) -> None:
    for rank in range(STAGES):
        peak = pipeline(logged, f"peak_activations_rank_{rank}")
        assert peak == dict.fromkeys([2, 4, 6], ranks[0].memory[rank].activations_peak)
        assert min(pipeline(logged, f"peak_allocated_rank_{rank}").values()) > 2 ** 20
    # All but norms are split; ranks 0 and 2 are the first pipeline.
    share = sum(ranks[rank].split for rank in (0, 2)) / sum(ranks[rank].trained for rank in (0, 2))
    assert 0.5 < share < 1
    assert pipeline(logged, "share_split") == pytest.approx(dict.fromkeys([2, 4, 6], share))


def test_the_schedule_is_shown_once(logged: dict[str, dict[int, Any]], folder: Path) -> None:
    (batch, image), = pipeline(logged, "schedule").items()
    assert batch == 4 and image["_type"] == "image-file" and image["caption"] == "v-half"
    picture, = folder.rglob(image["path"])
    with Image.open(picture) as opened:
        assert opened.format == "PNG" and opened.width > 1000


def test_csv_has_the_same(logged: dict[str, dict[int, Any]], ranks: list[Seen], folder: Path) -> None:
    ours = {name: values for name, values in logged.items()
            if name.startswith("Train/Pipeline/") and not name.endswith("/schedule")}
    files = sorted(folder.rglob("Train_Pipeline_*.csv"))
    assert [file.stem for file in files] == sorted(name.replace("/", "_") for name in ours)
    for name, values in ours.items():
        with next(folder.rglob(name.replace("/", "_") + ".csv")).open() as file:
            head, *rows = csv.reader(file)
        assert head == ["step", name.split("/")[-1]]
        assert {int(step): float(value) for step, value in rows} == pytest.approx(values)
