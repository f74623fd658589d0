"""No rank waits for another one that is lost, whatever it waits in: DeepSpeed's collectives, torch's, or ours.

A wait in torch.distributed ends early only if a connection of its own group breaks, or at its time limit. Neither tells
which rank is lost: a neighbour that has ended because its own neighbour did looks the same, and one that works on
something for long looks like one that is stopped. So these waits have no time limit, and the ranks know from each
other's signs of life (heartbeat.py) when to end them:

    [1] a rank is lost                  all ranks raise the same error, which names it
    [2] their waits are made to end     over gloo: a wait that times out closes the connections of its whole group
    [3] each raises PeerLost            from inside a `phase`: whatever a rank does together with others is in one
    [4] a wait that doesn't end         (for torch's store, or on a GPU) is ended with the process, after the message

On a GPU waits are the device's, and the host runs on until it needs a number from there. It waits for that in a loop,
which looks like computing; so what counts then is that it gets no further. NCCL has a watchdog of its own, which ends
the process without these words: its groups are given a limit that is far longer than that for signs of life.

Where the script itself waits, outside of any phase, it gets torch's own error, and what has happened is printed.

Of torch.distributed.distributed_c10d this uses _get_default_store and _world.pg_map, the groups that this process is
in.
"""

from __future__ import annotations

import atexit
import itertools
import os
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext, suppress
from datetime import timedelta
from functools import wraps
from multiprocessing.util import Finalize
from typing import Any, ParamSpec, TypeVar

import torch.distributed as dist
from deepspeed.accelerator import get_accelerator
from torch.distributed import distributed_c10d as c10d

from ds_vshape.comm.channels import PeerLost
from ds_vshape.comm.groups import FOREVER, allow_at_least, unbound
from ds_vshape.health.attendance import STUCK_SECONDS, JobLost, Status
from ds_vshape.health.heartbeat import Address, Heartbeat
from ds_vshape.health.names import RankName, rank_names
from ds_vshape.health.waits import end_waits, is_ended_wait, is_in_exchange, operations_started

P = ParamSpec("P")
T = TypeVar("T")

# How long an error of torch's may come before the news of what has caused it.
_NEWS_SECONDS = STUCK_SECONDS + 2.0
# How long after the news the script may take to raise them before they are printed, and how long it may then wait for
# other ranks before its process is ended.
_RAISING_SECONDS, _ENDING_SECONDS = 0.5, 3.0
# On a device that runs behind the host: how long the script may get no further in a phase after the news.
_ENDING_ON_DEVICE_SECONDS = 10.0
# By how much longer than the ranks for signs of life an operation over NCCL may take.
_NCCL_LATER = 10
# The share of its time that a thread which waits may be found to compute.
_BUSY = 0.05


