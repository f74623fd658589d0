"""sums += left @ right in one kernel, for operands of 16 bits and sums of 32.

BLAS calls of torch want one type for all three, so that such a product costs a matrix of 16 bits, rounded, and then a
pass that reads it and reads and writes the sums. Here a tile of the product stays in registers, at 32 bits, until it
is added.

Importing this needs triton.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

# What is tried once for each size: a tile of the sums, the depth of one step, tiles in a group, warps, steps ahead.
TILINGS = [
    (128, 256, 64, 8, 8, 3),
    (256, 128, 64, 8, 8, 3),
    (128, 128, 64, 8, 8, 3),
    (128, 128, 64, 8, 4, 4),
    (128, 128, 32, 8, 4, 5),
    (64, 128, 64, 8, 4, 4),
    (64, 64, 64, 8, 4, 4),
    (32, 64, 64, 8, 2, 4),
]


# In which type the tiles are multiplied: their own.
_TYPES = {torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}


@triton.jit  # type: ignore[untyped-decorator]
def product_kernel(sums, left, right, rows, columns, depth,  # type: ignore[no-untyped-def]
                   sums_row, sums_column, left_row, left_depth, right_depth, right_column,
                   ROWS: tl.constexpr, COLUMNS: tl.constexpr, DEPTH: tl.constexpr, GROUP: tl.constexpr,
                   MULTIPLIED_AS: tl.constexpr, EVEN: tl.constexpr):
    """One tile, ROWS by COLUMNS, of sums (rows, columns) += left (rows, depth) @ right (depth, columns).

    What is named like `left_row` is how many elements apart neighbours of that dimension are. Tiles are cast to
    MULTIPLIED_AS before they are multiplied. EVEN: DEPTH divides depth.
    """
    # [1] Which tile. GROUP tiles below one another, then the next column: those that run together share operands.
    tile = tl.program_id(0)
    tile_rows, tile_columns = (rows + ROWS - 1) // ROWS, (columns + COLUMNS - 1) // COLUMNS
    of_group = GROUP * tile_columns
    first = tile // of_group * GROUP
    height = tl.minimum(tile_rows - first, GROUP)
    row = (first + tile % of_group % height) * ROWS + tl.arange(0, ROWS)
    column = tile % of_group // height * COLUMNS + tl.arange(0, COLUMNS)

    # [2] Its product. Beyond the last row and column, others are computed again, and not stored.
    step = tl.arange(0, DEPTH)
    of_left, of_right = (row % rows).to(tl.int64), (column % columns).to(tl.int64)
    at_left = left + of_left[:, None] * left_row + step.to(tl.int64)[None, :] * left_depth
    at_right = right + step.to(tl.int64)[:, None] * right_depth + of_right[None, :] * right_column
    product = tl.full((ROWS, COLUMNS), 0.0, tl.float32)
    for start in range(0, depth, DEPTH):
        if EVEN:
            a, b = tl.load(at_left), tl.load(at_right)
        else:
            inside = step < depth - start
            a = tl.load(at_left, mask=inside[None, :], other=0.0)
            b = tl.load(at_right, mask=inside[:, None], other=0.0)
        product = tl.dot(a.to(MULTIPLIED_AS), b.to(MULTIPLIED_AS), product)
        at_left += DEPTH * left_depth
        at_right += DEPTH * right_depth

    # [3] Added.
    at_sums = sums + row.to(tl.int64)[:, None] * sums_row + column.to(tl.int64)[None, :] * sums_column
    inside = (row < rows)[:, None] & (column < columns)[None, :]
    tl.store(at_sums, tl.load(at_sums, mask=inside) + product, mask=inside)


with_even = triton.heuristics({"EVEN": lambda arguments: arguments["depth"] % arguments["DEPTH"] == 0})(product_kernel)
_tuned = triton.autotune(
    [triton.Config({"ROWS": rows, "COLUMNS": columns, "DEPTH": depth, "GROUP": group}, num_warps=warps,
                   num_stages=stages)
     for rows, columns, depth, group, warps, stages in TILINGS],
    key=["rows", "columns", "depth", "left_row", "right_column"],
    restore_value=["sums"],
)(with_even)


def add_product(sums: Tensor, left: Tensor, right: Tensor) -> None:
    """sums (n, m) += left (n, k) @ right (k, m); 32 bits, and 16 of one type; any strides.

    Tries its tilings at the first call of each size. Oracle: `add_product_in_torch`.
    """
    launch(_tuned, sums, left, right, MULTIPLIED_AS=_TYPES[left.dtype])


def launch(kernel: Any, sums: Tensor, left: Tensor, right: Tensor, **constants: Any) -> None:
    """Run `kernel`, product_kernel or a wrapper of it, on all tiles; `constants` are those it doesn't choose."""
    (rows, depth), columns = left.shape, right.size(1)
    if sums.shape != (rows, columns) or right.size(0) != depth:
        raise ValueError(f"sums {tuple(sums.shape)} += left {tuple(left.shape)} @ right {tuple(right.shape)}: "
                         "sizes don't agree")
    if not sums.numel() or not depth:
        return

    def grid(chosen: dict[str, int]) -> tuple[int]:
        return (triton.cdiv(rows, chosen["ROWS"]) * triton.cdiv(columns, chosen["COLUMNS"]),)

    kernel[grid](sums, left, right, rows, columns, depth, *sums.stride(), *left.stride(), *right.stride(), **constants)


def add_product_in_torch(sums: Tensor, left: Tensor, right: Tensor) -> None:
    """What `add_product` computes, slowly: no rounding to 16 bits on the way."""
    sums += torch.mm(left.to(sums.dtype), right.to(sums.dtype))
