"""What each layer of a Hugging Face model costs, found on the meta device: its modules run there, with shapes and
without data.

    parameters    of the module
    FLOPs         of the products that F, B and W make, as torch counts them (torch/utils/flop_counter.py)
    bytes         that F leaves for the backward and B leaves to W, and that passes need while they run, as
                  measure/memory.py counts them in an engine

Attention is taken to be fused (measure/on_meta.py).
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map
from torch.utils.flop_counter import flop_registry

from ds_vshape.deepspeed_adapter.silent_group import silent_group
from ds_vshape.measure.memory import ActivationMeter
from ds_vshape.measure.on_meta import GROUPED_MM
from ds_vshape.measure.passes_on_meta import run_on_meta
from ds_vshape.models.hugging_face.layer_list import next_token_loss, pipeline_layers
from ds_vshape.models.hugging_face.layers import DecoderLayer
from ds_vshape.models.hugging_face.shared import Flow, Shared
from ds_vshape.models.hugging_face.tensor_parallel import TensorParallelLoss
from ds_vshape.runtime.gradients import InGrad
from ds_vshape.schedule.passes import Kind, Pass


class Sums(NamedTuple):
    """All-reduces over tensor parallel ranks: how many, and the bytes of all of them."""

    number: int = 0
    nbytes: int = 0


@dataclass(frozen=True)
class MeasuredCosts:
    """The costs of one layer, for one micro-batch.

    Attributes:
        parameters: their number; no costs of a micro-batch.
        flops: of F, B and W.
        after_forward: bytes that F leaves for the backward, the layer's inputs included.
        after_backward: bytes that B leaves to W.
        working: bytes that F, B, a whole backward and W need besides what is left before or after them.
        sums_in_f, sums_in_b: of these passes.
    """

    parameters: int
    flops: tuple[int, int, int]
    after_forward: int
    after_backward: int
    working: tuple[int, int, int, int]
    sums_in_f: Sums = Sums()
    sums_in_b: Sums = Sums()


def layer_costs(config: Any, samples: int, length: int, dtype: torch.dtype,
                tensor: int = 1) -> tuple[MeasuredCosts, ...]:
    """The costs of each of pipeline_layers(config), for micro-batches of `samples` x `length` tokens without masks; the
    loss is part of the last layer. With `tensor` ranks that share each layer, the costs of the first of them.

    Raises:
        ValueError: as pipeline_layers.
    """
    with nullcontext() if tensor == 1 else silent_group(tensor) as group:
        return _costs_of(config, samples, length, dtype, group)


def _costs_of(config: Any, samples: int, length: int, dtype: torch.dtype, group: Any) -> tuple[MeasuredCosts, ...]:
    specs = pipeline_layers(config, tensor_group=group)
    loss_fn = next_token_loss if group is None else TensorParallelLoss(group)
    shared: Shared = specs[0].module_args[0]
    shared.planned.on_meta = True
    labels = torch.zeros(samples, length, dtype=torch.long, device="meta")
    flow: Flow = labels.clone()
    kinds = getattr(shared.planned.config, "layer_types", None)
    found, measured = [], {}
    for place, spec in enumerate(specs):
        layer = spec.build().to(dtype)
        call = layer if not getattr(spec, "forward_fn", None) else partial(spec.forward_fn, layer)
        if place == len(specs) - 1:
            call = partial(_with_loss, call, loss_fn, labels)
        # Equal layers are measured once.
        kind = kinds[layer.index] if isinstance(layer, DecoderLayer) and kinds else place == 0
        key = repr(layer), kind, tuple((tensor.shape, tensor.dtype) for tensor in tree_leaves(flow))
        if key not in measured:
            measured[key] = _measure(layer, call, flow)
        costs, flow = measured[key]
        found.append(costs)
    return tuple(found)


def _with_loss(call: Callable[[Flow], Flow], loss_fn: Callable[[Flow, Tensor], Flow], labels: Tensor,
               flow: Flow) -> Flow:
    return loss_fn(call(flow), labels)


def _measure(layer: nn.Module, call: Callable[[Flow], Any], flow: Flow) -> tuple[MeasuredCosts, Flow]:
    """The costs of a layer, and its outputs."""
    counter, meter = _Counter(), ActivationMeter(layer, "meta")
    meter.start()
    passed_on = run_on_meta(meter, 0, call, partial(_inputs, flow), [*layer.parameters()], InGrad(),
                            around=counter.counting, attention_flops=counter.add_flops)
    meter.stop()
    if meter.unknown is not None:
        raise ValueError(meter.unknown)
    f, b, w = (counter.of(kind) for kind in (Kind.F, Kind.B, Kind.W))
    parameters = sum(parameter.numel() for parameter in layer.parameters())
    sizes = meter.of_stage(0)
    return MeasuredCosts(parameters, (f.flops, b.flops, w.flops), sizes.after_forward, sizes.after_backward,
                         sizes.working, f.sums, b.sums), _inputs(passed_on)


def _inputs(flow: Flow) -> Flow:
    """A micro-batch's, which require gradients where they can."""
    inputs: Flow = tree_map(lambda tensor: tensor.detach().clone().requires_grad_(tensor.is_floating_point()), flow)
    return inputs


@dataclass
class _Counts:
    flops: int = 0
    sums: Sums = Sums()


class _Counter(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Adds up FLOPs, and sums over ranks, of each pass."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._of_passes: dict[Pass, _Counts] = {}
        self._now = _Counts()

    def counting(self, action: Pass) -> _Counter:
        """To be entered around a pass."""
        self._now = self._of_passes[action] = _Counts()
        return self

    def of(self, kind: Kind) -> _Counts:
        """The counts of the first pass of a kind."""
        return next(counts for action, counts in self._of_passes.items() if action.kind is kind)

    def add_flops(self, flops: int) -> None:
        """Those of what torch's counter doesn't know."""
        self._now.flops += flops

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if func.namespace == "c10d":
            nbytes = sum(tensor.nbytes for tensor in tree_leaves(args[0]))
            self._now.sums = Sums(self._now.sums.number + 1, self._now.sums.nbytes + nbytes)
        # W adds products to its sums in place.
        packet = getattr(torch.ops.aten, str(func._overloadpacket).rpartition(".")[2].rstrip("_"), None)
        count = flop_registry.get(func._overloadpacket) or flop_registry.get(packet)
        if func is GROUPED_MM:  # a row of one is multiplied with one matrix of the other
            self._now.flops += 2 * args[0].shape[-2] * args[0].shape[-1] * args[1].shape[-1]
        elif count is not None:
            self._now.flops += count(*args, **(kwargs or {}), out_val=result)
        return result
