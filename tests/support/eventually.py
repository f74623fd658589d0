"""What happens at some time."""

from __future__ import annotations

import time
from collections.abc import Callable


def eventually(what: str, holds: Callable[[], object], seconds: float = 120.0) -> None:
    """Wait until `holds()` is true; AssertionError with `what` if it isn't for so long."""
    deadline = time.monotonic() + seconds
    while not holds():
        assert time.monotonic() < deadline, f"not in {seconds:g} s: {what}"
        time.sleep(0.02)
