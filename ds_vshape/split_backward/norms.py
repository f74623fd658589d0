"""Split counterparts of layer_norm and rms_norm, for the choice of operators that defers norm weights too."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ds_vshape.split_backward.function import Operators, SplitFunction
from ds_vshape.split_backward.store import WeightGradientStore
from ds_vshape.split_backward.weights import is_plain


class LayerNorm(SplitFunction):
    """x (..., *shape), weight (*shape) or None, bias (*shape) or None, shape, eps -> x normalized, (..., *shape)."""

    weight_arguments = (1, 2)
    saved_for_weight = (0, 1, 2)
    differentiable_twice = True

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor | None, bias: Tensor | None, shape: list[int], eps: float
    ) -> Tensor:
        value, mean, rstd = torch.native_layer_norm(x, shape, weight, bias, eps)
        ctx.save_for_backward(x, mean, rstd, weight, bias)
        ctx.shape = shape
        # For W, which asks only whether they are there: they may have changed by then.
        ctx.weights = [None if tensor is None else tensor.detach() for tensor in (weight, bias)]
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
    x, mean, rstd, *weights = ctx.saved_tensors
    weight, bias = weights if mask[0] else ctx.weights
    backward = torch.ops.aten.native_layer_norm_backward.default
    gradients: tuple[Tensor | None, ...] = backward(gradient, x, ctx.shape, mean, rstd, weight, bias, mask)
    return gradients


class RmsNorm(SplitFunction):
    """x (..., *shape), weight (*shape), shape, eps or None -> x / root mean square * weight, (..., *shape).

    aten composes this norm from other operators on some devices and fuses it on others. Each half therefore runs the
    norm again and lets autograd differentiate it, for one more forward in B and in W. Each gradient is exact; where
    aten composes the norm and its input has other uses, their sum is equal to rounding: aten adds two parts one by one.
    """

    weight_arguments = (1,)
    saved_for_weight = (0,)
    differentiable_twice = True

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, shape: list[int], eps: float | None) -> Tensor:
        ctx.save_for_backward(x, weight)
        # For W, whose gradient doesn't depend on it: it may have changed by then.
        ctx.weight = weight.detach()
        ctx.shape, ctx.eps = shape, eps
        return torch.rms_norm(x, shape, weight, eps)

    @staticmethod
    def backward_input(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        if not ctx.needs_input_grad[0]:
            return None, None, None, None
        x, weight = ctx.saved_tensors
        return _rms_norm_gradient(ctx, x, weight, 0, gradient), None, None, None

    @staticmethod
    def backward_weight(ctx: Any, gradient: Tensor) -> Tensor:
        x, weight = ctx.saved_tensors
        return _rms_norm_gradient(ctx, x, ctx.weight if weight is None else weight, 1, gradient)


def _rms_norm_gradient(ctx: Any, x: Tensor, weight: Tensor, of: int, gradient: Tensor) -> Tensor:
    """The gradient of x (`of` 0) or weight (1); with a history, under create_graph."""
    twice = torch.is_grad_enabled()
    operands = [x, weight]
    if twice:
        # Hooks of the tensor itself are for the gradient that it gets in the end.
        operands[of] = operands[of].view_as(operands[of])
    else:
        operands = [tensor.detach() for tensor in operands]
        operands[of].requires_grad_()
    # A checkpoint that is running counts what is saved, and nothing is in the backward of an unsplit norm.
    with torch.enable_grad(), torch.autograd.graph.saved_tensors_hooks(_as_it_is, _as_it_is):
        value = torch.rms_norm(operands[0], ctx.shape, operands[1], ctx.eps)
    return torch.autograd.grad(value, operands[of], gradient, create_graph=twice)[0]


def _as_it_is(tensor: Tensor) -> Tensor:
    return tensor


def layer_norm(
    store: WeightGradientStore,
    input: Any = None,
    normalized_shape: Any = None,
    weight: Any = None,
    bias: Any = None,
    eps: Any = 1e-5,
    *rest: Any,
    **others: Any,
) -> Any:
    """torch.nn.functional.layer_norm with a weight, a bias or both."""
    if rest or others or not isinstance(normalized_shape, (tuple, list)) or not is_plain(input):
        return NotImplemented
    if not all(tensor is None or is_plain(tensor) for tensor in (weight, bias)):
        return NotImplemented
    return LayerNorm.apply_split(store, input, weight, bias, list(normalized_shape), eps)


def rms_norm(
    store: WeightGradientStore,
    input: Any = None,
    normalized_shape: Any = None,
    weight: Any = None,
    eps: Any = None,
    *rest: Any,
    **others: Any,
) -> Any:
    """torch.nn.functional.rms_norm with a weight."""
    if rest or others or not isinstance(normalized_shape, (tuple, list)):
        return NotImplemented
    if weight is None or not (is_plain(input) and is_plain(weight)):
        return NotImplemented
    return RmsNorm.apply_split(store, input, weight, list(normalized_shape), eps)


NORM_OPERATORS: Operators = {
    torch.nn.functional.layer_norm: layer_norm,
    torch.nn.functional.rms_norm: rms_norm,
}
