"""Triton kernels against their torch oracles: in triton's interpreter, compiled, and on a GPU where one is."""

from __future__ import annotations

import importlib.util
import itertools
from collections.abc import Callable
from types import ModuleType, SimpleNamespace

import pytest
import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from ds_vshape.kernels import product, product_into_wider_sum
from ds_vshape.kernels.product import TILINGS, add_product_in_torch, launch

WIDTHS = [torch.bfloat16, torch.float16]
# Rows, columns and depth: within one tile, of several whole ones, of several with a rest, and of odd strides.
SIZES = [(5, 7, 3), (64, 128, 64), (100, 70, 130), (1, 1, 200), (33, 257, 64)]


def interpreted(module: ModuleType) -> ModuleType:
    """A copy of the module whose kernels run in triton's interpreter, which needs no GPU."""
    spec = importlib.util.spec_from_file_location(f"{module.__name__}_interpreted", module.__file__)
    assert spec is not None and spec.loader is not None
    copy = importlib.util.module_from_spec(spec)
    with triton.knobs.runtime.scope():
        triton.knobs.runtime.interpret = True
        spec.loader.exec_module(copy)
    return copy


@pytest.fixture(scope="module")
def interpreted_product() -> ModuleType:
    return interpreted(product)


def by_rows(rows: int, columns: int, dtype: torch.dtype) -> Tensor:
    return torch.randn(rows, columns).to(dtype)


def by_columns(rows: int, columns: int, dtype: torch.dtype) -> Tensor:
    return torch.randn(columns, rows).to(dtype).t()


def in_a_larger_one(rows: int, columns: int, dtype: torch.dtype) -> Tensor:
    return torch.randn(2 * rows, columns + 3).to(dtype)[::2, 1:-2]


LAYOUTS: list[Callable[[int, int, torch.dtype], Tensor]] = [by_rows, by_columns, in_a_larger_one]


def check(add: Callable[[Tensor, Tensor, Tensor], None], sums: Tensor, left: Tensor, right: Tensor) -> None:
    """`add` against the oracle in double precision; what lies around the sums in memory stays as it is."""
    whole = torch.full((sums.size(0) + 2, sums.size(1) + 2), float("nan"), device=sums.device)
    inner = whole[1:-1, 1:-1].copy_(sums)
    expected = sums.double()
    add_product_in_torch(expected, left, right)
    add(inner, left, right)
    torch.testing.assert_close(inner.double(), expected, rtol=1e-5, atol=1e-5 * left.size(1) ** 0.5)
    whole[1:-1, 1:-1] = float("nan")
    assert whole.isnan().all()


@pytest.mark.parametrize("dtype", WIDTHS, ids=str)
@pytest.mark.parametrize("size", SIZES, ids=str)
def test_a_product_added_to_a_sum(size: tuple[int, int, int], dtype: torch.dtype, interpreted_product: ModuleType):
    torch.manual_seed(0)
    rows, columns, depth = size
    for of_left, of_right in itertools.product(LAYOUTS, LAYOUTS):
        def add(sums: Tensor, left: Tensor, right: Tensor) -> None:
            # The interpreter multiplies the bit patterns of bfloat16; these numbers are the same in float32.
            launch(interpreted_product.with_even, sums, left, right, ROWS=32, COLUMNS=64, DEPTH=64, GROUP=2,
                   MULTIPLIED_AS=tl.float32)

        check(add, torch.randn(rows, columns), of_left(rows, depth, dtype), of_right(depth, columns, dtype))


@pytest.mark.parametrize("tiling", TILINGS, ids=str)
def test_every_tiling_covers_every_tile_once(tiling: tuple[int, ...], interpreted_product: ModuleType):
    """3 by 5 tiles, so that the last group has fewer rows of tiles than the others."""
    torch.manual_seed(0)
    rows, columns, depth, _, *_ = tiling
    constants = {"ROWS": rows, "COLUMNS": columns, "DEPTH": depth, "MULTIPLIED_AS": tl.float32}
    sums = torch.randn(3 * rows - 1, 5 * columns - 1)
    left, right = by_columns(sums.size(0), 9, torch.bfloat16), by_rows(9, sums.size(1), torch.bfloat16)
    for group in (2, tiling[3]):
        check(lambda *given: launch(interpreted_product.with_even, *given, GROUP=group, **constants), sums, left, right)


