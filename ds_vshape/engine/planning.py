"""The job's planner: a process that runs while one rank trains, and whose answer all ranks get in the same call.

A failed plan must not end the training. Whatever happens to the process (it can't start, is killed or stopped, returns
an invalid plan), all ranks get PlannerFailed in the same call, and none waits longer than

    SILENT_SECONDS    without a sign of life from it (ds_vshape/schedule/worker.py), or
    LATE_SECONDS      after the time that it may plan for; it starts, compiles and ends in that.

Of the time between two checks at most a few seconds count, so the planner isn't late if the whole job was suspended.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
import weakref
from contextlib import suppress
from pathlib import Path
from typing import IO

from ds_vshape.comm.channels import PeerLost
from ds_vshape.comm.exchange import Exchange
from ds_vshape.schedule.request import Answer, Request, check_schedule, read_answer

WORKER = ["-m", "ds_vshape.schedule.worker"]
SILENT_SECONDS = 60.0
# Compiling takes up to a minute of a core, and a planner that gives way to busy ranks has a tenth of one.
LATE_SECONDS = 900.0
_MOST_SECONDS_BETWEEN_LOOKS = 5.0
# Ranks that wait for an answer ask for it so often, so that none waits for long in a collective.
_SECONDS_BETWEEN_QUESTIONS = 1.0
# The prefix of what ranks share of an answer.
_NOTHING, _FAILURE, _ANSWER = "", "!", "="


class PlannerFailed(RuntimeError):
    """The planner gives no answer; the message says why."""


class PlanningProcess:
    """A planner in a process of its own. Raises PlannerFailed if it can't start."""

    def __init__(self, request: Request) -> None:
        self._request = request
        try:
            self._answer = _file("answer")
            with _file("request") as question:
                question.write(json.dumps(request.to_json()).encode())
                question.seek(0)
                # Found wherever this process found the package, installed or not.
                paths = [str(Path(__file__).parents[2]), *filter(None, [os.environ.get("PYTHONPATH")])]
                # A process group of its own: if it is stopped before it can ask to end with this process, the system
                # ends it, as it does with stopped groups whose parents have ended; or lets it go on where SIGHUP is
                # ignored, as under nohup, and it ends when it finds itself without its parent.
                self._process = subprocess.Popen([sys.executable, *WORKER, str(os.getpid())], stdin=question,
                                                 stdout=self._answer, process_group=0,
                                                 env={**os.environ, "PYTHONPATH": os.pathsep.join(paths)})
        except Exception as error:
            # No memory, files or processes may be left: none of this is a reason to end the training.
            raise PlannerFailed(f"the planning process can't start: {type(error).__name__}: {error}") from error
        # It doesn't outlive the training; if that is killed, it ends by itself (worker.py). Linux also ends it with
        # the thread that started it.
        weakref.finalize(self, self._process.kill)
        self._looked = time.monotonic()
        self._sign, self._silent, self._taken = 0, 0.0, 0.0

    def answer(self, seconds: float) -> bytes | None:
        """What it found, waited for up to `seconds`; None if it is still planning.

        Raises PlannerFailed, after it has ended the process, if the answer doesn't fit the request or none will come.
        """
        with suppress(subprocess.TimeoutExpired):
            self._process.wait(seconds)
        try:
            self._check_size()
            if self._process.returncode is None:
                self._check_alive()
                return None
            text = self._read()
        except PlannerFailed:
            self.stop()
            raise
        self._answer.close()
        return text

    def _check_size(self) -> None:
        if os.fstat(self._answer.fileno()).st_size > self._request.most_bytes:
            raise PlannerFailed(f"the planning process wrote more than {self._request.most_bytes} bytes")

    def _check_alive(self) -> None:
        now, sign = time.monotonic(), os.fstat(self._answer.fileno()).st_mtime_ns
        passed, self._looked = min(now - self._looked, _MOST_SECONDS_BETWEEN_LOOKS), now
        self._taken += passed
        self._silent = self._silent + passed if sign == self._sign else 0.0
        self._sign = sign
        if self._silent > SILENT_SECONDS:
            raise PlannerFailed(f"the planning process gave no sign of life for {SILENT_SECONDS:g} s: is it stopped?")
        if self._taken > self._request.time_limit + LATE_SECONDS:
            raise PlannerFailed(f"the planning process wasn't done {LATE_SECONDS:g} s after its "
                                f"{self._request.time_limit:g} s")

    def _read(self) -> bytes:
        status = self._process.returncode
        if status:
            raise PlannerFailed(f"the planning process ended with status {status}; see its output above")
        self._answer.seek(0)
        text = self._answer.read()
        try:
            found = read_answer(text)
            if "schedule" in found:
                check_schedule(found["schedule"], self._request)
        except ValueError as error:
            raise PlannerFailed(f"the planning process gave an invalid answer: {error}") from None
        return text

    def stop(self) -> None:
        """End it, whatever it is doing."""
        self._process.kill()
        # A process that hangs in a system call is left to the system.
        with suppress(subprocess.TimeoutExpired):
            self._process.wait(1.0)
        self._answer.close()


def _file(name: str) -> IO[bytes]:
    """A file without a name, in memory if possible: a folder for temporary files may be full or missing."""
    if hasattr(os, "memfd_create"):
        return os.fdopen(os.memfd_create(f"ds_vshape {name}"), "w+b")
    return tempfile.TemporaryFile()


class Planner:
    """The job's planner: global rank 0 runs it, all ranks get its answer in the same call.

    Args:
        exchange: of all ranks of the job.
        is_first: whether this is global rank 0.
        seconds: how long a rank waits for another in the exchange.
    """

    def __init__(self, exchange: Exchange, is_first: bool, seconds: float) -> None:
        self._exchange, self._is_first = exchange, is_first
        self._interval = min(_SECONDS_BETWEEN_QUESTIONS, seconds / 4)
        self._process: PlanningProcess | None = None
        self._failure: PlannerFailed | None = None

    def start(self, request: Request) -> None:
        """Start to plan `request`; an earlier planning that still runs is stopped."""
        if not self._is_first:
            return
        if self._process is not None:
            self._process.stop()
        self._process = self._failure = None
        try:
            self._process = PlanningProcess(request)
        except PlannerFailed as failure:
            self._failure = failure

    def poll(self) -> Answer | None:
        """The answer if it is there, on every rank or on none (collective). Raises PlannerFailed on every rank if there
        will be none, and PeerLost if a rank doesn't come.
        """
        return self._share(0.0)

    def wait(self) -> Answer:
        """The answer, on every rank (collective); raises as `poll` does."""
        while (found := self._share(self._interval)) is None:
            pass
        return found

    def _share(self, seconds: float) -> Answer | None:
        try:
            answer = self._exchange.text_of_first(self._news(seconds) if self._is_first else "")
        except RuntimeError as error:
            raise PeerLost("not all ranks asked for the planner's answer: "
                           f"{str(error).partition(chr(10))[0]}") from error
        if answer.startswith(_FAILURE):
            raise PlannerFailed(answer.removeprefix(_FAILURE))
        return read_answer(answer.removeprefix(_ANSWER).encode()) if answer else None

    def _news(self, seconds: float) -> str:
        """What global rank 0 has to report after waiting for up to `seconds`."""
        failure, text = self._failure, None
        if self._process is not None:
            try:
                text = self._process.answer(seconds)
            except PlannerFailed as failed:
                failure = failed
        if failure is None and text is None:
            return _NOTHING
        self._process = self._failure = None
        return f"{_FAILURE}{failure}" if text is None else _ANSWER + text.decode()
