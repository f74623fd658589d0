"""Optimizer states of another number of data parallel ranks: merged, and divided again.

With ZeRO-1 or BF16_Optimizer each replica has a part of every parameter group: one flat tensor of all its parameters,
with zeros after the last so that parts have one length, and the optimizer's states in the same order. DeepSpeed 0.19.8
(runtime/engine.py:_load_zero_checkpoint) refuses parts of another number of replicas.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ds_vshape.deepspeed_adapter.optimizers import CORE_STATE, MASTER_WEIGHTS, FlatGroup

# In the file of a replica.
OPTIMIZER_STATE = "optimizer_state_dict"


def redistribute(parts: Sequence[dict[str, Any]], groups: Sequence[FlatGroup], replica: int) -> dict[str, Any]:
    """The state of one `replica`, from those that all replicas have saved.

    Args:
        parts: what each replica's optimizer has saved, in the order of the replicas.
        groups: the parameter groups as they are now, in the optimizer's order.
    """
    first = parts[0]
    weights = [_part([part[MASTER_WEIGHTS][number] for part in parts], group, replica)
               for number, group in enumerate(groups)]
    states = {number: _state([part[CORE_STATE]["state"][number] for part in parts], groups[number], replica)
              for number in first[CORE_STATE]["state"]}
    return {**first, MASTER_WEIGHTS: weights,
            CORE_STATE: {**first[CORE_STATE], "state": states}}


def _state(parts: Sequence[dict[str, Any]], group: FlatGroup, replica: int) -> dict[str, Any]:
    """A group's: what has an entry for each number of the parameters is divided as they are, the rest is common."""
    return {name: _part([part[name] for part in parts], group, replica)
            if isinstance(value, Tensor) and value.dim() else value for name, value in parts[0].items()}


def _part(parts: Sequence[Tensor], group: FlatGroup, replica: int) -> Tensor:
    whole = torch.cat([part.flatten() for part in parts])[:group.numbers]
    own = whole[replica * group.part:(replica + 1) * group.part]
    return torch.cat([own, own.new_zeros(group.part - len(own))])
