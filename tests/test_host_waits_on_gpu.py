"""In a batch on a simulated GPU the host waits for the device in DeepSpeed's step alone."""

from __future__ import annotations

from collections import Counter

from pipelines import BF16_ZERO1, FP32, FP32_ZERO1, Job, data
from simulated_gpu.device import DEVICE_OF_RANK
from simulated_gpu.processes import run_on_gpus

BATCHES = range(4)


def synchronizations(rank: int, job: Job) -> list[Counter[tuple[str, str]]]:
    engine = job.engine()
    of_batches = []
    for batch in BATCHES:
        before = len(DEVICE_OF_RANK.synchronizations)
        engine.train_batch(data(engine, batch))
        of_batches.append(Counter(DEVICE_OF_RANK.synchronizations[before:]))
    return of_batches


def test_the_host_waits_for_the_device_in_deepspeeds_step_alone() -> None:
    for config, waits in ((FP32, []), (FP32_ZERO1, ["is_invalid_grad_norm"]),
                          (BF16_ZERO1, ["has_overflow", "is_invalid_grad_norm"])):
        for of_batches in run_on_gpus(2, synchronizations, Job("v-half", 2, 4, config)):
            # The second is measured.
            for of_batch in of_batches[2:]:
                assert sorted(where.split()[1] for _, where in of_batch) == waits, of_batch
