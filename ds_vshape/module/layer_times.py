"""How long each layer takes and what it leaves in memory, measured before the model is cut into stages.

One rank runs an example micro-batch through the layers, of which it holds one at a time, with the backward split as the
engine splits it, and tells all others what it measured. A model too large for one device is measured with the memory of
its largest layer.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from functools import partial
from statistics import median
from typing import Any

import torch
from deepspeed import comm as dist
from deepspeed.runtime.pipe.module import LayerSpec, TiedLayerSpec
from torch import Tensor, nn
from torch.autograd.graph import GradientEdge, get_gradient_edge, saved_tensors_hooks

from ds_vshape.comm.exchange import Exchange
from ds_vshape.comm.payload import Payload, members
from ds_vshape.measure.memory import Storages
from ds_vshape.measure.profiling import clock
from ds_vshape.runtime.buffers import enter, leaves
from ds_vshape.runtime.random_state import RandomState
from ds_vshape.schedule.partition.balance import PartitionError
from ds_vshape.split_backward import SplitBackward, SplitForward, WeightGradientStore, WholeGradients
from ds_vshape.split_backward.ownership import run_from

WARM_UPS, REPEATS = 2, 5


@dataclass(frozen=True)
class LayerTimes:
    """Of each layer for one micro-batch: seconds of F, B and W, and the bytes that F leaves until B and B until W."""

    forward: tuple[float, ...]
    input_grad: tuple[float, ...]
    weight_grad: tuple[float, ...]
    after_forward: tuple[float, ...]
    after_backward: tuple[float, ...]

    @property
    def backward(self) -> tuple[float, ...]:
        """Seconds of B and W together."""
        return tuple(map(sum, zip(self.input_grad, self.weight_grad)))

    @property
    def costs(self) -> tuple[float, ...]:
        """What each layer adds to the work of its rank."""
        return tuple(map(sum, zip(self.forward, self.backward)))


@dataclass(frozen=True)
class LayerProfiler:
    """The layers of a PipelineModule, not built yet, and what it takes to run them.

    `example` is a micro-batch as train_batch's iterator gives it: (inputs, labels), each a tensor or a tuple of
    tensors. With labels other than None and a `loss_fn` the loss counts to the last layer. `seed(layer)` is called
    before a layer is built. Floating point parameters are cast to `dtype` if there is one.
    """

    layers: Sequence[Any]
    example: Any
    loss_fn: Callable[..., Any] | None
    seed: Callable[[int], None]
    device: str
    dtype: torch.dtype | None

    def agree(self, measures: bool, exchange: Exchange) -> LayerTimes:
        """The times that rank 0 has measured, on every rank (collective over `exchange`, that of the job).

        `measures` says whether this rank runs the layers: rank 0 does, and all ranks with which its layers talk.
        Raises PartitionError on every rank if rank 0 can't run the layers.
        """
        times = torch.zeros(len(fields(LayerTimes)), len(self.layers), dtype=torch.float64)
        failure = ""
        if measures:
            try:
                times = torch.tensor(list(zip(*self._measure())), dtype=torch.float64)
            except Exception as error:
                failure = str(error) if isinstance(error, PartitionError) else f"{type(error).__name__}: {error}"
        said = exchange.text_of_first(failure)
        if said:
            raise PartitionError(f"the partition 'profile' can't be measured: {said}")
        times = times.to(self.device)
        dist.broadcast(times, src=0)
        return LayerTimes(*map(tuple, times.tolist()))

    def _measure(self) -> list[tuple[float, ...]]:
        if not isinstance(self.example, (tuple, list)) or len(self.example) != 2:
            raise PartitionError("it needs an example: PipelineModule(..., example=(inputs, labels)), a micro-batch as "
                                 "train_batch's iterator gives it")
        inputs, labels = (_on(self.device, part) for part in self.example)
        times = []
        with RandomState.kept(), torch.enable_grad():
            for layer, spec in enumerate(self.layers):
                self.seed(layer)
                last = layer == len(self.layers) - 1
                try:
                    module = self._build(spec)
                    call = module
                    if last and self.loss_fn is not None and labels is not None:
                        call = partial(_with_loss, module, self.loss_fn, labels)
                    times.append((*self._time(call, inputs), *_sizes(module, call, inputs)))
                    if not last:
                        inputs = leaves(module(enter(_copied(inputs))))
                except Exception as error:
                    name = getattr(spec, "typename", type(spec)).__name__
                    raise PartitionError(f"layer {layer} ({name}): {type(error).__name__}: {error}") from error
        return times

    def _build(self, spec: Any) -> Callable[[Any], Any]:
        """The layer as the stock module builds it; a module that the user has built is copied."""
        if isinstance(spec, LayerSpec):
            module = spec.build()
        elif isinstance(spec, nn.Module):
            module = copy.deepcopy(spec)
        else:
            return spec  # type: ignore[no-any-return]
        module = module.to(device=self.device)
        if self.dtype is not None:
            module = module.to(dtype=self.dtype)
        if isinstance(spec, TiedLayerSpec) and spec.forward_fn is not None:
            return partial(spec.forward_fn, module)
        return module  # type: ignore[no-any-return]

    @staticmethod
    def _time(call: Callable[[Any], Any], inputs: Payload) -> tuple[float, ...]:
        """Median seconds of F, B and W."""
        timer = clock()
        marks = []
        for _ in range(WARM_UPS + REPEATS):
            entered, store = enter(_copied(inputs)), WeightGradientStore()
            start = timer.now()
            with SplitForward(store):
                outputs = call(entered)
            middle = timer.now()
            roots, grads = _roots(outputs)
            resumed = timer.now()
            with SplitBackward(store):
                if roots:
                    run_from(roots, grads)
            end_of_b = timer.now()
            store.run(_NOWHERE)
            marks.append((start, middle, resumed, end_of_b, timer.now()))
            del entered, outputs, roots, grads
        passes = zip(*((timer.seconds(a, b), timer.seconds(c, d), timer.seconds(d, e))
                       for a, b, c, d, e in marks[WARM_UPS:]))
        return tuple(map(median, passes))


# Weight gradients of a measurement are of no use.
_NOWHERE = WholeGradients(lambda parameter, gradient: None)


def _roots(outputs: Any) -> tuple[tuple[GradientEdge, ...], tuple[Tensor, ...]]:
    """Where a backward starts, and with which gradients."""
    roots = [output for output in members(outputs) if torch.is_tensor(output) and output.requires_grad]
    return tuple(map(get_gradient_edge, roots)), tuple(map(torch.ones_like, roots))


def _sizes(module: Any, call: Callable[[Any], Any], inputs: Payload) -> tuple[int, int]:
    """Bytes of what F leaves, the inputs included, and of what B leaves."""
    # A tied layer is a function with its module as the first argument.
    owner = module.args[0] if isinstance(module, partial) else module
    weights = Storages([*owner.parameters(), *owner.buffers()] if isinstance(owner, nn.Module) else ())
    entered, store = enter(_copied(inputs)), WeightGradientStore()
    saved: list[Any] = [*members(entered)]

    def keep(tensor: Tensor) -> Tensor:
        # An output that its own node kept would keep itself alive.
        saved.append(tensor.detach())
        return saved[-1]  # type: ignore[no-any-return]

    with saved_tensors_hooks(keep, lambda tensor: tensor), SplitForward(store):
        outputs = call(entered)
    after_forward = (Storages(saved) - weights).nbytes()
    roots, grads = _roots(outputs)
    with SplitBackward(store):
        if roots:
            run_from(roots, grads)
    return after_forward, (Storages(store.tensors()) - weights).nbytes()


def precision(ds_config: Any) -> torch.dtype | None:
    """The dtype to which DeepSpeed's engine will cast the parameters; None if it leaves them."""
    if any((ds_config.get(key) or {}).get("enabled") is True for key in ("bf16", "bfloat16")):
        return torch.bfloat16
    return torch.float16 if (ds_config.get("fp16") or {}).get("enabled") is True else None


def _with_loss(module: Callable[[Any], Any], loss_fn: Callable[..., Any], labels: Any, inputs: Any) -> Any:
    return loss_fn(module(inputs), labels)


def _on(device: str, data: Any) -> Any:
    if isinstance(data, (tuple, list)):
        return tuple(_on(device, part) for part in data)
    return data.to(device) if torch.is_tensor(data) else data


def _copied(payload: Payload) -> Payload:
    """Leaves with memory of their own, which the layer may change."""
    copies = tuple(None if t is None else t.detach().clone().requires_grad_(t.requires_grad) for t in members(payload))
    return copies if isinstance(payload, tuple) else copies[0]  # type: ignore[return-value]
