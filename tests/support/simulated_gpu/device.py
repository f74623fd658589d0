"""The device of one rank: its memory, and streams whose work runs as late as it may.

Memory of the device is ordinary memory that was asked for by the name DEVICE. (torch takes "cpu:0" for "cpu", but tells
the two apart until then.) Work that is put on a stream runs, in order, when something needs it: a synchronization, a
wait of another stream that is needed, or a transfer to another rank. A real device may be as late as that.
"""

from __future__ import annotations

import threading
import time
import traceback
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, UntypedStorage
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import _disable_current_modes

DEVICE = torch.device("cpu", 0)
# Seconds after which a thread that waits for a stream looks again whether it can run the stream itself.
_PATIENCE = 0.002
# In each byte of memory that anybody may have: NaN in all formats of floats.
_GARBAGE = 0xFF
_AUTOCAST = torch._C.DispatchKeySet(torch._C.DispatchKey.AutocastCPU)


def _without_autocast() -> Any:
    return torch._C._ExcludeDispatchKeyGuard(_AUTOCAST)


class Marker:
    """A place in a stream: done once all before it has run."""

    def __init__(self, stream: Stream) -> None:
        self.stream = stream
        self.done = threading.Event()


class Stream:
    """Work in order. Threads that need some of it run it themselves, one at a time."""

    def __init__(self, device: Any = None, priority: int = 0) -> None:
        self.device_index, self.priority = 0, priority
        self._work: deque[tuple[Callable[[], None], Sequence[Tensor]] | Marker] = deque()
        self._running = threading.RLock()
        self._last: Marker | None = None

    def put(self, work: Callable[[], None], uses: Sequence[Tensor] = ()) -> None:
        """Run `work` after everything queued before it; it has tensors of its own on the memory that it `uses`."""
        self._last = None
        self._work.append((work, uses))

    def uses_of(self, storage: int) -> int:
        """How many tensors of work that hasn't run yet are on a storage (its `_cdata`)."""
        return sum(tensor.untyped_storage()._cdata == storage
                   for work in list(self._work) if not isinstance(work, Marker) for tensor in work[1])

    def mark(self) -> Marker:
        """This place in the stream."""
        if self._last is None:
            self._last = Marker(self)
            self._work.append(self._last)
        return self._last

    def run_to(self, marker: Marker) -> None:
        """Run all before `marker`, in this thread unless another thread runs it already."""
        while not marker.done.is_set():
            # The thread that holds the lock may be waiting for something behind the marker.
            if not self._running.acquire(timeout=0 if DEVICE_OF_RANK.host_spins else _PATIENCE):
                continue
            try:
                if not marker.done.is_set():
                    self._run_next()
            finally:
                self._running.release()

    def _run_next(self) -> None:
        work = self._work.popleft()
        if isinstance(work, Marker):
            work.done.set()
            return
        # Below autograd and autocast, where the mode has caught the operators.
        with _disable_current_modes(), torch.no_grad():
            with torch._C._AutoDispatchBelowADInplaceOrView(), _without_autocast():
                work[0]()

    # -- torch's names

    def wait_stream(self, other: Stream) -> None:
        """Later work on this stream runs after everything queued on the other one now."""
        marker = other.mark()
        self.put(lambda: other.run_to(marker))

    def wait_event(self, event: Event) -> None:
        """What comes later on this stream runs after the event."""
        event.wait(self)

    def record_event(self, event: Event | None = None) -> Event:
        event = event or Event()
        event.record(self)
        return event

    def synchronize(self) -> None:
        """Wait until all has run."""
        DEVICE_OF_RANK.note_synchronization("a stream")
        self.run_to(self.mark())

    def query(self) -> bool:
        return not self._work


class Event:
    """torch's event."""

    def __init__(self, enable_timing: bool = False, **_: Any) -> None:
        self._marker: Marker | None = None
        self._time: list[float] = []

    def record(self, stream: Stream | None = None) -> None:
        """Be at this place of the stream."""
        stream = stream or DEVICE_OF_RANK.current
        moments: list[float] = []
        self._time = moments
        stream.put(lambda: moments.append(time.perf_counter()))
        self._marker = stream.mark()

    def wait(self, stream: Stream | None = None) -> None:
        """What comes later on `stream` runs after this event."""
        marker = self._marker
        if marker is not None:
            (stream or DEVICE_OF_RANK.current).put(lambda: marker.stream.run_to(marker))

    def query(self) -> bool:
        return self._marker is None or self._marker.done.is_set()

    def synchronize(self) -> None:
        """Wait until it has come."""
        DEVICE_OF_RANK.note_synchronization("an event")
        if self._marker is not None:
            self._marker.stream.run_to(self._marker)

    def elapsed_time(self, end: Event) -> float:
        """Milliseconds from this event to `end`."""
        for event in (self, end):
            if not event.query():
                raise RuntimeError("Both events must be completed before calculating elapsed time.")
        return 1000 * (end._time[0] - self._time[0])


