"""Split counterparts of layer_norm and rms_norm, for the choice of operators that defers norm weights too."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ds_vshape.split_backward.function import Operators, SplitFunction
from ds_vshape.split_backward.store import WeightGradientStore
from ds_vshape.split_backward.weights import is_plain


class LayerNorm(SplitFunction):
    """x (..., *shape), weight (*shape) or None, bias (*shape) or None, shape, eps -> x normalized, (..., *shape)."""

    weight_arguments = (1, 2)

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor | None, bias: Tensor | None, shape: list[int], eps: float
    ) -> Tensor:
        value, mean, rstd = torch.native_layer_norm(x, shape, weight, bias, eps)
        ctx.save_for_backward(x, mean, rstd, weight, bias)
        ctx.shape = shape
        return value

    @staticmethod
    def backward_input(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        x_gradient = None
        if ctx.needs_input_grad[0]:
            x_gradient, _, _ = _layer_norm_backward(ctx, gradient, [True, False, False])
        return x_gradient, None, None, None, None

    @staticmethod
    def backward_weight(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        return _layer_norm_backward(ctx, gradient, [False, *ctx.needs_input_grad[1:3]])[1:]


def _layer_norm_backward(ctx: Any, gradient: Tensor, mask: list[bool]) -> tuple[Tensor | None, ...]:
    x, mean, rstd, weight, bias = ctx.saved_tensors
    backward = torch.ops.aten.native_layer_norm_backward.default
    gradients: tuple[Tensor | None, ...] = backward(gradient, x, ctx.shape, mean, rstd, weight, bias, mask)
    return gradients


class RmsNorm(SplitFunction):
    """x (..., *shape), weight (*shape), shape, eps or None -> x / root mean square * weight, (..., *shape).

    aten composes this norm from other operators on some devices and fuses it on others. Each half therefore runs the
    norm again and lets autograd differentiate it: exact everywhere, for one more forward in B and in W.
    """

    weight_arguments = (1,)

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, shape: list[int], eps: float | None) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.shape, ctx.eps = shape, eps
        return torch.rms_norm(x, shape, weight, eps)

    @staticmethod
    def backward_input(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        if not ctx.needs_input_grad[0]:
            return None, None, None, None
        x, weight = (tensor.detach() for tensor in ctx.saved_tensors)
        return _rms_norm_gradient(ctx, x.requires_grad_(), weight, x, gradient), None, None, None

    @staticmethod
    def backward_weight(ctx: Any, gradient: Tensor) -> Tensor:
        x, weight = (tensor.detach() for tensor in ctx.saved_tensors)
        return _rms_norm_gradient(ctx, x, weight.requires_grad_(), weight, gradient)


def _rms_norm_gradient(ctx: Any, x: Tensor, weight: Tensor, of: Tensor, gradient: Tensor) -> Tensor:
    with torch.enable_grad():
        value = torch.rms_norm(x, ctx.shape, weight, ctx.eps)
    return torch.autograd.grad(value, of, gradient)[0]


def layer_norm(
    store: WeightGradientStore,
    input: Tensor,
    normalized_shape: Sequence[int],
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
) -> Any:
    """torch.nn.functional.layer_norm with a weight, a bias or both."""
    if not all(tensor is None or is_plain(tensor) for tensor in (input, weight, bias)):
        return NotImplemented
    return LayerNorm.apply_split(store, input, weight, bias, list(normalized_shape), eps)


def rms_norm(
    store: WeightGradientStore,
    input: Tensor,
    normalized_shape: Sequence[int],
    weight: Tensor | None = None,
    eps: float | None = None,
) -> Any:
    """torch.nn.functional.rms_norm with a weight."""
    if weight is None or not (is_plain(input) and is_plain(weight)):
        return NotImplemented
    return RmsNorm.apply_split(store, input, weight, list(normalized_shape), eps)


NORM_OPERATORS: Operators = {
    torch.nn.functional.layer_norm: layer_norm,
    torch.nn.functional.rms_norm: rms_norm,
}
