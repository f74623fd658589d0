"""Recomputation and offload change no loss and no weight: bit for bit those of DeepSpeed's own engine."""

from __future__ import annotations

import re
from dataclasses import replace
from itertools import count
from typing import Any

import pytest
import torch
from deepspeed.runtime.pipe.module import PipelineError
from given_back import BOTH, MOVED, NOTHING, RECOMPUTED, gives_back
from pipelines import (BATCHES, BF16_ZERO1, FP32, FP32_ZERO1, Dropping, Job, Outcome, data, merged, specs, tied_specs,
                       train)
from ranks import run_ranks
from torch import Tensor

from ds_vshape.runtime.copy_engine import CopyEngine
from ds_vshape.schedule.passes import Kind


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


def refused(rank: int) -> str:
    engine = Job("v-half", 2, 4).engine(activation_checkpoint_interval=1)
    with pytest.raises(PipelineError) as error:
        engine.use_schedule(gives_back(engine.schedule(), ways=(RECOMPUTED,)))
    # Offload alone moves what checkpoints leave.
    engine.use_schedule(gives_back(engine.schedule(), ways=(MOVED,)))
    losses = train(engine, BATCHES).losses
    assert losses == train(Job("v-half", 2, 4).engine(), BATCHES).losses
    return str(error.value)


def test_checkpointed_layers_are_not_recomputed_twice() -> None:
    first, second = run_ranks(2, refused)
    assert first == second and re.match(
        "activation_checkpoint_interval = 1 with the schedule v-half, which recomputes: must be 0", first)


class Full:
    """A host whose memory is full in one copy."""

    def __init__(self, fails: bool) -> None:
        self.fails, self.copies = fails, list[Tensor]()

    def write(self, memory: Any) -> None:
        if self.fails:
            raise OSError("No space left on device")
        self.copies = [values.clone() for values in memory]

    def read(self, memory: Any) -> None:
        for values, copy in zip(memory, self.copies, strict=True):
            values.copy_(copy)


def train_with_a_full_host(rank: int, job: Job, failing: int) -> tuple[str, Outcome]:
    """The error of a batch in which one copy of rank 1 fails, and what is trained after it."""
    engine = job.engine()
    engine.use_schedule(gives_back(engine.schedule(), ways=(MOVED,)))
    usual, hosts = engine.copy_engine, count()
    engine.copy_engine = CopyEngine(usual.outwards, usual.backwards,
                                    lambda: Full(rank == 1 and next(hosts) == failing), usual.free, usual.now)
    with pytest.raises(OSError if rank == 1 else PipelineError) as error:
        engine.train_batch(data(engine, 0))
    outcome = train(engine, BATCHES)
    # An evaluation keeps nothing, and moves nothing.
    before = next(hosts)
    engine.eval_batch(data(engine, 0))
    assert next(hosts) == before + 1
    predicted, measured = engine.timelines()
    copied = sum(action.kind is Kind.O for _, action in engine.schedule().passes())
    for timeline in (predicted, measured):
        for copies in (timeline.offloads, timeline.reloads):
            assert sum(map(len, copies)) == copied
            assert all(before.end <= after.start for spans in copies for before, after in zip(spans, spans[1:]))
    assert engine.pipeline_report()["makespan"] > 0
    return str(error.value), outcome


def test_a_failing_copy_is_an_error_on_all_ranks() -> None:
    """After which training goes on as if the batch hadn't been."""
    job = Job("v-half", 2, 4)
    found = run_ranks(2, train_with_a_full_host, job, 3)
    (first, _), (second, _) = found
    assert "No space left on device" in second and re.search("WaitOffload of stage .*No space left on device", first)
    oracle = merged([outcomes[0] for outcomes in run_ranks(2, train_by, [replace(job, schedule=None)], None, {})])
    outcome = merged([outcome for _, outcome in found])
    assert outcome.losses == oracle.losses
    assert all(torch.equal(outcome.weights[name], value) for name, value in oracle.weights.items())
