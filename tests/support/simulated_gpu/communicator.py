"""A c10d backend for the simulated device, over gloo, that obeys NCCL's rules instead of gloo's.

    one stream         the operations of a communicator run one after another, each after what stood on the device's
                       current stream when it was started
    rendezvous         a send reads its memory when both sides have met; a receive buffer holds NaN until then
    waiting            wait() lets the current stream wait, returns at once and never raises; with a time it blocks the
                       host, and raises when that is over
    lost ranks         an operation whose peer is gone never ends; the watchdog, which counts from the start of an
                       operation, ends the process without a word of ours
    lazily made        both ends make a communicator in its first operation, and the host waits there for the other
    bound device       under a default group with a device, new_group() splits the default communicator: all ranks of
                       the job must come, members or not
    types              no 16-bit integers, no complex numbers, no memory of the host
    options            of one group alone, as torch writes the group's name into them
"""

from __future__ import annotations

import os
import queue
import sys
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from simulated_gpu.deferral import poison, same_memory
from simulated_gpu.device import DEVICE_OF_RANK
from torch import Tensor
from torch.distributed import ProcessGroupGloo
from torch.utils._python_dispatch import _disable_current_modes

BACKEND = "simulated_nccl"
# What NCCL has no type for.
_NO_TYPE = (torch.int16, torch.complex64, torch.complex128)
# The default group's own device: any with an index.
BOUND_DEVICE = torch.device("cuda", 0)
# The name of threads that aren't a program's.
SIMULATION = "simulated_gpu"


class Counts:
    """What this process has made and started."""

    communicators = 0
    splits = 0
    # The options of those that are made.
    options: list[Options] = []


@dataclass
class Config:
    """NCCL's own."""

    max_ctas: int = 32


class Options:
    """Those of ProcessGroupNCCL which are used here."""

    def __init__(self) -> None:
        self.config = Config()
        self.is_high_priority_stream = False
        self._timeout = timedelta(minutes=10)
        self.is_taken = False


class Work(dist.Work):
    """An operation that was started."""

    def __init__(self, name: str, done: threading.Event) -> None:
        super().__init__()
        self._name, self._done = name, done

    def wait(self, timeout: timedelta | None = None) -> bool:
        """Let the current stream wait; with a `timeout` the host does."""
        if timeout is None or timeout == timedelta(0):
            DEVICE_OF_RANK.current.put(lambda: DEVICE_OF_RANK.wait(self._done))
            return True
        DEVICE_OF_RANK.note_synchronization(f"{self._name}.wait(timeout)")
        if not self._done.wait(timeout.total_seconds()):
            raise dist.DistBackendError(f"{self._name} didn't end within {timeout}")
        return True

    def is_completed(self) -> bool:
        return self._done.is_set()

    def is_success(self) -> bool:
        return self._done.is_set()

    def synchronize(self) -> None:
        self.wait()


