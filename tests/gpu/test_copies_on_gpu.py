"""Copies to the host and back on a GPU: on streams of their own, in the right order with passes, without the host."""

from __future__ import annotations

from collections.abc import Callable

import torch
from simulated_gpu.device import DEVICE, DEVICE_OF_RANK
from simulated_gpu.processes import run_on_gpus
from torch import Tensor

from ds_vshape.measure.profiling import clock
from ds_vshape.runtime.copy_engine import Copy, copy_engine
from ds_vshape.runtime.saved_tensors import SavedTensors

NUMBERS = [float(number) for number in range(1, 65)]
EXPECTED = [3 * number + 1 for number in NUMBERS]


def moved() -> Tensor:
    """Numbers that are made, go to the host and come back while others are made, and are used; no host waits."""
    engine, before = copy_engine(clock().now), len(DEVICE_OF_RANK.synchronizations)
    made = torch.empty(len(NUMBERS), device=DEVICE).copy_(torch.tensor(NUMBERS).pin_memory(), non_blocking=True)
    kept, other = made * 3, made + 0.5
    copies = [engine.start([tensor.untyped_storage()]) for tensor in (kept, other)]
    for copy in copies:
        copy.free()
    assert kept.untyped_storage().nbytes() == other.untyped_storage().nbytes() == 0
    meanwhile = made.sin() * made.cos()
    for copy in reversed(copies):
        copy.start_back()
    for copy in reversed(copies):
        copy.finish()
    found = kept + 1 + 0 * (meanwhile + other)
    assert len(DEVICE_OF_RANK.synchronizations) == before
    DEVICE_OF_RANK.synchronize()
    for copy in copies:
        for marks in (copy.outwards, copy.backwards):
            start, end = clock().on_host(marks)
            assert start <= end
    return found


def without_waiting(waits: Callable[[Copy], bool]) -> list[float]:
    """What comes out if a copy's end isn't awaited where `waits` says no."""
    wait = Copy.wait
    Copy.wait = lambda copy: wait(copy) if waits(copy) else None  # type: ignore[method-assign]
    try:
        return moved().tolist()
    finally:
        Copy.wait = wait  # type: ignore[method-assign]


def in_order_and_not(rank: int) -> None:
    assert moved().tolist() == EXPECTED
    assert without_waiting(lambda copy: True) == EXPECTED
    # The memory is freed while the copy to the host may still run; it's used before it's back.
    for waits in (lambda copy: bool(copy.backwards), lambda copy: not copy.backwards):
        assert without_waiting(waits) != EXPECTED


def test_what_comes_back_is_what_went_away() -> None:
    run_on_gpus(1, in_order_and_not)


def saved_by_a_graph(rank: int) -> None:
    """Work that is launched and hasn't run holds no memory."""
    engine, saved = copy_engine(clock().now), SavedTensors(DEVICE.type)
    x = torch.linspace(0, 1, 32).to(DEVICE).requires_grad_()
    inputs = x * 1
    with saved.hooks():
        y = (inputs.exp() * inputs).sin()
    copy = saved.offload([inputs.detach()], engine)
    # The results of exp and of the product, and the input of both, which x * 1 has left to nobody else.
    del inputs
    saved.free()
    assert copy.nbytes >= 2 * 32 * 4
    saved.reload()
    saved.wait()
    y.sum().backward()
    plain = x.detach().cpu().requires_grad_()
    (plain.exp() * plain).sin().sum().backward()
    assert x.grad is not None and plain.grad is not None and torch.equal(x.grad.cpu(), plain.grad)


def test_a_graphs_tensors_go_and_come_back() -> None:
    run_on_gpus(1, saved_by_a_graph)


def given_up(rank: int) -> None:
    """A failed batch leaves copies in any state; memory is free then, and the engine goes on."""
    engine = copy_engine(clock().now)
    for steps in range(3):
        x = torch.ones(1024, device=DEVICE) * 2
        copy = engine.start([x.untyped_storage()])
        if steps > 0:
            copy.free()
        if steps > 1:
            copy.start_back()
        copy.abandon()
        del x
    assert moved().tolist() == EXPECTED


def test_copies_that_are_given_up() -> None:
    run_on_gpus(1, given_up)
