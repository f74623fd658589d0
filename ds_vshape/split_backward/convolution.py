"""Split counterparts of the convolutions, by aten's convolution_backward with one half of its output mask at a time."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor

from ds_vshape.split_backward.function import Operators, SplitFunction
from ds_vshape.split_backward.store import WeightGradientStore
from ds_vshape.split_backward.weights import is_deferrable, is_plain, is_plain_bias


class Convolution(SplitFunction):
    """x (batch, in, ...), weight (out, in / groups, ...), bias (out) or None -> (batch, out, ...).

    stride, padding and dilation are lists with a number for each dimension of space.
    """

    weight_arguments = (1, 2)
    saved_for_weight = (0,)
    differentiable_twice = True

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        stride: list[int],
        padding: list[int],
        dilation: list[int],
        groups: int,
    ) -> Tensor:
        ctx.save_for_backward(x, weight)
        # W asks for its shape and layout alone, so that it may have changed by then.
        ctx.weight = weight.detach()
        ctx.geometry = (stride, padding, dilation, False, [0] * len(stride), groups)
        return torch.convolution(x, weight, bias, *ctx.geometry)

    @staticmethod
    def backward_input(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        x_gradient = None
        if ctx.needs_input_grad[0]:
            x_gradient, _, _ = _convolution_backward(ctx, gradient, [True, False, False])
        return x_gradient, None, None, None, None, None, None

    @staticmethod
    def backward_weight(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        _, needs_weight, needs_bias, *_ = ctx.needs_input_grad
        return _convolution_backward(ctx, gradient, [False, needs_weight, needs_bias])[1:]


def _convolution_backward(ctx: Any, gradient: Tensor, mask: list[bool]) -> tuple[Tensor | None, ...]:
    x, weight = ctx.saved_tensors
    if weight is None:
        weight = ctx.weight
    backward = torch.ops.aten.convolution_backward.default
    gradients: tuple[Tensor | None, ...] = backward(gradient, x, weight, [weight.size(0)], *ctx.geometry, mask)
    return gradients


def convolution(
    dimensions: int,
    store: WeightGradientStore,
    input: Any = None,
    weight: Any = None,
    bias: Any = None,
    stride: Any = 1,
    padding: Any = 0,
    dilation: Any = 1,
    groups: Any = 1,
    *rest: Any,
    **others: Any,
) -> Any:
    """torch.conv1d, conv2d, conv3d, for inputs with or without a batch dimension.

    Padding "same" is covered where it is the same on both sides; aten pads the input first where it isn't.
    """
    batched = dimensions + 2
    if rest or others or not (is_deferrable(weight) and is_plain(input) and weight.dim() == batched):
        return NotImplemented
    if input.dim() not in (batched, batched - 1) or not is_plain_bias(bias, weight.size(0)):
        return NotImplemented
    strides, dilations = _each(stride, dimensions), _each(dilation, dimensions)
    paddings: list[int] | None
    if strides is None or dilations is None or not isinstance(groups, int):
        return NotImplemented
    if padding == "valid":
        paddings = [0] * dimensions
    elif padding == "same":
        totals = [dilation * (size - 1) for dilation, size in zip(dilations, weight.shape[2:])]
        if any(total % 2 for total in totals) or any(step != 1 for step in strides):
            return NotImplemented
        paddings = [total // 2 for total in totals]
    else:
        paddings = _each(padding, dimensions)
        if paddings is None:
            return NotImplemented
    if input.dim() == batched:
        return Convolution.apply_split(store, input, weight, bias, strides, paddings, dilations, groups)
    value = Convolution.apply_split(store, input.unsqueeze(0), weight, bias, strides, paddings, dilations, groups)
    return value if value is NotImplemented else value.squeeze(0)


def _each(numbers: Any, dimensions: int) -> list[int] | None:
    """`numbers`, which torch lets be one for all dimensions, as one for each; None if they are something else."""
    if isinstance(numbers, int):
        return [numbers] * dimensions
    if not isinstance(numbers, (list, tuple)) or not all(isinstance(number, int) for number in numbers):
        return None
    each = list(numbers) * dimensions if len(numbers) == 1 else list(numbers)
    return each if len(each) == dimensions else None


CONVOLUTIONS: Operators = {
    torch.conv1d: partial(convolution, 1),
    torch.conv2d: partial(convolution, 2),
    torch.conv3d: partial(convolution, 3),
}
