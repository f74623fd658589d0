"""Products of 16 bits into sums of 32: the Triton kernel against torch in triton's interpreter, compiled, and on a GPU
where one is; which call is taken; and that nothing is chosen by timing."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from types import ModuleType

import pytest
import torch
import triton
import triton.language as tl
from deepspeed.profiling.flops_profiler import FlopsProfiler
from kernel_cases import LAYOUTS, WIDTHS, assert_compiles, by_columns, by_rows, interpreted, like
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from ds_vshape.split_backward.kernels import add_product_in_blas, product, product_into_wider_sum
from ds_vshape.split_backward.kernels.product import TILINGS, Tiling, add_product_in_torch, launch, tiling

# Rows, columns and depth: within one tile, of several whole ones, of several with a rest, and of odd strides.
SIZES = [(5, 7, 3), (64, 128, 64), (100, 70, 130), (1, 1, 200), (33, 257, 64)]


@pytest.fixture(scope="module")
def interpreted_product() -> ModuleType:
    return interpreted(product)


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
            launch(interpreted_product.with_even, Tiling(32, 64, 64, 2, 2, 4), sums, left, right, tl.float32)

        check(add, torch.randn(rows, columns), of_left(rows, depth, dtype), of_right(depth, columns, dtype))


@pytest.mark.parametrize("cut", TILINGS, ids=str)
def test_every_tiling_covers_every_tile_once(cut: Tiling, interpreted_product: ModuleType):
    """3 by 5 tiles, so that the last group has fewer rows of tiles than the others."""
    torch.manual_seed(0)
    sums = torch.randn(3 * cut.rows - 1, 5 * cut.columns - 1)
    left, right = by_columns(sums.size(0), 9, torch.bfloat16), by_rows(9, sums.size(1), torch.bfloat16)
    for group in (2, cut.group):
        check(lambda *given: launch(interpreted_product.with_even, cut._replace(group=group), *given, tl.float32),
              sums, left, right)


# Sums: the weights of transformers with hidden 4096 and 5120, a head, and ones too small to keep a GPU busy.
@pytest.mark.parametrize("rows, columns, tile", [
    (4096, 4096, (128, 256)), (20480, 5120, (128, 256)), (5120, 20480, (128, 256)), (128256, 4096, (128, 256)),
    (1024, 4096, (128, 256)), (1024, 2048, (128, 128)), (1024, 1024, (64, 128)), (1024, 512, (64, 64)),
    (512, 512, (32, 64)), (1, 1, (32, 64))])
def test_sizes_alone_choose_the_tiling(rows: int, columns: int, tile: tuple[int, int],
                                       interpreted_product: ModuleType):
    """Nothing is tried out, in this process or in another one: one launch for each product, of the same tiles."""
    assert tiling(rows, columns)[:2] == tile and tiling(rows, columns) in TILINGS
    launched = []

    class Counted:
        def __getitem__(self, grid: tuple[int]) -> Callable[..., None]:
            return lambda *arguments, **options: launched.append((grid, options))

    sums = torch.empty((rows, columns), device="meta")
    left, right = (torch.empty(size, device="meta", dtype=torch.bfloat16) for size in ((rows, 64), (64, columns)))
    for _ in range(2):
        with pytest.MonkeyPatch.context() as patched:
            patched.setattr(product, "with_even", Counted())
            product.add_product(sums, left, right)
    (grid, options), again = launched
    assert again == (grid, options)
    assert grid == (triton.cdiv(rows, tile[0]) * triton.cdiv(columns, tile[1]),)
    assert (options["ROWS"], options["COLUMNS"]) == tile


@pytest.mark.filterwarnings("ignore:TRITON_DEFAULT_FP_FUSION")
@pytest.mark.parametrize("capability", [80, 90])
@pytest.mark.parametrize("cut", TILINGS, ids=str)
def test_every_tiling_compiles(cut: Tiling, capability: int):
    """For GPUs of that capability, within their shared memory, and with their tensor cores."""
    rows, columns, depth, group, warps, stages = cut
    # As W calls it for a linear layer: both operands by columns of the tokens.
    constants = {"ROWS": rows, "COLUMNS": columns, "DEPTH": depth, "GROUP": group, "MULTIPLIED_AS": tl.bfloat16,
                 "EVEN": True, "left_row": 1, "right_column": 1, "sums_column": 1}
    types = {"sums": "*fp32", "left": "*bf16", "right": "*bf16"}
    assert_compiles(product.product_kernel, constants, types, capability, warps, stages)


@pytest.mark.parametrize("left, right, sums", [((4, 3), (2, 5), (4, 5)), ((4, 3), (3, 5), (5, 4))])
def test_sizes_that_do_not_agree(left: tuple[int, int], right: tuple[int, int], sums: tuple[int, int]):
    with pytest.raises(ValueError, match=r"left \(4, 3\)"):
        launch(None, TILINGS[0], torch.zeros(sums), torch.zeros(left), torch.zeros(right), tl.float32)


@pytest.mark.parametrize("left, right, sums", [((4, 0), (0, 5), (4, 5)), ((0, 3), (3, 5), (0, 5))])
def test_nothing_to_add(left: tuple[int, int], right: tuple[int, int], sums: tuple[int, int]):
    launch(None, TILINGS[0], torch.zeros(sums), torch.zeros(left), torch.zeros(right), tl.float32)


def test_who_has_a_call():
    one = torch.zeros(1, 1)
    bf16, fp16, fp32 = (torch.zeros(1, 1, dtype=dtype) for dtype in (torch.bfloat16, torch.float16, torch.float32))
    sums = like("cuda", torch.float32, one)
    assert product_into_wider_sum(sums, bf16, bf16) is add_product_in_blas
    assert product_into_wider_sum(sums, fp16, fp16) is add_product_in_blas
    assert product_into_wider_sum(sums, bf16, fp16) is None
    assert product_into_wider_sum(sums, fp32, fp32) is None
    assert product_into_wider_sum(like("cuda", torch.float64, one), bf16, bf16) is None
    assert product_into_wider_sum(fp32, bf16, bf16) is None


def test_what_blas_would_copy_is_for_the_kernel():
    sums = like("cuda", torch.float32, torch.zeros(4, 6))
    plain = torch.zeros(4, 8, dtype=torch.bfloat16), torch.zeros(8, 6, dtype=torch.bfloat16)
    by_columns = torch.zeros(8, 4, dtype=torch.bfloat16).t()
    within_another = torch.zeros(4, 9, dtype=torch.bfloat16)[:, :8]
    every_other_column = torch.zeros(4, 16, dtype=torch.bfloat16)[:, ::2]
    expanded = torch.zeros(1, 1, dtype=torch.bfloat16).expand(4, 8)
    for left in (plain[0], by_columns, within_another):
        assert product_into_wider_sum(sums, left, plain[1]) is add_product_in_blas
    for left in (every_other_column, expanded):
        assert product_into_wider_sum(sums, left, plain[1]) is product.add_product


class Calls(TorchDispatchMode):
    """Notes operators instead of running them."""

    def __init__(self) -> None:
        super().__init__()
        self.made: list[tuple[object, tuple[object, ...], dict[str, object]]] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        self.made.append((func, args, kwargs))
        return kwargs["out"]


@pytest.mark.parametrize("profiled", [False, True])
def test_the_call_of_blas(profiled: bool):
    """Only a GPU has its numbers; here it shows that there is one call, which reads and writes the sums themselves. In
    a batch of DeepSpeed's flops profiler torch.addmm is another function, which doesn't know it."""
    sums = torch.zeros(4, 6, device="meta")
    left, right = (torch.zeros(size, device="meta", dtype=torch.bfloat16) for size in ((4, 8), (8, 6)))
    profiler = FlopsProfiler(nn.Linear(2, 2))
    if profiled:
        profiler.start_profile()
    try:
        with Calls() as calls:
            add_product_in_blas(sums, left, right)
    finally:
        profiler.end_profile()
    (func, args, kwargs), = calls.made
    assert func is torch.ops.aten.addmm.dtype_out
    assert args[0] is kwargs["out"] is sums and args[1] is left and args[2] is right and args[3] is torch.float32


if torch.cuda.is_available():

    @pytest.mark.parametrize("dtype", WIDTHS, ids=str)
    @pytest.mark.parametrize("size", [*SIZES, (4096, 1024, 2048)], ids=str)
    def test_on_the_gpu(size: tuple[int, int, int], dtype: torch.dtype):
        torch.manual_seed(0)
        rows, columns, depth = size
        for of_left, of_right in itertools.product(LAYOUTS, LAYOUTS):
            for add in (product.add_product, add_product_in_blas):
                check(add, torch.randn(rows, columns, device="cuda"), of_left(rows, depth, dtype).cuda(),
                      of_right(depth, columns, dtype).cuda())
