"""Operators and models for the split backward, and what one run of them leaves behind."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ds_vshape.split_backward import ALL_OPERATORS, MATRIX_OPERATORS, SplitBackward, WeightGradientStore, WholeGradients

DTYPES = [torch.float32, torch.bfloat16, torch.float64]


def add(parameter: nn.Parameter, gradient: Tensor) -> None:
    """Where W's gradients add up: a new sum each time, of a dense gradient and one that may be sparse."""
    assert not gradient.requires_grad
    parameter.grad = gradient if parameter.grad is None else gradient + parameter.grad


@dataclass(frozen=True)
class Trained:
    """What one run leaves behind: outputs, input gradients and weight gradients, and how many entries waited for W."""

    outputs: list[Tensor]
    input_gradients: list[Tensor | None]
    weight_gradients: list[Tensor | None]
    entries: int

    def assert_equal(self, other: Trained) -> None:
        for mine, others in (
            (self.outputs, other.outputs),
            (self.input_gradients, other.input_gradients),
            (self.weight_gradients, other.weight_gradients),
        ):
            assert len(mine) == len(others)
            for one, two in zip(mine, others):
                assert (one is None) == (two is None)
                assert one is None or torch.equal(one, two)


def train(module: nn.Module, batches: list[Tensor], operators: Any = None) -> Trained:
    """Forward and backward of each batch, the W of each after the B of the next; unsplit without `operators`."""
    module.zero_grad()
    outputs, input_gradients, stores, entries = [], [], [], 0
    for place, batch in enumerate(batches):
        leaf = batch.detach().requires_grad_(batch.requires_grad)
        store = WeightGradientStore()
        if operators is None:
            output = module(leaf)
            output.backward(upstream(output, place))
        else:
            with SplitBackward(store, operators):
                output = module(leaf)
            assert len(store) == 0
            with SplitBackward(store, operators):
                output.backward(upstream(output, place))
        entries += len(store)
        outputs.append(output.detach())
        input_gradients.append(leaf.grad)
        stores.append(store)
        if place > 0:
            stores[place - 1].run(WholeGradients(add))
    stores[-1].run(WholeGradients(add))
    weights = [None if parameter.grad is None else parameter.grad.clone() for parameter in module.parameters()]
    return Trained(outputs, input_gradients, weights, entries)


def upstream(output: Tensor, place: int) -> Tensor:
    """An output gradient: random, and by turns contiguous, transposed in memory and expanded."""
    generator = torch.Generator().manual_seed(place)
    if place % 3 == 0 or output.dim() < 2:
        return torch.randn(output.shape, generator=generator, dtype=torch.float64).to(output.dtype)
    if place % 3 == 1:
        shape = (*output.shape[:-2], output.size(-1), output.size(-2))
        return torch.randn(shape, generator=generator, dtype=torch.float64).to(output.dtype).transpose(-1, -2)
    return torch.randn((), generator=generator, dtype=torch.float64).to(output.dtype).expand(output.shape)


class Operation(nn.Module):
    """`function(x, *weights)` with the weights as parameters of the given shapes."""

    def __init__(self, function: Callable[..., Tensor], *shapes: tuple[int, ...]) -> None:
        super().__init__()
        self.function = function
        self.weights = nn.ParameterList(nn.Parameter(torch.randn(shape)) for shape in shapes)

    def forward(self, x: Tensor) -> Tensor:
        return self.function(x, *self.weights)


@dataclass(frozen=True)
class Case:
    """An operator, the shape of its input, its weights' shapes, and whether the split covers it."""

    name: str
    function: Callable[..., Tensor]
    x: tuple[int, ...]
    weights: list[tuple[int, ...]]
    covered: bool = True
    x_gradient: bool = True
    indices: int = 0
    operators: Any = field(default_factory=lambda: MATRIX_OPERATORS)
    entries: int = 1
    dtypes: Sequence[torch.dtype] = tuple(DTYPES)

    def module(self, dtype: torch.dtype) -> nn.Module:
        return Operation(self.function, *self.weights).to(dtype)

    def batches(self, dtype: torch.dtype, count: int = 3) -> list[Tensor]:
        if self.indices:
            return [torch.randint(0, self.indices, self.x) for _ in range(count)]
        return [torch.randn(self.x).to(dtype).requires_grad_(self.x_gradient) for _ in range(count)]


