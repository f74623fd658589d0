"""Recomputation and offload change no loss and no weight: bit for bit those of DeepSpeed's own engine."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from given_back import BOTH, MOVED, NOTHING, RECOMPUTED, gives_back
from pipelines import (BATCHES, BF16_ZERO1, FP32, FP32_ZERO1, Dropping, Job, Outcome, merged, specs, tied_specs,
                       train)
from ranks import run_ranks


def train_by(rank: int, jobs: list[Job], ways: tuple[int, ...] | None, options: dict[str, Any]) -> list[Outcome]:
    outcomes = []
    for number, job in enumerate(jobs):
        print(job)
        engine = job.engine(**options)
        if ways is not None:
            engine.use_schedule(gives_back(engine.schedule(), number, ways))
        outcomes.append(train(engine, BATCHES))
    return outcomes


def assert_equal(jobs: list[Job], ways: tuple[int, ...] = (NOTHING, RECOMPUTED, MOVED, BOTH), oracle: Any = None,
                 **options: Any) -> None:
    """Each job, with memory given back, trains what it does by the schedule `oracle` without; by default DeepSpeed's.
    """
    world = jobs[0].stages
    plain = [replace(job, schedule=oracle) for job in jobs]
    expected = zip(*run_ranks(world, train_by, plain, None, options))
    found = zip(*run_ranks(world, train_by, jobs, ways, options))
    for job, of_ranks, oracles in zip(jobs, found, expected, strict=True):
        outcome, known = merged(list(of_ranks)), merged(list(oracles))
        assert outcome.losses == known.losses, job
        assert outcome.weights.keys() == known.weights.keys(), job
        assert all(torch.equal(outcome.weights[name], value) for name, value in known.weights.items()), job


def test_two_ranks() -> None:
    dropping = tuple(specs(7, Dropping))
    assert_equal([Job("v-half", 2, 4, FP32), Job("v-zb", 2, 4, BF16_ZERO1, dropping),
                  Job("1f1b", 2, 3, FP32_ZERO1, tuple(tied_specs(6)))])
