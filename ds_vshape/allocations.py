"""Records which memory torch's allocators give out and take back while this thread works, by torch's profiler.

The profiler listens to the allocators, so layers don't notice it: there is no hook on saved tensors, no dispatch mode
and no tensor subclass, and operators compute the same as without it. Only one profiler can run in a thread at a time:
while the script's own runs, nothing can be recorded here, and where a layer starts one, this one stops for it.

Of torch (autograd/profiler.py) this uses, besides `profile`: its names `_prepare_profiler` and `_enable_profiler`,
which every profiler calls first, and the tree of events in its results.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from torch._C._autograd import _profiler_enabled
from torch._C._profiler import _EventType, _RecordFunctionFast
from torch.autograd import profiler as torch_profiler

_MARK = "ds_vshape span "
_STARTS = ("_prepare_profiler", "_enable_profiler")


class CannotWatch(RuntimeError):
    """Why allocations can't be watched."""


@dataclass(frozen=True)
class Change:
    """`size` bytes that were given out at an address, or were taken back there (a negative size), at `time` in ns."""

    time: int
    address: int
    size: int


@dataclass(frozen=True)
class Watched:
    """All changes in the order of time, and the start and end (ns) of each span, by its number."""

    changes: list[Change]
    spans: dict[int, tuple[int, int]]


class AllocationWatcher:
    """Records the memory of devices of one type."""

    def __init__(self, device_type: str) -> None:
        self._device_type = device_type
        self._profiler: Any = None
        self._spans = 0
        # What every other profiler in this process would call first, while this one runs.
        self._starts: dict[str, Callable[..., Any]] = {}
        self._interrupted = False

    def start(self) -> None:
        """Start to record; raises CannotWatch where another profiler runs."""
        if _profiler_enabled() or torch_profiler._is_profiler_enabled:
            raise CannotWatch("another profiler was running")
        self._interrupted, self._spans = False, 0
        self._profiler = torch_profiler.profile(use_cpu=True, profile_memory=True, use_kineto=True)
        self._profiler.__enter__()
        self._starts = {name: getattr(torch_profiler, name) for name in _STARTS}
        for name, start in self._starts.items():
            setattr(torch_profiler, name, self._making_way(name, start))

    def _making_way(self, name: str, start: Callable[..., Any]) -> Callable[..., Any]:
        def stop_and_start(*args: Any, **kwargs: Any) -> Any:
            if self._profiler is not None:
                self.drop()
                self._interrupted = True
                # A profiler that calls nothing but the second has said already that it runs.
                torch_profiler._set_is_profiler_enabled(name == "_enable_profiler")
            return start(*args, **kwargs)

        return stop_and_start

    @contextmanager
    def span(self) -> Iterator[int]:
        """Mark what runs inside as a span; gives the number under which the result has it."""
        self._spans += 1
        if self._profiler is None:
            yield self._spans
            return
        with _RecordFunctionFast(f"{_MARK}{self._spans}"):
            yield self._spans

    def stop(self) -> Watched:
        """Stop, and return what was recorded; raises CannotWatch where this had to stop for another profiler."""
        profiler = self._end()
        if self._interrupted or profiler is None:
            raise CannotWatch("a layer started a profiler of its own")
        return self._read(profiler.kineto_results.experimental_event_tree())

    def drop(self) -> None:
        """Stop if it runs, and throw away what was recorded."""
        self._end()

    def _end(self) -> Any:
        profiler, self._profiler = self._profiler, None
        if profiler is not None:
            for name, start in self._starts.items():
                setattr(torch_profiler, name, start)
            profiler.__exit__(None, None, None)
        return profiler

    def _read(self, roots: list[Any]) -> Watched:
        changes: list[Change] = []
        spans: dict[int, tuple[int, int]] = {}
        left = list(roots)
        while left:
            event = left.pop()
            if event.tag == _EventType.Allocation:
                details = event.extra_fields
                if details.device.type == self._device_type:
                    changes.append(Change(event.start_time_ns, details.ptr, details.alloc_size))
            elif event.name.startswith(_MARK):
                spans[int(event.name.removeprefix(_MARK))] = event.start_time_ns, event.end_time_ns
            left += event.children
        return Watched(sorted(changes, key=lambda change: change.time), spans)