def in_their_dtypes(cases: Sequence[Case]) -> pytest.MarkDecorator:
    """Each of `cases` in each dtype that torch has the operator for."""
    return pytest.mark.parametrize("case, dtype", [
        pytest.param(case, dtype, id=f"{case.name}-{dtype}") for case in cases for dtype in case.dtypes])


def by_columns(x: Tensor) -> Tensor:
    """`x` with its last two dimensions the other way round in memory."""
    return x.transpose(-1, -2).contiguous().transpose(-1, -2)


def by_experts(x: Tensor, *weights: Tensor) -> Tensor:
    """Rows of x by one matrix or another, the first of them twice and the second never; biases where there are any."""
    products = [F.linear(rows, *(weight[expert] for weight in weights))
                for rows, expert in zip(x.chunk(4), (torch.tensor(0), 3, 2, 0))]
    return torch.cat(products)


def selected(x: Tensor, weight: Tensor, by: Callable[[Tensor, Tensor], Tensor]) -> Tensor:
    """Each row of x by a matrix of its own."""
    return by(x, weight[torch.tensor([2, 0, 2, 1, 2, -1])])


def grouped(x: Tensor, weight: Tensor) -> Tensor:
    """Rows of x in groups, one of them empty. Grouped products take no expanded gradients, so none is left here."""
    return torch.nn.functional.grouped_mm(x, weight, offs=torch.tensor([3, 3, 16], dtype=torch.int32)) * 1


# grouped_mm is made for no others.
GROUPED_DTYPES = [torch.float32, torch.bfloat16]

