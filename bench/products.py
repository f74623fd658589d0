"""Ways to add a product of matrices to a sum: in two calls, in one, and by the Triton kernel."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ds_vshape.split_backward.kernels import add_product_in_blas

# sums (n, m) += left (n, k) @ right (k, m).
Add = Callable[[Tensor, Tensor, Tensor], Any]
BASE, WIDE, BLAS, TRITON = "product, then sum", "wide product, then sum", "cuBLAS in place", "Triton in place"


def ways(sums: torch.dtype, products: torch.dtype, device: str) -> dict[str, Add]:
    """The ways for matrices of dtype `products` and sums of dtype `sums`, by name; the first is what the others are
    compared with. The Triton kernel is one of them where triton is installed, and needs sums wider than the products.
    """
    found: dict[str, Add] = {BASE: lambda sums, left, right: sums.add_(left.mm(right))}
    if sums == products:
        found["in place"] = lambda sums, left, right: sums.addmm_(left, right)
    elif device == "cuda":
        found[WIDE] = lambda sums, left, right: sums.add_(torch.mm(left, right, out_dtype=sums.dtype))
        found[BLAS] = add_product_in_blas
        if importlib.util.find_spec("triton") is not None:
            from ds_vshape.split_backward.kernels.product import add_product

            found[TRITON] = add_product
    return found
