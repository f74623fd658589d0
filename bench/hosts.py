"""Two hosts on this machine, for tests and measurements: network namespaces with their own addresses, names and sshd.

    host-a 10.77.0.1 eth0 ---------- eth0 10.77.0.2 host-b

They share the file system and the cores, and nothing of the network: they are reachable only from inside. The wire may
take a while: by `tc netem`, or where the kernel has none by wire.py; or it may be narrow: by `tc tbf`. Needs root,
iproute2, and for sshd openssh-server.
Everything is in temporary places, and gone at the end.
"""

from __future__ import annotations

import ctypes
import os
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from wire import INTERFACE

_ADDRESSES = {"host-a": "10.77.0.1", "host-b": "10.77.0.2"}
_SBIN = "/usr/sbin:/sbin"
# sshd wants it, and on a machine without the service nobody has made it.
_SSHD_FOLDER = Path("/run/sshd")
# Of setns, unshare and mount, which Python 3.11 hasn't got.
_NETWORK, _MOUNTS, _NAMES = 0x40000000, 0x00020000, 0x04000000
_RECURSIVE, _PRIVATE, _BIND = 0x4000, 0x40000, 0x1000
# What a narrow wire lets through at once, and what may wait for it: packets that are lost would slow TCP down.
_BURST, _QUEUE = "64kb", "64mb"


@dataclass(frozen=True)
class Host:
    """A host of its own `name` and `address`, and the network namespace that it is."""

    name: str
    address: str
    namespace: str

    def command(self, command: Sequence[str]) -> list[str]:
        """What runs `command` there."""
        named = ["sh", "-c", f'hostname {self.name} && exec "$@"', "sh", *command]
        return ["ip", "netns", "exec", self.namespace, "unshare", "--uts", *named]

    def enter(self) -> None:
        """Make this process one that `command` would have started there; it must have no other thread."""
        with open(f"/run/netns/{self.namespace}") as namespace:
            _call("setns", namespace.fileno(), _NETWORK)
        _call("unshare", _MOUNTS | _NAMES)
        _call("mount", b"none", b"/", None, _RECURSIVE | _PRIVATE, None)
        _call("mount", f"/etc/netns/{self.namespace}/hosts".encode(), b"/etc/hosts", None, _BIND, None)
        socket.sethostname(self.name)

    def processes(self) -> list[int]:
        """The ids of all that runs there."""
        return [int(pid) for pid in _run("ip", "netns", "pids", self.namespace).split()]


def missing(programs: Sequence[str] = ("ip", "tc", "unshare")) -> str | None:
    """What keeps this machine from having such hosts, if anything."""
    if os.geteuid():
        return "needs root"
    absent = [program for program in programs if shutil.which(program, path=f"{os.environ['PATH']}:{_SBIN}") is None]
    return f"needs {', '.join(absent)}" if absent else None


@contextmanager
def two_hosts(milliseconds: float = 0, megabits: float | None = None) -> Iterator[tuple[Host, Host]]:
    """host-a and host-b with a wire between them, on which a packet takes so long in each direction, or which carries
    so many megabits a second in each; ValueError for both.

    Whatever still runs there at the end is killed.
    """
    if milliseconds and megabits is not None:
        raise ValueError("a wire has a delay or a bandwidth here, not both")
    job = secrets.token_hex(4)
    a, b = (Host(name, address, f"ds-vshape-{job}-{name}") for name, address in _ADDRESSES.items())
    with ExitStack() as stack:
        for host in (a, b):
            stack.enter_context(_namespace(host))
        _connect(a, b)
        if milliseconds and not all(_delayed(host, milliseconds) for host in (a, b)):
            _run("ip", "-netns", a.namespace, "link", "delete", INTERFACE)
            stack.enter_context(_slow_wire(a, b, milliseconds))
        for host in (a, b):
            for command in (["address", "add", f"{host.address}/24", "dev", INTERFACE],
                            ["link", "set", INTERFACE, "up"], ["link", "set", "lo", "up"]):
                _run("ip", "-netns", host.namespace, *command)
            if megabits is not None:
                _run(*host.command(["tc", "qdisc", "add", "dev", INTERFACE, "root", "tbf", "rate", f"{megabits}mbit",
                                    "burst", _BURST, "limit", _QUEUE]))
        yield a, b


def _connect(a: Host, b: Host) -> None:
    _run("ip", "link", "add", INTERFACE, "netns", a.namespace, "type", "veth",
         "peer", "name", INTERFACE, "netns", b.namespace)


