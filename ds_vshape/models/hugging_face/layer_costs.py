"""What each layer of a Hugging Face model costs (measure/layer_costs.py): its modules run on the meta device."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

from ds_vshape.deepspeed_adapter.silent_group import silent_group
from ds_vshape.measure.layer_costs import Autocast, MeasuredCosts, measure_layer
from ds_vshape.models.hugging_face.layer_list import next_token_loss, pipeline_layers
from ds_vshape.models.hugging_face.layers import DecoderLayer
from ds_vshape.models.hugging_face.shared import Flow, Shared
from ds_vshape.models.hugging_face.tensor_parallel import TensorParallelLoss


def layer_costs(config: Any, samples: int, length: int, dtype: torch.dtype, tensor: int = 1,
                autocast: Autocast | None = None) -> tuple[MeasuredCosts, ...]:
    """The costs of each of pipeline_layers(config), for micro-batches of `samples` x `length` tokens without masks; the
    loss is part of the last layer. With `tensor` ranks that share each layer, the costs of the first of them.

    Raises:
        ValueError: as pipeline_layers.
    """
    with nullcontext() if tensor == 1 else silent_group(tensor) as group:
        return _costs_of(config, samples, length, dtype, group, autocast)


def _costs_of(config: Any, samples: int, length: int, dtype: torch.dtype, group: Any,
              autocast: Autocast | None) -> tuple[MeasuredCosts, ...]:
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
        # Equal layers are measured once.
        kind = kinds[layer.index] if isinstance(layer, DecoderLayer) and kinds else place == 0
        key = repr(layer), kind, tuple((tensor.shape, tensor.dtype) for tensor in tree_leaves(flow))
        if key not in measured:
            loss = partial(_loss_of, loss_fn, labels) if place == len(specs) - 1 else None
            measured[key] = measure_layer(layer, call, flow, autocast, loss)
        costs, flow = measured[key]
        found.append(costs)
    return tuple(found)


def _loss_of(loss_fn: Callable[[Flow, Tensor], Flow], labels: Tensor, outputs: Flow) -> Flow:
    return loss_fn(outputs, labels)
