"""When messages really arrive, which may be long before anyone waits for them.

Gloo doesn't tell whether a receive is done until it is waited for. So a thread for each channel waits in the engine's
place, and the engine waits for the thread.
"""

from __future__ import annotations

import time
from queue import SimpleQueue
from threading import Event, Thread
from typing import Any

from ds_vshape.schedule.lowering import Channel, Message


class _Watched:
    """Replaces the works of a message, while a thread waits for them."""

    def __init__(self, works: list[Any]) -> None:
        self._works = works
        self._done = Event()
        self._error: Exception | None = None
        self.arrived = 0.0

    def watch(self) -> None:
        """Wait for the works, in the thread."""
        try:
            for action in self._works:
                action.wait()
        except Exception as error:
            self._error = error
        self.arrived = time.perf_counter()
        self._done.set()

    def wait(self) -> None:
        """Until the message is there, as a work's; raises what its own wait raised."""
        self._done.wait()
        if self._error is not None:
            raise self._error


class Arrivals:
    """Watches the messages of one batch on this rank."""

    def __init__(self) -> None:
        self._watched: dict[Message, _Watched] = {}
        self._threads: dict[Channel, tuple[Thread, SimpleQueue[_Watched | None]]] = {}

    def watch(self, message: Message, works: list[Any]) -> None:
        """Look out for `message`, whose receive is posted; puts another work in the place of its `works`."""
        if not works:  # of an announced batch, whose receives are posted when they are waited for
            return
        watched = self._watched[message] = _Watched(list(works))
        works[:] = [watched]
        self._queue(message.channel).put(watched)

    def _queue(self, channel: Channel) -> SimpleQueue[_Watched | None]:
        if channel not in self._threads:
            queue: SimpleQueue[_Watched | None] = SimpleQueue()
            # Daemons: where another rank is lost, the wait for it doesn't keep this one alive.
            thread = Thread(target=_serve, args=(queue,), name=f"arrivals of {channel}", daemon=True)
            thread.start()
            self._threads[channel] = thread, queue
        return self._threads[channel][1]

    def close(self) -> None:
        """The batch has ended, whether it has succeeded or not: end the threads."""
        for _, queue in self._threads.values():
            queue.put(None)

    def seen(self) -> dict[Message, float]:
        """When each message arrived, by time.perf_counter; after a batch that succeeded."""
        return {message: watched.arrived for message, watched in self._watched.items()}


def _serve(queue: SimpleQueue[_Watched | None]) -> None:
    while (watched := queue.get()) is not None:
        watched.watch()
