"""What a rank trains whose own layers are all frozen.

Torch's optimizers refuse an empty list of parameters, DeepSpeed's fail on one that holds frozen parameters alone, and
on gradients of which there are none; so a first stage that is frozen as a whole could not be trained with, here or in
DeepSpeed's own engine. A parameter of one zero, which no layer uses, stands in, and its gradient is zero.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import nn

from ds_vshape.split_backward import Delivery

# Its name in the module; layer files hold layers only, so that it is in none of them.
NAME = "nothing_to_train"


def with_stand_in(module: nn.Module, parameters: Iterable[Any] | None) -> list[Any]:
    """What deepspeed.initialize may take for `parameters` (a list, one of groups, or None for all of the module's).

    They come back as they are where one of them is trained, else with a stand-in, which the module then has too.
    """
    given = list(module.parameters() if parameters is None else parameters)
    groups = [entry["params"] if isinstance(entry, dict) else [entry] for entry in given]
    if any(parameter.requires_grad for group in groups for parameter in group):
        return given
    stand_in: Any = nn.Parameter(torch.zeros(1))
    # A norm counts it on every rank: one without any gradient to count would fail.
    stand_in.ds_pipe_replicated, stand_in.tensor_model_parallel = False, True
    module.register_parameter(NAME, stand_in)
    return [{"params": [stand_in]}] if any(isinstance(entry, dict) for entry in given) else [stand_in]


def give_gradient(module: nn.Module, delivery: Delivery) -> None:
    """The stand-in's gradient of a batch, if there is a stand-in."""
    stand_in = getattr(module, NAME, None)
    if stand_in is not None:
        delivery.add(stand_in, torch.zeros_like(stand_in))
