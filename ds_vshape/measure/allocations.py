"""What operators take and what is given back while passes run, as a dispatch mode sees it.

The mode looks at results after their operator is done, and at what is still alive: layers compute what they compute
without it. Higher-order operators (torch.cond) and torch.func transforms pass through. It is active in passes alone:
torch hands a thread's modes, and a profiler, on to the threads of gloo, which would meet them at any time.

Memory that an operator takes and gives back within itself isn't seen, nor what compiled code takes.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.nn import Parameter
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

# Others have no memory of their own (FakeTensor), or keep it in tensors that are seen by themselves.
_PLAIN_TYPES = (Tensor, Parameter)


def memory_of(tensor: Tensor) -> tuple[int, int]:
    """A number that stands for a tensor's memory, which no other has as long as anyone refers to it, and its bytes. An
    address would change while the memory is on the host, and there is none on the meta device."""
    storage = tensor.untyped_storage()
    return storage._cdata, storage.nbytes()


def strided(tensors: Iterable[Any]) -> Iterator[Tensor]:
    """Those that are tensors with plain storage."""
    return (tensor for tensor in tensors if isinstance(tensor, Tensor) and tensor.layout is torch.strided)


class CannotWatch(RuntimeError):
    """Why memory can't be watched."""


@dataclass(frozen=True)
class MemoryChange:
    """Memory that was taken, or was given back (a negative size); `number` as in `memory_of`."""

    time: int
    number: int
    size: int


@dataclass(frozen=True)
class Watched:
    """All changes in the order of time, and the start and end of each span, by its number."""

    changes: list[MemoryChange]
    spans: dict[int, tuple[int, int]]


class AllocationWatcher:
    """Watches the memory of devices of one type. Time is counted in what was seen."""

    def __init__(self, device_type: str) -> None:
        self._device_type = device_type
        self._watched: Watched | None = None
        # What was taken and is still there, by its storage: its number and bytes.
        self._alive: dict[StorageWeakRef, tuple[int, int]] = {}
        # All that has a number. As long as a weak reference is there, no other storage gets it.
        self._numbered: set[StorageWeakRef] = set()
        self._spans = self._time = 0
        self._failure: Exception | None = None

    def start(self) -> None:
        """Start watching what happens in spans."""
        self.drop()
        self._watched, self._failure = Watched([], {}), None
        self._spans = self._time = 0

    @contextmanager
    def span(self) -> Iterator[int]:
        """Around what is watched, to be found again in the result by the number that this gives."""
        self._spans += 1
        number = self._spans
        if self._watched is None:
            yield number
            return
        self._prune()
        start = self._tick()
        with _Look(self):
            yield number
        self._prune()
        if self._watched is not None:
            self._watched.spans[number] = start, self._tick()

    def stop(self) -> Watched:
        """Stop watching. Raises CannotWatch where something couldn't be observed."""
        watched, failure = self._watched, self._failure
        self.drop()
        if watched is None or failure is not None:
            raise CannotWatch(f"{type(failure).__name__}: {failure}" if failure is not None else "it was stopped")
        return watched

    def drop(self) -> None:
        """Stop if it runs, and discard what was seen."""
        self._watched = None
        self._alive.clear()
        self._numbered.clear()

    def memory(self, tensors: Iterable[Any]) -> dict[int, int]:
        """The memory of tensors, each piece once: bytes by the number that none but it has while this watches."""
        found: dict[int, int] = {}
        for tensor in strided(tensors):
            self._numbered.add(StorageWeakRef(tensor.untyped_storage()))  # type: ignore[no-untyped-call]
            number, size = memory_of(tensor)
            if size:
                found[number] = size
        return found

    def look(self, given: Iterable[Any], results: Iterable[Any]) -> None:
        """An operator was `given` tensors and has come to `results`; raises nothing."""
        try:
            self._prune()
            before = {StorageWeakRef(tensor.untyped_storage())  # type: ignore[no-untyped-call]
                      for tensor in self._on_device(given)}
            for tensor in self._on_device(results):
                reference = StorageWeakRef(tensor.untyped_storage())  # type: ignore[no-untyped-call]
                number, size = memory_of(tensor)
                if reference not in before and reference not in self._alive and size:
                    self._alive[reference] = number, size
                    self._numbered.add(reference)
                    self._note(number, size)
        except Exception as error:
            self._failure = self._failure or error

    def _on_device(self, tensors: Iterable[Any]) -> Iterator[Tensor]:
        return (tensor for tensor in tensors if type(tensor) in _PLAIN_TYPES and tensor.layout is torch.strided
                and tensor.device.type == self._device_type)

    def _prune(self) -> None:
        for reference in [reference for reference in self._alive
                          if reference.expired()]:  # type: ignore[no-untyped-call]
            number, size = self._alive.pop(reference)
            self._note(number, -size)

    def _note(self, number: int, size: int) -> None:
        if self._watched is not None:
            self._watched.changes.append(MemoryChange(self._tick(), number, size))

    def _tick(self) -> int:
        self._time += 1
        return self._time


class _Look(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Lets the watcher look at each operator."""

    # Else torch refuses torch.cond and its like while a mode is active.
    supports_higher_order_operators = True

    def __init__(self, watcher: AllocationWatcher) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._watcher = watcher

    @classmethod
    def ignore_compile_internals(cls) -> bool:
        """Compiled layers stay compiled: torch would run them eagerly for this mode, and a checkpoint of one, which is
        compiled when it's recomputed, would then find other tensors than were saved."""
        return True

    def __torch_dispatch__(self, func: Any, types: Sequence[type], args: tuple[Any, ...] = (),
                           kwargs: dict[str, Any] | None = None) -> Any:
        result = func(*args, **(kwargs or {}))
        self._watcher.look(tree_leaves((args, kwargs)), tree_leaves(result))
        return result
