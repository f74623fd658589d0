"""Signs of life between two ranks, here two threads of one process."""

from __future__ import annotations

from queue import Queue

from ds_vshape.health.attendance import JobLost, Status
from ds_vshape.health.heartbeat import Heartbeat


def test_an_error_of_any_length_is_told() -> None:
    """Neither while a batch fails nor at the end of a script does it cut the connection."""
    text, lost = "one of 1,000,000 numbers: " + "7 " * 1_000_000, Queue[JobLost]()
    first = Heartbeat(0, 2, 60.0, Status, lost.put)
    second = Heartbeat(1, 2, 60.0, lambda: Status(failure=text), lost.put)
    address = first.listen(["127.0.0.1"])
    first.start()
    second.connect(address)
    second.start()
    for heartbeat in (first, second):
        assert heartbeat.settled.wait(20.0)
    second.tell()
    second.leave(text)
    assert lost.get(timeout=20.0).why.startswith("its script has ended in one of 1,000,000 numbers")
    first.leave()
