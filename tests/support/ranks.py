"""Ranks as processes on this machine, forked from a parent that has imported torch and deepspeed.

Imports and first calls take a cold process seconds; a fork takes milliseconds. Ranks talk over gloo, as on a cluster
without GPUs.
"""

from __future__ import annotations

import gc
import os
import signal
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, TypeAlias

os.environ.setdefault("DS_ACCELERATOR", "cpu")
os.environ.setdefault("OMP_NUM_THREADS", "1")

import deepspeed
import deepspeed.ops
import deepspeed.runtime.zero.muon.original_muon  # noqa: F401  (DeepSpeed imports it at the first step)
import torch
import torch._dynamo  # noqa: F401  (so does the first optimizer)
import torch.distributed as dist
from deepspeed.utils import logger
from forks import fork

import ds_vshape.plugin  # noqa: F401  (the package imports it when a script first asks for one of its names)

# Building DeepSpeed's shared-memory collectives takes minutes on a fresh machine, and gloo does for tests.
deepspeed.ops.__compatible_ops__ = {}

# Makes this process a rank of the job: its number, that of all ranks, and the URL of a file store.
Start: TypeAlias = Callable[[int, int, str], None]

_STOPPED = "stopped"


class RanksFailed(AssertionError):
    """Some ranks raised or hung; the message holds the output of each."""


def start_on_gloo(rank: int, world: int, store: str) -> None:
    """Make this process a rank of a job whose default group is gloo's."""
    dist.init_process_group("gloo", init_method=store, rank=rank, world_size=world)
    deepspeed.init_distributed("gloo", verbose=False)


def run_ranks(world: int, body: Callable[..., Any], *args: Any, timeout: float = 300.0,
              start: Start = start_on_gloo) -> list[Any]:
    """Run `body(rank, *args)` on `world` ranks and return what each returned.

    A rank's return value comes back through torch.save. RanksFailed if one raises, isn't done after `timeout` seconds,
    or is stopped when all others have ended.
    """
    with tempfile.TemporaryDirectory() as folder:
        children = {rank: fork(Path(folder) / f"log{rank}",
                               partial(_rank, rank, world, Path(folder), start, body, args))
                    for rank in range(world)}
        late = _wait(list(children.values()), timeout)
        failures = [f"rank {rank} was {late[pid]}" for rank, pid in children.items() if pid in late]
        results = []
        for rank in range(world):
            outcome = Path(folder) / f"result{rank}"
            if not outcome.exists():
                log = (Path(folder) / f"log{rank}").read_text(errors="replace")
                failures.append(f"rank {rank}:\n{log[-6000:]}")
            else:
                results.append(torch.load(outcome, weights_only=False))
        if failures:
            raise RanksFailed("\n".join(failures))
        return results


def _rank(rank: int, world: int, folder: Path, start: Start, body: Callable[..., Any], args: tuple[Any, ...]) -> int:
    """Run `body` as a rank, and leave what it returns in `folder`; the exit status."""
    # DeepSpeed collects garbage often. What the parent made isn't garbage, and reading it would copy its pages.
    gc.freeze()
    logger.setLevel("INFO")
    torch.set_num_threads(1)
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(world))
    start(rank, world, f"file://{folder}/store")
    result = body(rank, *args)
    torch.save(result, folder / f"draft{rank}")
    os.replace(folder / f"draft{rank}", folder / f"result{rank}")
    dist.barrier()
    return 0


def _wait(pids: list[int], timeout: float) -> dict[int, str]:
    """Wait for the children; those that haven't ended are killed and returned, with the state in which they were."""
    deadline = time.monotonic() + timeout
    states = dict.fromkeys(pids, f"still running after {timeout:g} s")
    while any(state != _STOPPED for state in states.values()) and time.monotonic() < deadline:
        for pid in list(states):
            changed, status = os.waitpid(pid, os.WNOHANG | os.WUNTRACED | os.WCONTINUED)
            if changed and os.WIFSTOPPED(status):
                states[pid] = _STOPPED
            elif changed and os.WIFCONTINUED(status):
                states[pid] = f"still running after {timeout:g} s"
            elif changed:
                del states[pid]
        time.sleep(0.005)
    for pid in states:
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
    return states
