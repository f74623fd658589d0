"""All passes of a stage or a layer with shapes alone, metered as in training."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import get_gradient_edge
from torch.nn import Parameter
from torch.utils._pytree import tree_leaves, tree_map_only

from ds_vshape.measure.memory import ActivationMeter
from ds_vshape.measure.on_meta import on_meta
from ds_vshape.schedule.passes import BW, B, F, Pass, W
from ds_vshape.split_backward import (MATRIX_OPERATORS, GradientAccumulator, Operators, SplitBackward, SplitForward,
                                      WeightGradientStore)
from ds_vshape.split_backward.ownership import run_from


def run_on_meta(meter: ActivationMeter, stage: int, forward: Callable[[Any], Any], make_inputs: Callable[[], Any],
                weights: list[Parameter], accumulator: GradientAccumulator, operators: Operators = MATRIX_OPERATORS,
                labels: Any = None,
                around: Callable[[Pass], AbstractContextManager[Any]] = lambda action: nullcontext(),
                attention_flops: Callable[[int], None] = lambda flops: None) -> Any:
    """Run F, B and W of a micro-batch, and F and BW of another; gives tensors like the outputs.

    Args:
        meter: one for the meta device, which has been started.
        forward: the stage, with the loss if it is the last one.
        make_inputs: makes inputs of a micro-batch, on the meta device.
        weights: those of the stage; they get gradients, to which the passes add.
        around: what each pass runs in besides, such as a counter.
    """
    with on_meta(), torch.no_grad():
        forward(make_inputs())  # makes what stays, as masks
    for weight in weights:
        if weight.requires_grad:
            weight.grad = torch.empty_like(weight, requires_grad=False)
    for micro_batch, split in enumerate((True, False)):
        store, inputs = WeightGradientStore(), make_inputs()
        action = F(stage, micro_batch)
        with on_meta(attention_flops), meter.forward(action, inputs, labels), around(action), (
                SplitForward(store, operators) if split else nullcontext()):
            outputs = forward(inputs)
        # In memory of their own, which no pass has.
        passed_on = tree_map_only(Tensor, _alike, outputs)
        roots = [output for output in tree_leaves(outputs) if isinstance(output, Tensor) and output.requires_grad]
        edges, gradients = tuple(map(get_gradient_edge, roots)), tuple(map(torch.empty_like, roots))
        del outputs, roots
        action = (B if split else BW)(stage, micro_batch)
        with on_meta(attention_flops), meter.backward(action), around(action), (
                SplitBackward(store, operators) if split else nullcontext()):
            run_from(edges, gradients)
        del edges, gradients
        if split:
            meter.after_backward(action, store)
            action = W(stage, micro_batch)
            with on_meta(), meter.weights(action, store), around(action):
                store.run(accumulator)
    return passed_on


def _alike(tensor: Tensor) -> Tensor:
    return torch.empty_like(tensor, requires_grad=tensor.requires_grad)
