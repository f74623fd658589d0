"""sums += left @ right in one kernel, for operands of 16 bits and sums of 32.

A tile of the product stays in registers, at 32 bits, until it is added. Operands may lie in memory in any way: BLAS
would first copy what is adjacent neither by rows nor by columns.

Importing this needs triton.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor


class Tiling(NamedTuple):
    """How a product is tiled: rows and columns of a tile of the sums, the depth of one step, rows of tiles in a group,
    warps, and how many steps loads run ahead."""

    rows: int
    columns: int
    depth: int
    group: int
    warps: int
    stages: int


# From the largest tiles, which read least, to the smallest, which keep most of a device busy.
TILINGS = [
    Tiling(128, 256, 64, 8, 8, 3),
    Tiling(128, 128, 64, 8, 8, 3),
    Tiling(64, 128, 64, 8, 4, 4),
    Tiling(64, 64, 64, 8, 4, 4),
    Tiling(32, 64, 64, 8, 2, 4),
]
# Tiles that keep a large device busy: it has somewhat more than a hundred multiprocessors.
_ENOUGH = 128


def tiling(rows: int, columns: int, sums: int = 1) -> Tiling:
    """The tiling for so many sums (rows, columns): the largest tiles of which there are enough, or else the smallest.

    Sizes alone decide, so that a sum comes out bit for bit the same in each run. What was fastest in a trial could be
    another one after a restart, and with it the order in which a sum is added up.
    """
    enough = (one for one in TILINGS if sums * triton.cdiv(rows, one.rows) * triton.cdiv(columns, one.columns)
              >= _ENOUGH)
    return next(enough, TILINGS[-1])


# In which type the tiles are multiplied: their own.
TYPES = {torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}


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

    # [2] Its product. Rows and columns beyond the last wrap around, so that loads need no mask for them.
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


def add_product(sums: Tensor, left: Tensor, right: Tensor) -> None:
    """sums (n, m) += left (n, k) @ right (k, m) on a GPU: 32-bit sums, both operands of one 16-bit dtype, any strides.

    ValueError if the sizes don't agree. Oracle: `add_product_in_torch`.
    """
    launch(with_even, tiling(*sums.shape), sums, left, right, TYPES[left.dtype])


def launch(kernel: Any, cut: Tiling, sums: Tensor, left: Tensor, right: Tensor, multiplied_as: Any) -> None:
    """Run `kernel`, with_even or a copy of it, on all tiles, which are multiplied in triton's type `multiplied_as`.

    ValueError unless sums (n, m), left (n, k) and right (k, m) agree.
    """
    (rows, depth), columns = left.shape, right.size(1)
    if sums.shape != (rows, columns) or right.size(0) != depth:
        raise ValueError(f"sums {tuple(sums.shape)} += left {tuple(left.shape)} @ right {tuple(right.shape)}: "
                         "sizes don't agree")
    if not sums.numel() or not depth:
        return
    grid = (triton.cdiv(rows, cut.rows) * triton.cdiv(columns, cut.columns),)
    kernel[grid](sums, left, right, rows, columns, depth, *sums.stride(), *left.stride(), *right.stride(),
                 ROWS=cut.rows, COLUMNS=cut.columns, DEPTH=cut.depth, GROUP=cut.group, MULTIPLIED_AS=multiplied_as,
                 num_warps=cut.warps, num_stages=cut.stages)


def add_product_in_torch(sums: Tensor, left: Tensor, right: Tensor) -> None:
    """What `add_product` computes, without a kernel of its own; nothing is rounded to 16 bits on the way."""
    sums += torch.mm(left.to(sums.dtype), right.to(sums.dtype))
