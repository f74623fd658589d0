"""Layers that run together between two activation checkpoints.

DeepSpeed's own implementation (PipelineModule.forward in runtime/pipe/module.py) silently gets two things wrong:

    seeds      a checkpointed layer is seeded by its position in its segment, so dropout depends on the partition and on
               the interval. Here a layer is seeded by its position in the model.
    training   under a reentrant checkpoint autograd records nothing if no input requires a gradient, so a segment that
               starts with an embedding, or follows a frozen one, isn't trained. Here it gets an additional empty input
               that requires a gradient.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from ds_vshape.deepspeed_adapter.checkpointing import non_reentrant_checkpoint

# As in DeepSpeed: called with the function to be recomputed, and its inputs.
Checkpoint = Callable[..., Any]


@dataclass(slots=True)
class Segment:
    """Layers `first`, `first` + 1, ... of the model; `before_layer` gets the number of each before it runs."""

    layers: Sequence[Callable[[Any], Any]]
    first: int
    before_layer: Callable[[int], None]

    def run(self, inputs: Any) -> Any:
        """The outputs of the last layer; `inputs` are a tensor or a tuple, as the first layer takes them."""
        for number, layer in enumerate(self.layers, self.first):
            self.before_layer(number)
            inputs = layer(inputs)
        return inputs

    def run_checkpointed(self, checkpoint: Checkpoint, inputs: Any) -> Any:
        """As `run`, keeping only the inputs for the backward, which runs the layers again."""
        is_tuple, gave = isinstance(inputs, tuple), object
        parts = inputs if isinstance(inputs, tuple) else (inputs,)
        count = len(parts)

        def again(*parts: Any) -> Any:
            nonlocal gave
            outputs = self.run(parts[:count] if is_tuple else parts[0])
            gave = type(outputs)
            return outputs

        witness = (torch.empty(0, requires_grad=True),) if self._needs_a_witness(checkpoint, parts) else ()
        outputs = checkpoint(again, *parts, *witness)
        if not issubclass(gave, tuple):
            return outputs
        # DeepSpeed's gives back a tuple of one as its member, and other functions a plain tuple for a named one.
        members = outputs if isinstance(outputs, tuple) else (outputs,)
        return gave(*members) if hasattr(gave, "_fields") else members

    def _needs_a_witness(self, checkpoint: Checkpoint, inputs: tuple[Any, ...]) -> bool:
        """Whether parameters are to be trained that no gradient of an input leads to."""
        wanted = any(isinstance(tensor, Tensor) and tensor.requires_grad for tensor in inputs)
        return (not wanted and checkpoint is not non_reentrant_checkpoint and torch.is_grad_enabled()
                and any(parameter.requires_grad for parameter in parameters_of(self.layers)))


def modules_of(layers: Iterable[Any]) -> Iterator[nn.Module]:
    """The modules among layers as a PipelineModule has them: modules, functions, tied modules with a function."""
    for layer in layers:
        # A tied layer with a function of its own is a partial of that and the module.
        yield from (part for part in (layer.args if isinstance(layer, partial) else (layer,))
                    if isinstance(part, nn.Module))


def parameters_of(layers: Iterable[Any]) -> Iterator[nn.Parameter]:
    """The parameters of such layers."""
    for module in modules_of(layers):
        yield from module.parameters()
