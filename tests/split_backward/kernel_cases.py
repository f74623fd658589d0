"""Matrices for tests of the kernels, and how to run these without a GPU."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from types import ModuleType, SimpleNamespace
from typing import Any

import torch
import triton
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

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


def assert_compiles(kernel: Any, constants: dict[str, Any], types: dict[str, str], capability: int, warps: int,
                    stages: int) -> None:
    """For GPUs of that capability: within their shared memory, with their tensor cores and without spilled registers.

    Arguments that are in neither dictionary are integers, all but constants divisible by 16.
    """
    names = kernel.arg_names
    signature = {name: "constexpr" if name in constants else types.get(name, "i32") for name in names}
    divisible = {(place,): [["tt.divisibility", 16]] for place, name in enumerate(names) if name not in constants}
    source = ASTSource(kernel, signature, {(names.index(name),): value for name, value in constants.items()}, divisible)
    compiled = triton.compile(source, target=GPUTarget("cuda", capability, 32),
                              options={"num_warps": warps, "num_stages": stages})
    assert compiled.metadata.shared <= (227 if capability == 90 else 163) * 1024
    assert "wgmma.mma_async" in compiled.asm["ptx"] or "mma.sync" in compiled.asm["ptx"]
    assert ".local" not in compiled.asm["ptx"]


def by_rows(rows: int, columns: int, dtype: torch.dtype) -> Tensor:
    return torch.randn(rows, columns).to(dtype)


def by_columns(rows: int, columns: int, dtype: torch.dtype) -> Tensor:
    return torch.randn(columns, rows).to(dtype).t()


def in_a_larger_one(rows: int, columns: int, dtype: torch.dtype) -> Tensor:
    return torch.randn(2 * rows, columns + 3).to(dtype)[::2, 1:-2]


LAYOUTS: list[Callable[[int, int, torch.dtype], Tensor]] = [by_rows, by_columns, in_a_larger_one]


def like(device: str, dtype: torch.dtype, matrix: Tensor) -> SimpleNamespace:
    return SimpleNamespace(is_cuda=device == "cuda", dtype=dtype, shape=matrix.shape, stride=matrix.stride)
