"""How many bytes each rank needs: measured where they are, predicted where a schedule decides."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from deepspeed.runtime.bf16_optimizer import BF16_Optimizer
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from ds_vshape.gradients import sums_so_far
from ds_vshape.rank_memory import RankMemory
from ds_vshape.schedule.activations import Activations, Working, peaks, working_peaks
from ds_vshape.schedule.lowering import lower
from ds_vshape.schedule.passes import Kind, Pass
from ds_vshape.schedule.placement import Placement
from ds_vshape.schedule.schedule import Schedule
from ds_vshape.schedule.timeline import Times
from ds_vshape.split_backward import WeightGradientStore


class Storages:
    """Memory that tensors stand on, each piece counted once however many tensors share it; kept alive by none of it."""

    def __init__(self, tensors: Iterable[Any] = ()) -> None:
        self._bytes: dict[StorageWeakRef, int] = {}
        self.add(tensors)

    def add(self, tensors: Iterable[Any]) -> None:
        """Take in the memory of `tensors`; what is no tensor is passed over, and what has no plain storage too."""
        for tensor in tensors:
            if isinstance(tensor, Tensor) and tensor.layout is torch.strided:
                storage = tensor.untyped_storage()
                self._bytes[StorageWeakRef(storage)] = storage.nbytes()  # type: ignore[no-untyped-call]

    def __or__(self, other: Storages) -> Storages:
        both = Storages()
        both._bytes = self._bytes | other._bytes
        return both

    def __sub__(self, other: Storages) -> Storages:
        rest = Storages()
        rest._bytes = {ref: size for ref, size in self._bytes.items() if ref not in other._bytes}
        return rest

    def prune(self) -> None:
        """Forget what isn't alive any more."""
        self._bytes = {ref: size for ref, size in self._bytes.items() if not _expired(ref)}

    def nbytes(self) -> int:
        """The bytes of all that is alive."""
        alive: list[int] = [size for ref, size in self._bytes.items() if not _expired(ref)]
        return sum(alive)


def _expired(ref: StorageWeakRef) -> bool:
    return bool(ref.expired())  # type: ignore[no-untyped-call]


