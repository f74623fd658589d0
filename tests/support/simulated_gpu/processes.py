"""Forked ranks, each with a simulated device of its own, on NCCL's stand-in."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable
from datetime import timedelta
from functools import partial
from typing import Any

import deepspeed
import torch
import torch.distributed as dist
from deepspeed.accelerator import set_accelerator
from ranks import run_ranks
from simulated_gpu.accelerator import SimulatedGpu
from simulated_gpu.communicator import BACKEND, BOUND_DEVICE, SIMULATION, register
from simulated_gpu.deferral import Deferral, Residence
from simulated_gpu.device import DEVICE_OF_RANK
from torch.utils._python_dispatch import _disable_current_modes

# Longer than any test waits: for those that want the watchdog there is an argument.
WATCHDOG_SECONDS = 600.0


def run_on_gpus(world: int, body: Callable[..., Any], *args: Any, timeout: float = 120.0,
                watchdog_seconds: float = WATCHDOG_SECONDS) -> list[Any]:
    """`run_ranks`, with a simulated device on each rank, to which the default group is bound, as DeepSpeed does it."""
    start = partial(_start, timedelta(seconds=watchdog_seconds))
    return run_ranks(world, _run, body, *args, timeout=timeout, start=start)


def _start(watchdog: timedelta, rank: int, world: int, store: str) -> None:
    # Each rank as on a host of its own.
    os.environ["LOCAL_RANK"] = "0"
    set_accelerator(SimulatedGpu())
    register()
    dist.init_process_group(BACKEND, init_method=store, rank=rank, world_size=world, timeout=watchdog)
    dist.group.WORLD.bound_device_id = BOUND_DEVICE  # type: ignore[union-attr]
    deepspeed.init_distributed(BACKEND, verbose=False)
    threading.Thread.run = _run_on_gpu  # type: ignore[method-assign]
    # Memory isn't given out again before all that uses it has run. (torch refuses a stream that isn't its own.)
    torch.Tensor.record_stream = lambda tensor, stream: None  # type: ignore[method-assign]
    torch.UntypedStorage.resize_ = _resize  # type: ignore[method-assign]
    torch._C._storage_Use_Count = _use_count  # type: ignore[attr-defined]


def _run(rank: int, body: Callable[..., Any], *args: Any) -> Any:
    with Residence(), Deferral():
        result = body(rank, *args)
        DEVICE_OF_RANK.synchronize()
    return result


_resize_storage = torch.UntypedStorage.resize_


def _resize(storage: torch.UntypedStorage, nbytes: int) -> None:
    if DEVICE_OF_RANK.holds_storage(storage):
        with _disable_current_modes():
            DEVICE_OF_RANK.resize(storage, nbytes, _resize_storage)
    else:
        _resize_storage(storage, nbytes)


_count_uses = torch._C._storage_Use_Count  # type: ignore[attr-defined]


def _use_count(number: int) -> int:
    """Kernels that are launched hold no tensors."""
    return int(_count_uses(number)) - DEVICE_OF_RANK.uses_of(number)


_run_thread = threading.Thread.run


def _run_on_gpu(thread: threading.Thread) -> None:
    """A thread of the program uses the device too."""
    if thread.name == SIMULATION:
        _run_thread(thread)
        return
    with Residence(), Deferral():
        _run_thread(thread)
