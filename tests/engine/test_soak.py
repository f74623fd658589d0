"""Thousands of batches, with evaluations and checkpoints in between, take no more memory, files, threads and time."""

from __future__ import annotations

import gc
import os
import statistics
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import pytest
from pipelines import FP32_ZERO1, Job, data, specs
from ranks import run_ranks

BATCHES, WINDOW = 2000, 50
ADAPTIVE = {"name": "adaptive", "memory_limit": 0.75, "times": "profile", "planning_seconds": 0.5}


@dataclass(frozen=True)
class Sample:
    """What a rank holds after some batches, and how long the fastest of them took."""

    resident: float  # MiB
    descriptors: float
    threads: float
    objects: float  # that Python's garbage collector knows
    milliseconds: float  # of the processor: what the clock says depends on who else is at work


# What the second half may have more than the first, a warm-up of a quarter left out. A job plans now and then, which
# takes some descriptors and objects while it lasts; a batch of the model below keeps 10 KiB of activations.
ALLOWED = Sample(resident=1.0, descriptors=2, threads=0, objects=100, milliseconds=float("nan"))
ALLOWED_RATIO = 1.3


def growth(samples: list[Sample]) -> Sample:
    """The medians of the second half less those of the first; of the time, the ratio of the fastest batches."""
    steady = samples[len(samples) // 4:]
    first, second = steady[:len(steady) // 2], steady[len(steady) // 2:]

    def medians(name: str) -> float:
        return statistics.median(getattr(s, name) for s in second) - statistics.median(getattr(s, name) for s in first)

    ratio = min(s.milliseconds for s in second) / min(s.milliseconds for s in first)
    return Sample(*(medians(f.name) for f in fields(Sample) if f.name != "milliseconds"), ratio)


def grown(samples: list[Sample]) -> dict[str, float]:
    """What grew beyond what is allowed."""
    by = vars(growth(samples))
    return {name: value for name, value in by.items()
            if value > (ALLOWED_RATIO if name == "milliseconds" else getattr(ALLOWED, name))}


def sampled(milliseconds: float) -> Sample:
    gc.collect()
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return Sample(pages * os.sysconf("SC_PAGE_SIZE") / 2**20, len(os.listdir("/proc/self/fd")),
                  len(os.listdir("/proc/self/task")), len(gc.get_objects()), milliseconds)


def soak(rank: int, section: Any, batches: int, folder: str, leak: Callable[[int], None] | None) -> list[Sample]:
    engine = Job(section, 2, 2, FP32_ZERO1, tuple(specs(2))).engine()
    samples, took = [], []
    for batch in range(batches):
        start = time.process_time()
        engine.train_batch(data(engine, batch % 50))
        if leak is not None:
            leak(batch)
        took.append(1000 * (time.process_time() - start))
        if batch % 50 == 10:
            engine.eval_batch(data(engine, batch % 50))
        if batch % 200 == 20:
            engine.save_checkpoint(folder, "last")
        if batch % 400 == 30:
            engine.load_checkpoint(folder)
        if batch % WINDOW == WINDOW - 1:
            samples.append(sampled(min(took)))
            took.clear()
    return samples


@pytest.mark.slow_cases("v-half")
@pytest.mark.parametrize("section", ["v-half", ADAPTIVE], ids=["v-half", "adaptive"])
def test_nothing_grows(section: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    for samples in run_ranks(2, soak, section, BATCHES, str(tmp_path), None, timeout=600):
        print(growth(samples), samples[-1])
        assert grown(samples) == {}


def leak_everything(batch: int, kept: list[Any] = []) -> None:  # noqa: B006 (that it lasts is what it is for)
    kept.append([bytes(262144)])
    if batch % 50 == 0:
        kept.append(open(os.devnull))
    if batch % 100 == 0:
        threading.Thread(target=threading.Event().wait, daemon=True).start()
    for _ in range(25 * batch ** 2):
        pass


@pytest.mark.slow
def test_a_leak_is_seen(tmp_path: Path) -> None:
    """In far fewer batches than above, where a leak has less time to show."""
    for samples in run_ranks(2, soak, "v-half", 400, str(tmp_path), leak_everything, timeout=300):
        assert set(grown(samples)) == {field.name for field in fields(Sample)}
