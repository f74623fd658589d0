"""What the passes of a rank keep and need, in bytes, as they run: on its device, or with shapes alone."""

from __future__ import annotations

from collections import deque
from collections.abc import Collection, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._pytree import tree_leaves

from ds_vshape.deepspeed_adapter.optimizers import GRADIENTS
from ds_vshape.measure.allocations import AllocationWatcher, CannotWatch, Watched, memory_of, strided
from ds_vshape.schedule.activations import Activations, Working
from ds_vshape.schedule.passes import Kind, Pass
from ds_vshape.schedule.placement import Placement
from ds_vshape.split_backward import WeightGradientStore


class Storages:
    """The storages of tensors, each counted once however many tensors share it; only weak references are kept."""

    def __init__(self, tensors: Iterable[Any] = ()) -> None:
        self._bytes: dict[StorageWeakRef, int] = {}
        self.add(tensors)

    def add(self, tensors: Iterable[Any]) -> None:
        """Count the memory of `tensors`; anything else is ignored, and so are tensors without plain storage."""
        for tensor in strided(tensors):
            ref, _, size = _reference(tensor)
            self._bytes[ref] = size

    def __sub__(self, other: Storages) -> Storages:
        rest = Storages()
        rest._bytes = {ref: size for ref, size in self._bytes.items() if ref not in other._bytes}
        return rest

    def nbytes(self) -> int:
        """The bytes of all that is alive."""
        alive: list[int] = [size for ref, size in self._bytes.items() if not _expired(ref)]
        return sum(alive)


def _expired(ref: StorageWeakRef) -> bool:
    return bool(ref.expired())  # type: ignore[no-untyped-call]


class StageSizes(NamedTuple):
    """Bytes of one micro-batch on a stage: what F leaves, what B leaves, what F, B, BW and W need besides, and the
    inputs."""

    after_forward: int
    after_backward: int
    working: tuple[int, int, int, int]
    inputs: int


