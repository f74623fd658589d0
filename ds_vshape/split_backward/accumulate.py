"""Weight gradients added to their sum by the call that computes them: without a temporary tensor, and without a second
pass over the sum.

Each function returns whether it has added. If it hasn't, nothing was computed: there is no sum yet, or no single call
for these dtypes, such as 16 bits into 32 on a CPU.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ds_vshape.split_backward.kernels import grouped_product_into_wider_sum, product_into_wider_sum


def add_product(sums: Tensor | None, left: Tensor, right: Tensor) -> bool:
    """sums (n, m) += left (n, k) @ right (k, m)."""
    if sums is None:
        return False
    if sums.dtype == left.dtype == right.dtype:
        sums.addmm_(left, right)
        return True
    kernel = product_into_wider_sum(sums, left, right)
    if kernel is None:
        return False
    kernel(sums, left, right)
    return True


def add_batched_product(sums: Tensor | None, left: Tensor, right: Tensor) -> bool:
    """sums (b, n, m) += left (b, n, k) @ right (b, k, m)."""
    if sums is None or not sums.dtype == left.dtype == right.dtype:
        return False
    sums.baddbmm_(left, right)
    return True


def add_grouped_product(sums: Tensor | None, left: Tensor, right: Tensor, ends: Tensor) -> bool:
    """sums (e, n, m)[i] += left (n, s)[:, group i] @ right (s, m)[group i], where group i is ends[i - 1] to ends[i]."""
    if sums is None:
        return False
    kernel = grouped_product_into_wider_sum(sums, left, right)
    if kernel is not None:
        kernel(sums, left, right, ends)
        return True
    # On other devices the host would have to wait for the ends.
    if sums.device.type != "cpu" or not sums.dtype == left.dtype == right.dtype:
        return False
    start = 0
    for matrix, end in zip(sums, ends.tolist()):
        if end > start:
            matrix.addmm_(left[:, start:end], right[start:end])
        start = end
    return True


def add_rows(sums: Tensor | None, indices: Tensor, rows: Tensor, skipped: int) -> bool:
    """sums (v, h)[indices (...)] += rows (..., h), except where the index is `skipped`.

    An embedding's gradient is zero in all rows but these, and v is large: as a tensor of its own it costs far more
    time than the sum.
    """
    if sums is None or torch.promote_types(sums.dtype, rows.dtype) is not sums.dtype:
        # In a narrower sum the rows of one index would be rounded one by one.
        return False
    indices, rows = indices.reshape(-1), rows.reshape(-1, rows.size(-1)).to(sums.dtype)
    if skipped >= 0:
        rows = rows.masked_fill((indices == skipped).unsqueeze(1), 0)
    if sums.device.type == "cpu":
        sums.index_add_(0, indices, rows)
    else:
        # Sorts the indices first; index_add_ would add with atomics, in another order each time.
        sums.index_put_((indices,), rows, accumulate=True)
    return True
