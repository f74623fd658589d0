"""What the process of a rank has besides its tensors, measured as a remainder."""

from __future__ import annotations

import ctypes
import ctypes.util
import gc
import resource
from contextlib import suppress
from pathlib import Path

import torch


def process_bytes(device: torch.device, tensors: int) -> int:
    """What this process has on `device` besides `tensors` bytes of tensors that are there now; to be called between
    batches.

    On a GPU: what is taken of it (by others, too) without what torch's allocator has, so the context and NCCL's
    buffers; and what that allocator had at its peak without using it. On a CPU: resident memory.
    """
    if device.type == "cuda":
        free, total = torch.cuda.mem_get_info(device)
        unused = torch.cuda.max_memory_reserved(device) - torch.cuda.max_memory_allocated(device)
        return max(0, total - free - torch.cuda.memory_reserved(device) + unused)
    _give_back_freed_memory()
    return max(0, resident_bytes() - tensors)


def resident_bytes() -> int:
    """This process's resident memory; 0 where the system doesn't tell it."""
    try:
        pages = int(Path("/proc/self/statm").read_text().split()[1])
    except OSError:
        return 0
    return pages * resource.getpagesize()


def _give_back_freed_memory() -> None:
    """Let the C library return what it keeps of freed memory, which tensors of the next batch would use again."""
    gc.collect()
    with suppress(OSError, AttributeError):  # not glibc
        ctypes.CDLL(ctypes.util.find_library("c")).malloc_trim(0)