class ActivationMeter:
    """Sizes of the activations of this rank's stages, and what its passes need besides them, in bytes for one
    micro-batch.

        meter.start()
        with meter.forward(work, inputs, labels):
            outputs = ...                               an F
        with meter.backward(work):
            ...                                         the B or BW of the same stage and micro-batch
        meter.after_backward(work, store)               if it was a B
        with meter.weights(work, store):
            ...                                         a W, or a piece of it
        meter.stop()

    Measure a micro-batch other than the first: a module may make caches in its first forward, which stay. Measure
    a B and a BW of each stage, if it has both: where layers are recomputed a B keeps more the further it gets.
    Operators run slower inside, so times that are measured meanwhile don't count.

    A forward leaves what is alive at the start of its backward: memory that it took, the stage's inputs, and labels
    that the graph saved; not `module`'s parameters and buffers, and not outputs unless the graph saved them too.

    Nothing here raises into the passes or changes what they do. If something can't be measured, `unknown` says why.
    """

    def __init__(self, module: nn.Module, device_type: str) -> None:
        self.whole: dict[int, int] = {}
        self.kept: dict[int, int] = {}
        self.unknown: str | None = None
        # The most that was alive in each kind of pass, of what `whole` and `kept` count in part; and the inputs.
        self._most: dict[tuple[Kind, int], int] = {}
        self._inputs: dict[int, int] = {}
        self._module = module
        self._watcher = AllocationWatcher(device_type)
        self._spans: list[_Span] = []

    def start(self) -> None:
        """To be called before the first pass that is measured."""
        for found in (self.whole, self.kept, self._most, self._inputs):
            found.clear()
        self._spans.clear()
        self.unknown = None
        with self._measuring():
            if any(getattr(module, "_compiled_call_impl", None) for module in self._module.modules()):
                raise CannotWatch("the memory of compiled layers can't be observed")
            self._watcher.start()

    def stop(self) -> None:
        """To be called after the last pass that is measured."""
        with self._measuring():
            self._add_up(self._watcher.stop())
        self.drop()

    def drop(self) -> None:
        """Stop measuring: the batch has failed, or starts again."""
        self._watcher.drop()
        self._spans.clear()

    @contextmanager
    def forward(self, action: Pass, inputs: Any, labels: Any = None) -> Iterator[None]:
        """Around an F; `inputs` and `labels` are a tensor or nested ones."""
        span = _Span(action)
        with self._measuring():
            span.alive = self._watcher.memory(tree_leaves(inputs))
            self._inputs[action.stage] = sum(span.alive.values())
            span.labels = [*map(_reference, strided(tree_leaves(labels)))]
            if not span.alive:
                raise CannotWatch(f"micro-batch {action.micro_batch} of stage {action.stage} was empty")
        with self._watched(span):
            yield
        with self._measuring():
            span.apart = self._watcher.memory([*self._module.parameters(), *self._module.buffers()])

    @contextmanager
    def backward(self, action: Pass) -> Iterator[None]:
        """Around the B or BW of what was measured in F, or the C between them."""
        span = _Span(action)
        with self._measuring():
            first = Pass(Kind.F, action.stage, action.micro_batch)
            forward = next(span for span in self._spans if span.action == first)
            span.apart = forward.apart
            saved = {number: size for ref, number, size in forward.labels if not _expired(ref)}
            span.alive = {**forward.alive, **saved}
        with self._watched(span):
            yield

    def after_backward(self, action: Pass, store: WeightGradientStore) -> None:
        """When B has ended; `store` is what it leaves to W."""
        with self._measuring():
            self.kept[action.stage] = (Storages(store.tensors()) - memory_of_model(self._module)).nbytes()

    @contextmanager
    def weights(self, action: Pass, store: WeightGradientStore) -> Iterator[None]:
        """Around W, which empties `store`."""
        span = _Span(action)
        with self._measuring():
            span.apart = self._watcher.memory([*self._module.parameters(), *self._module.buffers()])
            span.alive = self._watcher.memory(store.tensors())
        with self._watched(span):
            yield

    @contextmanager
    def _measuring(self) -> Iterator[None]:
        """Around what is done for the measurement alone: an error ends the measurement and nothing else."""
        try:
            yield
        except Exception as error:
            if self.unknown is None:
                self.unknown = str(error) if isinstance(error, CannotWatch) else f"{type(error).__name__}: {error}"
            self.drop()

    @contextmanager
    def _watched(self, span: _Span) -> Iterator[None]:
        with self._watcher.span() as span.number:
            yield
        with self._measuring():
            span.gradients = self._watcher.memory(
                getattr(parameter, name, None) for parameter in self._module.parameters() for name in GRADIENTS)
        self._spans.append(span)

    def _add_up(self, watched: Watched) -> None:
        """Go through all that was allocated and freed."""
        changes = deque(watched.changes)
        # By stage and micro-batch: memory that its F took and that hasn't been given back.
        left: dict[tuple[int, int], dict[int, int]] = {}

        def take_until(time: float, alive: dict[int, int], gradients: Collection[int] = ()) -> int:
            """The most that is alive until `time`, of `alive` and what comes to it, without the sums of `gradients`."""
            most = now = sum(alive.values())
            while changes and changes[0].time <= time:
                change = changes.popleft()
                if change.number in gradients:
                    continue
                if change.size > 0:
                    alive[change.number] = change.size
                    now += change.size
                    most = max(most, now)
                else:
                    now -= alive.pop(change.number, 0)
                    for of_forward in left.values():
                        of_forward.pop(change.number, None)
            return most

        for span in self._spans:
            start, end = watched.spans[span.number]
            take_until(start, {})
            action, buffer = span.action, (span.action.stage, span.action.micro_batch)
            alive = _without({**span.alive, **left.pop(buffer, {})}, span.apart)
            if action.kind.gives_input_gradient:
                self.whole[action.stage] = sum(alive.values())
            before = set(alive)
            # C needs what F needs without it.
            kind = Kind.F if action.kind is Kind.C else action.kind, action.stage
            self._most[kind] = max(take_until(end, alive, span.gradients), self._most.get(kind, 0))
            if action.kind is Kind.F:
                left[buffer] = _without({number: alive[number] for number in alive.keys() - before}, span.apart)
            elif action.kind is Kind.C:
                left[buffer] = _without(alive, span.apart)

    def of_stage(self, stage: int) -> StageSizes:
        """The sizes of a stage of this rank."""
        whole, backward = self.whole[stage], [self._most.get((kind, stage), 0) for kind in (Kind.B, Kind.BW)]
        kept = self.kept.get(stage, whole)
        working = (self._most.get((Kind.F, stage), 0) - whole, *((one or max(backward)) - whole for one in backward),
                   self._most.get((Kind.W, stage), 0) - kept)
        f, b, bw, w = (max(size, 0) for size in working)
        return StageSizes(whole, kept, (f, b, bw, w), self._inputs[stage])

    def gather(self, placement: Placement, device: torch.device) -> tuple[Activations, Working] | None:
        """The sizes of all stages, the largest of all replicas, on every rank of the job (collective); None where they
        are unknown to one of them.

        A stage whose B wasn't measured counts as one that keeps all until W, and its B as its BW, or the other way
        round.
        """
        own = torch.zeros(8, placement.stages, dtype=torch.int64)
        for stage in self.whole:
            whole, kept, working, inputs = self.of_stage(stage)
            own[:-1, stage] = torch.tensor([whole, kept, *working, inputs])
        own[-1] = self.unknown is not None
        own = own.to(device)
        dist.all_reduce(own, op=dist.ReduceOp.MAX)
        *rows, unknown = [tuple(map(float, of_stages)) for of_stages in own.tolist()]
        return None if any(unknown) or 0 in rows[0] else (Activations(rows[0], rows[1]), Working(*rows[2:]))


@dataclass(eq=False)
class _Span:
    """A pass that is measured. Memory is a size in bytes by its number (`memory_of`)."""

    action: Pass
    number: int = 0
    # What is alive when it starts, without what the forward left.
    alive: dict[int, int] = field(default_factory=dict)
    # Parameters and buffers, which don't count.
    apart: dict[int, int] = field(default_factory=dict)
    # The sums that it adds to, which it makes if it's the first.
    gradients: dict[int, int] = field(default_factory=dict)
    labels: list[tuple[StorageWeakRef, int, int]] = field(default_factory=list)


def _without(memory: dict[int, int], apart: dict[int, int]) -> dict[int, int]:
    return {number: size for number, size in memory.items() if number not in apart}


def _reference(tensor: Tensor) -> tuple[StorageWeakRef, int, int]:
    return StorageWeakRef(tensor.untyped_storage()), *memory_of(tensor)  # type: ignore[no-untyped-call]


def memory_of_model(module: nn.Module) -> Storages:
    """Parameters and buffers, and what quantized parameters are decoded by."""
    return Storages([*module.parameters(), *module.buffers(), *_states(module)])


def _states(module: nn.Module) -> Iterator[Tensor]:
    """What quantized parameters (bitsandbytes' Params4bit) are decoded by, of which torch doesn't know."""
    for parameter in module.parameters():
        state = getattr(parameter, "quant_state", None)
        while state is not None:
            values = vars(state)
            yield from (value for value in values.values() if isinstance(value, Tensor))
            state = values.get("state2")
