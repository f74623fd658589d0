"""Signs of life between the ranks of a job, on separate connections, by a thread that sleeps most of the time.

Global rank 0 keeps the attendance (attendance.py); every other rank has a connection to it. Messages are lines of JSON:

    to rank 0      hello (the job's secret, rank, host); status, every second or so; left, when a script ends
    from rank 0    here (the hosts of all ranks, once they are there); silent, every second or so; left, and loss

A rank that hears nothing from rank 0 decides by itself that rank 0 is lost. Nothing that is received is executed, and
a connection without the job's secret gets no further than hello.

Time counts only while this thread gets to run: a process that was stopped, or a host that was asleep, doesn't consider
the others lost when it continues.
"""

from __future__ import annotations

import json
import os
import secrets
import selectors
import socket
import threading
import time
import weakref
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, field, replace
from typing import Any

from ds_vshape.health.attendance import Attendance, JobLost, Status

BEAT_SECONDS = 1.0
# The least number of signs of life within the time after which a rank counts as lost.
_BEATS = 8
# A rank from which so many signs are missing is silent.
_MISSED = 3
_CONNECT_SECONDS = 5.0
# How long a rank that leaves waits for its last message to be read: a stopped rank doesn't read it.
_PARTING_SECONDS = 1.0
# Bytes that are read at once; the longest line that is accepted, which is also the most that may wait to be sent.
_CHUNK, _LONGEST = 1 << 16, 1 << 20
# How many characters of an error the others are told.
_TEXT_SIZE = 1 << 13

_threads: weakref.WeakSet[Heartbeat] = weakref.WeakSet()


@dataclass
class _Connection:
    """A socket for lines of JSON, on which neither sending nor receiving blocks."""

    socket: socket.socket
    rank: int | None = None
    incoming: bytearray = field(default_factory=bytearray)
    outgoing: bytearray = field(default_factory=bytearray)

    def send(self, message: Mapping[str, Any]) -> None:
        """Send `message`, now or later; OSError if the connection is closed."""
        if len(self.outgoing) < _LONGEST:
            self.outgoing += json.dumps(message).encode() + b"\n"
        self.flush()

    def flush(self) -> None:
        """Send as much of what is left as the connection takes."""
        with suppress(BlockingIOError):
            while self.outgoing:
                del self.outgoing[:self.socket.send(self.outgoing)]

    def receive(self) -> list[Any]:
        """The messages that have come.

        Raises OSError if the connection is closed and all is read, ValueError for bytes that are no lines of JSON.
        """
        with suppress(BlockingIOError):
            while chunk := self.socket.recv(_CHUNK):
                self.incoming += chunk
                if len(self.incoming) > _LONGEST:
                    raise ValueError("too long")
            if b"\n" not in self.incoming:
                raise ConnectionResetError
        *lines, rest = bytes(self.incoming).split(b"\n")
        self.incoming = bytearray(rest)
        return [json.loads(line) for line in lines]


class Address:
    """Where global rank 0 listens, as text for the others: its names, the port and the job's secret."""

    def __init__(self, names: Iterable[str], port: int, secret: str) -> None:
        self.names, self.port, self.secret = list(dict.fromkeys(names)), port, secret

    @classmethod
    def read(cls, text: str) -> Address:
        """The address whose `text` this is."""
        return cls(**json.loads(text))

    def text(self) -> str:
        """The address as a text."""
        return json.dumps(vars(self))


