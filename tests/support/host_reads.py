"""Which instructions of a batch read a tensor's value on the host."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable
from functools import partial
from typing import Any

import torch
from instruction_functions import around_instruction
from internals import replace_background
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from ds_vshape.deepspeed_adapter.engine import instructions_of

# What hands a value, or a shape that depends on values, to the host.
_READS = {"_local_scalar_dense", "is_nonzero", "equal", "nonzero", "masked_select", "unique_consecutive", "_unique2"}


class _Reads(TorchDispatchMode):
    """Counts reads of values by the instruction in which they happen."""

    def __init__(self) -> None:
        super().__init__()
        self.instruction = ""
        self.found: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.overloadpacket.__name__ in _READS:
            self.found[self.instruction] += 1
        return func(*args, **(kwargs or {}))


class _AtOnce:
    """Runs background work at once, so that its reads are seen."""

    def start(self, work: Callable[[], Any], uses: Iterable[Tensor] = ()) -> _AtOnce:
        with torch.no_grad():
            self.value = work()
        return self

    def result(self, timeout: float | None = None) -> Any:
        return self.value


def reads_of_batch(engine: Any, batch_of: Callable[[int], Any]) -> dict[str, int]:
    """Reads in a batch after shapes are known and activations are measured, by instruction."""
    for batch in range(3):
        engine.train_batch(batch_of(batch))
    replace_background(engine, _AtOnce())
    seen = _Reads()

    def watched(name: str, execute: Callable[[], None]) -> None:
        seen.instruction = name
        execute()
        seen.instruction = ""

    for kind in instructions_of(engine):
        around_instruction(engine, kind, partial(watched, kind.__name__))
    with seen:
        engine.train_batch(batch_of(3))
    return dict(seen.found)
