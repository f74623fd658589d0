"""The sizes of activations before the first batch: the passes of a micro-batch on the meta device, with shapes alone.

Each rank runs F, B and W of its stages on copies of its layers without data, and tells the next one the shapes of its
outputs. The meter is the one of the second batch, so sizes are those that it will measure, as far as operators take on
the meta device what they take on the real one. Layers that can't run there (kernels without shapes, sizes that depend
on data, messages between tensor parallel ranks) leave the sizes unknown until that batch.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn import Parameter
from torch.utils._pytree import tree_map_only
from torch.utils.checkpoint import checkpoint

from ds_vshape.comm.exchange import Exchange
from ds_vshape.comm.payload import Payload, Signature, check_payload, members
from ds_vshape.measure.keeping import KeepingMeter
from ds_vshape.measure.memory import ActivationMeter
from ds_vshape.measure.passes_on_meta import run_on_meta
from ds_vshape.measure.rank_memory import Sizes
from ds_vshape.module.segment import parameters_of
from ds_vshape.runtime.buffers import enter, leaves
from ds_vshape.runtime.gradients import InGrad, accumulator_of, leave_to_backward
from ds_vshape.schedule.passes import Kind, Pass
from ds_vshape.schedule.placement import Placement
from ds_vshape.split_backward import GradientAccumulator, Operators

_META = torch.device("meta")
# DeepSpeed's own copies what it keeps to the device.
_checkpoint = partial(checkpoint, use_reentrant=False, preserve_rng_state=False)
_FAILED = "!"


@dataclass
class ShapeRehearsal:
    """The passes of this rank's stages with shapes alone.

    Args:
        module: a PipelineModule.
        autocast: gives what its layers run in.
        loss: from the last stage's outputs and the labels, with where early gradients go.
        held: whether the optimizer adds up a parameter's gradient.
        operators, fusion: of the split backward.
        keeping: gets the sizes that recomputation and offload would leave.
    """

    module: Any
    autocast: Callable[[], AbstractContextManager[None]]
    loss: Callable[[Any, Any, GradientAccumulator], Any]
    held: Callable[[Parameter], bool]
    operators: Operators
    fusion: bool
    keeping: KeepingMeter | None
    _meter: ActivationMeter = field(init=False)

    def sizes(self, inputs: Any, labels: Any, exchange: Exchange, pipeline: Sequence[int]) -> tuple[Sizes | None, str]:
        """The sizes of all stages on every rank (collective over the job), or None and why.

        `inputs` and `labels` are a micro-batch, None on ranks that don't need them; `pipeline` are the global ranks of
        this rank's.
        """
        placement: Placement = self.module.placement
        layers = nn.ModuleList()
        self._meter = ActivationMeter(layers, _META.type)
        self._meter.start()
        payload, failure = inputs, ""
        for stage in range(placement.stages):
            own = stage in placement.chunks[self.module.stage_id]
            text = ""
            if own:
                try:
                    if payload is None:
                        raise ValueError("there is no micro-batch yet")
                    outputs = self._run(stage, layers, payload, labels)
                    text = "" if outputs is None else " ".join(map(str, outputs.encode()))
                except Exception as error:
                    # Whatever somebody's layer does without data.
                    text = f"{_FAILED}stage {stage}: {type(error).__name__}: {str(error).partition(chr(10))[0]}"
            told = exchange.texts(text)
            failure = next((text[len(_FAILED):] for text in told if text.startswith(_FAILED)), "")
            if failure:
                self._meter.drop()
                return None, failure
            of_stage = told[pipeline[placement.rank_of(stage)]]
            payload = _received(of_stage) if of_stage else None
        self._meter.stop()
        unknown = self._meter.unknown
        sizes = self._meter.gather(placement, torch.device("cpu") if dist.get_backend() == "gloo" else
                                   torch.device("cuda"))
        if sizes is not None and self.keeping is not None:
            sizes = self.keeping.gather(sizes[0]), sizes[1]
        return sizes, unknown or ""

    def _run(self, stage: int, layers: nn.ModuleList, inputs: Payload, labels: Any) -> Signature | None:
        """All passes of a micro-batch with a split backward, and of one with a whole one; what the outputs are."""
        module = self.module
        chunk = module.chunks[module.placement.chunks[module.stage_id].index(stage)]
        last = stage == module.placement.last_stage
        funcs = _without_data(chunk.funcs)
        of_shapes = replace(chunk, funcs=funcs)
        layers.extend(func for func in funcs if isinstance(func, nn.Module))
        weights = list(parameters_of(funcs))
        place = InGrad(weight for weight, real in zip(weights, parameters_of(chunk.funcs), strict=True)
                       if self.held(real))
        leave_to_backward(weights, place)
        accumulator = accumulator_of(place, self.fusion)
        inputs, labels = (tree_map_only(Tensor, _shapes, of) for of in (inputs, labels))

        def forward(payload: Payload) -> Any:
            with self.autocast():
                outputs = module.run_layers(of_shapes, enter(payload), module.layer_starts, _checkpoint)
                module.layer_starts(of_shapes.stop)
            return self.loss(outputs, labels, accumulator) if last else outputs

        made: list[Payload] = []

        def make_inputs() -> Payload:
            made[:] = [leaves(inputs)]
            return made[0]

        def around(action: Pass) -> AbstractContextManager[Any]:
            if self.keeping is None or action.kind is not Kind.F:
                return nullcontext()
            return self.keeping.sizes(stage, members(made.pop()))

        outputs = run_on_meta(self._meter, stage, forward, make_inputs, weights, accumulator, self.operators, labels,
                              around)
        if last:
            return None
        check_payload(outputs, _META)
        return Signature.of(outputs)


def _received(text: str) -> Payload:
    """What a stage gets from the one whose outputs `text` describes."""
    signature = Signature.decode([*map(int, text.split())])
    tensors = tuple(None if tensor is None else
                    tensor.empty(_META).requires_grad_(tensor.requires_grad) for tensor in signature.tensors)
    return tensors if signature.is_tuple else tensors[0]  # type: ignore[return-value]


def _shapes(tensor: Tensor) -> Tensor:
    """A tensor of the same shape, without data."""
    return torch.empty_like(tensor, device=_META).requires_grad_(tensor.requires_grad)


def _without_data(funcs: Sequence[Any]) -> list[Any]:
    """Copies of layers whose parameters and buffers have shapes alone."""
    memo: dict[int, Any] = {}
    for func in funcs:
        for module in [func, *getattr(func, "args", ())]:
            for tensor in [*module.parameters(), *module.buffers()] if isinstance(module, nn.Module) else []:
                shapes = torch.empty_like(tensor, device=_META, requires_grad=False)
                memo[id(tensor)] = Parameter(shapes, tensor.requires_grad) if isinstance(tensor, Parameter) else shapes
    return [copy.deepcopy(func, memo) for func in funcs]