def _delayed(host: Host, milliseconds: float) -> bool:
    """Whether the kernel delays what leaves `host` from now on; not every kernel can."""
    try:
        _run(*host.command(["tc", "qdisc", "add", "dev", INTERFACE, "root", "netem", "delay", f"{milliseconds}ms"]))
    except RuntimeError as error:
        if "kind is unknown" not in str(error):
            raise
        return False
    return True


@contextmanager
def _slow_wire(a: Host, b: Host, milliseconds: float) -> Iterator[None]:
    program = [sys.executable, str(Path(__file__).with_name("wire.py")), a.namespace, b.namespace, str(milliseconds)]
    with subprocess.Popen(program, stdout=subprocess.PIPE) as wire:
        try:
            assert wire.stdout is not None
            if wire.stdout.readline() != b"ready\n":
                raise RuntimeError("wire.py made no wire; see its output above")
            yield
        finally:
            wire.kill()


@contextmanager
def _namespace(host: Host) -> Iterator[None]:
    # `ip netns exec` puts what is in this folder over /etc.
    files = Path("/etc/netns") / host.namespace
    files.mkdir(parents=True)
    try:
        (files / "hosts").write_text("127.0.0.1 localhost\n" + "".join(
            f"{address} {name}\n" for name, address in _ADDRESSES.items()))
        _run("ip", "netns", "add", host.namespace)
        try:
            yield
        finally:
            while pids := host.processes():
                for pid in pids:
                    _kill(pid)
                time.sleep(0.05)
            _run("ip", "netns", "delete", host.namespace)
    finally:
        shutil.rmtree(files)


@contextmanager
def ssh_between(hosts: Sequence[Host], folder: Path) -> Iterator[Path]:
    """An sshd on each of `hosts`, and a folder for the front of PATH whose `ssh` logs in to them.

    Keys, configs and logs are in `folder`.
    """
    for key in ("host_key", "user_key"):
        _run("ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", str(folder / key))
    host_key = (folder / "host_key.pub").read_text()
    (folder / "known_hosts").write_text("".join(f"{host.name},{host.address} {host_key}" for host in hosts))
    (folder / "ssh_config").write_text(f"IdentityFile {folder}/user_key\nUserKnownHostsFile {folder}/known_hosts\n"
                                       "BatchMode yes\nConnectTimeout 10\n")
    (folder / "sshd_config").write_text(
        f"HostKey {folder}/host_key\nAuthorizedKeysFile {folder}/user_key.pub\nPidFile none\nUsePAM no\n"
        # The folder's parents may be writable by all, as /tmp is.
        "StrictModes no\nPasswordAuthentication no\nPermitRootLogin yes\n")
    (folder / "bin").mkdir()
    wrapper = folder / "bin" / "ssh"
    wrapper.write_text(f'#!/bin/sh\nexec {shutil.which("ssh")} -F {folder}/ssh_config "$@"\n')
    wrapper.chmod(0o755)
    with ExitStack() as stack:
        if not _SSHD_FOLDER.exists():
            _SSHD_FOLDER.mkdir(mode=0o755)
            stack.callback(shutil.rmtree, _SSHD_FOLDER)
        for host in hosts:
            log = stack.enter_context(open(folder / f"sshd.{host.name}.log", "w"))
            sshd = subprocess.Popen(host.command(["/usr/sbin/sshd", "-D", "-e", "-f", str(folder / "sshd_config")]),
                                    stderr=log)
            stack.callback(_end, sshd)
        for host in hosts:
            _await_login(host, wrapper)
        yield folder / "bin"


def _await_login(host: Host, ssh: Path, seconds: float = 20) -> None:
    deadline = time.monotonic() + seconds
    command = host.command([str(ssh), host.name, "true"])
    while (login := subprocess.run(command, capture_output=True, text=True)).returncode:
        if time.monotonic() > deadline:
            raise TimeoutError(f"{host.name} lets nobody in after {seconds:g} s: {login.stderr}")
        time.sleep(0.1)


def _end(process: subprocess.Popen[bytes]) -> None:
    process.kill()
    process.wait()


def _kill(pid: int) -> None:
    try:
        os.kill(pid, signal.SIGKILL)
    except ProcessLookupError:
        pass


def _call(function: str, *arguments: Any) -> None:
    """A system call by the C library; OSError if it fails."""
    library = ctypes.CDLL(None, use_errno=True)
    if getattr(library, function)(*arguments):
        raise OSError(ctypes.get_errno(), f"{function}: {os.strerror(ctypes.get_errno())}")


def _run(*command: str) -> str:
    """The output of `command`; RuntimeError with what it said if it fails."""
    environment = {**os.environ, "PATH": f"{os.environ['PATH']}:{_SBIN}"}
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)}: {done.stderr.strip()}")
    return done.stdout
