"""Checks the arguments of a PipelineModule before DeepSpeed uses them.

DeepSpeed checks them (runtime/pipe/module.py) one by one while it builds the module, or only in the first batch, and
its errors name neither the argument nor the legal values ("Invalid Grid", "integer modulo by zero").
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from deepspeed.pipe import LayerSpec
from deepspeed.runtime.pipe.module import PipelineError
from torch import nn

from ds_vshape.deepspeed_adapter.module import StockPipelineModule
from ds_vshape.schedule.partition.balance import PartitionError

Arguments = Mapping[str, Any]

_METHODS = ("uniform", "parameters", "profile")
_BY_TYPE = "type:"


def bound(layers: Any, *arguments: Any, **options: Any) -> Arguments:
    """The arguments by name. Raises TypeError for arguments that DeepSpeed's PipelineModule doesn't have."""
    return inspect.signature(StockPipelineModule).bind(layers, *arguments, **options).arguments


def check_arguments(arguments: Arguments, world: int) -> None:
    """Raise PipelineError, with the argument, its value and what is legal, if a job of `world` ranks can't build the
    module."""
    topology, stages = arguments.get("topology"), arguments.get("num_stages")
    if topology is not None:
        if topology.world_size() != world:
            axes = dict(zip(topology.axes, topology.dims))
            raise PipelineError(f"topology = {axes} has {topology.world_size()} ranks: the job has {world}")
    elif isinstance(stages, bool) or not isinstance(stages, int) or stages < 1 or world % stages:
        raise PipelineError(f"num_stages = {stages!r}: must be a number of pipeline ranks that divides the job's "
                            f"{world}, or topology must be given")
    interval = arguments.get("activation_checkpoint_interval", 0)
    if isinstance(interval, bool) or not isinstance(interval, int) or interval < 0:
        raise PipelineError(f"activation_checkpoint_interval = {interval!r}: must be a number of layers, or 0 for no "
                            "checkpoints")
    loss_fn = arguments.get("loss_fn")
    if loss_fn is not None and not callable(loss_fn):
        raise PipelineError(f"loss_fn = {loss_fn!r}: must be a function of (outputs, labels), or None where the last "
                            "layer gives the loss")
    _check_layers(arguments["layers"])


def _check_layers(layers: Any) -> None:
    if not isinstance(layers, Sequence) and not (isinstance(layers, nn.Module) and isinstance(layers, Iterable)):
        raise PipelineError(f"layers = {layers!r}: must be a list of layers")
    for number, layer in enumerate(layers):
        if not isinstance(layer, LayerSpec) and not callable(layer):
            raise PipelineError(f"layer {number} is {layer!r}: must be a LayerSpec, an nn.Module or a function")


def check_method(method: str) -> None:
    """Raise PartitionError for a `partition_method` that neither DeepSpeed nor this package supports."""
    name = method.lower()
    if name in _METHODS:
        return
    if not name.startswith(_BY_TYPE):
        raise PartitionError(f"the partition's method {method!r} isn't known: must be {', '.join(_METHODS)}, or "
                             f"{_BY_TYPE} and a regular expression for the layers' classes")
    try:
        re.compile(method.split(":")[1])
    except re.error as error:
        raise PartitionError(f"the partition's method {method!r} isn't a valid regular expression: {error}") from None
