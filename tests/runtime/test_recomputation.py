"""Layers that are run again give the gradients that they would have given at once, and leave no other trace."""

from __future__ import annotations

import random
from contextlib import nullcontext
from typing import Any

import numpy
import pytest
import torch
from deepspeed.runtime.pipe.module import PipelineError
from kept_layers import WIDTH, layers
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef

from ds_vshape.runtime.buffers import enter, enter_copies
from ds_vshape.runtime.recomputation import ChangingBuffers, Recomputation
from ds_vshape.split_backward import SplitBackward, SplitForward, WeightGradientStore, WholeGradients


def forward(model: list[nn.Module], x: Any, again: Recomputation | None = None) -> Any:
    for number, layer in enumerate(model):
        if again is not None:
            again.starts(number)
        x = layer(x)
    return x


def buffers_of(model: list[nn.Module]) -> ChangingBuffers:
    return ChangingBuffers(model)


def random_numbers() -> list[float]:
    return [random.random(), numpy.random.rand(), float(torch.rand(()))]


def train(model: list[nn.Module], recomputed: int | None, splits: bool) -> list[Any]:
    """Outputs, gradients, buffers and random numbers of two micro-batches, of which the second runs in between."""
    torch.manual_seed(5)
    found: list[Any] = []
    buffers = buffers_of(model[:recomputed]) if recomputed is not None else None
    backwards = []
    for micro_batch in range(2):
        x = torch.randn(3, 4, WIDTH, generator=torch.Generator().manual_seed(micro_batch)).requires_grad_()
        store = WeightGradientStore()
        with SplitForward(store) if splits else nullcontext():
            if buffers is None:
                y = forward(model, enter(x))
                again = None
            else:
                again = Recomputation("stage 0, micro-batch 0", recomputed, buffers)
                with again.forgetting():
                    y = forward(model, enter_copies(x), again)
        backwards.append((x, y, store, again))
        found.append(y.detach().clone())
    for x, y, store, again in backwards:
        found += random_numbers()
        if again is not None:
            with SplitForward(store) if splits else nullcontext(), again.again():
                forward(model[:recomputed], enter(x))
                random_numbers()
        gradients: dict[Any, Tensor] = {}
        with SplitBackward(store) if splits else nullcontext():
            y.square().sum().backward()
        store.run(WholeGradients(lambda weight, gradient: gradients.update({weight: gradient})))
        weights = dict.fromkeys(weight for layer in model for weight in layer.parameters())
        found += [x.grad, *(gradients.get(weight, weight.grad) for weight in weights)]
        for weight in weights:
            weight.grad = None
    return [*found, *random_numbers(), *(buffer.clone() for layer in model for buffer in layer.buffers())]


@pytest.mark.parametrize("splits", [False, True])
@pytest.mark.parametrize("recomputed", [1, 5, len(layers())])
def test_gradients_are_those_without_it(recomputed: int, splits: bool) -> None:
    for state in (random.seed, numpy.random.seed):
        state(0)
    expected = train(layers(), None, splits)
    for state in (random.seed, numpy.random.seed):
        state(0)
    for value, oracle in zip(train(layers(), recomputed, splits), expected, strict=True):
        assert torch.equal(value, oracle) if isinstance(value, Tensor) else value == oracle


def alive(references: list[StorageWeakRef]) -> list[bool]:
    return [not reference.expired() for reference in references]


def test_each_layer_is_forgotten_when_the_next_one_starts() -> None:
    """Also what the last of them leaves is, and the layers after them keep theirs."""
    results: list[StorageWeakRef] = []
    seen: list[list[bool]] = []

    class Noted(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            seen.append(alive(results))
            y = x.exp()
            results.append(StorageWeakRef(y.untyped_storage()))
            return y * 2

    model: list[nn.Module] = [Noted() for _ in range(4)]
    x = torch.full((3,), 0.1, requires_grad=True)
    again = Recomputation("", 3, buffers_of(model))
    with again.forgetting():
        y = forward(model, enter_copies(x), again)
    assert seen == [[], [False], [False] * 2, [False] * 3] and alive(results) == [False] * 3 + [True]
    with again.again():
        forward(model[:3], enter(x))
    assert alive(results[4:]) == [True] * 3
    y.sum().backward()
    assert not any(alive(results))


class Changing(nn.Module):
    """Does something else each time."""

    def __init__(self, what: str) -> None:
        super().__init__()
        self.what, self.times = what, 0

    def forward(self, x: Tensor) -> Tensor:
        self.times += 1
        if self.times == 1:
            return x.exp()
        changed = {"more": lambda: x.exp().exp(), "fewer": lambda: x * 1, "another": lambda: x.repeat(2).exp()}
        return changed[self.what]()


@pytest.mark.parametrize("what, found", [
    ("more", "more"), ("fewer", "0 of them"),
    ("another", r"a float32 tensor of shape \[6\] in place of a float32 tensor of shape \[3\]")])
def test_layers_that_do_something_else_are_an_error(what: str, found: str) -> None:
    model: list[nn.Module] = [Changing(what)]
    again = Recomputation("stage 3, micro-batch 7", 1, buffers_of(model))
    x = torch.ones(3, requires_grad=True)
    with again.forgetting():
        forward(model, enter_copies(x), again)
    with pytest.raises(PipelineError, match=f"stage 3, micro-batch 7 is recomputed.* saved 1 tensors.* {found}"):
        with again.again():
            forward(model, enter(x))


def test_a_change_in_place_is_found_as_autograd_finds_it() -> None:
    class Wrong(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            y = x.exp()
            z = y * 2
            y.add_(1)
            return z

    x = torch.ones(3, requires_grad=True)
    again = Recomputation("", 1, buffers_of([]))
    with again.forgetting():
        y = forward([Wrong()], enter_copies(x), again)
    with again.again():
        forward([Wrong()], enter(x))
    with pytest.raises(RuntimeError, match=r"modified by an inplace operation.* version 1; expected version 0"):
        y.sum().backward()
