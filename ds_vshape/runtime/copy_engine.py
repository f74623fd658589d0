"""Copies of the device's memory to the host and back, concurrently with the passes.

    device      copies run                              the host keeps them in
    GPU         on a stream for each direction          page-locked memory, which torch's allocator keeps for later ones
    CPU         in a thread for each direction          unlinked temporary files, which aren't resident memory

In each direction copies run one after another, in the order in which they were started. While memory is away its
storages are empty; once it's back, all tensors in it have their numbers again. It's freed and taken again where passes
run, after these have waited for the copy, so that no allocator has to know of other streams.
"""

from __future__ import annotations

import ctypes
import errno
import mmap
import os
import tempfile
import weakref
from collections.abc import Callable, Sequence
from contextlib import suppress
from functools import cache, partial
from typing import Any, Protocol

import torch
from deepspeed.accelerator import get_accelerator
from torch import Tensor, UntypedStorage

from ds_vshape.comm.background import Background, Handle, background

# The most that is read or written at once; Linux takes at most 2 GiB.
_MOST_BYTES = 1 << 30
_MADV_DONTNEED = 4


class HostMemory(Protocol):
    """Where the host keeps one copy. Memory of the device is given as tensors of uint8."""

    def write(self, memory: Sequence[Tensor]) -> None:
        """Keep the numbers of `memory`."""

    def read(self, memory: Sequence[Tensor]) -> None:
        """Fill `memory`, which has the same sizes, with them. To be called once."""


class PinnedMemory:
    """Page-locked memory: a stream copies to it and from it by itself."""

    def __init__(self) -> None:
        self._copies: list[Tensor] = []

    def write(self, memory: Sequence[Tensor]) -> None:
        for values in memory:
            copy = torch.empty(values.numel(), dtype=torch.uint8, pin_memory=True)
            self._copies.append(copy.copy_(values, non_blocking=True))

    def read(self, memory: Sequence[Tensor]) -> None:
        for values, copy in zip(memory, self._copies, strict=True):
            values.copy_(copy, non_blocking=True)
        # Its allocator knows which stream still reads it.
        self._copies.clear()


class _TemporaryFile:
    """A file without a name in the folder for temporary files ($TMPDIR); closed when nothing refers to it."""

    def __init__(self) -> None:
        with tempfile.TemporaryFile(buffering=0) as file:
            self.number = os.dup(file.fileno())
        weakref.finalize(self, os.close, self.number)


class FileMemory:
    """A file, one of the `idle` ones if there are any, to which it's added when its copy is back.

    It isn't mapped: on a full disk a write raises, where a map would end the process.
    """

    def __init__(self, idle: list[_TemporaryFile]) -> None:
        self._idle = idle
        self._file: _TemporaryFile | None = None

    def write(self, memory: Sequence[Tensor]) -> None:
        self._file = self._idle.pop() if self._idle else _TemporaryFile()
        _transfer(memory, partial(os.pwrite, self._file.number))

    def read(self, memory: Sequence[Tensor]) -> None:
        file, self._file = self._file, None
        assert file is not None
        _transfer(memory, lambda part, offset: os.preadv(file.number, [part], offset))
        self._idle.append(file)


def _transfer(memory: Sequence[Tensor], transfer: Callable[[memoryview, int], int]) -> None:
    """Write or read all of `memory`; `transfer` does it from an offset on, as far as it comes."""
    offset = 0
    for values in memory:
        # Not by numpy(), after which torch would refuse to free the memory.
        rest = memoryview((ctypes.c_char * values.numel()).from_address(values.data_ptr())).cast("B")
        while rest:
            done = transfer(rest[:_MOST_BYTES], offset)
            if not done:
                raise OSError(errno.EIO, "a temporary file of offloaded activations ends too early")
            offset, rest = offset + done, rest[done:]


class CopyEngine:
    """Copies in both directions.

    Args:
        outwards, backwards: run copies to the host, and back.
        host: gives memory of the host for a copy.
        free: frees a storage's memory.
        now: reads the clock of where copies run.
    """

    def __init__(self, outwards: Background, backwards: Background, host: Callable[[], HostMemory],
                 free: Callable[[UntypedStorage], None], now: Callable[[], Any]) -> None:
        self.outwards, self.backwards, self.host, self.free, self.now = outwards, backwards, host, free, now

    def start(self, storages: Sequence[UntypedStorage]) -> Copy:
        """Start to copy the memory of `storages` to the host; it mustn't change any more."""
        return Copy(storages, self)


class Copy:
    """The memory of some storages: on its way to the host, there, or on its way back.

    A copy's error is raised where its end is awaited.
    """

    def __init__(self, storages: Sequence[UntypedStorage], engine: CopyEngine) -> None:
        self._storages, self._sizes = list(storages), [storage.nbytes() for storage in storages]
        self._engine, self._host = engine, engine.host()
        # Start and end of the copy to the host, and of the one back, by the engine's clock.
        self.outwards: list[Any] = []
        self.backwards: list[Any] = []
        self._running: Handle[None] | None = engine.outwards.start(
            partial(self._run, self._host.write, self.outwards))

    @property
    def nbytes(self) -> int:
        """How much is moved."""
        return sum(self._sizes)

    def free(self) -> None:
        """Wait until the copy is on the host, and free the memory on the device."""
        self.wait()
        for storage in self._storages:
            self._engine.free(storage)

    def start_back(self) -> None:
        """Take memory again, and start to copy into it."""
        for storage, size in zip(self._storages, self._sizes):
            storage.resize_(size)
        self._running = self._engine.backwards.start(partial(self._run, self._host.read, self.backwards))

    def wait(self) -> None:
        """Until what was started last has ended: on a CPU the caller waits, on a GPU the current stream."""
        running, self._running = self._running, None
        if running is not None:
            running.result()

    def finish(self) -> None:
        """Wait until the memory is back, and leave it to the tensors in it."""
        self.wait()
        self._storages.clear()

    def abandon(self) -> None:
        """Let go of everything, whatever state it's in; raises nothing."""
        with suppress(Exception):
            self.wait()
        self._storages.clear()

    def _run(self, transfer: Callable[[Sequence[Tensor]], None], marks: list[Any]) -> None:
        marks.append(self._engine.now())
        transfer([_bytes_of(storage, size) for storage, size in zip(self._storages, self._sizes)])
        marks.append(self._engine.now())


def copy_engine(now: Callable[[], Any]) -> CopyEngine:
    """That of this process's accelerator; `now` reads the clock of the current stream or thread."""
    if get_accelerator().is_synchronized_device():
        idle: list[_TemporaryFile] = []
        return CopyEngine(background(), background(), lambda: FileMemory(idle), _free_pages, now)
    return CopyEngine(background(), background(), PinnedMemory, _free, now)


def _bytes_of(storage: UntypedStorage, size: int) -> Tensor:
    return torch.empty(0, dtype=torch.uint8, device=storage.device).set_(storage, 0, (size,), (1,))


def _free(storage: UntypedStorage) -> None:
    storage.resize_(0)


def _free_pages(storage: UntypedStorage) -> None:
    """Free memory of the host, which the C library keeps as resident memory in most sizes."""
    start, page = storage.data_ptr(), mmap.PAGESIZE
    first, end = -(-start // page) * page, (start + storage.nbytes()) // page * page
    if first < end:
        _madvise()(first, end - first, _MADV_DONTNEED)
    _free(storage)


@cache
def _madvise() -> Callable[[int, int, int], int]:
    function = ctypes.CDLL(None).madvise
    function.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)
    return function
