"""A GPT block for the split backward, all kinds of checkpoints, and what of memory and graph is alive."""

from __future__ import annotations

import gc
from collections.abc import Callable
from typing import Any

import deepspeed
import torch.nn.functional as F
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

from ds_vshape.split_backward.matrix import Linear


class Block(nn.Module):
    """A GPT block (pre-norm, flash attention of one head) of width `h` on (batch, sequence, h)."""

    def __init__(self, h: int) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(h), nn.LayerNorm(h)
        self.qkv, self.proj = nn.Linear(h, 3 * h), nn.Linear(h, h)
        self.fc1, self.fc2 = nn.Linear(h, 4 * h), nn.Linear(4 * h, h)
        self.forwards = 0

    def forward(self, x: Tensor) -> Tensor:
        self.forwards += 1
        q, k, v = (part.unsqueeze(1) for part in self.qkv(self.norm1(x)).chunk(3, -1))
        x = x + self.proj(F.scaled_dot_product_attention(q, k, v, is_causal=True).squeeze(1))
        return x + self.fc2(F.gelu(self.fc1(self.norm2(x))))


class Storages(TorchDispatchMode):
    """Watches the memory that each operator allocates."""

    def __init__(self) -> None:
        super().__init__()
        self._seen: dict[int, tuple[StorageWeakRef, int]] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        value = func(*args, **(kwargs or {}))
        for tensor in value if isinstance(value, tuple) else (value,):
            if isinstance(tensor, Tensor):
                storage = tensor.untyped_storage()
                reference = StorageWeakRef(storage)
                known = self._seen.get(reference.cdata)
                if known is None or known[0].expired():
                    self._seen[reference.cdata] = (reference, storage.nbytes())
        return value

    def live(self, without: list[Tensor] = []) -> int:  # noqa: B006
        """Bytes still allocated, not counting the memory of the tensors `without`."""
        gc.collect()
        apart = {tensor.untyped_storage()._cdata for tensor in without}
        return sum(size for ref, size in self._seen.values() if not ref.expired() and ref.cdata not in apart)


def linear_nodes() -> list[object]:
    """The nodes of split linear layers that are alive anywhere."""
    gc.collect()
    return [thing for thing in gc.get_objects() if type(thing) is Linear._backward_cls]


CHECKPOINTS: dict[str, Callable[..., Tensor]] = {
    "reentrant": lambda layer, x: checkpoint(layer, x, use_reentrant=True),
    "not reentrant": lambda layer, x: checkpoint(layer, x, use_reentrant=False),
    "deepspeed": lambda layer, x: deepspeed.checkpointing.checkpoint(layer, x),
    "deepspeed, not reentrant": lambda layer, x: deepspeed.checkpointing.non_reentrant_checkpoint(layer, x),
}
