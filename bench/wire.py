"""A wire between two network namespaces on which every packet takes a while.

    python bench/wire.py NAMESPACE-A NAMESPACE-B MILLISECONDS

What `tc netem` does in kernels that have it, for those that don't (CONFIG_NET_SCH_NETEM): a TUN device in each
namespace, and this process, which hands over what comes out of one to the other when its time has come. It runs until
it is killed, and says "ready" when the devices are there.
"""

from __future__ import annotations

import fcntl
import os
import select
import struct
import subprocess
import sys
import time
from collections import deque
from collections.abc import Sequence

INTERFACE = "eth0"
_TUNSETIFF = 0x400454CA
_IFF_TUN, _IFF_NO_PI = 0x0001, 0x1000
_PACKET = 65536


def open_device(namespace: str) -> int:
    """The descriptor of a TUN device that is INTERFACE in `namespace`."""
    device = os.open("/dev/net/tun", os.O_RDWR | os.O_NONBLOCK)
    request = fcntl.ioctl(device, _TUNSETIFF, struct.pack("16sH22x", b"wire%d", _IFF_TUN | _IFF_NO_PI))
    name = request[:16].rstrip(b"\0").decode()
    # A device may change its namespace: what is read and written here stays the same.
    subprocess.run(["ip", "link", "set", name, "netns", namespace, "name", INTERFACE], check=True)
    return device


def carry(devices: Sequence[int], seconds: float) -> None:
    """Hand over packets between two devices, each `seconds` after it was sent, in order; for ever."""
    other = {devices[0]: devices[1], devices[1]: devices[0]}
    underway: deque[tuple[float, int, bytes]] = deque()
    while True:
        due = max(0.0, underway[0][0] - time.perf_counter()) if underway else None
        for device in select.select(devices, [], [], due)[0]:
            # All that is there: a message is many packets.
            while packet := _read(device):
                underway.append((time.perf_counter() + seconds, other[device], packet))
        while underway and underway[0][0] <= time.perf_counter():
            _, device, packet = underway.popleft()
            _write(device, packet)


def _read(device: int) -> bytes:
    try:
        return os.read(device, _PACKET)
    except BlockingIOError:
        return b""


def _write(device: int, packet: bytes) -> None:
    try:
        os.write(device, packet)
    except (BlockingIOError, OSError):
        pass  # lost, as on any wire whose end takes no more


if __name__ == "__main__":
    a, b, milliseconds = sys.argv[1:]
    # It stands for hardware: it must not wait behind what it connects.
    os.nice(-15)
    ends = [open_device(a), open_device(b)]
    print("ready", flush=True)
    carry(ends, float(milliseconds) / 1000)
