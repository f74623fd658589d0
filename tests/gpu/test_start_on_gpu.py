"""A job starts on simulated GPUs to which DeepSpeed has bound its default group: groups wait for their members alone,
and the start-up check of the channels tells those that answer from those that don't."""

from __future__ import annotations

from datetime import timedelta
from types import SimpleNamespace
from typing import Any

import torch
import torch.distributed as dist
from pipelines import FP32, FP32_ZERO1, Job, data
from simulated_gpu.communicator import BOUND_DEVICE, Counts
from simulated_gpu.processes import run_on_gpus

from ds_vshape.comm.exchange import Exchange
from ds_vshape.comm.groups import allow_at_least, new_group
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


def engine(rank: int) -> tuple[int, list[float]]:
    """How many splits of the default communicator a job made; its losses."""
    engine = Job("v-half", 2, 2, FP32_ZERO1).engine()
    losses = [float(engine.train_batch(data(engine, batch))) for batch in range(2)]
    world: Any = dist.group.WORLD
    assert world.bound_device_id == BOUND_DEVICE
    return Counts.splits, losses


def test_nor_do_deepspeeds_groups_wait_for_all_ranks() -> None:
    """Of two pipelines: those of DeepSpeed's grid and of its engine, of which most are never used."""
    (splits, losses), *others = run_on_gpus(4, engine)
    assert splits == 0 and all(other == (splits, losses) for other in others)


def test_time_limits_reach_what_torch_wraps_to_debug_it() -> None:
    """With TORCH_DISTRIBUTED_DEBUG=DETAIL each backend is in a wrapper, which has options but no limit to set."""
    limits: list[timedelta] = []
    options = SimpleNamespace(_timeout=timedelta(seconds=5))
    backend = SimpleNamespace(options=options, _set_default_timeout=limits.append)
    group = SimpleNamespace(_get_backend=lambda device: SimpleNamespace(options=options, wrapped_pg=backend))
    for seconds in (4.0, 6.0):
        allow_at_least(group, seconds)
    assert limits == [timedelta(seconds=6)]
    # torch's own has what this one has.
    wrapper: Any = torch._C._distributed_c10d._ProcessGroupWrapper
    assert hasattr(wrapper, "options") and hasattr(wrapper, "wrapped_pg")
    assert not hasattr(wrapper, "_set_default_timeout")


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
    assert error.count("can't reach each other") == 1
    assert "rank 1 (" in error and "rank 2 (" in error
