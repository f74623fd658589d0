"""What a forward leaves goes to the host and comes back bit for bit, and nothing else goes with it."""

from __future__ import annotations

import gc
import threading
import time
from collections.abc import Callable, Iterable
from contextlib import nullcontext
from itertools import chain, repeat
from typing import Any

import pytest
import torch
from kept_layers import WIDTH, layers
from resident import resident, trimmed
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef

from ds_vshape.comm.background import Thread
from ds_vshape.runtime.copy_engine import CopyEngine, HostMemory, copy_engine
from ds_vshape.runtime.saved_tensors import SavedTensors
from ds_vshape.split_backward import SplitBackward, SplitForward, WeightGradientStore, WholeGradients


def inputs() -> Tensor:
    return torch.randn(3, 4, WIDTH, generator=torch.Generator().manual_seed(3)).requires_grad_()


def run(model: nn.Sequential, splits: bool, engine: CopyEngine | None) -> tuple[Tensor, list[Tensor | None]]:
    """The outputs and all gradients of two micro-batches of which each is away during the other's forward."""
    torch.manual_seed(5)
    done: list[Callable[[], list[Tensor | None]]] = []
    outputs = []

    def forward(x: Tensor) -> Callable[[], list[Tensor | None]]:
        store, saved = WeightGradientStore(), SavedTensors("cpu")
        gradients: dict[Any, Tensor] = {}
        with SplitForward(store) if splits else nullcontext(), saved.hooks() if engine else nullcontext():
            y = model(x * 1)
        outputs.append(y.detach().clone())
        if engine:
            assert saved.offload([x], engine).nbytes > 1000
            saved.free()

        def backward() -> list[Tensor | None]:
            if engine:
                saved.reload()
                saved.wait()
            with SplitBackward(store) if splits else nullcontext():
                y.square().sum().backward()
            store.run(WholeGradients(lambda weight, gradient: gradients.update({weight: gradient})))
            found = [x.grad, *(gradients.get(weight, weight.grad) for weight in model.parameters())]
            model.zero_grad()
            return found

        return backward

    done = [forward(inputs()), forward(inputs().detach().mul_(2).requires_grad_())]
    return torch.stack(outputs), [gradient for backward in done for gradient in backward()]


@pytest.mark.parametrize("splits", [False, True])
def test_gradients_are_those_without_it(splits: bool) -> None:
    outputs, gradients = run(nn.Sequential(*layers()), splits, copy_engine(time.perf_counter))
    expected, oracle = run(nn.Sequential(*layers()), splits, None)
    assert torch.equal(outputs, expected)
    for gradient, value in zip(gradients, oracle, strict=True):
        assert gradient is not None and value is not None and torch.equal(gradient, value)


def addresses(tensors: Iterable[Tensor]) -> set[int]:
    return {tensor.untyped_storage().data_ptr() for tensor in tensors}


def test_what_others_hold_stays() -> None:
    model = nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.Tanh(), nn.BatchNorm1d(WIDTH), nn.Sigmoid())
    table, saved, x = torch.rand(WIDTH), SavedTensors("cpu"), torch.randn(5, WIDTH, requires_grad=True)
    with saved.hooks():
        y = model(x) * table
        message = y.tanh()
        kept = model[0](x)
        loss = (message * kept.exp()).sum()
    moved = addresses([torch.empty(0).set_(storage) for storage in saved.movable([x])])
    assert x.untyped_storage().data_ptr() in moved
    others = [*model.parameters(), *model.buffers(), table, message, kept, loss]
    assert not moved & addresses(others)
    copy = saved.offload([x], copy_engine(time.perf_counter))
    # Linear's input, the results of Tanh, Sigmoid and exp, and the batch's statistics.
    assert copy.nbytes == 4 * (4 * 5 * WIDTH + 2 * WIDTH)
    saved.free()
    assert x.untyped_storage().nbytes() == 0 and message.untyped_storage().nbytes() == 4 * 5 * WIDTH
    with pytest.raises(RuntimeError, match="while its memory is on the host"):
        loss.backward()


def test_a_change_in_place_is_found_as_autograd_finds_it() -> None:
    def changed(saved: SavedTensors | None) -> Tensor:
        x = torch.ones(4, requires_grad=True)
        with saved.hooks() if saved else nullcontext():
            y = x.exp()
            loss = y.sum()
        y.add_(1)
        return loss

    for saved in (None, SavedTensors("cpu")):
        with pytest.raises(RuntimeError, match=r"modified by an inplace operation.* version 1; expected version 0"):
            changed(saved).backward()


MEBIBYTE = 2**20


