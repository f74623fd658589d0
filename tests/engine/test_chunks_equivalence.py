"""Training with more than two chunks on a rank equals DeepSpeed's engine and the plain model, bit for bit."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from pipelines import FP32_ZERO1, Job, Outcome, PlainTraining, merged, specs, train
from ranks import run_ranks

BATCHES = range(3)
SECTIONS: list[dict[str, Any]] = [
    {"name": "v-zb", "chunks": 4}, {"name": "interleaved-zb", "chunks": 4}, {"name": "interleaved-1f1b", "chunks": 3}]


def train_all(rank: int, jobs: list[Job]) -> list[Outcome]:
    return [train(job.engine(), BATCHES) for job in jobs]


@pytest.mark.parametrize("ranks, micro_batches", [(2, 5), pytest.param(4, 6, marks=pytest.mark.slow)])
def test_equals_deepspeed_and_the_plain_model(ranks: int, micro_batches: int) -> None:
    layers = tuple(specs(4 * ranks))
    jobs = [Job(section, ranks, micro_batches, FP32_ZERO1, layers) for section in (None, *SECTIONS)]
    of_ranks = run_ranks(ranks, train_all, jobs)
    oracle, *ours = (merged(list(outcomes)) for outcomes in zip(*of_ranks, strict=True))
    plain = PlainTraining(jobs[0], 1).train(BATCHES, micro_batches)
    for of, outcome in zip(("plain", *SECTIONS), (plain, *ours), strict=True):
        assert outcome.losses == oracle.losses, of
        assert all(torch.equal(outcome.weights[name], value) for name, value in oracle.weights.items()), of