class Watch:
    """Signs of life of all ranks of the job, and the words for a rank that is lost.

    Creating it is collective, and returns once all ranks have come. PeerLost if some rank is lost before.
    """

    def __init__(self, seconds: float) -> None:
        self.world = dist.group.WORLD
        self._rank, self._ranks = dist.get_rank(), dist.get_world_size()
        self.names: Sequence[RankName] = rank_names([socket.gethostname() if rank == self._rank else ""
                                                     for rank in range(self._ranks)])
        # What this rank does with others at the moment; innermost last.
        self._phases: list[Callable[[], str]] = []
        self.failure: str | None = None
        # What the script has come to, in the words of an error.
        self.progress: Callable[[], str] = lambda: ""
        self._script = threading.get_ident()
        self._clock = time.pthread_getcpuclockid(self._script)
        # Since when the script's thread has neither computed nor got further, and since when it has got no further.
        self._idle_since = self._same_since = time.monotonic()
        # The last look at it: when, its seconds of computing until then, and where it was.
        self._looked: tuple[float, float, Any] = (self._idle_since, 0.0, None)
        self._loss: JobLost | None = None
        self._raised = threading.Event()
        self._news = threading.Event()
        self._heartbeat: Heartbeat | None = None
        self._closed = False
        if self._ranks > 1:
            with self.phase(lambda: "PipelineModule"):
                self._meet(seconds)

    def _meet(self, seconds: float) -> None:
        key = f"ds_vshape/heartbeat/{next(_numbers)}"
        heartbeat = Heartbeat(self._rank, self._ranks, seconds, self._status, self._lost)
        self._heartbeat = heartbeat
        if self._rank == 0:
            address = heartbeat.listen(_own_names())
            heartbeat.start()
            c10d._get_default_store().set(key, address.text())
        else:
            heartbeat.connect(self._looked_up(key, seconds))
            heartbeat.start()
        # Processes that multiprocessing has started run finalizers at their end, but not what atexit has.
        Finalize(None, self.close, exitpriority=100)
        atexit.register(self.close)
        heartbeat.settled.wait()
        self.check()
        self.names = rank_names(heartbeat.hosts)

    def _looked_up(self, key: str, seconds: float) -> Address:
        # The store may be rank 0's, and a stopped process never answers: not in this thread.
        found: list[str] = []
        looking = threading.Thread(target=_look_up, args=(key, seconds, found), daemon=True)
        looking.start()
        looking.join(seconds)
        if not found:
            self._loss = JobLost(0, f"it hasn't reached its PipelineModule within {seconds:g} seconds")
            self.check()
        return Address.read(found[0])

    @property
    def is_open(self) -> bool:
        """Whether the other ranks give signs of life."""
        return self._heartbeat is not None and not self._closed

    def place(self, topology: Any) -> None:
        """The ranks' places in DeepSpeed's `topology` are known from now on, and get into their names."""
        self.names = rank_names([name.host for name in self.names], topology)

    @property
    def silent(self) -> Sequence[int]:
        """The global ranks that have given no sign of life lately."""
        return self._heartbeat.silent if self._heartbeat is not None else ()

    @property
    def seconds(self) -> float:
        """How long a rank may give no sign of life."""
        return self._heartbeat.seconds if self._heartbeat is not None else float("inf")

    @seconds.setter
    def seconds(self, value: float) -> None:
        if self._heartbeat is not None:
            self._heartbeat.seconds = value

    def close(self) -> None:
        """Tell the others that this rank's script ends (and in which error, if in one) or needs them no more, so that
        they don't consider it lost."""
        if self.is_open and self._heartbeat is not None:
            error = getattr(sys, "last_exc", None) or getattr(sys, "last_value", None)
            if error is not None and is_ended_wait(error) and self._news.wait(_NEWS_SECONDS):
                if not self._raised.is_set():
                    self._print()
            self._closed = True
            self._heartbeat.leave("" if error is None else f"{type(error).__name__}: {error}")
        atexit.unregister(self.close)

    # -- what the script does

    @contextmanager
    def phase(self, what: Callable[[], str]) -> Iterator[None]:
        """Around what this rank does together with others; `what` gives its name, when it's needed.

        Raises PeerLost instead of torch's errors where a rank is lost.
        """
        self.check(what)
        self._phases.append(what)
        try:
            yield
        except (PeerLost, RuntimeError) as error:
            if not is_ended_wait(error) or getattr(error, "is_explained", False) or not self.is_open:
                raise
            raise self._explained(error, what) from error
        finally:
            self._phases.pop()

    def check(self, what: Callable[[], str] | None = None) -> None:
        """Raise PeerLost if a rank is lost already, while this rank is at `what`, by default its innermost phase."""
        if self._loss is not None and not self._closed:
            if what is None and self._phases:
                what = self._phases[-1]
            raise self._peer_lost(self._told(self._loss), what)

    @contextmanager
    def failed(self, failure: object | None) -> Iterator[None]:
        """Let signs of life name this rank's failure, if there is one, while it tells the others: some of them may wait
        elsewhere."""
        self.failure = None if failure is None else str(failure)
        try:
            yield
        finally:
            self.failure = None

    def _explained(self, error: Exception, what: Callable[[], str]) -> PeerLost:
        """`error` with what has happened, once that is known."""
        if self._heartbeat is not None and not (isinstance(error, PeerLost) and error.__cause__ is not None
                                                and not is_ended_wait(error.__cause__)):
            self._news.wait(_NEWS_SECONDS)
        if self._loss is not None:
            return self._peer_lost(self._told(self._loss), what)
        reason = str(error).splitlines()[0]
        if not isinstance(error, PeerLost):
            reason = f"the connection to a rank broke: {reason}"
        return self._peer_lost(f"{reason} (all ranks give signs of life)", what)

    def _peer_lost(self, reason: str, what: Callable[[], str] | None) -> PeerLost:
        own = self.names[self._rank]
        waits = f" waits in {what()}" if what is not None else ""
        progress = self.progress()
        lost = PeerLost("; ".join(filter(None, [f"{own.short} on {own.host}{waits}: {reason}",
                                                f"this is {own.rest}" if own.rest else "", progress])))
        lost.is_explained = True
        self._raised.set()
        return lost

    def _told(self, loss: JobLost) -> str:
        if loss.rank is None:
            return f"no rank is lost, but none goes on: {loss.why}"
        name = self.names[loss.rank]
        where = ", ".join(filter(None, [name.rest, f"on {name.host}" if name.host else ""]))
        return f"{name.short} {loss.fate}{f' ({where})' if where else ''}: {loss.why}"

    # -- what the heartbeat's thread does

    def _status(self) -> Status:
        """How long this rank's script has been in the same exchange with others."""
        idle = self._idle_for()
        if idle < min(self.seconds, STUCK_SECONDS) / 2 or not self._in_exchange():
            return Status(failure=self.failure)
        return Status(idle, self._place(), self.failure)

    def _idle_for(self) -> float:
        """The seconds that the script's thread has neither computed anything nor started an exchange."""
        now, busy = time.monotonic(), time.clock_gettime(self._clock)
        token = operations_started(), len(self._phases), self._place()
        before, busy_before, token_before = self._looked
        if token != token_before:
            self._same_since = now
        if token != token_before or busy - busy_before > _BUSY * (now - before):
            self._idle_since = now
        self._looked = now, busy, token
        return now - self._idle_since

    def _in_exchange(self) -> bool:
        """Whether the script's thread, which is idle, waits for other ranks.

        Frames must be asked for only while the thread is idle: while it raises, that corrupts memory (Python 3.11).
        """
        return is_in_exchange(sys._current_frames().get(self._script))

    def _place(self) -> str:
        with suppress(Exception):
            return self._phases[-1]()
        return "its script"

    def _lost(self, loss: JobLost) -> None:
        self._loss = loss
        self._news.set()
        if self._heartbeat is not None:
            self._heartbeat.settled.set()
        if not self._phases or not get_accelerator().is_synchronized_device():
            # NCCL may find out as well, and ends the process without a word.
            self._print()
        end_waits()
        if not self._raised.wait(_RAISING_SECONDS):
            self._print()
        threading.Thread(target=self._end_what_waits, name="ds_vshape end", daemon=True).start()

    def _end_what_waits(self) -> None:
        """End the process as soon as its script waits for other ranks: what it waits for will never come."""
        while True:
            time.sleep(_RAISING_SECONDS)
            idle = self._idle_for()
            # A wait for the device looks like computing.
            on_device = bool(self._phases) and not get_accelerator().is_synchronized_device()
            same = time.monotonic() - self._same_since
            if (idle >= _ENDING_SECONDS and self._in_exchange()) or (on_device and same >= _ENDING_ON_DEVICE_SECONDS):
                if not self._raised.is_set():
                    self._print()
                print("ds_vshape: this process waits for what won't come, and is ended", file=sys.stderr, flush=True)
                sys.stdout.flush()
                os._exit(1)

    def _print(self) -> None:
        assert self._loss is not None
        what = self._phases[-1] if self._phases else None
        lost = self._peer_lost(self._told(self._loss), what)
        print(f"{PeerLost.__module__}.{PeerLost.__qualname__}: {lost}", file=sys.stderr, flush=True)


