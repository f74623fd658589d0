"""A job starts on simulated GPUs to which DeepSpeed has bound its default group: groups wait for their members alone,
and the start-up check of the channels tells those that answer from those that don't."""

from __future__ import annotations

from typing import Any

import torch.distributed as dist
from pipelines import FP32, Job
from simulated_gpu.communicator import BOUND_DEVICE, Counts
from simulated_gpu.processes import run_on_gpus

from ds_vshape.comm.exchange import Exchange
from ds_vshape.comm.groups import new_group
from ds_vshape.health.preflight import Preflight


def groups(rank: int) -> tuple[int, list[int]]:
    """How many splits of the default communicator groups made; and what the first two ranks tell each other."""
    world: Any = dist.group.WORLD
    assert world.bound_device_id == BOUND_DEVICE
    before = Counts.splits
    exchange, _, _ = Exchange([0, 1]), new_group([1, 2]), new_group()
    assert world.bound_device_id == BOUND_DEVICE
    return Counts.splits - before, exchange.largest_of_each([rank, -rank]) if rank < 2 else []


def test_groups_are_made_without_the_other_ranks() -> None:
    assert run_on_gpus(3, groups) == [(0, [1, 0]), (0, [1, 0]), (0, [])]


def probed(rank: int) -> str:
    """What the check says where rank 2 of three doesn't answer rank 1; then the channels are given up."""
    probe = Preflight.probe

    def partly(self: Preflight, ends: Any) -> None:
        probe(self, () if rank == 2 else ends, 3.0)

    Preflight.probe = partly  # type: ignore[method-assign, assignment]
    try:
        Job("1f1b", 3, 3, FP32).engine()
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return ""


def test_only_the_pair_that_is_silent_is_named() -> None:
    told = set(run_on_gpus(3, probed, timeout=60))
    assert len(told) == 1
    error, = told
    assert error.startswith("PreflightError: no messages between pipeline ranks within 3 s: ")
    assert error.count("don't hear each other") == 1
    assert "rank 1 (" in error and "rank 2 (" in error
