"""What a layer costs, found on the meta device, where it runs with shapes and without data.

    parameters    of the module
    FLOPs         of the products that F, B and W make, as torch counts them (torch/utils/flop_counter.py)
    bytes         that F leaves for the backward and B leaves to W, and that passes need while they run, as
                  memory.py counts them in an engine

Attention is taken to be fused (on_meta.py).
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map
from torch.utils.flop_counter import flop_registry

from ds_vshape.comm.payload import Payload
from ds_vshape.measure.memory import ActivationMeter
from ds_vshape.measure.on_meta import GROUPED_MM
from ds_vshape.measure.passes_on_meta import run_on_meta
from ds_vshape.runtime.gradients import InGrad
from ds_vshape.schedule.passes import Kind, Pass
from ds_vshape.split_backward.autocast import autocast_of

# A device, and the dtype of autocast there.
Autocast = tuple[str, torch.dtype]


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


def measure_layer(layer: nn.Module, call: Callable[[Any], Any], inputs: Payload, autocast: Autocast | None = None,
                  loss: Callable[[Any], Any] | None = None) -> tuple[MeasuredCosts, Any]:
    """The costs of a layer, whose forward is `call`, under `autocast` if there is one, and then the `loss` of the last
    one; and outputs that may be the next layer's inputs. All are on the meta device.

    Raises ValueError for a layer that can't be measured there.
    """
    def forward(entered: Any) -> Any:
        context: AbstractContextManager[None] = nullcontext() if autocast is None else autocast_of(*autocast)
        with context:
            outputs = call(entered)
        return outputs if loss is None else loss(outputs)

    counter, meter = _Counter(), ActivationMeter(layer, "meta")
    meter.start()
    passed_on = run_on_meta(meter, 0, forward, partial(_inputs, inputs), [*layer.parameters()], InGrad(),
                            around=counter.counting, attention_flops=counter.add_flops)
    meter.stop()
    if meter.unknown is not None:
        raise ValueError(meter.unknown)
    f, b, w = (counter.of(kind) for kind in (Kind.F, Kind.B, Kind.W))
    parameters = sum(parameter.numel() for parameter in layer.parameters())
    sizes = meter.of_stage(0)
    return MeasuredCosts(parameters, (f.flops, b.flops, w.flops), sizes.after_forward, sizes.after_backward,
                         sizes.working, f.sums, b.sums), _inputs(passed_on)


def _inputs(given: Any) -> Any:
    """A micro-batch's, which require gradients where they can."""
    return tree_map(lambda tensor: tensor.detach().clone().requires_grad_(tensor.is_floating_point()), given)


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