# The store keeps the address of an earlier watch over the same ranks.
_numbers = itertools.count()
_watch: Watch | None = None


def in_phase(function: Callable[P, T]) -> Callable[P, T]:
    """Run `function` in a phase of its name, where this process's job is watched."""
    @wraps(function)
    def watched(*args: P.args, **kwargs: P.kwargs) -> T:
        with nullcontext() if _watch is None else _watch.phase(lambda: function.__name__):
            return function(*args, **kwargs)
    return watched


def watch_job(seconds: float) -> Watch:
    """The watch over this process's job; made (collective) if there is none yet.

    PeerLost if some rank is lost, or doesn't come within `seconds`.
    """
    global _watch
    if _watch is None or not _watch.is_open or _watch.world is not dist.group.WORLD:
        if _watch is not None:
            _watch.close()
        _watch = None
        _watch = Watch(seconds)
    else:
        _watch.seconds = seconds
        _watch.check(lambda: "PipelineModule")
    return _watch


@contextmanager
def groups_without_limit() -> Iterator[None]:
    """Around what makes groups, as DeepSpeed does: if there is a watch, which ends waits, those over gloo and the job's
    own get no time limit, and others at least one that is far longer than that for signs of life. Ranks that aren't in
    a group don't wait for it.
    """
    before = set(c10d._world.pg_map) - {dist.group.WORLD}
    with unbound() if _watch is not None and _watch.is_open else nullcontext():
        yield
    if _watch is not None and _watch.is_open:
        for group in set(c10d._world.pg_map) - before:
            if "gloo" in str(dist.get_backend(group)):
                c10d._set_pg_timeout(FOREVER, group)
            else:
                allow_at_least(group, _NCCL_LATER * _watch.seconds)


def _look_up(key: str, seconds: float, found: list[str]) -> None:
    with suppress(RuntimeError):
        store = c10d._get_default_store()
        store.wait([key], timedelta(seconds=seconds))
        found.append(store.get(key).decode())


def _own_names() -> Iterator[str]:
    """The names by which others may know this host."""
    if "MASTER_ADDR" in os.environ:
        yield os.environ["MASTER_ADDR"]
    yield socket.gethostname()
    yield "127.0.0.1"
