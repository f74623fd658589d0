"""A port of this machine."""

from __future__ import annotations

import socket
from pathlib import Path
from random import SystemRandom

_LOWEST = 10_000


def free_port() -> int:
    """A port that no process listens on now, and that the system gives to none that connects meanwhile."""
    given = int(Path("/proc/sys/net/ipv4/ip_local_port_range").read_text().split()[0])
    while True:
        port = SystemRandom().randrange(_LOWEST, given) if given > _LOWEST else 0
        with socket.socket() as listener:
            try:
                listener.bind(("127.0.0.1", port))
            except OSError:  # it's taken
                continue
            return listener.getsockname()[1]