class Heartbeat(threading.Thread):
    """This rank's signs of life, and what it hears of all others.

    Args:
        rank, ranks: this rank's number, and how many there are.
        seconds: after how long without a sign a rank is lost.
        status: what this rank tells of itself; called in this thread.
        lost: called once in this thread, when the job is lost.
    """

    def __init__(self, rank: int, ranks: int, seconds: float, status: Callable[[], Status],
                 lost: Callable[[JobLost], None]) -> None:
        super().__init__(name="ds_vshape heartbeat", daemon=True)
        self._rank, self._status, self._lost = rank, status, lost
        # Rank 0 watches over all ranks, the others over rank 0.
        self._attendance = Attendance(range(ranks) if rank == 0 else [0], seconds)
        self._hosts = {rank: socket.gethostname()}
        self._connections: list[_Connection] = []
        self._listener: socket.socket | None = None
        self._secret = ""
        self._selector = selectors.DefaultSelector()
        self._waking, woken = socket.socketpair()
        self._woken = woken
        woken.setblocking(False)
        self._selector.register(woken, selectors.EVENT_READ, None)
        self._leaving: str | None = None
        self._found: JobLost | None = None
        # All ranks have come, or the job is lost.
        self.settled = threading.Event()
        # The ranks that haven't sent anything lately.
        self.silent: Sequence[int] = ()
        # By global rank, once all have come.
        self.hosts: Sequence[str] = ()
        _threads.add(self)

    def listen(self, names: Iterable[str]) -> Address:
        """Accept connections on this rank, which is 0; returns its address with these `names`, for the others."""
        self._listener = socket.create_server(("", 0), family=socket.AF_INET, backlog=1024)
        self._listener.setblocking(False)
        self._selector.register(self._listener, selectors.EVENT_READ, None)
        self._secret = secrets.token_hex(16)
        return Address(names, self._listener.getsockname()[1], self._secret)

    def connect(self, address: Address) -> None:
        """Connect to rank 0; OSError if none of its names leads there."""
        problems = []
        for name in address.names:
            try:
                connection = socket.create_connection((name, address.port), _CONNECT_SECONDS)
                connection.sendall(json.dumps({"hello": [address.secret, self._rank, self._hosts[self._rank]]}).encode()
                                   + b"\n")
                # For a stopped process its system accepts the connection, but doesn't answer.
                connection.settimeout(self.seconds)
                if connection.recv(1) == b"\n":
                    break
                problems.append(f"{name}: another program answers")
            except OSError as error:
                problems.append(f"{name}: {error}")
        else:
            raise OSError(f"global rank 0 can't be reached at port {address.port} of {'; '.join(problems)}")
        connection.setblocking(False)
        self._add(connection, 0)

    @property
    def seconds(self) -> float:
        """After how long without a sign a rank is lost."""
        return self._attendance.seconds

    @seconds.setter
    def seconds(self, value: float) -> None:
        self._attendance.seconds = value

    def tell(self) -> None:
        """Send the status now, from any thread."""
        with suppress(OSError):
            self._waking.send(b"x")

    def leave(self, error: str = "") -> None:
        """End this thread, and tell the others that the script has ended: in an error, unless `error` is empty."""
        if self._leaving is None:
            self._leaving = error[:_TEXT_SIZE]
            self.tell()
            if threading.current_thread() is not self:
                self.join(_CONNECT_SECONDS)

    def abandon(self) -> None:
        """Close the connections, as a forked process must: while its copies are open, its parent seems to be alive."""
        for connection in self._connections:
            connection.socket.close()
        if self._listener is not None:
            self._listener.close()

    # -- in the thread

    def run(self) -> None:
        now, before, sent = 0.0, time.monotonic(), float("-inf")
        while self._leaving is None:
            interval = min(BEAT_SECONDS, self.seconds / _BEATS)
            events = self._selector.select(max(0.0, sent + interval - now))
            clock = time.monotonic()
            now, before = now + min(clock - before, 2 * interval), clock
            for key, _ in events:
                if key.fileobj is self._listener:
                    self._accept()
                elif key.data is None:
                    self._wake_up()
                    sent = float("-inf")
                else:
                    self._receive(key.data, now)
            if now >= sent + interval:
                sent = now
                self._tell(now, interval)
            self._judge(now)
        self._part({"left": self._leaving})
        self.abandon()
        self._selector.close()
        self._waking.close()
        self._woken.close()

    def _wake_up(self) -> None:
        with suppress(BlockingIOError):
            self._woken.recv(_CHUNK)

    def _accept(self) -> None:
        assert self._listener is not None
        with suppress(OSError):
            connection, _ = self._listener.accept()
            connection.setblocking(False)
            self._add(connection, None)

    def _add(self, connection: socket.socket, rank: int | None) -> None:
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        made = _Connection(connection, rank)
        self._connections.append(made)
        self._selector.register(connection, selectors.EVENT_READ, made)

    def _receive(self, connection: _Connection, now: float) -> None:
        try:
            for message in connection.receive():
                self._take(connection, message, now)
            connection.flush()
        except (OSError, ValueError, LookupError, TypeError):
            self._close(connection)

    def _close(self, connection: _Connection) -> None:
        if connection in self._connections:
            self._drop(connection)
            if connection.rank is not None:
                self._attendance.gone(connection.rank)

    def _take(self, connection: _Connection, message: Any, now: float) -> None:
        if connection.rank is None:
            secret, rank, host = message["hello"]
            if not secrets.compare_digest(secret, self._secret):
                raise ValueError("a stranger")
            connection.rank, self._hosts[rank] = int(rank), str(host)
            connection.outgoing += b"\n"
            if self._found is not None:
                connection.send({"loss": asdict(self._found)})
        self._attendance.heard(connection.rank, now)
        if "status" in message:
            self._attendance.heard(connection.rank, now, Status(**message["status"]))
        elif "silent" in message:
            self.silent = message["silent"]
        elif "left" in message:
            self._attendance.left(connection.rank, message["left"])
            self._drop(connection)
        elif "here" in message:
            self._all_here(message["here"])
        elif "loss" in message:
            self._lose(JobLost(**message["loss"]))

    def _tell(self, now: float, interval: float) -> None:
        status = self._status()
        if status.failure is not None:
            status = replace(status, failure=status.failure[:_TEXT_SIZE])
        if self._rank == 0:
            self._attendance.heard(0, now, status)
            self.silent = self._attendance.silent(now, _MISSED * interval)
            self._say({"silent": self.silent})
        else:
            if silent := self._attendance.silent(now, _MISSED * interval):
                self.silent = silent
            self._say({"status": asdict(status)})

    def _judge(self, now: float) -> None:
        if self._rank == 0 and not self.hosts and self._attendance.complete:
            self._all_here([self._hosts[rank] for rank in sorted(self._hosts)])
            self._say({"here": self.hosts})
        loss = self._attendance.loss(now)
        if loss is not None:
            self._lose(loss)

    def _all_here(self, hosts: Sequence[str]) -> None:
        self.hosts = hosts
        self.settled.set()

    def _lose(self, loss: JobLost) -> None:
        if self._found is None:
            self._found = loss
            self._part({"loss": asdict(loss)})
            self._lost(loss)
            self.settled.set()

    def _part(self, message: Mapping[str, Any]) -> None:
        """Send a last message, and close each connection when its other end is closed: by then the message is read.

        If a process ends before, while it has received something that it hasn't read, its last message may be lost.
        """
        self._say(message)
        parting = [connection for connection in self._connections if connection.rank is not None]
        for connection in parting:
            with suppress(OSError):
                connection.socket.shutdown(socket.SHUT_WR)
        deadline = time.monotonic() + _PARTING_SECONDS
        while self._rank == 0 and parting and (left := deadline - time.monotonic()) > 0:
            for key, _ in self._selector.select(left):
                connection = key.data
                if connection in parting:
                    try:
                        connection.receive()
                    except (OSError, ValueError):
                        parting.remove(connection)
                        self._drop(connection)
                elif key.fileobj is self._woken:
                    self._wake_up()
                else:
                    # A rank that connects now is accepted when this is over.
                    time.sleep(0.01)
        for connection in list(self._connections):
            self._drop(connection)

    def _drop(self, connection: _Connection) -> None:
        if connection in self._connections:
            self._connections.remove(connection)
            self._selector.unregister(connection.socket)
            connection.socket.close()

    def _say(self, message: Mapping[str, Any]) -> None:
        for connection in list(self._connections):
            if connection.rank is not None:
                try:
                    connection.send(message)
                except OSError:
                    # It is closed, which `_receive` finds after it has read what came before.
                    continue


def _abandon_all() -> None:
    for thread in list(_threads):
        thread.abandon()


os.register_at_fork(after_in_child=_abandon_all)
