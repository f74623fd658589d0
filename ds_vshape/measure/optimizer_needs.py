"""What an optimizer's step makes, found on the meta device: the step runs there, with shapes and without data."""

from __future__ import annotations

from collections import OrderedDict, defaultdict
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import Parameter
from torch.utils._pytree import tree_leaves

from ds_vshape.measure.allocations import AllocationWatcher

# Optimizers of kernels that have no shapes on the meta device, by their names: how many tensors of a weight's size they
# keep. They make none besides.
_MOMENTS = {"FusedAdam": 2, "DeepSpeedCPUAdam": 2, "FusedLamb": 2, "FusedLion": 1, "DeepSpeedCPULion": 1,
            "DeepSpeedCPUAdagrad": 1}


@dataclass(frozen=True)
class StepNeeds:
    """Bytes of the state that a step makes for the weights, and of what it has only while it runs; None if unknown."""

    state: int | None
    temporary: int | None


def step_needs(optimizer: Any) -> StepNeeds:
    """Of one of torch's optimizers or one like that, whether it has stepped or not; the largest parameter group's
    temporary memory, since ZeRO steps one after another."""
    groups = [group for group in optimizer.param_groups if group["params"]]
    moments = _MOMENTS.get(type(optimizer).__name__)
    if moments is not None:
        return StepNeeds(moments * sum(weight.nbytes for group in groups for weight in group["params"]), 0)
    try:
        found = [_step_of(optimizer, group) for group in groups]
    except Exception:
        # Whatever the step of somebody's optimizer does with tensors that have no data.
        return StepNeeds(None, None)
    return StepNeeds(sum(state for state, _ in found), max((temporary for _, temporary in found), default=0))


def _step_of(optimizer: Any, group: dict[str, Any]) -> tuple[int, int]:
    """Bytes of state and of temporary memory of a group."""
    weights = []
    for weight in group["params"]:
        shapes = Parameter(torch.empty_like(weight, device="meta"))
        shapes.grad = torch.empty_like(shapes, requires_grad=False)
        weights.append(shapes)
    options = dict(group, params=weights)
    if options.get("fused"):
        options["fused"] = False
    elif "foreach" in options and options["foreach"] is None:
        # torch's own choice goes by the device.
        options["foreach"] = group["params"][0].device.type == "cuda"
    same: Any = object.__new__(type(optimizer))
    vars(same).update({name: OrderedDict() if name.endswith("_hooks") else value
                       for name, value in vars(optimizer).items() if name != "step"})
    same.param_groups, same.state = [options], defaultdict(dict)
    type(optimizer).step(same)
    watcher = AllocationWatcher("meta")
    watcher.start()
    with watcher.span():
        type(optimizer).step(same)
    now = most = 0
    for change in watcher.stop().changes:
        now += change.size
        most = max(most, now)
    state = sum(value.nbytes for value in tree_leaves([*same.state.values()]) if isinstance(value, Tensor))
    return state, 0 if group.get("fused") else most
