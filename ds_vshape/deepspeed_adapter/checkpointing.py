"""DeepSpeed's activation checkpoints; checked with DeepSpeed 0.19.8
(runtime/activation_checkpointing/checkpointing.py)."""

from __future__ import annotations

from typing import Any

from deepspeed.runtime.activation_checkpointing import checkpointing as _stock
from deepspeed.runtime.activation_checkpointing.checkpointing import non_reentrant_checkpoint

__all__ = ["checkpoints_synchronize", "forget_checkpoints", "non_reentrant_checkpoint", "set_tracked_random_states",
           "tracked_random_states"]


def checkpoints_synchronize() -> bool:
    """Whether each checkpointed layer waits for the whole device: by deepspeed.checkpointing.configure."""
    return bool(_stock.SYNCHRONIZE)


def forget_checkpoints() -> None:
    """To be called where no backward will come for what was checkpointed."""
    _stock.reset()


def tracked_random_states() -> dict[str, Any]:
    """The random states that recomputation switches between, by name."""
    return _stock.get_cuda_rng_tracker().get_states()  # type: ignore[no-any-return]


def set_tracked_random_states(states: dict[str, Any]) -> None:
    """Put them back."""
    _stock.get_cuda_rng_tracker().set_states(states)