class Device:
    """The device of this process."""

    def __init__(self) -> None:
        self.default = Stream()
        self._of_thread = threading.local()
        # Operations of communicators that aren't done; a synchronization of the device waits for them.
        self.outstanding: dict[int, threading.Event] = {}
        # Where the host waited for the device, and why.
        self.synchronizations: list[tuple[str, str]] = []
        # With it the first launch of each kernel waits until the device is idle, as loading a module does.
        self.loads_lazily = False
        # With it a host that waits for the device computes meanwhile, as CUDA's does unless told otherwise.
        self.host_spins = False
        self._loaded: set[Any] = set()
        self._memory: set[StorageWeakRef] = set()
        # Page-locked memory of the host.
        self._pinned: set[StorageWeakRef] = set()
        self._streams: list[Stream] = [self.default]

    def new_stream(self, *arguments: Any, **options: Any) -> Stream:
        stream = Stream(*arguments, **options)
        self._streams.append(stream)
        return stream

    @property
    def current(self) -> Stream:
        """The stream on which this thread puts work."""
        stream: Stream = getattr(self._of_thread, "current", self.default)
        return stream

    @contextmanager
    def on(self, stream: Stream | None) -> Iterator[None]:
        """Put work on `stream` inside."""
        before = self.current
        self._of_thread.current = stream or before
        try:
            yield
        finally:
            self._of_thread.current = before

    def load(self, kernel: Any) -> None:
        """Have `kernel` on the device."""
        if kernel not in self._loaded:
            self._loaded.add(kernel)
            if self.loads_lazily:
                with _disable_current_modes():
                    self.synchronize()

    # -- memory

    def take(self, tensor: Tensor) -> Tensor:
        """`tensor`'s memory is the device's from now on."""
        self._memory.add(StorageWeakRef(tensor.untyped_storage()))
        if len(self._memory) % 1024 == 0:
            self._memory = {memory for memory in self._memory if not memory.expired()}
        return tensor

    def holds(self, tensor: Tensor) -> bool:
        """Whether `tensor` is on the device."""
        return tensor.layout is torch.strided and self.holds_storage(tensor.untyped_storage())

    def holds_storage(self, storage: UntypedStorage) -> bool:
        return StorageWeakRef(storage) in self._memory

    def uses_of(self, storage: int) -> int:
        """How many tensors of work that hasn't run yet are on a storage (its `_cdata`)."""
        return sum(stream.uses_of(storage) for stream in self._streams)

    def resize(self, storage: UntypedStorage, nbytes: int, resize: Callable[[UntypedStorage, int], Any]) -> None:
        """Free memory of the device, or take memory for a storage that has none, by `resize`, in the order of the
        current stream: what comes later on it may have the memory then, and what other streams still do with it, or
        have done before they waited for this one, is lost."""
        memory = torch.empty(0, dtype=torch.uint8)
        if nbytes:
            resize(storage, nbytes)
            memory.set_(storage, 0, (nbytes,), (1,))
            self.current.put(partial(_fill_with_garbage, memory), (memory,))
            return
        self.current.run_to(self.current.mark())
        _fill_with_garbage(memory.set_(storage, 0, (storage.nbytes(),), (1,)))
        for stream in [stream for stream in self._streams if stream.uses_of(storage._cdata)]:
            stream.run_to(stream.mark())
        resize(storage, 0)

    def pin(self, tensor: Tensor) -> Tensor:
        """`tensor`'s memory, which is the host's, is page-locked from now on."""
        self._pinned = {memory for memory in self._pinned if not memory.expired()}
        self._pinned.add(StorageWeakRef(tensor.untyped_storage()))
        return tensor

    def is_pinned(self, tensor: Tensor) -> bool:
        return StorageWeakRef(tensor.untyped_storage()) in self._pinned

    # -- the host waits

    def note_synchronization(self, why: str) -> None:
        """The host is going to wait."""
        stack = [frame for frame in traceback.extract_stack()
                 if "simulated_gpu" not in frame.filename and "/torch/" not in frame.filename]
        where = " < ".join(f"{frame.filename.rsplit('/', 1)[-1]}:{frame.lineno} {frame.name}"
                           for frame in stack[:-4:-1])
        self.synchronizations.append((why, where))

    def finish(self) -> None:
        """Run everything queued on the current stream; what reads the device's memory needs no more."""
        self.current.run_to(self.current.mark())

    def synchronize(self) -> None:
        """Wait for all streams and for all operations of communicators."""
        for stream in list(self._streams):
            stream.run_to(stream.mark())
        for done in list(self.outstanding.values()):
            self.wait(done)

    def wait(self, done: threading.Event) -> None:
        """Wait for an operation of a communicator."""
        while self.host_spins and not done.is_set():
            continue
        done.wait()


def _fill_with_garbage(memory: Tensor) -> None:
    memory.fill_(_GARBAGE)


DEVICE_OF_RANK = Device()
