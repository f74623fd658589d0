"""Texts from the ranks of a pipeline to the first of them; as bytes, so that nothing is executed that comes in."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor


def gather_texts(own: str, ranks: Sequence[int], group: Any) -> list[str]:
    """The texts of the global `ranks`, in their order; nothing but on the first of them.

    Collective over their `group`, which is one over gloo.
    """
    encoded = torch.frombuffer(bytearray(own.encode()), dtype=torch.uint8)
    sizes = [torch.zeros(1, dtype=torch.int64) for _ in ranks]
    dist.all_gather(sizes, torch.tensor([encoded.numel()]), group=group)
    if dist.get_rank() != ranks[0]:
        dist.send(encoded, ranks[0], group=group)
        return []
    texts = [own]
    for rank, size in zip(ranks[1:], sizes[1:]):
        text: Tensor = torch.empty(int(size), dtype=torch.uint8)
        dist.recv(text, rank, group=group)
        texts.append(bytes(text.tolist()).decode())
    return texts