@pytest.mark.parametrize("mebibytes", [2, 64])
def test_resident_memory_falls(mebibytes: int) -> None:
    """In sizes that the C library gives back by itself, and in others."""
    # The first copy loads what copies need.
    run(nn.Sequential(*layers()), False, copy_engine(time.perf_counter))
    # What the C library keeps of memory that other tests have freed: most of these tensors, below one that stays.
    stays = [torch.ones(MEBIBYTE // 40) for _ in range(2500)][-1]
    engine, saved = copy_engine(time.perf_counter), SavedTensors("cpu")
    count = 128 // mebibytes
    with saved.hooks():
        x = torch.ones(mebibytes * MEBIBYTE // 4, requires_grad=True)
        y = x
        for _ in range(count):
            y = y.sin()
        loss = y.sum()
    del y
    before = trimmed()
    assert saved.offload([x], engine).nbytes == 128 * MEBIBYTE
    saved.free()
    away = resident()
    assert away < before - 120 * MEBIBYTE
    saved.reload()
    saved.wait()
    assert resident() > away + 120 * MEBIBYTE
    loss.backward()
    assert x.grad is not None and x.grad.isfinite().all() and stays.all()


class Failing:
    """Memory of the host that is full, or can't be read."""

    def __init__(self, writes: bool) -> None:
        self.writes = writes

    def write(self, memory: Any) -> None:
        if self.writes:
            raise OSError("No space left on device")

    def read(self, memory: Any) -> None:
        raise OSError("Input/output error")


def engine_with(host: Callable[[], HostMemory]) -> CopyEngine:
    usual = copy_engine(time.perf_counter)
    return CopyEngine(usual.outwards, usual.backwards, host, usual.free, usual.now)


@pytest.mark.parametrize("writes", [True, False])
def test_an_error_of_a_copy_is_raised_where_it_is_awaited(writes: bool) -> None:
    saved, x = SavedTensors("cpu"), torch.ones(4, requires_grad=True)
    with saved.hooks():
        loss = x.exp().sum()
    saved.offload([x], engine_with(lambda: Failing(writes)))
    if not writes:
        saved.free()
        saved.reload()
    with pytest.raises(OSError, match="No space" if writes else "Input/output"):
        (saved.free if writes else saved.wait)()
    saved.abandon()
    del loss


@pytest.mark.parametrize("state", ["going", "away", "coming"])
def test_an_abandoned_one_frees_everything(state: str) -> None:
    engine = copy_engine(time.perf_counter)
    for lane in (engine.outwards, engine.backwards):
        # A copy that has to wait its turn.
        lane.start(lambda: time.sleep(0.1))
    saved, x = SavedTensors("cpu"), torch.ones(1000, requires_grad=True)
    with saved.hooks():
        loss = x.exp().sin().sum()
    memory = [StorageWeakRef(storage) for storage in saved.movable([x])]
    saved.offload([x], engine)
    if state != "going":
        saved.free()
    if state == "coming":
        saved.reload()
    saved.abandon()
    del saved, x, loss
    gc.collect()
    assert len(memory) == 2 and all(reference.expired() for reference in memory)


class Sleeping(Thread):
    """Copies take a while, and before each one what `first` says happens in their thread."""

    def __init__(self, first: Callable[[], Any]) -> None:
        super().__init__()
        self._first = first

    def start(self, work: Any, uses: Any = ()) -> Any:
        return super().start(lambda: (self._first(), time.sleep(0.02), work())[-1])


def wait_for(event: threading.Event) -> None:
    assert event.wait(60)


def test_copies_run_one_after_another_in_each_direction() -> None:
    """None goes out before all have been asked for, and none but the first before one comes back."""
    usual, asked, coming = copy_engine(time.perf_counter), threading.Event(), threading.Event()
    turns = chain([asked], repeat(coming))
    out, back = Sleeping(lambda: wait_for(next(turns))), Sleeping(coming.set)
    engine = CopyEngine(out, back, usual.host, usual.free, usual.now)
    every = [SavedTensors("cpu") for _ in range(3)]
    graphs, copies = [], []
    for saved in every:
        x = torch.ones(1000, requires_grad=True)
        with saved.hooks():
            graphs.append(x.exp().sum())
        copies.append(saved.offload([x], engine))
    asked.set()
    for saved in every:
        saved.free()
        saved.reload()
    for saved in every:
        saved.wait()
    for before, after in zip(copies, copies[1:]):
        assert before.outwards[1] <= after.outwards[0] and before.backwards[1] <= after.backwards[0]
    assert all(copy.outwards[1] <= copy.backwards[0] for copy in copies)
