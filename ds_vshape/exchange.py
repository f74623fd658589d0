"""Short texts and numbers between all ranks of the job: what they have, and what went wrong.

Texts travel as bytes in tensors: nothing that comes from another rank is executed, as unpickling would. They go over
gloo whatever the job's backend is, so that no GPU is waited for.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from contextlib import suppress
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from ds_vshape.config import TIMEOUT_SECONDS
from ds_vshape.groups import GLOO, new_group

# Bytes of a text in `texts_within`, which can't ask for the size first.
_BOX = 2048


class Exchange:
    """All ranks of the job, or those of the global `ranks`, as a group of its own. Creating it is collective over the
    job.

    Methods raise RuntimeError where a rank is lost, or doesn't come within `seconds`.
    """

    def __init__(self, seconds: float = TIMEOUT_SECONDS, ranks: Sequence[int] | None = None) -> None:
        self._group = new_group(ranks, seconds, GLOO)

    def largest(self, own: int) -> int:
        """The largest of all ranks' numbers; collective."""
        number = torch.tensor([own])
        dist.all_reduce(number, op=dist.ReduceOp.MAX, group=self._group)
        return int(number)

    def start_numbers(self, own: Sequence[float]) -> Numbers:
        """Start to tell all ranks this rank's numbers, of which every rank has as many; doesn't wait. Collective."""
        sent = torch.tensor(own, dtype=torch.float64)
        boxes = [torch.empty_like(sent) for _ in range(dist.get_world_size(self._group))]
        return Numbers(boxes, dist.all_gather(boxes, sent, group=self._group, async_op=True))

    def texts(self, own: str) -> list[str]:
        """Every rank's text, in rank order; collective."""
        encoded = own.encode()
        longest = self.largest(len(encoded))
        if not longest:
            return [""] * dist.get_world_size(self._group)
        boxes = [_box(b"", longest) for _ in range(dist.get_world_size(self._group))]
        dist.all_gather(boxes, _box(encoded, longest), group=self._group)
        return [_unboxed(box) for box in boxes]

    def text_of_first(self, own: str) -> str:
        """The text that the first rank of the group gives, on all of them; collective."""
        source = dist.get_process_group_ranks(self._group)[0]
        encoded = own.encode(errors="replace") if dist.get_rank() == source else b""
        size = torch.tensor([len(encoded)])
        dist.broadcast(size, source, group=self._group)
        if not int(size):
            return ""
        box = _box(encoded, int(size))
        dist.broadcast(box, source, group=self._group)
        return bytes(box.tolist()).decode()

    def texts_within(self, own: str, seconds: float) -> list[str | None]:
        """Every rank's text, cut where it is very long, and None for ranks that said nothing within `seconds`.

        To be called on every rank that still can. Where one stayed silent, the exchange is of no use afterwards.
        """
        deadline = time.monotonic() + seconds
        rank, world = dist.get_rank(), dist.get_world_size()
        others = [other for other in range(world) if other != rank]
        sent, boxes = _box(own.encode(), _BOX), {other: _box(b"", _BOX) for other in others}
        receives, sends = {}, []
        for other in others:
            with suppress(RuntimeError):  # the connection is gone
                receives[other] = dist.irecv(boxes[other], other, group=self._group)
                sends.append(dist.isend(sent, other, group=self._group))
        texts: list[str | None] = [None] * world
        texts[rank] = own
        for other, receive in receives.items():
            if finished(receive, deadline):
                texts[other] = _unboxed(boxes[other])
        for send in sends:
            finished(send, deadline)
        return texts


class Numbers:
    """What all ranks are telling each other."""

    def __init__(self, boxes: list[Tensor], work: Any) -> None:
        self._boxes, self._work = boxes, work

    def result(self) -> list[list[float]]:
        """Every rank's numbers, in rank order, once they are all there."""
        self._work.wait()
        return [box.tolist() for box in self._boxes]


def finished(work: Any, deadline: float) -> bool:
    """Whether `work` is done by the `deadline` (of time.monotonic), which is waited for.

    Gloo closes all connections of a group in which one wait was in vain; what had come before stays.
    """
    try:
        work.wait(timedelta(seconds=max(0.001, deadline - time.monotonic())))
    except RuntimeError:
        return False
    return True


def _box(text: bytes, size: int) -> Tensor:
    return torch.frombuffer(bytearray(text[:size].ljust(size, b"\0")), dtype=torch.uint8)


def _unboxed(box: Tensor) -> str:
    return bytes(box.tolist()).rstrip(b"\0").decode(errors="replace")
