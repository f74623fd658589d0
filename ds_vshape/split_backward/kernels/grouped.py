"""sums[i] += left[:, group i] @ right[group i] for all groups in one launch, operands of 16 bits and sums of 32.

These are the weight gradients of a mixture's experts: one launch for each expert would leave most of a GPU idle, and
the host would have to wait for the groups' ends. Each program computes one tile of the sums, and adds up its group from
first to last, so that the result is the same bit for bit in each run.

Importing this needs triton.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from ds_vshape.split_backward.kernels.product import TYPES, Tiling, tiling


@triton.jit  # type: ignore[untyped-decorator]
def grouped_kernel(sums, left, right, ends, rows, columns,  # type: ignore[no-untyped-def]
                   sums_group, sums_row, sums_column, left_row, left_depth, right_depth, right_column,
                   ROWS: tl.constexpr, COLUMNS: tl.constexpr, DEPTH: tl.constexpr, MULTIPLIED_AS: tl.constexpr):
    """One tile, ROWS by COLUMNS, of one group's sums (rows, columns); names as in product.py."""
    # [1] Which group, and which tile of its sums.
    tile_rows, tile_columns = (rows + ROWS - 1) // ROWS, (columns + COLUMNS - 1) // COLUMNS
    group, tile = tl.program_id(0) // (tile_rows * tile_columns), tl.program_id(0) % (tile_rows * tile_columns)
    row = tile % tile_rows * ROWS + tl.arange(0, ROWS)
    column = tile // tile_rows * COLUMNS + tl.arange(0, COLUMNS)
    first = tl.where(group > 0, tl.load(ends + tl.maximum(group - 1, 0)), 0).to(tl.int64)
    last = tl.load(ends + group).to(tl.int64)

    # [2] Its product. Rows and columns beyond the last wrap around, and aren't stored.
    step = tl.arange(0, DEPTH).to(tl.int64)
    at_left = left + (row % rows).to(tl.int64)[:, None] * left_row
    at_right = right + (column % columns).to(tl.int64)[None, :] * right_column
    product = tl.full((ROWS, COLUMNS), 0.0, tl.float32)
    for start in range(first, last, DEPTH):
        depth = start + step
        a = tl.load(at_left + depth[None, :] * left_depth, mask=(depth < last)[None, :], other=0.0)
        b = tl.load(at_right + depth[:, None] * right_depth, mask=(depth < last)[:, None], other=0.0)
        product = tl.dot(a.to(MULTIPLIED_AS), b.to(MULTIPLIED_AS), product)

    # [3] Added; the product of an empty group is zero.
    at_sums = (sums + group.to(tl.int64) * sums_group + row.to(tl.int64)[:, None] * sums_row
               + column.to(tl.int64)[None, :] * sums_column)
    inside = (row < rows)[:, None] & (column < columns)[None, :]
    tl.store(at_sums, tl.load(at_sums, mask=inside) + product, mask=inside)


def add_grouped_product(sums: Tensor, left: Tensor, right: Tensor, ends: Tensor) -> None:
    """sums (e, n, m)[i] += left (n, s)[:, group i] @ right (s, m)[group i], where group i is ends[i - 1] to ends[i];
    32 bits, and 16 of one type; any strides, but those of `ends` (e), which are whole numbers one after another.

    Oracle: `add_grouped_product_in_torch`.
    """
    launch(grouped_kernel, tiling(sums.size(1), sums.size(2), sums.size(0)), sums, left, right, ends,
           TYPES[left.dtype])


def launch(kernel: Any, cut: Tiling, sums: Tensor, left: Tensor, right: Tensor, ends: Tensor,
           multiplied_as: Any) -> None:
    """Run `kernel`, grouped_kernel or a copy of it, on all tiles of all groups."""
    groups, rows, columns = sums.shape
    if left.size(0) != rows or right.shape != (left.size(1), columns) or ends.shape != (groups,):
        raise ValueError(f"sums {tuple(sums.shape)} += left {tuple(left.shape)} @ right {tuple(right.shape)} in groups "
                         f"{tuple(ends.shape)}: sizes don't agree")
    if not sums.numel() or not left.size(1):
        return
    grid = (groups * triton.cdiv(rows, cut.rows) * triton.cdiv(columns, cut.columns),)
    kernel[grid](sums, left, right, ends.contiguous(), rows, columns, *sums.stride(), *left.stride(), *right.stride(),
                 ROWS=cut.rows, COLUMNS=cut.columns, DEPTH=cut.depth, MULTIPLIED_AS=multiplied_as,
                 num_warps=cut.warps, num_stages=cut.stages)


def add_grouped_product_in_torch(sums: Tensor, left: Tensor, right: Tensor, ends: Tensor) -> None:
    """What `add_grouped_product` computes, slowly: no rounding to 16 bits on the way."""
    start = 0
    for matrix, end in zip(sums, ends.tolist()):
        matrix += torch.mm(left[:, start:end].to(sums.dtype), right[start:end].to(sums.dtype))
        start = end