class Communicator(dist.ProcessGroup):
    """A process group of simulated devices."""

    supports_splitting = True

    def __init__(self, store: Any, rank: int, size: int, options: Options) -> None:
        super().__init__(rank, size)
        self._store, self._rank, self._size, self.options = store, rank, size, options
        self._gloo: ProcessGroupGloo | None = None
        self._work: queue.SimpleQueue[Callable[[], None]] = queue.SimpleQueue()
        self._name = ""

    # -- what torch asks of a backend

    def getBackendName(self) -> str:  # noqa: N802
        return BACKEND

    def _get_backend(self, device: torch.device) -> Communicator:
        return self

    def _set_group_name(self, name: str) -> None:
        self._name = name

    def _set_group_desc(self, description: str) -> None:
        pass

    @property
    def group_name(self) -> str:
        return self._name

    def set_timeout(self, timeout: timedelta) -> None:
        self._set_default_timeout(timeout)

    def _set_default_timeout(self, timeout: timedelta) -> None:
        self.options._timeout = timeout

    def perform_nocolor_split(self, device: Any) -> None:
        """Take part in a split of this communicator without being a member of what comes out; the host waits."""
        Counts.splits += 1
        self._connect()
        assert self._gloo is not None
        self._gloo.barrier().wait(self.options._timeout)

    def eager_connect_single_device(self, device: Any) -> None:
        """Make the communicator at once, by a split of the default one."""
        if dist.is_initialized():
            dist.group.WORLD.perform_nocolor_split(device)
        self._connect()

    def _connect(self) -> None:
        """Make the communicator, for which all its ranks are needed."""
        if self._gloo is not None:
            return
        self._gloo = ProcessGroupGloo(self._store, self._rank, self._size, timeout=timedelta(days=1))
        Counts.communicators += 1
        Counts.options.append(self.options)
        threading.Thread(target=self._run, daemon=True, name=SIMULATION).start()

    # -- operations

    def _run(self) -> None:
        while True:
            work = self._work.get()
            try:
                with torch.no_grad():
                    work()
            except RuntimeError:
                # The other side is gone: on a GPU the kernel would spin from here on.
                threading.Event().wait()

    def _start(self, name: str, tensors: Sequence[Tensor], operation: Callable[[ProcessGroupGloo], None],
               fills: Sequence[Tensor] = ()) -> Work:
        for tensor in tensors:
            if not DEVICE_OF_RANK.holds(tensor):
                raise RuntimeError("No backend type associated with device type cpu")
            if tensor.dtype in _NO_TYPE:
                raise TypeError(f"Input tensor data type is not supported for NCCL process group: {tensor.dtype}")
            if not tensor.is_contiguous():
                raise ValueError("Tensors must be contiguous")
        # As a connection of NCCL's: the host waits until the other ranks have come to their first operation.
        self._connect()
        stream = DEVICE_OF_RANK.current
        for tensor in fills:
            stream.put(lambda tensor=tensor: poison(tensor))
        before, done = stream.mark(), threading.Event()
        number = id(done)
        DEVICE_OF_RANK.outstanding[number] = done
        _watchdog.watch(f"{name} of {self._name or 'a group'}", done, self.options._timeout)

        def run() -> None:
            stream.run_to(before)
            assert self._gloo is not None
            operation(self._gloo)
            done.set()
            DEVICE_OF_RANK.outstanding.pop(number, None)

        self._work.put(run)
        return Work(name, done)

    def send(self, tensors: list[Tensor], target: int, tag: int = 0) -> Work:
        tensor, = _held(tensors)
        ready = torch.zeros(1, dtype=torch.uint8)

        def operation(gloo: ProcessGroupGloo) -> None:
            gloo.recv([ready], target, 1).wait()
            gloo.send([_bytes(tensor)], target, 0).wait()

        return self._start("send", tensors, operation)

    def recv(self, tensors: list[Tensor], source: int, tag: int = 0) -> Work:
        tensor, = _held(tensors)

        def operation(gloo: ProcessGroupGloo) -> None:
            gloo.send([torch.zeros(1, dtype=torch.uint8)], source, 1).wait()
            gloo.recv([_bytes(tensor)], source, 0).wait()

        return self._start("recv", tensors, operation, fills=tensors)

    def allreduce(self, tensors: list[Tensor], options: Any = None) -> Work:
        options, tensors = options or dist.AllreduceOptions(), _held(tensors)
        return self._start("allreduce", tensors, lambda gloo: _waited(gloo.allreduce(tensors, options)))

    def allreduce_coalesced(self, tensors: list[Tensor], options: Any = None) -> Work:
        tensors = _held(tensors)

        def operation(gloo: ProcessGroupGloo) -> None:
            for tensor in tensors:
                gloo.allreduce([tensor], options).wait()

        return self._start("allreduce", tensors, operation)

    def broadcast(self, tensors: list[Tensor], options: Any = None) -> Work:
        tensors = _held(tensors)
        return self._start("broadcast", tensors, lambda gloo: _waited(gloo.broadcast(tensors, options)))

    def reduce(self, tensors: list[Tensor], options: Any = None) -> Work:
        tensors = _held(tensors)
        return self._start("reduce", tensors, lambda gloo: _waited(gloo.reduce(tensors, options)))

    def allgather(self, outputs: list[list[Tensor]], inputs: list[Tensor], options: Any = None) -> Work:
        outputs, inputs = _held(outputs), _held(inputs)
        flat = [tensor for those in outputs for tensor in those]
        return self._start("allgather", [*inputs, *flat], lambda gloo: _waited(gloo.allgather(outputs, inputs)))

    def _allgather_base(self, output: Tensor, given: Tensor, options: Any = None) -> Work:
        output, given = _held((output, given))

        def operation(gloo: ProcessGroupGloo) -> None:
            gloo.allgather([list(output.view(-1).chunk(self._size))], [given.reshape(-1)]).wait()

        return self._start("allgather", [given, output], operation)

    def _reduce_scatter_base(self, output: Tensor, given: Tensor, options: Any = None) -> Work:
        output, given = _held((output, given))

        def operation(gloo: ProcessGroupGloo) -> None:
            whole = given.clone()
            inner = dist.AllreduceOptions()
            inner.reduceOp = options.reduceOp
            gloo.allreduce([whole], inner).wait()
            output.view(-1).copy_(whole.view(-1).chunk(self._size)[self._rank])

        return self._start("reduce_scatter", [given, output], operation)

    # torch's newer names.
    all_gather_single, reduce_scatter_single = _allgather_base, _reduce_scatter_base

    def barrier(self, opts: Any = None) -> Work:
        work = self._start("barrier", [], lambda gloo: _waited(gloo.barrier()))
        # The host waits in torch's too.
        work._done.wait()
        return work


class _Watchdog:
    """Ends the process when an operation takes longer than its group's time-out, counted from its start."""

    def __init__(self) -> None:
        self._watched: list[tuple[float, str, threading.Event]] = []
        self._started = False

    def watch(self, name: str, done: threading.Event, timeout: timedelta) -> None:
        self._watched = [entry for entry in self._watched if not entry[2].is_set()]
        self._watched.append((time.monotonic() + timeout.total_seconds(), name, done))
        if not self._started:
            self._started = True
            threading.Thread(target=self._run, daemon=True, name=SIMULATION).start()

    def _run(self) -> None:
        while True:
            time.sleep(0.2)
            for deadline, name, done in list(self._watched):
                if not done.is_set() and time.monotonic() > deadline:
                    print(f"Watchdog caught collective operation timeout: {name}", file=sys.stderr, flush=True)
                    os._exit(134)


_watchdog = _Watchdog()


def _held(tensors: Any) -> Any:
    with _disable_current_modes(), torch.no_grad():
        return same_memory(tensors)


def _waited(work: Any) -> None:
    work.wait()


def _bytes(tensor: Tensor) -> Tensor:
    """What gloo sends: it has no bfloat16 in some operations."""
    return tensor.detach().view(torch.uint8) if tensor.dim() else tensor.detach().view(1).view(torch.uint8)


def _make(group: Any, options: Options | None) -> Communicator:
    options = options or Options()
    assert not options.is_taken, "these options are another group's"
    options.is_taken, options._timeout = True, group.timeout
    return Communicator(group.store, group.group_rank, group.group_size, options)


def register() -> None:
    """Let torch know the backend."""
    if BACKEND not in dist.Backend.backend_list:
        dist.Backend.register_backend(BACKEND, _make, extended_api=True, devices=["cpu", "cuda"])
