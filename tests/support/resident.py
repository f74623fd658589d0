"""The resident memory of this process, from /proc/self (Linux)."""

from __future__ import annotations

import ctypes
import gc
from collections.abc import Callable
from pathlib import Path
from typing import Any

_M_MMAP_THRESHOLD = -3
_LARGE = 256 * 1024


def map_large_tensors() -> None:
    """Have the C library map large tensors one by one, so that memory goes back when a tensor dies."""
    if ctypes.CDLL("libc.so.6").mallopt(_M_MMAP_THRESHOLD, _LARGE) != 1:
        raise RuntimeError("this libc can't be told how to map memory: the peaks would mean nothing")


def resident() -> int:
    """Bytes that are resident now, without garbage: what was left of other work could be collected at any time."""
    gc.collect()
    return _status("VmRSS")


def trimmed() -> int:
    """Bytes that are resident when the C library has given back what it keeps of freed memory, so that resident memory
    rises by all that is allocated next."""
    gc.collect()
    ctypes.CDLL("libc.so.6").malloc_trim(0)
    return _status("VmRSS")


def rise_in(run: Callable[[], Any]) -> int:
    """The most bytes by which resident memory rises while `run` does, above what is resident before."""
    before = trimmed()
    return peak_in(run) - before


def peak_in(run: Callable[[], Any]) -> int:
    """The most bytes that are resident at once while `run` does."""
    Path("/proc/self/clear_refs").write_text("5")  # the high-water mark starts again
    run()
    return _status("VmHWM")


def _status(field: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field + ":"):
            return int(line.split()[1]) * 1024
    raise RuntimeError(f"/proc/self/status has no {field}")
