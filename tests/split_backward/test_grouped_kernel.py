"""The weight gradients of all experts added to sums of 32 bits in one launch: against torch in triton's interpreter,
and compiled for GPUs."""

from __future__ import annotations

from types import ModuleType

import pytest
import torch
import triton.language as tl
from kernel_cases import LAYOUTS, WIDTHS, assert_compiles, by_columns, by_rows, interpreted, like
from split_cases import grouped as grouped_rows
from torch import Tensor, nn

from ds_vshape.split_backward import SplitBackward, WeightGradientStore, accumulate
from ds_vshape.split_backward.kernels import grouped, grouped_product_into_wider_sum
from ds_vshape.split_backward.kernels.grouped import add_grouped_product_in_torch, launch
from ds_vshape.split_backward.kernels.product import TILINGS, Tiling, tiling

# Ends of groups: an empty one between two, none in the first, the last rows in none, one group alone.
ENDS = [(3, 3, 70), (0, 64, 65, 130), (40, 41), (96,)]


@pytest.fixture(scope="module")
def kernel() -> ModuleType:
    return interpreted(grouped)


def check(kernel: ModuleType, cut: Tiling, sums: Tensor, left: Tensor, right: Tensor, ends: Tensor) -> None:
    whole = torch.full((sums.size(0), sums.size(1) + 2, sums.size(2) + 2), float("nan"))
    inner = whole[:, 1:-1, 1:-1].copy_(sums)
    expected = sums.double()
    add_grouped_product_in_torch(expected, left, right, ends)
    # The interpreter multiplies the bit patterns of bfloat16; these numbers are the same in float32.
    launch(kernel.grouped_kernel, cut, inner, left, right, ends, tl.float32)
    torch.testing.assert_close(inner.double(), expected, rtol=1e-5, atol=1e-5 * left.size(1) ** 0.5)
    empty = [place for place, end in enumerate(ends.tolist()) if end == ([0, *ends.tolist()])[place]]
    assert all(torch.equal(inner[place], sums[place]) for place in empty)
    whole[:, 1:-1, 1:-1] = float("nan")
    assert whole.isnan().all()


@pytest.mark.parametrize("dtype", WIDTHS, ids=str)
@pytest.mark.parametrize("ends", ENDS, ids=str)
def test_groups_added_to_their_sums(ends: tuple[int, ...], dtype: torch.dtype, kernel: ModuleType) -> None:
    torch.manual_seed(0)
    depth = max(ends) + 5
    for number, layout in enumerate(LAYOUTS):
        sums, place = torch.randn(len(ends), 33, 70), torch.tensor(ends, dtype=torch.int32)
        check(kernel, Tiling(32, 64, 64, 2, 2, 4), sums, layout(33, depth, dtype),
              LAYOUTS[(number + 1) % len(LAYOUTS)](depth, 70, dtype), place)


@pytest.mark.slow
@pytest.mark.parametrize("cut", TILINGS, ids=str)
def test_every_tiling_covers_every_tile_once(cut: Tiling, kernel: ModuleType) -> None:
    torch.manual_seed(0)
    sums = torch.randn(2, 2 * cut.rows - 1, cut.columns + 1)
    check(kernel, cut, sums, by_columns(sums.size(1), 20, torch.bfloat16), by_rows(20, sums.size(2), torch.bfloat16),
          torch.tensor([7, 20]))


def test_sizes_alone_choose_the_tiling() -> None:
    """Mixtral's experts, Qwen3's, and ones too small to keep a GPU busy."""
    assert tiling(28672, 4096, 8)[:2] == tiling(1536, 2048, 128)[:2] == (128, 256)
    assert tiling(64, 64, 4)[:2] == (32, 64)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:TRITON_DEFAULT_FP_FUSION")
@pytest.mark.parametrize("capability", [80, 90])
@pytest.mark.parametrize("cut", TILINGS, ids=str)
def test_every_tiling_compiles(cut: Tiling, capability: int) -> None:
    """Within the GPU's shared memory, with its tensor cores and without spilled registers."""
    constants = {"ROWS": cut.rows, "COLUMNS": cut.columns, "DEPTH": cut.depth, "MULTIPLIED_AS": tl.bfloat16,
                 "left_row": 1, "right_column": 1, "sums_column": 1}
    types = {"sums": "*fp32", "left": "*bf16", "right": "*bf16", "ends": "*i32"}
    assert_compiles(grouped.grouped_kernel, constants, types, capability, cut.warps, cut.stages)


def test_who_has_a_call() -> None:
    bf16, fp16, fp32 = (torch.zeros(1, 1, dtype=dtype) for dtype in (torch.bfloat16, torch.float16, torch.float32))
    sums = like("cuda", torch.float32, torch.zeros(1, 1, 1))
    assert grouped_product_into_wider_sum(sums, bf16, bf16) is grouped.add_grouped_product
    assert grouped_product_into_wider_sum(sums, bf16, fp16) is None
    assert grouped_product_into_wider_sum(sums, fp32, fp32) is None
    assert grouped_product_into_wider_sum(torch.zeros(1, 1, 1), bf16, bf16) is None


@pytest.mark.parametrize("transposed", [False, True])
def test_w_uses_it_where_sums_have_more_bits(transposed: bool, kernel: ModuleType,
                                             monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a GPU, but by the interpreter: the second micro-batch is added to the sum of the first."""
    launched = []

    def add(sums: Tensor, left: Tensor, right: Tensor, ends: Tensor) -> None:
        launched.append(sums.shape)
        launch(kernel.grouped_kernel, Tiling(32, 64, 64, 2, 2, 4), sums, left, right, ends, tl.float32)

    monkeypatch.setattr(accumulate, "grouped_product_into_wider_sum", lambda *_: add)
    torch.manual_seed(0)
    weight = nn.Parameter(torch.randn((3, 16, 8) if transposed else (3, 8, 16)).bfloat16())
    sums = torch.randn(weight.shape)
    batch = torch.randn(16, 8).bfloat16().requires_grad_()

    def run() -> None:
        grouped_rows(batch, weight.mT if transposed else weight).backward(torch.ones(16, 16).bfloat16())

    run()
    expected, weight.grad = sums + weight.grad.float(), None
    store = WeightGradientStore()
    with SplitBackward(store):
        run()

    class Sums:
        def add(self, parameter: nn.Parameter, gradient: Tensor, /) -> None:
            raise AssertionError("W was to add in place")

        def buffer(self, parameter: nn.Parameter, /) -> Tensor:
            return sums

    store.run(Sums())
    assert launched == [weight.shape]
    torch.testing.assert_close(sums, expected, rtol=2e-2, atol=2e-2)


def test_sizes_that_do_not_agree() -> None:
    with pytest.raises(ValueError, match=r"in groups \(2,\)"):
        launch(None, TILINGS[0], torch.zeros(3, 4, 5), torch.zeros(4, 9), torch.zeros(9, 5), torch.zeros(2), tl.float32)


def test_nothing_to_add() -> None:
    launch(None, TILINGS[0], torch.zeros(3, 4, 5), torch.zeros(4, 0), torch.zeros(0, 5), torch.zeros(3), tl.float32)
