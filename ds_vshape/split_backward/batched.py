"""Split counterparts of the products with a batch of weight matrices, as the experts of a mixture keep theirs.

    weight[index]              a weight like any other, by targets.py: its gradient is an element of the batch's
    weight[indices]            here: a copy, which batched products multiply
    bmm, matmul, @             b matrices by b matrices, one of the two a weight
    grouped_mm                 the rows of a matrix, sorted into groups, by one matrix of the batch each

As in matrix.py each gradient is computed by the aten calls that autograd would make, and is equal bit for bit.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import Parameter

from ds_vshape.split_backward.accumulate import add_batched_product, add_grouped_product
from ds_vshape.split_backward.function import Operators, SplitFunction
from ds_vshape.split_backward.store import OperatorBuffers, WeightGradientStore
from ds_vshape.split_backward.targets import Selection
from ds_vshape.split_backward.weights import is_deferrable, is_plain, is_transposed_weight

# As it is now: DeepSpeed's flops profiler wraps the name in torch for a while.
_bmm = torch.bmm


class BatchMatMul(SplitFunction):
    """x (b, n, k), weight (b, k, m) -> x weight for each of b, (b, n, m)."""

    weight_arguments = (1,)
    saved_for_weight = (0,)
    differentiable_twice = True

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(x, weight if ctx.needs_input_grad[0] else None)
        return _bmm(x, weight)

    @staticmethod
    def backward_input(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        _, weight = ctx.saved_tensors
        return (gradient.bmm(weight.transpose(1, 2)) if ctx.needs_input_grad[0] else None), None

    @staticmethod
    def backward_weight(ctx: Any, gradient: Tensor) -> Tensor:
        x: Tensor = ctx.saved_tensors[0]
        return x.transpose(1, 2).bmm(gradient)

    @classmethod
    def accumulate_weight(cls, ctx: Any, buffers: OperatorBuffers, gradient: Tensor) -> Tensor | None:
        added = add_batched_product(buffers[0], ctx.saved_tensors[0].transpose(1, 2), gradient)
        return None if added else cls.backward_weight(ctx, gradient)


class TransposedBatchMatMul(BatchMatMul):
    """x (b, n, k), the transposes (b, k, m) of a weight's matrices -> x transpose for each of b, (b, n, m).

    W computes the weight's own gradient (b, m, k).
    """

    @classmethod
    def can_defer(cls, weight: Tensor) -> bool:
        return is_transposed_weight(weight)

    @classmethod
    def accumulate_weight(cls, ctx: Any, buffers: OperatorBuffers, gradient: Tensor) -> Tensor | None:
        added = add_batched_product(buffers[0], gradient.transpose(1, 2), ctx.saved_tensors[0])
        return None if added else cls.backward_weight(ctx, gradient).transpose(1, 2)


class LeftBatchMatMul(SplitFunction):
    """weight (b, n, k), x (b, k, m) -> weight x for each of b, (b, n, m)."""

    weight_arguments = (0,)
    saved_for_weight = (1,)
    differentiable_twice = True

    @staticmethod
    def forward(ctx: Any, weight: Tensor, x: Tensor) -> Tensor:
        ctx.save_for_backward(weight if ctx.needs_input_grad[1] else None, x)
        return _bmm(weight, x)

    @staticmethod
    def backward_input(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        weight, _ = ctx.saved_tensors
        return None, weight.transpose(1, 2).bmm(gradient) if ctx.needs_input_grad[1] else None

    @staticmethod
    def backward_weight(ctx: Any, gradient: Tensor) -> Tensor:
        x: Tensor = ctx.saved_tensors[1]
        return gradient.bmm(x.transpose(1, 2))

    @classmethod
    def accumulate_weight(cls, ctx: Any, buffers: OperatorBuffers, gradient: Tensor) -> Tensor | None:
        added = add_batched_product(buffers[0], gradient, ctx.saved_tensors[1].transpose(1, 2))
        return None if added else cls.backward_weight(ctx, gradient)


class GroupedMatMul(SplitFunction):
    """x (s, k), weight (e, k, m), ends (e) -> rows ends[i - 1] to ends[i] of x times weight[i], (s, m).

    Rows beyond the last end belong to no group, and the product's are left unset, as grouped_mm leaves them.
    """

    weight_arguments = (1,)
    saved_for_weight = (0, 2)
    differentiable_twice = True

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, ends: Tensor) -> Tensor:
        ctx.save_for_backward(x, weight if ctx.needs_input_grad[0] else None, ends)
        ctx.by_columns = _is_by_columns(weight)
        return torch._grouped_mm(x, weight, offs=ends)

    @staticmethod
    def backward_input(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        if not ctx.needs_input_grad[0]:
            return None, None, None
        # aten: _grouped_mm_mat1_backward
        x, weight, ends = ctx.saved_tensors
        if _is_by_columns(x):
            return torch._grouped_mm(weight, gradient.t(), offs=ends).t(), None, None
        return torch._grouped_mm(gradient, weight.transpose(1, 2), offs=ends), None, None

    @staticmethod
    def backward_weight(ctx: Any, gradient: Tensor) -> Tensor:
        # aten: _grouped_mm_mat2_backward
        x, _, ends = ctx.saved_tensors
        if ctx.by_columns:
            return torch._grouped_mm(gradient.t(), x, offs=ends).transpose(1, 2)
        return torch._grouped_mm(x.t(), gradient, offs=ends)

    @classmethod
    def accumulate_weight(cls, ctx: Any, buffers: OperatorBuffers, gradient: Tensor) -> Tensor | None:
        x, _, ends = ctx.saved_tensors
        added = add_grouped_product(buffers[0], x.t(), gradient, ends)
        return None if added else cls.backward_weight(ctx, gradient)


class TransposedGroupedMatMul(GroupedMatMul):
    """x (s, k), the transposes (e, k, m) of a weight's matrices, ends (e) -> as GroupedMatMul, (s, m).

    W computes the weight's own gradient (e, m, k).
    """

    @classmethod
    def can_defer(cls, weight: Tensor) -> bool:
        return is_transposed_weight(weight)

    @classmethod
    def accumulate_weight(cls, ctx: Any, buffers: OperatorBuffers, gradient: Tensor) -> Tensor | None:
        x, _, ends = ctx.saved_tensors
        added = add_grouped_product(buffers[0], gradient.t(), x, ends)
        return None if added else cls.backward_weight(ctx, gradient).transpose(1, 2)


def _is_by_columns(matrices: Tensor) -> bool:
    """Whether aten takes the matrices for column-major, and then computes their gradients column-major too."""
    return matrices.stride(-2) == 1 and matrices.stride(-1) == matrices.size(-2)


def batched_product(store: WeightGradientStore, input: Tensor, other: Tensor) -> Any:
    """input (b, n, k) by other (b, k, m), either of them a batch of weights."""
    if is_deferrable(other):
        return BatchMatMul.apply_split(store, input, other)
    if is_transposed_weight(other):
        return TransposedBatchMatMul.apply_split(store, input, other)
    return LeftBatchMatMul.apply_split(store, input, other) if is_deferrable(input) else NotImplemented


def bmm(store: WeightGradientStore, input: Any = None, mat2: Any = None, *rest: Any, **others: Any) -> Any:
    """torch.bmm with one operand a weight."""
    if rest or others or not (is_plain(input) and is_plain(mat2) and input.dim() == mat2.dim() == 3):
        return NotImplemented
    return batched_product(store, input, mat2) if input.size(0) == mat2.size(0) else NotImplemented


def grouped_mm(
    store: WeightGradientStore,
    input: Any = None,
    mat2: Any = None,
    offs: Any = None,
    bias: Any = None,
    out_dtype: Any = None,
    *rest: Any,
    **others: Any,
) -> Any:
    """torch._grouped_mm, and torch.nn.functional.grouped_mm, which calls it: rows in groups by a batch of weights."""
    if rest or others or bias is not None or out_dtype is not None or not all(map(is_plain, (input, mat2, offs))):
        return NotImplemented
    if (input.dim(), mat2.dim(), offs.dim()) != (2, 3, 1):
        return NotImplemented
    if is_deferrable(mat2):
        return GroupedMatMul.apply_split(store, input, mat2, offs)
    if is_transposed_weight(mat2):
        return TransposedGroupedMatMul.apply_split(store, input, mat2, offs)
    return NotImplemented


def select(store: WeightGradientStore, input: Any = None, index: Any = None, *rest: Any) -> Any:
    """weight[indices] of a batch of weight matrices, a copy whose products are split; nothing is deferred here."""
    if type(input) is not Parameter or type(index) is not Tensor or input.dim() != 3 or index.dim() != 1:
        return NotImplemented
    if index.dtype not in (torch.int64, torch.int32) or not is_deferrable(input):
        return NotImplemented
    return Selection.mark(input[index], input, index)


BATCHED_PRODUCTS: Operators = {
    torch.bmm: bmm,
    Tensor.bmm: bmm,
    torch._grouped_mm: grouped_mm,
    Tensor.__getitem__: select,
}
