"""In a batch on a simulated GPU the host waits for the device in DeepSpeed's step alone."""

from __future__ import annotations

from typing import Any

from pipelines import BF16_ZERO1, BF16_ZERO1_FP32, FP32, FP32_ZERO1, Job, data
from simulated_gpu.device import DEVICE_OF_RANK
from simulated_gpu.processes import run_on_gpus

BATCHES = range(4)
# DeepSpeed asks whether a gradient overflowed, copies a -1 to the device, and asks whether the norm is a number, with
# clipping twice. Of all this it makes the decision whether to step.
OVERFLOW, MASK, NORM = "has_overflow", "mask_nan_or_inf_with_val_inplace", "is_invalid_grad_norm"
# The norm is told to other ranks over gloo. It is read where DeepSpeed reads it too.
OWN_NORM = "read"
POST_VALIDATION = {"optimizer_post_validation": True}


def waits(rank: int, jobs: list[tuple[Job, dict[str, Any]]]) -> list[list[list[str]]]:
    """Of each job and batch: the functions that waited, and why if it isn't for numbers."""
    found = []
    for job, options in jobs:
        engine, of_job = job.engine(**options), []
        for batch in BATCHES:
            before = len(DEVICE_OF_RANK.synchronizations)
            engine.train_batch(data(engine, batch))
            of_job.append([where.split()[1] for _, where in DEVICE_OF_RANK.synchronizations[before:]])
            print(batch, DEVICE_OF_RANK.synchronizations[before:])
        # DeepSpeed's timer of the throughput would wait in every forward, if it were ever stopped.
        assert engine.tput_timer.global_step_count < engine.tput_timer.start_step
        found.append(of_job)
    return found


def job(config: dict[str, Any], clip: float = 0.0, schedule: str = "v-half", **section: Any) -> Job:
    return Job({"name": schedule, **section}, 2, 4, {**config, "gradient_clipping": clip})


CASES: dict[str, tuple[Job, dict[str, Any], list[str]]] = {
    "fp32": (job(FP32), {}, []),
    "fp32, clipping": (job(FP32, 0.5), {}, []),
    "fp32, ZeRO-1": (job(FP32_ZERO1), {}, [MASK, NORM]),
    "fp32, ZeRO-1, clipping": (job(FP32_ZERO1, 0.5), {}, [MASK, NORM, NORM]),
    "bf16, ZeRO-1": (job(BF16_ZERO1, schedule="1f1b"), {}, [OVERFLOW, MASK, NORM]),
    "bf16, ZeRO-1, sums in fp32": (job(BF16_ZERO1_FP32), {}, [MASK, NORM]),
    "dynamic shapes": (job(FP32), {"dynamic_shape": True}, []),
    "post-validation": (job(FP32_ZERO1, 100.0, **POST_VALIDATION), {}, [MASK, OWN_NORM, NORM, NORM]),
    "post-validation, bf16": (job(BF16_ZERO1, **POST_VALIDATION), {}, [OVERFLOW, MASK, OWN_NORM, NORM]),
}


def test_the_host_waits_for_the_device_in_deepspeeds_step_alone() -> None:
    jobs = [(job, options) for job, options, _ in CASES.values()]
    for of_rank in run_on_gpus(2, waits, jobs):
        # The second batch is measured.
        found = {name: of_job[2:] for name, of_job in zip(CASES, of_rank, strict=True)}
        assert found == {name: [expected] * 2 for name, (_, _, expected) in CASES.items()}
