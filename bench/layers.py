"""Layers whose passes take a set time whatever the machine: they sleep around a small matrix product.

Ranks that sleep don't compete for cores, so a few cores show what a schedule does on as many devices as there are
ranks. The sleep of W belongs to the weight gradient: an engine that doesn't split sleeps both in its backward.
"""

from __future__ import annotations

import time
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from ds_vshape.split_backward import SplitFunction


class _SleepingProduct(SplitFunction):
    """x @ weight.T, sleeping `seconds` = (F, B, W)."""

    weight_arguments = (1,)
    saved_for_weight = (0,)

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, seconds: tuple[float, ...]) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.seconds = seconds
        time.sleep(seconds[0])
        return functional.linear(x, weight)

    @staticmethod
    def backward_input(ctx: Any, grad: Tensor) -> Any:
        time.sleep(ctx.seconds[1])
        return grad @ ctx.saved_tensors[1], None, None

    @staticmethod
    def backward_weight(ctx: Any, grad: Tensor) -> Tensor:
        time.sleep(ctx.seconds[2])
        return grad.flatten(0, -2).t() @ ctx.saved_tensors[0].flatten(0, -2)


class SleepingLinear(nn.Module):
    """A linear layer of `width` with a residual, of which F, B and W take at least `seconds` each."""

    def __init__(self, width: int, seconds: tuple[float, ...]) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(width, width))
        nn.init.normal_(self.weight, std=0.02)
        self.seconds = seconds

    def forward(self, x: Tensor) -> Tensor:
        # The first layer of the model must take its B too, though nobody wants the gradient of the data.
        if torch.is_grad_enabled() and not x.requires_grad:
            x = x.detach().requires_grad_()
        return x + self.product(x)

    def product(self, x: Tensor) -> Tensor:
        product: Tensor = _SleepingProduct.apply(x, self.weight, self.seconds)
        return product


class _HoldingProduct(_SleepingProduct):
    """The same, which saves `held` bytes more, until W."""

    saved_for_weight = (0, 2)

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, seconds: tuple[float, ...], held: int) -> Tensor:
        product = _SleepingProduct.forward(ctx, x, weight, seconds)
        ctx.save_for_backward(x, weight, torch.ones(held, dtype=torch.uint8))
        return product

    @staticmethod
    def backward_input(ctx: Any, grad: Tensor) -> Any:
        return *_SleepingProduct.backward_input(ctx, grad), None


class HoldingLinear(SleepingLinear):
    """The same layer, which keeps `held` bytes of a micro-batch from F to W, next to which its input is nothing."""

    def __init__(self, width: int, seconds: tuple[float, ...], held: int) -> None:
        super().__init__(width, seconds)
        self.held = held

    def product(self, x: Tensor) -> Tensor:
        product: Tensor = _HoldingProduct.apply(x, self.weight, self.seconds, self.held)
        return product


class BlockLinear(HoldingLinear):
    """The same layer, of which x [rows, width] takes and keeps in proportion to its rows: `seconds` and `held` are of
    `rows` of them."""

    def __init__(self, width: int, seconds: tuple[float, ...], held: int, rows: int) -> None:
        super().__init__(width, seconds, held)
        self.of_rows = rows, seconds, held

    def forward(self, x: Tensor) -> Tensor:
        rows, seconds, held = self.of_rows
        self.seconds = tuple(each * len(x) / rows for each in seconds)
        self.held = held * len(x) // rows
        return super().forward(x)


class LengthSleepingLinear(SleepingLinear):
    """The same layer, of which the passes of x [length, width] take `seconds` for `length` of `mean`."""

    def __init__(self, width: int, seconds: tuple[float, ...], mean: int) -> None:
        super().__init__(width, seconds)
        self.for_mean, self.mean = seconds, mean

    def forward(self, x: Tensor) -> Tensor:
        self.seconds = tuple(seconds * len(x) / self.mean for seconds in self.for_mean)
        return super().forward(x)


class _SleepingGradient(torch.autograd.Function):
    """The identity, whose gradient takes `seconds`; it saves `held` bytes until then."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, seconds: float, held: int = 0) -> Tensor:
        ctx.seconds = seconds
        ctx.save_for_backward(torch.ones(held, dtype=torch.uint8))
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
        time.sleep(ctx.seconds)
        return gradient, None, None


class HoldingPaths(SleepingLinear):
    """The same layer for torch's pipelines, which keeps `held` bytes of a micro-batch from F to W.

    Their split runs autograd twice, once for the inputs and once for the weights. A Function that computes both
    gradients would run whole, sleeps included, in both; so each sleep stands on a path of its own to the product.
    """

    def __init__(self, width: int, seconds: tuple[float, ...], held: int = 0) -> None:
        super().__init__(width, seconds)
        self.held = held

    def forward(self, x: Tensor) -> Tensor:
        time.sleep(self.seconds[0])
        if torch.is_grad_enabled() and not x.requires_grad:
            x = x.detach().requires_grad_()
        by_input = _SleepingGradient.apply(x, self.seconds[1])
        by_weight = _SleepingGradient.apply(self.weight, self.seconds[2], self.held)
        return x + functional.linear(by_input, by_weight)
