"""What recomputation and offload would save and cost, measured without doing either: how much memory of a forward
depends on its first layers alone, their share of its time, and how fast copies to the host and back are.
"""

from __future__ import annotations

import bisect
import statistics
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from ds_vshape.measure.profiling import clock
from ds_vshape.runtime.copy_engine import CopyEngine
from ds_vshape.runtime.saved_tensors import SavedTensors
from ds_vshape.schedule.activations import Activations
from ds_vshape.schedule.timeline import Times

# Calls a function with the number of each layer of the model that starts, and of the one after a stage's last.
AtLayers = Callable[[Callable[[int], None]], AbstractContextManager[None]]
# Seconds that a byte takes to the host, and back.
Speeds = tuple[float, float]

_ROUNDS = 3
# Copies whose speed is measured: large enough for a start to be nothing, small enough for any device.
_LEAST_BYTES, _MOST_BYTES = 1 << 20, 1 << 28


@dataclass(frozen=True)
class _Sizes:
    """Bytes of one stage: what an offload moves, and what of that the first layers alone have left, for each number of
    them."""

    movable: int
    of_layers: tuple[int, ...]


class KeepingMeter:
    """Measures the stages of this rank.

    Args:
        at_layers: of the rank's module.
        layers: how many layers each stage of the model has.
        device: this rank's.
    """

    def __init__(self, at_layers: AtLayers, layers: Sequence[int], device: torch.device) -> None:
        self._at_layers, self._layers, self._device = at_layers, layers, device
        self._sizes: dict[int, _Sizes] = {}
        self._marks: dict[int, list[Any]] = {}
        # All stages', once they have been gathered.
        self._activations: Activations | None = None

    @contextmanager
    def sizes(self, stage: int, inputs: Sequence[Tensor | None]) -> Iterator[None]:
        """Around an F; `inputs` are the stage's, on this rank's device or with shapes alone."""
        device = next(tensor.device for tensor in inputs if tensor is not None)
        saved, starts = SavedTensors(device.type), list[int]()
        with self._at_layers(lambda layer: starts.append(saved.count)), saved.hooks():
            yield
        last = saved.last_places()
        own = {tensor.untyped_storage()._cdata for tensor in inputs if tensor is not None}
        movable = saved.movable(inputs)
        found = [0] * (len(starts) - 1)
        for storage in movable:
            layer = bisect.bisect_right(starts, last.get(storage._cdata, -1)) - 1
            if storage._cdata not in own and 0 <= layer < len(found):
                found[layer] += storage.nbytes()
        so_far = tuple(sum(found[:layers]) for layers in range(1, len(found) + 1))
        self._sizes[stage] = _Sizes(sum(storage.nbytes() for storage in movable), so_far)

    @contextmanager
    def times(self, stage: int) -> Iterator[None]:
        """Around an F."""
        timer = clock()
        marks: list[Any] = []
        with self._at_layers(lambda layer: marks.append(timer.now())):
            yield
        self._marks[stage] = [*marks, timer.now()]

    def gather(self, activations: Activations) -> Activations:
        """`activations` with what recomputation and offload leave of them, the largest of all replicas, on every rank
        of the job (collective)."""
        stages, most = len(self._layers), max(self._layers)
        own = torch.zeros(stages, 1 + most, dtype=torch.int64)
        for stage, sizes in self._sizes.items():
            own[stage, 0] = sizes.movable
            # What is left, of which the largest counts.
            left = [sizes.movable - of_layers for of_layers in sizes.of_layers]
            own[stage, 1:1 + len(left)] = torch.tensor(left)
        movable, *left_of = self._largest(own).t().tolist()
        rows = list(zip(*left_of))
        self._activations = replace(
            activations, offloadable=tuple(map(float, movable)), recomputed=tuple(
                tuple(max(0.0, whole - moved + left) for left in row[:layers])
                for whole, moved, row, layers in zip(activations.after_forward, movable, rows, self._layers)))
        return self._activations

    def of_times(self, times: Times, engine: CopyEngine, agreed: Callable[[Callable[[], Speeds]], Speeds]) -> Times:
        """`times` with those of recomputation and copies, the slowest of all replicas, on every rank of the job
        (collective); as they are where sizes are unknown. `agreed` gives what a function gives, or raises on all ranks
        what that has raised on one."""
        sizes = self._activations
        if sizes is None:
            return times
        stages, most = len(self._layers), max(self._layers)
        # Two bandwidths, and shares of F.
        own = torch.zeros(stages, 2 + most, dtype=torch.float64)
        largest = max((of_stage.movable for of_stage in self._sizes.values()), default=0)
        own[:, :2] = torch.tensor(agreed(partial(seconds_per_byte, engine, largest, self._device)))
        for stage, marks in self._marks.items():
            start, *ends, end = clock().on_host(marks)
            own[stage, 2:2 + len(ends)] = torch.tensor([(until - start) / (end - start or 1.0) for until in ends])
        rows = self._largest(own).tolist()
        recompute, copied = [], []
        for stage, (forward, layers) in enumerate(zip(times.forward, self._layers)):
            recompute.append(tuple(forward * share for share in rows[stage][2:2 + layers]))
            moved, stays = sizes.offloadable[stage], sizes.after_forward[stage] - sizes.offloadable[stage]
            copied.append(tuple(max(0.0, left - stays) / (moved or 1.0) for left in sizes.recomputed[stage]))
        offload, reload = (tuple(size * row[place] for size, row in zip(sizes.offloadable, rows)) for place in (0, 1))
        return replace(times, recompute=tuple(recompute), offload=offload, reload=reload, copied=tuple(copied))

    def _largest(self, own: Tensor) -> Tensor:
        own = own.to(self._device)
        dist.all_reduce(own, op=dist.ReduceOp.MAX)
        return own.cpu()


def seconds_per_byte(engine: CopyEngine, nbytes: int, device: torch.device) -> Speeds:
    """How long a byte takes to the host, and back, of a copy of about `nbytes` while another one goes the other way."""
    nbytes = min(max(nbytes, _LEAST_BYTES), _MOST_BYTES)
    there, back = torch.zeros(2, nbytes, dtype=torch.uint8, device=device).unbind()
    there, back = there.clone(), back.clone()
    found: tuple[list[float], list[float]] = [], []
    timer = clock()
    for _ in range(_ROUNDS):
        coming = engine.start([back.untyped_storage()])
        coming.free()
        going = engine.start([there.untyped_storage()])
        coming.start_back()
        going.wait()
        coming.finish()
        for marks, seconds in zip((going.outwards, coming.backwards), found):
            first, last = timer.on_host(marks)
            seconds.append((last - first) / nbytes)
    return statistics.median(found[0]), statistics.median(found[1])
