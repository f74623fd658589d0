"""The job's planner: a process beside the training of one rank, whose answer all ranks get in the same call."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import weakref
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from ds_vshape.schedule.worker import Request


WORKER = ["-m", "ds_vshape.schedule.worker"]


class PlanningProcess:
    """A planner in a process of its own, which gives way to the training on the same cores."""

    def __init__(self, request: Request) -> None:
        self._answer = tempfile.TemporaryFile("w+")
        with tempfile.TemporaryFile("w+") as questions:
            json.dump(request.to_json(), questions)
            questions.seek(0)
            # Found wherever this process found the package, installed or not.
            paths = [str(Path(__file__).parent.parent), *filter(None, [os.environ.get("PYTHONPATH")])]
            self._process = subprocess.Popen(["nice", sys.executable, *WORKER, str(os.getpid())], stdin=questions,
                                             stdout=self._answer,
                                             env={**os.environ, "PYTHONPATH": os.pathsep.join(paths)})
        # It doesn't outlive the training; where that is killed, it sees so itself.
        weakref.finalize(self, self._process.kill)

    def answer(self, wait: bool) -> dict[str, Any] | None:
        """What it found; None while it is at it, unless `wait`."""
        status = self._process.wait() if wait else self._process.poll()
        if status is None:
            return None
        with self._answer:
            if status:
                return {"crash": f"the planning process ended with status {status}; see its output above"}
            self._answer.seek(0)
            found: dict[str, Any] = json.load(self._answer)
        return found

    def stop(self) -> None:
        """End it, whatever it is at."""
        self._process.kill()
        self._process.wait()
        self._answer.close()


class Planner:
    """The job's planner: global rank 0 runs it, all ranks get its answer in the same call.

    Args:
        device: where the job's collectives take place.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._process: PlanningProcess | None = None

    def start(self, request: Request) -> None:
        """Plan `request` from now on; a planning that is still at it is given up."""
        if dist.get_rank() == 0:
            if self._process is not None:
                self._process.stop()
            self._process = PlanningProcess(request)

    def poll(self) -> Mapping[str, Any] | None:
        """The answer if it is there, on every rank or on none (collective)."""
        return self._share(wait=False)

    def wait(self) -> Mapping[str, Any]:
        """The answer, on every rank (collective)."""
        found = self._share(wait=True)
        assert found is not None
        return found

    def _share(self, wait: bool) -> Mapping[str, Any] | None:
        text = b""
        if self._process is not None:
            found = self._process.answer(wait)
            if found is not None:
                self._process = None
                text = json.dumps(found).encode()
        length = torch.tensor([len(text)], device=self._device)
        dist.broadcast(length, 0)
        if not int(length):
            return None
        message = torch.empty(int(length), dtype=torch.uint8, device=self._device)
        if text:
            message.copy_(torch.frombuffer(bytearray(text), dtype=torch.uint8))
        dist.broadcast(message, 0)
        answer: Mapping[str, Any] = json.loads(bytes(message.tolist()))
        return answer