CASES = [
    Case("linear", F.linear, (6, 8), [(4, 8), (4,)]),
    Case("linear, odd", F.linear, (7, 5), [(3, 5), (3,)]),
    Case("linear without bias", F.linear, (7, 5), [(3, 5)]),
    Case("linear with keywords", lambda x, w, b: F.linear(input=x, weight=w, bias=b), (7, 5), [(3, 5), (3,)]),
    Case("linear 3-D", F.linear, (2, 7, 5), [(3, 5), (3,)]),
    Case("linear 3-D without bias", F.linear, (2, 7, 5), [(3, 5)]),
    Case("linear 4-D", F.linear, (2, 3, 7, 6), [(4, 6), (4,)]),
    Case("linear one row", F.linear, (1, 5), [(3, 5), (3,)]),
    Case("linear one column", F.linear, (7, 1), [(3, 1), (3,)]),
    Case("linear one output", F.linear, (7, 5), [(1, 5), (1,)]),
    Case("linear wide", F.linear, (33, 130), [(257, 130), (257,)]),
    Case("linear no rows", F.linear, (0, 5), [(3, 5), (3,)]),
    Case("linear 1-D", F.linear, (5,), [(3, 5), (3,)]),
    Case("linear 1-D without bias", F.linear, (5,), [(3, 5)]),
    Case("linear on the first stage", F.linear, (2, 7, 5), [(3, 5), (3,)], x_gradient=False),
    Case("linear by columns", lambda x, *w: F.linear(by_columns(x), *w), (7, 5), [(3, 5), (3,)]),
    Case("linear 3-D sequence first", lambda x, w: F.linear(x.transpose(0, 1), w), (2, 7, 5), [(3, 5)]),
    Case("linear 3-D sequence first, bias", lambda x, *w: F.linear(x.transpose(0, 1), *w), (2, 7, 5), [(3, 5), (3,)],
         entries=2),
    Case("linear 4-D by columns, bias", lambda x, *w: F.linear(by_columns(x), *w), (2, 3, 7, 6), [(4, 6), (4,)],
         entries=2),
    Case("linear of a part", lambda x, *w: F.linear(x[..., 1:6], *w), (2, 7, 8), [(3, 5), (3,)], entries=2),
    Case("linear, frozen bias", lambda x, w: F.linear(x, w, torch.ones(3, dtype=x.dtype)), (7, 5), [(3, 5)]),
    Case("linear, frozen weight", lambda x, b: F.linear(x, torch.ones(3, 5, dtype=x.dtype), b), (7, 5), [(3,)], False),
    Case("linear, computed weight", lambda x, w: F.linear(x, w * 2), (7, 5), [(3, 5)], covered=False),
    Case("linear, computed bias", lambda x, w, b: F.linear(x, w, b * 2), (7, 5), [(3, 5), (3,)], covered=False),
    Case("linear, written to", lambda x, *w: F.relu_(F.linear(x, *w)), (2, 7, 5), [(3, 5), (3,)]),
    Case("@", lambda x, w: x @ w, (7, 5), [(5, 3)]),
    Case("@ 3-D", lambda x, w: x @ w, (2, 7, 5), [(5, 3)]),
    Case("@ 3-D sequence first", lambda x, w: x.transpose(0, 1) @ w, (2, 7, 5), [(5, 3)]),
    Case("@ by columns", lambda x, w: by_columns(x) @ w, (7, 5), [(5, 3)]),
    Case("@ weight.t()", lambda x, w: x @ w.t(), (7, 5), [(3, 5)]),
    Case("@ weight.T, 3-D", lambda x, w: x @ w.T, (2, 7, 5), [(3, 5)]),
    Case("@ weight.mT, square", lambda x, w: x @ w.mT, (2, 7, 5), [(5, 5)]),
    Case("@ part of a weight", lambda x, w: x @ w[:, :2], (7, 5), [(5, 3)], covered=False),
    Case("@ part of weight.t()", lambda x, w: x @ w.t()[:, :3], (7, 3), [(5, 3)], covered=False),
    Case("@ batch of weights", lambda x, w: x @ w, (2, 7, 5), [(2, 5, 3)]),
    Case("@ vector", lambda x, w: x @ w, (7, 5), [(5,)], covered=False),
    Case("weight @", lambda x, w: w @ x, (7, 5), [(3, 7)]),
    Case("weight @ by columns", lambda x, w: w @ by_columns(x), (7, 5), [(3, 7)]),
    Case("weight @ 3-D", lambda x, w: w @ x, (2, 7, 5), [(3, 7)], covered=False),
    Case("torch.matmul", lambda x, w: torch.matmul(x, other=w), (2, 7, 5), [(5, 3)]),
    Case("Tensor.matmul", lambda x, w: x.matmul(w), (2, 7, 5), [(5, 3)]),
    Case("torch.mm", lambda x, w: torch.mm(x, mat2=w), (7, 5), [(5, 3)]),
    Case("Tensor.mm", lambda x, w: w.mm(x), (7, 5), [(3, 7)]),
    Case("torch.bmm", torch.bmm, (2, 7, 5), [(2, 5, 3)]),
    Case("Tensor.bmm", lambda x, w: x.bmm(w), (2, 7, 5), [(2, 5, 3)]),
    Case("weight.bmm", lambda x, w: w.bmm(x), (2, 7, 5), [(2, 3, 7)]),
    Case("weight @ batch", lambda x, w: w @ by_columns(x), (2, 7, 5), [(2, 3, 7)]),
    Case("bmm weight.mT", lambda x, w: x.bmm(w.mT), (2, 7, 5), [(2, 3, 5)]),
    Case("@ weight.transpose, first stage", lambda x, w: x @ w.transpose(-2, -1), (2, 7, 5), [(2, 3, 5)], True, False),
    Case("bmm weight.transpose(0, 1)", lambda x, w: x.bmm(w.transpose(0, 1)), (2, 7, 5), [(5, 2, 3)], covered=False),
    Case("linear of experts", by_experts, (12, 5), [(4, 3, 5)], entries=4),
    Case("linear of experts, biases", by_experts, (12, 5), [(4, 3, 5), (4, 3)], entries=4),
    Case("@ an expert", lambda x, w: x @ w[-1] + x @ w.select(0, 1), (2, 7, 5), [(3, 5, 5)], entries=2),
    Case("@ an expert again", lambda x, w: (lambda one: x @ one + (x @ w[1]) @ one)(w[1]), (7, 5), [(3, 5, 5)],
         entries=3),
    Case("@ each expert", lambda x, w: sum((x @ one for one in w), torch.zeros(())), (7, 5), [(3, 5, 4)], entries=3),
    Case("@ an expert and all", lambda x, w: x @ w[0] + (x @ w).sum(0), (2, 7, 5), [(2, 5, 5)], entries=2),
    Case("@ expert.t()", lambda x, w: x @ w[1].t(), (7, 5), [(3, 4, 5)], covered=False),
    Case("@ row of experts", lambda x, w: x @ w[:, 1], (7, 3), [(3, 4, 5)], covered=False),
    Case("bmm of a selection", lambda x, w: selected(x, w, torch.bmm), (6, 2, 5), [(3, 5, 4)]),
    Case("selection @", lambda x, w: selected(x, w, lambda x, w: w @ x), (6, 5, 2), [(3, 4, 5)]),
    Case("selection and an expert", lambda x, w: selected(x, w, torch.bmm) + x @ w[2] + x @ w[1], (6, 2, 5),
         [(3, 5, 4)], entries=3),
    Case("selection, scaled", lambda x, w: selected(x, w, lambda x, w: x @ w.mul_(2)), (6, 2, 5), [(3, 5, 4)],
         covered=False),
    Case("grouped", grouped, (16, 8), [(3, 8, 16)], dtypes=GROUPED_DTYPES),
    Case("grouped, square, weight.mT", lambda x, w: grouped(x, w.mT), (16, 8), [(3, 8, 8)], dtypes=GROUPED_DTYPES),
    Case("grouped by columns", lambda x, w: grouped(by_columns(x), w), (16, 8), [(3, 8, 16)], dtypes=GROUPED_DTYPES),
    Case("grouped by columns, weight.mT", lambda x, w: grouped(by_columns(x), w.mT), (16, 8), [(3, 16, 8)],
         dtypes=GROUPED_DTYPES),
    Case("grouped, first stage", lambda x, w: grouped(x, w.mT), (16, 8), [(3, 16, 8)], True, False,
         dtypes=GROUPED_DTYPES),
    Case("torch.addmm", lambda x, w, b: torch.addmm(b, x, w), (7, 5), [(5, 3), (3,)]),
    Case("Tensor.addmm", lambda x, w, b: b.addmm(x, w), (7, 5), [(5, 3), (3,)]),
    Case("addmm by columns", lambda x, w, b: torch.addmm(b, by_columns(x), w), (7, 5), [(5, 3), (3,)]),
    Case("addmm weight.t()", lambda x, w, b: torch.addmm(b, x, w.t()), (7, 5), [(3, 5), (3,)]),
    Case("addmm scaled", lambda x, w, b: torch.addmm(b, x, w, alpha=2), (7, 5), [(5, 3), (3,)], covered=False),
    Case("addmm of a matrix", lambda x, w, b: torch.addmm(b, x, w), (7, 5), [(5, 3), (7, 3)], covered=False),
    Case("embedding", F.embedding, (2, 7), [(11, 5)], indices=11),
    Case("embedding, padding", lambda i, w: F.embedding(i, w, padding_idx=3), (4, 9), [(5, 6)], indices=5),
    Case("embedding, padding last", lambda i, w: F.embedding(i, w, padding_idx=-1), (4, 9), [(5, 6)], indices=5),
    Case("embedding scaled", lambda i, w: F.embedding(i, w, scale_grad_by_freq=True), (9,), [(5, 6)], False, indices=5),
    Case("embedding, max_norm", lambda i, w: F.embedding(i, w, max_norm=9.0), (9,), [(5, 6)], False, indices=5),
    Case("conv1d", F.conv1d, (2, 6, 9), [(4, 6, 3), (4,)]),
    Case("conv1d without bias", lambda x, w: F.conv1d(x, w, stride=2), (2, 5, 9), [(3, 5, 3)]),
    Case("conv1d groups", lambda x, *w: F.conv1d(x, *w, padding=2, groups=3), (2, 6, 9), [(6, 2, 3), (6,)]),
    Case("conv1d dilated, first stage", lambda x, *w: F.conv1d(x, *w, 1, 2, 2), (2, 5, 9), [(3, 5, 3), (3,)],
         x_gradient=False),
    Case("conv2d", F.conv2d, (2, 4, 8, 6), [(6, 4, 3, 3), (6,)]),
    Case("conv2d odd", lambda x, *w: F.conv2d(x, *w, (2, 1), (1, 0)), (3, 5, 7, 9), [(3, 5, 3, 2), (3,)]),
    Case("conv2d same", lambda x, *w: F.conv2d(x, *w, padding="same"), (2, 4, 7, 6), [(5, 4, 3, 5), (5,)]),
    Case("conv2d valid", lambda x, *w: F.conv2d(x, *w, padding="valid"), (2, 4, 7, 6), [(5, 4, 3, 5), (5,)]),
    Case("conv2d unbatched", F.conv2d, (4, 7, 6), [(5, 4, 3, 5), (5,)]),
    Case("conv2d channels last", lambda x, *w: F.conv2d(x.to(memory_format=torch.channels_last), *w), (2, 4, 8, 6),
         [(6, 4, 3, 3), (6,)]),
    Case("conv3d", F.conv3d, (2, 3, 5, 4, 6), [(4, 3, 2, 2, 3), (4,)]),
    Case("layer_norm in B", lambda x, *w: F.layer_norm(x, (5,), *w), (2, 7, 5), [(5,), (5,)], covered=False),
    Case("layer_norm", lambda x, *w: F.layer_norm(x, (5,), *w), (2, 7, 5), [(5,), (5,)], operators=ALL_OPERATORS),
    Case("layer_norm 2 dimensions", lambda x, *w: F.layer_norm(x, (7, 5), *w), (6, 7, 5), [(7, 5), (7, 5)],
         operators=ALL_OPERATORS),
    Case("layer_norm without bias", lambda x, w: F.layer_norm(x, (64,), w), (33, 64), [(64,)], operators=ALL_OPERATORS),
    Case("layer_norm by columns", lambda x, *w: F.layer_norm(by_columns(x), (5,), *w), (2, 7, 5), [(5,), (5,)],
         operators=ALL_OPERATORS),
    Case("layer_norm first stage", lambda x, *w: F.layer_norm(x, (5,), *w), (2, 7, 5), [(5,), (5,)], True, False,
         operators=ALL_OPERATORS),
    Case("layer_norm without weights", lambda x: F.layer_norm(x, (5,)), (2, 7, 5), [], False, operators=ALL_OPERATORS),
    Case("rms_norm in B", lambda x, w: F.rms_norm(x, (5,), w), (2, 7, 5), [(5,)], covered=False),
    Case("rms_norm", lambda x, w: F.rms_norm(x, (5,), w), (2, 7, 5), [(5,)], operators=ALL_OPERATORS),
    Case("rms_norm wide", lambda x, w: F.rms_norm(x, (64,), w, eps=1e-6), (33, 64), [(64,)], operators=ALL_OPERATORS),
    Case("rms_norm first stage", lambda x, w: F.rms_norm(x, (5,), w), (2, 7, 5), [(5,)], True, False,
         operators=ALL_OPERATORS),
]


class Tied(nn.Module):
    """An embedding used again as the head, and one linear layer applied three times."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding, self.linear = nn.Embedding(13, 10), nn.Linear(10, 10)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embedding(tokens)
        for _ in range(3):
            x = x + torch.tanh(self.linear(x))
        return F.linear(x, self.embedding.weight)
