"""The simulated GPU is as strict as a real one."""

from __future__ import annotations

import ctypes
import time
from datetime import timedelta
from typing import Any

import pytest
import torch
import torch.distributed as dist
from deepspeed.accelerator import get_accelerator
from ranks import RanksFailed
from simulated_gpu.device import DEVICE, DEVICE_OF_RANK
from simulated_gpu.processes import run_on_gpus
from torch import nn


def peek(tensor: torch.Tensor) -> list[float]:
    """The numbers that lie in the device's memory right now, without waiting."""
    assert tensor.dtype is torch.float32
    with torch._C.DisableTorchFunction():
        return list((ctypes.c_float * tensor.numel()).from_address(tensor.untyped_storage().data_ptr()))


def operators(rank: int) -> None:
    x = torch.arange(4.0).to(DEVICE)
    y = x * 2
    assert all(number != number for number in peek(y)), "it hasn't run yet"
    assert [why for why, _ in DEVICE_OF_RANK.synchronizations] == ["from the host"]
    assert y.tolist() == [0, 2, 4, 6] and len(DEVICE_OF_RANK.synchronizations) == 2
    y.add_(1)
    assert peek(y) == [0, 2, 4, 6]
    assert float(y.sum()) == 16
    with pytest.raises(RuntimeError, match="same device"):
        y + torch.ones(4)
    layer = nn.Linear(4, 3).to(DEVICE)
    assert all(map(DEVICE_OF_RANK.holds, layer.parameters()))
    again = nn.Linear(4, 3)
    again.load_state_dict({name: value.cpu() for name, value in layer.state_dict().items()})
    layer(y).square().sum().backward()
    again(y.cpu()).square().sum().backward()
    assert torch.equal(layer.weight.grad.cpu(), again.weight.grad)


def test_operators_run_when_they_are_needed() -> None:
    run_on_gpus(1, operators)


def copies(rank: int) -> None:
    usual, pinned = torch.ones(3), torch.ones(3, pin_memory=True)
    assert pinned.is_pinned() and not usual.is_pinned() and usual.pin_memory().is_pinned()
    found = [tensor.to(DEVICE, non_blocking=True) for tensor in (usual, pinned)]
    assert not DEVICE_OF_RANK.synchronizations
    # The GPU reads page-locked memory when its turn has come, and gets a copy of any other at once.
    for tensor in (usual, pinned):
        tensor.fill_(2)
    assert [tensor.tolist() for tensor in found] == [[1, 1, 1], [2, 2, 2]]
    before = len(DEVICE_OF_RANK.synchronizations)
    torch.ones(3, device=DEVICE), torch.full((), 3.0, device=DEVICE)
    assert len(DEVICE_OF_RANK.synchronizations) == before
    usual.to(DEVICE), torch.tensor(3.0, device=DEVICE)
    assert [why for why, _ in DEVICE_OF_RANK.synchronizations[before:]] == ["from the host"] * 2


def test_copies_from_the_host_wait_unless_they_are_told_not_to() -> None:
    run_on_gpus(1, copies)


def messages(rank: int) -> Any:
    x = torch.full((3,), float(rank + 1)).to(DEVICE)
    work = dist.isend(x * 1, 1) if rank == 0 else dist.irecv(x, 0)
    if rank == 1:
        work.wait()
        y = x + 1
        assert y.tolist() == [2, 2, 2]
    with pytest.raises(TypeError, match="not supported for NCCL"):
        dist.isend(torch.zeros(2, dtype=torch.int16, device=DEVICE), 1 - rank)
    with pytest.raises(RuntimeError, match="No backend type associated with device type cpu"):
        dist.isend(torch.zeros(2), 1 - rank)
    z = torch.ones(2, device=DEVICE) * (rank + 1)
    dist.all_reduce(z)
    get_accelerator().synchronize()
    assert peek(z) == [3, 3]


def test_messages_obey_the_rules_of_nccl() -> None:
    run_on_gpus(2, messages)


def early_write(rank: int) -> Any:
    x = torch.full((3,), float(rank + 1)).to(DEVICE)
    store = dist.distributed_c10d._get_default_store()
    if rank == 1:
        # The communicator is made first; then the message is awaited when it has changed.
        dist.irecv(torch.zeros(1, device=DEVICE), 0).wait(timedelta(seconds=60))
        store.wait(["changed"])
        dist.irecv(x, 0).wait()
        return x.tolist()
    dist.isend(torch.zeros(1, device=DEVICE), 1)
    side = get_accelerator().Stream()
    side.wait_stream(get_accelerator().current_stream())
    with get_accelerator().stream(side):
        work = dist.isend(x, 1)
    x.fill_(7)
    DEVICE_OF_RANK.finish()
    assert not work.is_completed()
    store.set("changed", "yes")
    work.wait(timedelta(seconds=60))
    return None


def test_a_send_reads_its_memory_when_both_sides_have_met() -> None:
    assert run_on_gpus(2, early_write)[1] == [7, 7, 7]


@pytest.mark.slow
def test_an_operation_that_nobody_meets_ends_the_process_without_a_word() -> None:
    with pytest.raises(RanksFailed, match="Watchdog caught collective operation timeout: recv"):
        run_on_gpus(2, unmet, watchdog_seconds=3)


def unmet(rank: int) -> None:
    dist.barrier()
    if rank == 0:
        dist.irecv(torch.zeros(3, device=DEVICE), 1).wait()
        get_accelerator().synchronize()
    else:
        time.sleep(10)
