"""The engine on simulated GPUs over NCCL's stand-in: losses and weights are those over gloo, bit for bit.

There operators run late, a device is bound to the job, kernels are loaded in the first batch, and whatever is read,
sent or let go of too early is NaN.
"""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest
import torch
from pipelines import BF16_ZERO1, BF16_ZERO1_FP32, FP32, FP32_ZERO1, Job, Outcome, data, merged, train
from ranks import run_ranks
from simulated_gpu.communicator import Counts
from simulated_gpu.device import DEVICE_OF_RANK
from simulated_gpu.processes import run_on_gpus

from ds_vshape.schedule.communicators import MAX_CTAS, communicators_of_rank

PRECISIONS = {"fp32-zero0": FP32, "fp32-zero1": FP32_ZERO1, "bf16-zero1": BF16_ZERO1,
              "bf16-zero1-fp32": BF16_ZERO1_FP32}
BATCHES = range(4)


def train_jobs(rank: int, jobs: list[Job]) -> list[Outcome]:
    outcomes = []
    for job in jobs:
        outcome = train(job.engine(), BATCHES)
        outcomes.append(Outcome(outcome.losses, {name: value.cpu() for name, value in outcome.weights.items()}))
    return outcomes


def train_on_gpus(rank: int, jobs: list[Job]) -> list[Outcome]:
    DEVICE_OF_RANK.loads_lazily = True
    return train_jobs(rank, jobs)


def assert_equal_to_gloo(jobs: list[Job], world: int) -> None:
    over_gloo = [merged(list(ranks)) for ranks in zip(*run_ranks(world, train_jobs, jobs))]
    on_gpus = [merged(list(ranks)) for ranks in zip(*run_on_gpus(world, train_on_gpus, jobs))]
    for job, oracle, outcome in zip(jobs, over_gloo, on_gpus, strict=True):
        assert outcome.losses == oracle.losses, job
        assert all(torch.equal(outcome.weights[name], value) for name, value in oracle.weights.items()), job


@pytest.mark.parametrize("precision", PRECISIONS)
def test_two_ranks(precision: str) -> None:
    assert_equal_to_gloo([Job(schedule, 2, 4, PRECISIONS[precision]) for schedule in ("v-half", "zb-h1")], 2)


@pytest.mark.slow
@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("schedule", ["1f1b", "zb-h1", "1f1b-v", "v-min", "v-half", "v-zb"])
def test_four_ranks(schedule: str, precision: str) -> None:
    assert_equal_to_gloo([Job(schedule, 4, 6, PRECISIONS[precision])], 4)


def synchronizations(rank: int, job: Job) -> tuple[Any, ...]:
    engine = job.engine()
    of_batches = []
    for batch in BATCHES:
        before = len(DEVICE_OF_RANK.synchronizations)
        engine.train_batch(data(engine, batch))
        of_batches.append(Counter(DEVICE_OF_RANK.synchronizations[before:]))
    return of_batches, Counts.splits


def test_the_host_waits_for_the_device_in_deepspeeds_step_alone() -> None:
    for config, waits in ((FP32, []), (FP32_ZERO1, ["is_invalid_grad_norm"]),
                          (BF16_ZERO1, ["has_overflow", "is_invalid_grad_norm"])):
        for of_batches, _ in run_on_gpus(2, synchronizations, Job("v-half", 2, 4, config)):
            # The second is measured.
            for of_batch in of_batches[2:]:
                assert sorted(where.split()[1] for _, where in of_batch) == waits, of_batch


def communicators_of_messages(rank: int, job: Job) -> tuple[int, list[tuple[int, bool]]]:
    engine = job.engine()
    engine.train_batch(data(engine, 0))
    light = [(options.config.max_ctas, options.is_high_priority_stream) for options in Counts.options
             if options.config.max_ctas == MAX_CTAS]
    return communicators_of_rank(engine.placement, engine.stage_id), light


@pytest.mark.parametrize(["schedule", "pipelines"], [("v-half", 1), ("1f1b", 2)])
def test_messages_have_one_light_communicator_for_each_direction(schedule: str, pipelines: int) -> None:
    ranks = 4 // pipelines
    found = run_on_gpus(4, communicators_of_messages, Job(schedule, ranks, 4))
    of_pipeline = [2 if place in (0, ranks - 1) else 4 for place in range(ranks)]
    assert sorted(expected for expected, _ in found) == sorted(of_pipeline * pipelines)
    for expected, light in found:
        assert light == [(MAX_CTAS, True)] * expected
