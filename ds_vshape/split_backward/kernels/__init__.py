"""A product of 16-bit matrices added to a 32-bit sum on a GPU, in one call and without a matrix for the product.

    add_product_in_blas   cuBLAS, for what it takes as it lies in memory: the default
    product.py            a Triton kernel for all else; without triton, the caller multiplies and then adds
    grouped.py            a Triton kernel for many products at once, those of a mixture's experts

cuBLAS is tuned for each GPU, and chooses by sizes and types, not by timing; so does the kernel. A repeated run, and one
that continues from a checkpoint, therefore have the same sums bit for bit. `bench/accumulation.py` and `bench/gpu.py`
measure both.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache

import torch
from torch import Tensor

AddProduct = Callable[[Tensor, Tensor, Tensor], None]
AddGroupedProduct = Callable[[Tensor, Tensor, Tensor, Tensor], None]


def product_into_wider_sum(sums: Tensor, left: Tensor, right: Tensor) -> AddProduct | None:
    """What adds sums (n, m) += left (n, k) @ right (k, m) with 32-bit `sums` and both others of one 16-bit type; None
    where these tensors, or this machine, have no such call. Types and strides alone decide."""
    if not _is_into_wider_sum(sums, left, right):
        return None
    return add_product_in_blas if all(map(_is_taken_by_blas, (sums, left, right))) else _kernels()[0]


def grouped_product_into_wider_sum(sums: Tensor, left: Tensor, right: Tensor) -> AddGroupedProduct | None:
    """What adds sums (e, n, m)[i] += left (n, s)[:, group i] @ right (s, m)[group i], types as above, given the ends
    (e) of the groups as well; None as above."""
    return _kernels()[1] if _is_into_wider_sum(sums, left, right) else None


def _is_into_wider_sum(sums: Tensor, left: Tensor, right: Tensor) -> bool:
    return (sums.is_cuda and sums.dtype is torch.float32 and left.dtype is right.dtype
            and left.dtype in (torch.bfloat16, torch.float16))


def add_product_in_blas(sums: Tensor, left: Tensor, right: Tensor) -> None:
    """sums (n, m) += left (n, k) @ right (k, m), on a GPU; 32 bits, and 16 of one type."""
    # torch.addmm by the name that the flops profiler of DeepSpeed does not wrap: it knows no out_dtype.
    torch.ops.aten.addmm.dtype_out(sums, left, right, sums.dtype, out=sums)


def _is_taken_by_blas(matrix: Tensor) -> bool:
    """Whether BLAS reads `matrix` as it lies in memory (prepare_matrix_for_cublas in ATen/native/cuda/Blas.cpp)."""
    (rows, columns), (row, column) = matrix.shape, matrix.stride()
    return row == 1 and column >= max(1, rows) or column == 1 and row >= max(1, columns)


@cache
def _kernels() -> tuple[AddProduct, AddGroupedProduct] | tuple[None, None]:
    """Those in Triton; None where the extra "kernels" isn't installed."""
    try:
        from ds_vshape.split_backward.kernels.grouped import add_grouped_product
        from ds_vshape.split_backward.kernels.product import add_product
    except ImportError:
        return None, None
    return add_product, add_grouped_product
