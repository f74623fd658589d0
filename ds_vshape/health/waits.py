"""Waits for other ranks in torch.distributed: whether a thread is in one, how to end all of them, and which errors they
end in.

Of torch this uses ProcessGroup.recv and _get_sequence_number_for_group, and torch.distributed.distributed_c10d's
_world.pg_map, the groups that this process is in.
"""

from __future__ import annotations

import re
from contextlib import suppress
from datetime import timedelta
from types import FrameType
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed import distributed_c10d as c10d

from ds_vshape.comm.channels import PeerLost

# How gloo's and NCCL's errors start, which torch raises as plain RuntimeErrors: gloo's with the place in its source. A
# script's error may have the words too, in the name of a file for example.
_TRANSPORT_ERROR = re.compile(
    r"\[[^\]]*\bgloo/|gloo\b|nccl\b|processgroup|.*(pair closure|connection closed by peer)", re.IGNORECASE)
# The tag of a message that no rank sends.
_TAG = 2**31 - 5
# Modules that wait for other ranks, and modules that wait for a thread which does so.
_WAITING_MODULES = ("torch.distributed", "ds_vshape.comm.exchange", "ds_vshape.comm.channels")
_HANDING_OVER = ("ds_vshape.engine", "ds_vshape.runtime.reduction", "ds_vshape.health")


def is_ended_wait(error: BaseException) -> bool:
    """Whether `error`, which may be of the script's code as well, is one of torch.distributed's, or our PeerLost, about
    a rank that is lost."""
    return isinstance(error, (PeerLost, dist.DistError)) or (
        type(error) is RuntimeError and _TRANSPORT_ERROR.match(str(error)) is not None)


def end_waits() -> None:
    """End all waits of this process in its groups over gloo, with a RuntimeError; the groups can't be used any more."""
    for group in list(c10d._world.pg_map):
        own, size = group.rank(), group.size()
        for peer in range(size):
            # A wait that times out closes all connections of its group; one on a closed connection fails at once.
            if peer != own and _times_out(group, peer):
                break


def _times_out(group: Any, peer: int) -> bool:
    """Whether a short wait for `peer` times out, as it does on an open connection."""
    try:
        group.recv([torch.zeros(1)], peer, _TAG).wait(timedelta(milliseconds=1))
    except RuntimeError as error:
        return "imed out" in str(error)
    return False


def is_in_exchange(frame: FrameType | None) -> bool:
    """Whether a thread at `frame` waits for other ranks, or for a thread of ours that does."""
    modules: tuple[str, ...] = _WAITING_MODULES
    while frame is not None and _module(frame).startswith(("threading", "concurrent.futures")):
        frame, modules = frame.f_back, _HANDING_OVER
    return frame is not None and _module(frame).startswith(modules)


def _module(frame: FrameType) -> str:
    return str(frame.f_globals.get("__name__", ""))


def operations_started() -> int:
    """How many operations this process has started in all its groups."""
    count = 0
    for group in list(c10d._world.pg_map):
        with suppress(RuntimeError):
            count += group._get_sequence_number_for_group()  # type: ignore[attr-defined]
    return count