@pytest.mark.filterwarnings("ignore:TRITON_DEFAULT_FP_FUSION")
@pytest.mark.parametrize("capability", [80, 90])
@pytest.mark.parametrize("tiling", TILINGS, ids=str)
def test_every_tiling_compiles(tiling: tuple[int, ...], capability: int):
    """For GPUs of that capability, within their shared memory, and with their tensor cores."""
    rows, columns, depth, group, warps, stages = tiling
    # As W calls it for a linear layer: both operands by columns of the tokens.
    constants = {"ROWS": rows, "COLUMNS": columns, "DEPTH": depth, "GROUP": group, "MULTIPLIED_AS": tl.bfloat16,
                 "EVEN": True, "left_row": 1, "right_column": 1, "sums_column": 1}
    types = {"sums": "*fp32", "left": "*bf16", "right": "*bf16"}
    names = product.product_kernel.arg_names
    signature = {name: "constexpr" if name in constants else types.get(name, "i32") for name in names}
    divisible = {(place,): [["tt.divisibility", 16]] for place, name in enumerate(names) if name not in constants}
    source = ASTSource(product.product_kernel, signature, {(names.index(name),): value
                                                           for name, value in constants.items()}, divisible)
    compiled = triton.compile(source, target=GPUTarget("cuda", capability, 32),
                              options={"num_warps": warps, "num_stages": stages})
    assert compiled.metadata.shared <= (227 if capability == 90 else 163) * 1024
    assert "wgmma.mma_async" in compiled.asm["ptx"] or "mma.sync" in compiled.asm["ptx"]
    assert ".local" not in compiled.asm["ptx"]  # no spilled registers


@pytest.mark.parametrize("left, right, sums", [((4, 3), (2, 5), (4, 5)), ((4, 3), (3, 5), (5, 4))])
def test_sizes_that_do_not_agree(left: tuple[int, int], right: tuple[int, int], sums: tuple[int, int]):
    with pytest.raises(ValueError, match=r"left \(4, 3\)"):
        launch(None, torch.zeros(sums), torch.zeros(left), torch.zeros(right))


@pytest.mark.parametrize("left, right, sums", [((4, 0), (0, 5), (4, 5)), ((0, 3), (3, 5), (0, 5))])
def test_nothing_to_add(left: tuple[int, int], right: tuple[int, int], sums: tuple[int, int]):
    launch(None, torch.zeros(sums), torch.zeros(left), torch.zeros(right))


def like(device: str, dtype: torch.dtype) -> SimpleNamespace:
    return SimpleNamespace(is_cuda=device == "cuda", dtype=dtype)


def test_who_has_a_kernel():
    bf16, fp16, fp32 = (torch.zeros(1, dtype=dtype) for dtype in (torch.bfloat16, torch.float16, torch.float32))
    sums = like("cuda", torch.float32)
    assert product_into_wider_sum(sums, bf16, bf16) is product.add_product
    assert product_into_wider_sum(sums, fp16, fp16) is product.add_product
    assert product_into_wider_sum(sums, bf16, fp16) is None
    assert product_into_wider_sum(sums, fp32, fp32) is None
    assert product_into_wider_sum(like("cuda", torch.float64), bf16, bf16) is None
    assert product_into_wider_sum(fp32, bf16, bf16) is None


if torch.cuda.is_available():

    @pytest.mark.parametrize("dtype", WIDTHS, ids=str)
    @pytest.mark.parametrize("size", [*SIZES, (4096, 1024, 2048)], ids=str)
    def test_on_the_gpu(size: tuple[int, int, int], dtype: torch.dtype):
        torch.manual_seed(0)
        rows, columns, depth = size
        for of_left, of_right in itertools.product(LAYOUTS, LAYOUTS):
            check(product.add_product, torch.randn(rows, columns, device="cuda"),
                  of_left(rows, depth, dtype).cuda(), of_right(depth, columns, dtype).cuda())
