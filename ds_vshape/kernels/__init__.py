"""Triton kernels, for what torch has no single call for. Each stands beside the torch calls that it replaces, and isn't
needed: without triton, or away from a GPU, those run.

    product.py    a product of 16-bit matrices added to a 32-bit sum
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache

import torch
from torch import Tensor

AddProduct = Callable[[Tensor, Tensor, Tensor], None]


def product_into_wider_sum(sums: Tensor, left: Tensor, right: Tensor) -> AddProduct | None:
    """The kernel for sums (n, m) += left (n, k) @ right (k, m) with 32-bit `sums` and both others of one 16-bit type;
    None where these tensors, or this machine, have none."""
    if not (sums.is_cuda and sums.dtype is torch.float32):
        return None
    if left.dtype is not right.dtype or left.dtype not in (torch.bfloat16, torch.float16):
        return None
    return _compiled()


@cache
def _compiled() -> AddProduct | None:
    try:
        from ds_vshape.kernels.product import add_product
    except ImportError:  # The extra "kernels" isn't installed.
        return None
    return add_product
