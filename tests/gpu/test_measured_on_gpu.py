"""What is measured of batches on simulated GPUs: times are the devices', from the common start of the hosts."""

from __future__ import annotations

import json
import time
from pathlib import Path

from pipelines import Job, data
from simulated_gpu.communicator import Counts
from simulated_gpu.device import DEVICE_OF_RANK
from simulated_gpu.processes import run_on_gpus


def measured(rank: int, job: Job, late: float) -> tuple[list[float], float, int]:
    """When each pass of a batch started on all ranks, whose last device comes to the batch later than its host."""
    engine = job.engine()
    communicators = 0
    for batch in range(3):
        if batch == 2:
            communicators = Counts.communicators
            if rank:
                DEVICE_OF_RANK.current.put(lambda: time.sleep(late))
        engine.train_batch(data(engine, batch))
    timeline = engine.timelines()[1]
    starts = [span.start for span in timeline.ranks[1]]
    return starts, engine.pipeline_report()["makespan"], Counts.communicators - communicators


def test_a_device_that_is_behind_its_host_starts_later(tmp_path: Path) -> None:
    late = 1.5
    job = Job({"name": "v-half", "trace": {"batches": [3, 3], "path": str(tmp_path)}}, 2, 4)
    for starts, makespan, communicators in run_on_gpus(2, measured, job, late):
        assert min(starts) >= late and makespan >= late
        # Clocks and traces go over gloo; the reports after the batch have the communicator that returned the losses.
        assert communicators == 0
    trace = json.loads((tmp_path / "batches_3-3.trace.json").read_text())
    about, = trace["otherData"]["batches"]
    assert about["measured_makespan_s"] >= late
