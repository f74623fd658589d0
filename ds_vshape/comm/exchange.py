"""Texts and numbers between all ranks of the job, or some: what they have, and what went wrong.

Texts travel as bytes in tensors: nothing that comes from another rank is executed, as unpickling would. They go over
gloo whatever the job's backend is, so that no GPU is waited for.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from ds_vshape.comm.groups import GLOO, new_group


class Exchange:
    """All ranks of the job, or the global `ranks`, as a process group of their own over gloo.

    Creating it is collective over the job; its methods are collective over `ranks`.

    Methods raise RuntimeError where a rank is lost, or doesn't come within `seconds`, where there is such a limit.
    """

    def __init__(self, ranks: Sequence[int] | None = None, seconds: float | None = None) -> None:
        self.group = new_group(ranks, GLOO, seconds)
        self.ranks: Sequence[int] = range(dist.get_world_size()) if ranks is None else ranks

    def largest(self, own: int) -> int:
        """The largest of all ranks' numbers; collective."""
        return self.largest_of_each([own])[0]

    def largest_of_each(self, own: Sequence[int]) -> list[int]:
        """For each place the largest of all ranks' numbers; every rank gives as many numbers. Collective."""
        numbers = torch.tensor(own)
        dist.all_reduce(numbers, op=dist.ReduceOp.MAX, group=self.group)
        return numbers.tolist()

    def start_numbers(self, own: Sequence[float]) -> Numbers:
        """Start to tell all ranks this rank's numbers, of which every rank has as many; doesn't wait. Collective."""
        sent = torch.tensor(own, dtype=torch.float64)
        boxes = [torch.empty_like(sent) for _ in self.ranks]
        return Numbers(boxes, dist.all_gather(boxes, sent, group=self.group, async_op=True))

    def texts(self, own: str) -> list[str]:
        """Every rank's text, in rank order; collective."""
        encoded = _encoded(own)
        longest = self.largest(len(encoded))
        if not longest:
            return [""] * len(self.ranks)
        # By way of the first rank, in two messages a rank: all_gather takes as many as there are ranks, each.
        first = self.ranks[0]
        boxes = torch.zeros(len(self.ranks), longest, dtype=torch.uint8)
        dist.gather(_box(encoded, longest), list(boxes) if dist.get_rank() == first else None, first, group=self.group)
        dist.broadcast(boxes, first, group=self.group)
        return [_unboxed(box) for box in boxes]

    def texts_on_first(self, own: str) -> list[str]:
        """Every rank's text on the first rank of the group, in rank order; an empty list on all others. Collective.

        Each text travels once, which counts where they are long.
        """
        encoded = torch.frombuffer(bytearray(_encoded(own) or b"\0"), dtype=torch.uint8)
        sizes = [torch.zeros(1, dtype=torch.int64) for _ in self.ranks]
        dist.all_gather(sizes, torch.tensor([encoded.numel()]), group=self.group)
        if dist.get_rank() != self.ranks[0]:
            dist.send(encoded, self.ranks[0], group=self.group)
            return []
        texts = [own]
        for rank, size in zip(self.ranks[1:], sizes[1:]):
            box = _box(b"", int(size))
            dist.recv(box, rank, group=self.group)
            texts.append(_unboxed(box))
        return texts

    def text_of_first(self, own: str) -> str:
        """The text that the first rank of the group gives, on all of them; collective."""
        source = self.ranks[0]
        encoded = _encoded(own) if dist.get_rank() == source else b""
        size = torch.tensor([len(encoded)])
        dist.broadcast(size, source, group=self.group)
        if not int(size):
            return ""
        box = _box(encoded, int(size))
        dist.broadcast(box, source, group=self.group)
        return box.numpy().tobytes().decode()


class Numbers:
    """Numbers of every rank, on their way to all ranks."""

    def __init__(self, boxes: list[Tensor], work: Any) -> None:
        self._boxes, self._work = boxes, work

    def result(self) -> list[list[float]]:
        """Wait for every rank's numbers [rank][number]."""
        self._work.wait()
        return [box.tolist() for box in self._boxes]


def _encoded(text: str) -> bytes:
    # Names of files may have what UTF-8 can't encode.
    return text.encode(errors="backslashreplace")


def _box(text: bytes, size: int) -> Tensor:
    return torch.frombuffer(bytearray(text[:size].ljust(size, b"\0")), dtype=torch.uint8)


def _unboxed(box: Tensor) -> str:
    return box.numpy().tobytes().rstrip(b"\0").decode(errors="replace")
