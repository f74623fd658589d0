"""Which message a device that runs behind its host is waiting for.

On such a device a wait for a message is a wait of the stream. The host continues to the end of the batch, or until it
needs a number from the device, and then can't tell which message is missing.
"""

from __future__ import annotations

from collections import deque
from typing import Any, Generic, TypeVar

from deepspeed.accelerator import get_accelerator

T = TypeVar("T")


class DeviceWaits(Generic[T]):
    """The waits on the current stream that the device may not have passed yet, each with what it waits for."""

    def __init__(self) -> None:
        self._waits: deque[tuple[T, Any]] = deque()

    def put(self, what: T) -> None:
        """Note that the stream waits for `what`; to be called right after that wait was put on it."""
        event = get_accelerator().Event()
        event.record()
        self._waits.append((what, event))
        while self._waits and _is_past(self._waits[0][1]):
            self._waits.popleft()

    def first(self) -> T | None:
        """What the device waits for, or will next; None if it has passed all waits. May be called in any thread."""
        return next((what for what, event in list(self._waits) if not _is_past(event)), None)


def _is_past(event: Any) -> bool:
    try:
        return bool(event.query())
    except RuntimeError:
        # The device has failed.
        return False