class _Watched(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Adds the memory of every operator's results to what was `alive` before, but for `apart`; notes the most of it.

    `apart` is what is counted elsewhere: weights, and the sums of gradients, to which operators add in place.
    """

    def __init__(self, alive: Storages, apart: Storages) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.alive, self._apart = alive, apart
        self.most = alive.nbytes()

    @classmethod
    def ignore_compile_internals(cls) -> bool:
        """Compiled layers stay compiled: torch would run them eagerly for this mode, and a checkpoint of one, which is
        compiled when it's recomputed, would then find other tensors than were saved."""
        return True

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        self.alive |= Storages(tree_leaves(result)) - self._apart
        self.alive.prune()
        self.most = max(self.most, self.alive.nbytes())
        return result


class ActivationMeter:
    """Sizes of the activations of this rank's stages, and what its passes need beside them, in bytes for one
    micro-batch.

        with meter.forward(work, inputs):
            outputs = ...                               an F
        meter.after_forward(work, inputs, outputs)
        with meter.backward(work):
            ...                                         the B or BW of the same stage and micro-batch
        meter.after_backward(work, store)               if it was a B
        with meter.weights(work, store):
            ...                                         a W, or a piece of it

    Measure a micro-batch other than the first: a module may make caches in its first forward, which stay. A B and a BW
    of each stage, if it has both: where layers are recomputed a B keeps more the further it gets. Operators run slower
    inside, so times are no times.

    A forward leaves what the graph saved, what nodes of the graph hold beside it (as DeepSpeed's checkpoints do), and
    the stage's inputs; not `module`'s parameters, buffers and gradients, and not the outputs unless the graph saved
    them too.
    """

    def __init__(self, module: nn.Module) -> None:
        self.whole: dict[int, int] = {}
        self.kept: dict[int, int] = {}
        # The most that was alive in each kind of pass, of what `whole` and `kept` count in part; and the inputs.
        self._most: dict[tuple[Kind, int], int] = {}
        self._inputs: dict[int, int] = {}
        self._module = module
        # By stage and micro-batch.
        self._left: dict[tuple[int, int], Storages] = {}
        self._alive = self._saved = Storages()

    @contextmanager
    def forward(self, work: Pass, inputs: Any) -> Iterator[None]:
        """Around an F; nothing else may run inside."""
        self._saved = Storages()

        def pack(tensor: Tensor) -> Tensor:
            self._saved.add([tensor])
            return tensor

        received = Storages(tree_leaves(inputs))
        self._inputs[work.stage] = received.nbytes()
        with saved_tensors_hooks(pack, _itself), self._watched(work, received):
            yield

    def after_forward(self, work: Pass, inputs: Any, outputs: Any) -> None:
        """When F has ended and its local variables are gone; `inputs` and `outputs` are a tensor or nested ones."""
        only_passed_on = Storages(tree_leaves(outputs)) - self._saved
        left = (self._alive | self._saved) - only_passed_on | Storages(tree_leaves(inputs))
        left -= _model(self._module)
        self._left[work.stage, work.micro_batch] = left
        self.whole[work.stage] = left.nbytes()

    @contextmanager
    def backward(self, work: Pass) -> Iterator[None]:
        """Around the B or BW of what was measured in F."""
        with self._watched(work, self._left.pop((work.stage, work.micro_batch))):
            yield

    def after_backward(self, work: Pass, store: WeightGradientStore) -> None:
        """When B has ended; `store` is what it leaves to W."""
        self.kept[work.stage] = (Storages(store.tensors()) - _model(self._module)).nbytes()

    @contextmanager
    def weights(self, work: Pass, store: WeightGradientStore) -> Iterator[None]:
        """Around W, which empties `store`."""
        with self._watched(work, Storages(store.tensors()) - _model(self._module)):
            yield

    @contextmanager
    def _watched(self, work: Pass, alive: Storages) -> Iterator[None]:
        apart = _model(self._module) | Storages(sums_so_far(self._module.parameters()))
        with _Watched(alive, apart) as watched:
            yield
        self._alive = watched.alive
        kind = work.kind, work.stage
        self._most[kind] = max(watched.most, self._most.get(kind, 0))

    def gather(self, placement: Placement, group: Any, device: torch.device) -> tuple[Activations, Working]:
        """The sizes of all stages, on every rank of the pipeline's `group` (collective).

        A stage whose B wasn't measured counts as one that keeps all until W, and its B as its BW, or the other way
        round. RuntimeError if one of its F wasn't.
        """
        own = torch.zeros(7, placement.stages, dtype=torch.int64)
        for stage, whole in self.whole.items():
            kept = self.kept.get(stage, whole)
            backward = [self._most.get((kind, stage), 0) for kind in (Kind.B, Kind.BW)]
            beside = (self._most.get((Kind.F, stage), 0) - whole, *((one or max(backward)) - whole for one in backward),
                      self._most.get((Kind.W, stage), 0) - kept)
            own[:, stage] = torch.tensor([whole, kept, *(max(size, 0) for size in beside), self._inputs[stage]])
        own = own.to(device)
        dist.all_reduce(own, group=group)
        rows = [tuple(map(float, of_stages)) for of_stages in own.tolist()]
        if 0 in rows[0]:
            raise RuntimeError(f"the activations of stage {rows[0].index(0)} haven't been measured")
        return Activations(*rows[:2]), Working(*rows[2:])


def _itself(tensor: Tensor) -> Tensor:
    return tensor


def predict_memory(engine: Any, schedule: Schedule, activations: Activations,
                   working: Working) -> tuple[RankMemory, ...]:
    """What each pipeline rank needs under `schedule`, on every rank of `engine`'s pipeline (collective).

    To be called after the first step: torch's optimizers make their moments in it.
    """
    own = torch.tensor([parameter_bytes(engine.module), gradient_bytes(engine.module, engine.optimizer),
                        optimizer_bytes(engine.module, engine.optimizer), engine.rollback_bytes()],
                       device=engine.device)
    every = [torch.empty_like(own) for _ in schedule.orders]
    dist.all_gather(every, own, group=engine.grid.get_pipe_parallel_group())
    programs = lower(schedule, Times.uniform(schedule.placement.stages))
    found = zip(torch.stack(every).tolist(), peaks(schedule, activations),
                working_peaks(programs, activations, working), strict=True)
    return tuple(RankMemory(parameters, gradients, optimizer, round(peak), round(highest - peak), rollback)
                 for (parameters, gradients, optimizer, rollback), peak, highest in found)


def parameter_bytes(module: nn.Module) -> int:
    """Parameters and buffers, and the flat memory that DeepSpeed's optimizers put them into."""
    return _model(module).nbytes()


def gradient_bytes(module: nn.Module, optimizer: Any) -> int:
    """What a batch accumulates: each parameter's gradient, and what the optimizer has beside it.

    With BF16_Optimizer, which accumulates in a place of its own, parameters whose gradients come from W alone don't
    use theirs; they are counted all the same.
    """
    trained = [parameter for parameter in module.parameters() if parameter.requires_grad]
    gradients = sum(parameter.nbytes for parameter in trained)
    if isinstance(optimizer, BF16_Optimizer):
        return gradients + Storages(optimizer.fp32_groups_gradients_flat).nbytes()
    if getattr(optimizer, "use_grad_accum_attribute", False):
        gradients += sum(parameter.numel() for parameter in trained) * optimizer.gradient_accumulation_dtype.itemsize
    return gradients


def optimizer_bytes(module: nn.Module, optimizer: Any) -> int:
    """What the torch optimizer inside `optimizer` has: the weights that it steps, where they aren't the module's own,
    and its state."""
    inner = getattr(optimizer, "optimizer", optimizer)
    stepped = [parameter for group in inner.param_groups for parameter in group["params"]]
    return (Storages([*stepped, *tree_leaves([*inner.state.values()])]) - _model(module)).nbytes()


def _model(module: nn.Module) -> Storages:
    return Storages([*module.parameters(), *module.buffers()])
