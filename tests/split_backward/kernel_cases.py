"""Matrices for tests of the kernels, and how to run these without a GPU."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from types import ModuleType, SimpleNamespace

import torch
import triton
from torch import Tensor

WIDTHS = [torch.bfloat16, torch.float16]


def interpreted(module: ModuleType) -> ModuleType:
    """A copy of the module whose kernels run in triton's interpreter, which needs no GPU."""
    spec = importlib.util.spec_from_file_location(f"{module.__name__}_interpreted", module.__file__)
    assert spec is not None and spec.loader is not None
    copy = importlib.util.module_from_spec(spec)
    with triton.knobs.runtime.scope():
        triton.knobs.runtime.interpret = True
        spec.loader.exec_module(copy)
    return copy


def by_rows(rows: int, columns: int, dtype: torch.dtype) -> Tensor:
    return torch.randn(rows, columns).to(dtype)


def by_columns(rows: int, columns: int, dtype: torch.dtype) -> Tensor:
    return torch.randn(columns, rows).to(dtype).t()


def in_a_larger_one(rows: int, columns: int, dtype: torch.dtype) -> Tensor:
    return torch.randn(2 * rows, columns + 3).to(dtype)[::2, 1:-2]


LAYOUTS: list[Callable[[int, int, torch.dtype], Tensor]] = [by_rows, by_columns, in_a_larger_one]


def like(device: str, dtype: torch.dtype, matrix: Tensor) -> SimpleNamespace:
    return SimpleNamespace(is_cuda=device == "cuda", dtype=dtype, shape=matrix.shape, stride=matrix.stride)
