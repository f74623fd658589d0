"""Layers between checkpoints: numbered by their place in the model, trained, and given what they'd get without."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from deepspeed.runtime.activation_checkpointing import checkpointing as ds_checkpointing
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from ds_vshape.module.segment import Segment

CHECKPOINTS: dict[str, Callable[..., Any]] = {
    "deepspeed": ds_checkpointing.checkpoint, "deepspeed, not reentrant": ds_checkpointing.non_reentrant_checkpoint,
    "torch": partial(checkpoint, use_reentrant=True), "torch, not reentrant": partial(checkpoint, use_reentrant=False),
}


def segment(*layers: Any) -> tuple[Segment, list[int]]:
    """`layers` as those from the fifth of a model on, and the numbers that they announce."""
    entered: list[int] = []
    return Segment(layers, 5, entered.append), entered


@pytest.mark.parametrize("kind", CHECKPOINTS)
def test_the_recomputed_layers_have_the_same_numbers(kind: str) -> None:
    made, entered = segment(nn.Linear(3, 3), torch.tanh, nn.Linear(3, 3))
    x = torch.randn(2, 3, requires_grad=True)
    expected = made.run(x)
    assert entered == [5, 6, 7]
    output = made.run_checkpointed(CHECKPOINTS[kind], x)
    output.sum().backward()
    assert entered == [5, 6, 7] * 3
    assert torch.equal(output, expected)


@pytest.mark.parametrize("kind", CHECKPOINTS)
@pytest.mark.parametrize("tied", [False, True])
def test_weights_get_gradients_though_no_input_wants_one(kind: str, tied: bool) -> None:
    embedding = nn.Embedding(7, 3)
    made, _ = segment(partial(lambda module, x: module(x), embedding) if tied else embedding, torch.tanh)
    tokens = torch.tensor([1, 2, 2])
    made.run(tokens).sum().backward()
    expected, embedding.weight.grad = embedding.weight.grad, None
    made.run_checkpointed(CHECKPOINTS[kind], tokens).sum().backward()
    assert expected is not None and embedding.weight.grad is not None
    assert torch.equal(embedding.weight.grad, expected)


@pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad")  # torch's own says so
@pytest.mark.parametrize("kind", CHECKPOINTS)
def test_what_is_frozen_or_evaluated_wants_no_gradient(kind: str) -> None:
    frozen, _ = segment(nn.Embedding(7, 3).requires_grad_(False), torch.tanh)
    assert not frozen.run_checkpointed(CHECKPOINTS[kind], torch.tensor([1])).requires_grad
    trained, _ = segment(nn.Embedding(7, 3))
    with torch.no_grad():
        assert not trained.run_checkpointed(CHECKPOINTS[kind], torch.tensor([1])).requires_grad


@pytest.mark.parametrize("count", [1, 2])
@pytest.mark.parametrize("kind", CHECKPOINTS)
def test_tuples_stay_tuples(kind: str, count: int) -> None:
    """DeepSpeed's own makes a tuple of one a tensor, of which the next layer might take the first sample for it."""
    seen: list[Any] = []

    def layer(inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        seen.append(inputs)
        return tuple(tensor * tensor for tensor in inputs)

    made, _ = segment(layer)
    inputs = tuple(torch.ones(2, requires_grad=True) for _ in range(count))
    outputs = made.run_checkpointed(CHECKPOINTS[kind], inputs)
    sum(tensor.sum() for tensor in outputs).backward()
    assert isinstance(outputs, tuple) and len(outputs) == count
    assert [(type(given), len(given)) for given in seen] == [(tuple, count)] * 2
    assert all(tensor.grad is not None and torch.equal(tensor.grad, torch.full((2,), 2.0)) for tensor in inputs)
