"""What a rank trains that has no gradient of its own to count.

Torch's optimizers refuse an empty list of parameters, ZeRO fails on one that holds frozen parameters alone, and
BF16_Optimizer on a norm of no gradients. So a rank could not be trained with whose layers are all frozen, or, with
tensor parallel ones, an embedding and a head that another rank counts: in DeepSpeed's own engine neither. A parameter
of one zero, which no layer uses, stands in, and its gradient is zero.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from deepspeed.runtime.utils import bwc_tensor_model_parallel_rank, is_model_parallel_parameter
from torch import nn

from ds_vshape.split_backward import Delivery

# Its name in the module; layer files hold layers only, so that it is in none of them.
NAME = "stand_in"


def with_stand_in(module: Any, parameters: Iterable[Any] | None) -> list[Any]:
    """What deepspeed.initialize may take for `parameters` (a list, one of groups, or None for all of the module's).

    They come back as they are where one of them is trained and counts in the gradients' norm on this rank, else with a
    stand-in, which the module then has too.
    """
    given = [{**entry, "params": _listed(entry["params"])} if isinstance(entry, dict) else entry
             for entry in (module.parameters() if parameters is None else parameters)]
    everything = [parameter for entry in given
                  for parameter in (entry["params"] if isinstance(entry, dict) else [entry])]
    first = bwc_tensor_model_parallel_rank(module.mpu()) == 0
    trained = [parameter for parameter in everything if parameter.requires_grad]
    if any(not p.ds_pipe_replicated and (first or is_model_parallel_parameter(p)) for p in trained):
        return given
    stand_in: Any = nn.Parameter(torch.zeros(1))
    # It counts on every rank.
    stand_in.ds_pipe_replicated, stand_in.tensor_model_parallel = False, True
    module.register_parameter(NAME, stand_in)
    kept = given if trained else given[:1]
    if kept and isinstance(kept[0], dict):
        return [{**kept[0], "params": [*(kept[0]["params"] if trained else ()), stand_in]}, *kept[1:]]
    return [*(kept if trained else ()), stand_in]


def _listed(parameters: Any) -> list[Any]:
    """A group's parameters, which may be one tensor."""
    return [parameters] if torch.is_tensor(parameters) else list(parameters)


def give_gradient(module: nn.Module, delivery: Delivery) -> None:
    """The stand-in's gradient of a batch, if there is a stand-in."""
    stand_in = getattr(module, NAME, None)
    if stand_in is not None:
        delivery.add(stand_in, torch.zeros_like(stand_in))
