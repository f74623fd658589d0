"""Inner loops as machine code, where numba is installed (the extra `planner`): about a hundred times as fast.

The code is kept on disk, so that only the first plan after an installation waits some seconds for it. Without numba the
same functions run as they are. Importing numba takes time as well, so modules with loops are imported when planning
starts. A loop and all that it calls are in one file, because numba looks at no other one when it decides whether the
code on disk is still right.
"""

from __future__ import annotations

from collections.abc import Callable
from importlib import import_module
from typing import Any, TypeVar

Function = TypeVar("Function", bound=Callable[..., Any])


def _njit() -> Any:
    """numba's decorator, or None where it isn't installed."""
    try:
        return import_module("numba").njit
    except ImportError:
        return None


_NJIT = _njit()
COMPILED = _NJIT is not None


def jit(function: Function) -> Function:
    """`function`, compiled when it is first called, if numba is there."""
    if _NJIT is None:
        return function
    try:
        compiled: Function = _NJIT(cache=True, error_model="numpy", nogil=True)(function)
    except RuntimeError:  # no folder to keep it in
        compiled = _NJIT(error_model="numpy", nogil=True)(function)
    return compiled
