"""The states of the random number generators: read, put back, compared."""

from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy
import torch
from deepspeed.accelerator import get_accelerator

from ds_vshape.deepspeed_adapter.checkpointing import set_tracked_random_states, tracked_random_states


class RandomState:
    """The states of all generators that DeepSpeed's set_random_seed seeds, and of its activation checkpointing's.

    Read when the object is made.
    """

    def __init__(self) -> None:
        self._host = random.getstate(), numpy.random.get_state(), torch.get_rng_state()
        self._device = get_accelerator().get_rng_state()
        self._tracked = tracked_random_states()

    @classmethod
    @contextmanager
    def kept(cls) -> Iterator[None]:
        """What is drawn inside leaves no trace: all generators are put back at the end."""
        before = cls()
        try:
            yield
        finally:
            before.restore()

    def restore(self) -> None:
        """Put all of them back."""
        self.restore_host()
        get_accelerator().set_rng_state(self._device)
        set_tracked_random_states(dict(self._tracked))

    def restore_host(self) -> None:
        """Put those back that loading data may use."""
        python, of_numpy, of_torch = self._host
        random.setstate(python)
        numpy.random.set_state(of_numpy)
        torch.set_rng_state(of_torch)

    def same_host(self, other: RandomState) -> bool:
        """Whether no random numbers were drawn on the host in between."""
        return self._digest() == other._digest()

    def _digest(self) -> tuple[Any, ...]:
        python, of_numpy, of_torch = self._host
        return python, *(part.tobytes() if isinstance(part, numpy.ndarray) else part for part in of_numpy), (
            of_torch.numpy().tobytes())
