"""Split counterparts of the products with a weight matrix, and of the embedding.

Each gradient is computed by the aten calls that autograd itself would make (derivatives.yaml and FunctionsManual.cpp
of torch), so outputs and gradients are equal bit for bit. The Functions see matrices alone; flattening the leading
dimensions is left to autograd, as in aten's own linear and matmul. Where a sum of gradients exists already, W adds to
it in one call (accumulate.py); that rounds once where product and sum round twice.

An operator takes the store and then what the torch function takes; it returns NotImplemented for what it leaves to
autograd. Norms, activations and the like aren't here: a bias goes along because its output gradient is kept anyway.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import Parameter

from ds_vshape.split_backward.accumulate import add_product, add_rows
from ds_vshape.split_backward.batched import batched_product
from ds_vshape.split_backward.function import Operators, SplitFunction
from ds_vshape.split_backward.store import OperatorBuffers, WeightGradientStore
from ds_vshape.split_backward.weights import is_deferrable, is_plain, is_plain_bias, is_transposed_weight

# As they are now: DeepSpeed's flops profiler wraps the names in torch for a while, and has counted the call that led
# here already.
_mm, _addmm = torch.mm, torch.addmm
_unsafe_view = torch.ops.aten._unsafe_view.default


def _is_by_columns(matrix: Tensor) -> bool:
    """Whether aten takes `matrix` for column-major, and then computes its gradient column-major too."""
    return matrix.stride(0) == 1 and matrix.stride(1) == matrix.size(0)


def _left_gradient(gradient: Tensor, right: Tensor, by_columns: bool) -> Tensor:
    """The gradient of `left` in left @ right (aten: mm_mat1_grad); by_columns is that of `left`."""
    return right.mm(gradient.t()).t() if by_columns else gradient.mm(right.t())


def _right_gradient(gradient: Tensor, left: Tensor, by_columns: bool) -> Tensor:
    """The gradient of `right` in left @ right (aten: mm_mat2_grad); by_columns is that of `right`."""
    return gradient.t().mm(left).t() if by_columns else left.t().mm(gradient)


class _OfEarlierMemory(torch.autograd.Function):
    """The values of `earlier`, with the graph of `weight`, whose `.data` has been set to another tensor meanwhile."""

    @staticmethod
    def forward(ctx: Any, weight: Tensor, earlier: Tensor) -> Tensor:
        return earlier.view_as(earlier)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        return gradient, None


class Linear(SplitFunction):
    """x (n, k), weight (m, k), bias (m) or None -> x weight^T + bias, (n, m)."""

    weight_arguments = (1, 2)
    saved_for_weight = (0,)
    differentiable_twice = True

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        transposed = weight.t()
        if ctx.needs_input_grad[0]:
            ctx.save_for_backward(x, weight)
            # A view keeps its memory when `weight.data` is set to another, as the one that aten saves does.
            ctx.transposed = transposed
        else:
            ctx.save_for_backward(x, None)
        ctx.by_columns = _is_by_columns(transposed)
        return _mm(x, transposed) if bias is None else _addmm(bias, x, transposed)

    @staticmethod
    def backward_input(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        if not ctx.needs_input_grad[0]:
            return None, None, None
        x, weight = ctx.saved_tensors
        transposed = weight.t()
        # What hooks of saved tensors have unpacked isn't the Parameter, and needs no look.
        if isinstance(weight, Parameter) and weight.data_ptr() != ctx.transposed.data_ptr():
            transposed = _OfEarlierMemory.apply(transposed, ctx.transposed)  # type: ignore[no-untyped-call]
        del ctx.transposed
        return _left_gradient(gradient, transposed, _is_by_columns(x)), None, None

    @staticmethod
    def backward_weight(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        _, needs_weight, needs_bias = ctx.needs_input_grad
        return (
            _right_gradient(gradient, ctx.saved_tensors[0], ctx.by_columns).t() if needs_weight else None,
            gradient.sum(0) if needs_bias else None,
        )

    @classmethod
    def accumulate_weight(cls, ctx: Any, buffers: OperatorBuffers, gradient: Tensor) -> tuple[Tensor | None, ...]:
        if add_product(buffers[0], gradient.t(), ctx.saved_tensors[0]):
            return None, gradient.sum(0) if ctx.needs_input_grad[2] else None
        return cls.backward_weight(ctx, gradient)


class AddBias(SplitFunction):
    """x (..., m), bias (m) -> x + bias, (..., m)."""

    weight_arguments = (1,)
    differentiable_twice = True

    @staticmethod
    def forward(ctx: Any, x: Tensor, bias: Tensor) -> Tensor:
        return x + bias

    @staticmethod
    def backward_input(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        return gradient, None

    @staticmethod
    def backward_weight(ctx: Any, gradient: Tensor) -> Tensor:
        # A sum over no dimensions would be one over all.
        return gradient.sum(tuple(range(gradient.dim() - 1))) if gradient.dim() > 1 else gradient


class MatMul(SplitFunction):
    """x (n, k), weight (k, m), bias (m) or None -> x weight + bias, (n, m)."""

    weight_arguments = (1, 2)
    saved_for_weight = (0,)
    differentiable_twice = True

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(x, weight if ctx.needs_input_grad[0] else None)
        ctx.by_columns = _is_by_columns(weight)
        return _mm(x, weight) if bias is None else _addmm(bias, x, weight)

    @staticmethod
    def backward_input(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        if not ctx.needs_input_grad[0]:
            return None, None, None
        x, weight = ctx.saved_tensors
        return _left_gradient(gradient, weight, _is_by_columns(x)), None, None

    @staticmethod
    def backward_weight(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        _, needs_weight, needs_bias = ctx.needs_input_grad
        return (
            _right_gradient(gradient, ctx.saved_tensors[0], ctx.by_columns) if needs_weight else None,
            gradient.sum(0) if needs_bias else None,
        )

    @classmethod
    def accumulate_weight(cls, ctx: Any, buffers: OperatorBuffers, gradient: Tensor) -> tuple[Tensor | None, ...]:
        if add_product(buffers[0], ctx.saved_tensors[0].t(), gradient):
            return None, gradient.sum(0) if ctx.needs_input_grad[2] else None
        return cls.backward_weight(ctx, gradient)


class TransposedMatMul(MatMul):
    """x (n, k), the transpose (k, m) of a weight, bias (m) or None -> x transpose + bias, (n, m).

    The graph leads to the weight over its transpose; W computes the weight's own gradient, as of Linear.
    """

    @classmethod
    def can_defer(cls, weight: Tensor) -> bool:
        return is_transposed_weight(weight) or is_deferrable(weight)

    @classmethod
    def accumulate_weight(cls, ctx: Any, buffers: OperatorBuffers, gradient: Tensor) -> tuple[Tensor | None, ...]:
        return Linear.accumulate_weight(ctx, buffers, gradient)


class LeftMatMul(SplitFunction):
    """weight (n, k), x (k, m) -> weight x, (n, m)."""

    weight_arguments = (0,)
    saved_for_weight = (1,)
    differentiable_twice = True

    @staticmethod
    def forward(ctx: Any, weight: Tensor, x: Tensor) -> Tensor:
        ctx.save_for_backward(weight if ctx.needs_input_grad[1] else None, x)
        ctx.by_columns = _is_by_columns(weight)
        return _mm(weight, x)

    @staticmethod
    def backward_input(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        weight, x = ctx.saved_tensors
        x_gradient = _right_gradient(gradient, weight, _is_by_columns(x)) if ctx.needs_input_grad[1] else None
        return None, x_gradient

    @staticmethod
    def backward_weight(ctx: Any, gradient: Tensor) -> Tensor:
        return _left_gradient(gradient, ctx.saved_tensors[1], ctx.by_columns)

    @classmethod
    def accumulate_weight(cls, ctx: Any, buffers: OperatorBuffers, gradient: Tensor) -> Tensor | None:
        added = add_product(buffers[0], gradient, ctx.saved_tensors[1].t())
        return None if added else cls.backward_weight(ctx, gradient)


class Embedding(SplitFunction):
    """indices (...), weight (v, h), padding_idx (-1 for none) -> the rows of weight, (..., h)."""

    weight_arguments = (1,)
    saved_for_weight = (0,)
    differentiable_twice = True

    @staticmethod
    def forward(ctx: Any, indices: Tensor, weight: Tensor, padding_idx: int) -> Tensor:
        ctx.save_for_backward(indices)
        ctx.rows, ctx.padding_idx = weight.size(0), padding_idx
        return torch.embedding(weight, indices, padding_idx)

    @staticmethod
    def backward_input(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        return None, None, None

    @staticmethod
    def backward_weight(ctx: Any, gradient: Tensor) -> Tensor:
        indices = ctx.saved_tensors[0]
        backward = torch.ops.aten.embedding_dense_backward.default
        weight_gradient: Tensor = backward(gradient, indices, ctx.rows, ctx.padding_idx, False)
        return weight_gradient

    @classmethod
    def accumulate_weight(cls, ctx: Any, buffers: OperatorBuffers, gradient: Tensor) -> Tensor | None:
        added = add_rows(buffers[0], ctx.saved_tensors[0], gradient, ctx.padding_idx)
        return None if added else cls.backward_weight(ctx, gradient)


def linear(
    store: WeightGradientStore,
    input: Any = None,
    weight: Any = None,
    bias: Any = None,
    *rest: Any,
    **others: Any,
) -> Any:
    """torch.nn.functional.linear for inputs (..., k)."""
    if rest or others or not (is_deferrable(weight) and weight.dim() == 2 and is_plain(input)):
        return NotImplemented
    if not is_plain_bias(bias, weight.size(0)):
        return NotImplemented
    if input.dim() == 2:
        return Linear.apply_split(store, input, weight, bias)
    # As aten: the bias goes into the product when the input can be flattened without a copy, else it's added after.
    if bias is None or input.is_contiguous():
        return _on_rows(store, Linear, input, weight, bias, weight.size(0))
    product = _on_rows(store, Linear, input, weight, None, weight.size(0))
    if product is NotImplemented:
        return product
    return AddBias.apply_split(store, product, bias) if bias.requires_grad else product + bias


def matmul(store: WeightGradientStore, input: Any = None, other: Any = None, *rest: Any, **others: Any) -> Any:
    """torch.matmul and the operator @ with one operand a weight: (..., k) @ (k, m), (n, k) @ (k, m), or batches."""
    if rest or others or not (is_plain(input) and is_plain(other)):
        return NotImplemented
    if other.dim() == 2 and input.dim() >= 2:
        function = _by_weight(other)
        if function is not None:
            if input.dim() == 2:
                return function.apply_split(store, input, other, None)
            return _on_rows(store, function, input, other, None, other.size(1))
        if input.dim() == 2 and is_deferrable(input):
            return LeftMatMul.apply_split(store, input, other)
    elif other.dim() == input.dim() == 3 and input.size(0) == other.size(0):
        return batched_product(store, input, other)
    return NotImplemented


def mm(store: WeightGradientStore, input: Any = None, mat2: Any = None, *rest: Any, **others: Any) -> Any:
    """torch.mm with one operand a weight."""
    if not (is_plain(input) and is_plain(mat2) and input.dim() == mat2.dim() == 2):
        return NotImplemented
    return matmul(store, input, mat2, *rest, **others)


def addmm(
    store: WeightGradientStore,
    input: Any = None,
    mat1: Any = None,
    mat2: Any = None,
    *rest: Any,
    **others: Any,
) -> Any:
    """torch.addmm as a linear layer: input is the bias, mat1 the activations, mat2 the weight."""
    if rest or others or not (is_plain(mat1) and is_plain(mat2) and mat1.dim() == mat2.dim() == 2):
        return NotImplemented
    function = _by_weight(mat2)
    if input is None or function is None or not is_plain_bias(input, mat2.size(1)):
        return NotImplemented
    return function.apply_split(store, mat1, mat2, input)


def embedding(
    store: WeightGradientStore,
    input: Any = None,
    weight: Any = None,
    padding_idx: Any = None,
    max_norm: Any = None,
    norm_type: Any = 2.0,
    scale_grad_by_freq: Any = False,
    sparse: Any = False,
    *rest: Any,
    **others: Any,
) -> Any:
    """torch.nn.functional.embedding with a dense, unscaled gradient."""
    if rest or others or max_norm is not None or scale_grad_by_freq or sparse:
        return NotImplemented
    if not (is_plain(input) and is_deferrable(weight) and weight.dim() == 2):
        return NotImplemented
    rows = weight.size(0)
    if padding_idx is None:
        padding_idx = -1
    elif isinstance(padding_idx, int) and -rows <= padding_idx < rows:
        padding_idx %= rows
    else:
        return NotImplemented
    return Embedding.apply_split(store, input, weight, padding_idx)


def _by_weight(matrix: Tensor) -> type[MatMul] | None:
    """How to multiply by `matrix` from the right if it is a weight, or a weight's transpose as in x @ weight.t()."""
    if is_deferrable(matrix):
        return MatMul
    return TransposedMatMul if is_transposed_weight(matrix) else None


def _on_rows(
    store: WeightGradientStore,
    function: type[SplitFunction],
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    columns: int,
) -> Any:
    """`function` on x (..., k) flattened to (n, k), its value back at (..., columns)."""
    if x.dim() == 0 or x.size(-1) == 0:
        return NotImplemented
    product = function.apply_split(store, x.reshape(-1, x.size(-1)), weight, bias)
    if product is NotImplemented:
        return product
    shape = (*x.shape[:-1], columns)
    # As aten: without a bias the value counts as no view, which may be detached in place.
    return product.view(shape) if bias is not None else _unsafe_view(product, shape)


MATRIX_PRODUCTS: Operators = {
    torch.nn.functional.linear: linear,
    torch.matmul: matmul,
    Tensor.matmul: matmul,
    torch.mm: mm,
    Tensor.mm: mm,
    torch.addmm: addmm,
    Tensor.addmm: addmm,
    torch.nn.functional.embedding: embedding,
}
