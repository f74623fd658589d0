"""Runs exchanges with other ranks concurrently with the passes, one after another.

On a GPU collectives are asynchronous anyway, so another stream is enough; on a CPU they block the thread that calls
them, so another thread is needed. The pieces run in the order in which they were started: ranks that start
theirs in the same order meet in the same collectives.
"""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable, Iterable
from concurrent.futures import Future
from typing import Any, Protocol, TypeVar

import torch
from deepspeed.accelerator import get_accelerator
from torch import Tensor

T = TypeVar("T")
T_co = TypeVar("T_co", covariant=True)


class Handle(Protocol[T_co]):
    """Work that was started."""

    def result(self, timeout: float | None = None) -> T_co:
        """The work's result. On a CPU the caller waits for it; on a GPU the current stream does.

        Raises what the work raised, and on a CPU TimeoutError after `timeout` seconds.
        """


class Background(Protocol):
    """Where work runs concurrently with the passes."""

    def start(self, work: Callable[[], T], uses: Iterable[Tensor] = ()) -> Handle[T]:
        """Start `work`, for which no gradients are recorded. The tensors that it `uses` needn't be kept until its end.
        """


class Thread:
    """A daemon thread: it ends with the process, even while it waits for a rank that is lost."""

    def __init__(self) -> None:
        self._waiting: queue.SimpleQueue[tuple[Future[Any], Callable[[], Any]]] = queue.SimpleQueue()
        threading.Thread(target=self._run, name="ds_vshape background", daemon=True).start()

    def start(self, work: Callable[[], T], uses: Iterable[Tensor] = ()) -> Handle[T]:
        future: Future[T] = Future()
        self._waiting.put((future, work))
        return future

    def _run(self) -> None:
        while True:
            future, work = self._waiting.get()
            try:
                with torch.no_grad():
                    result = work()
            except BaseException as error:
                future.set_exception(error)
            else:
                future.set_result(result)
            del future, work


class Stream:
    """A stream of the device."""

    def __init__(self) -> None:
        self._stream = get_accelerator().Stream()

    def start(self, work: Callable[[], T], uses: Iterable[Tensor] = ()) -> Handle[T]:
        self._stream.wait_stream(get_accelerator().current_stream())
        for tensor in uses:
            tensor.record_stream(self._stream)
        with get_accelerator().stream(self._stream), torch.no_grad():
            return _OnStream(work(), self._stream.record_event())


class _OnStream(Handle[T]):
    def __init__(self, value: T, end: Any) -> None:
        self._value, self._end = value, end

    def result(self, timeout: float | None = None) -> T:
        # What was started later isn't waited for.
        get_accelerator().current_stream().wait_event(self._end)
        return self._value


def background() -> Background:
    """What runs work in the background on this process's accelerator."""
    return Thread() if get_accelerator().is_synchronized_device() else Stream()
