"""A dummy parameter for ranks that have nothing to train.

Torch's optimizers refuse an empty list of parameters, ZeRO fails if all its parameters are frozen, and BF16_Optimizer
fails on the norm of no gradients. DeepSpeed's own engine therefore can't train a model that leaves a rank with frozen
layers only, or a second tensor parallel rank with only weights that the first one counts in the norm. Such a rank gets
one additional parameter, a single zero, which no layer uses and whose gradient is zero.

The layer files of checkpoints don't contain it. If one tensor parallel rank has one, all do, because DeepSpeed's
universal conversion (checkpoint/ds_to_universal.py) joins the slices of each parameter over them. It isn't loaded from
universal checkpoints, because one of DeepSpeed's own engine, or of another number of ranks, may not contain it.
"""

from __future__ import annotations

from collections.abc import Iterable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ds_vshape.deepspeed_adapter.optimizers import UNIVERSAL_WEIGHT, load_universal_by, mapping_of
from ds_vshape.deepspeed_adapter.utils import is_first_tensor_rank, is_model_parallel_parameter, is_pipe_replicated
from ds_vshape.split_backward import GradientAccumulator

# Its name in the module, unchanged for older checkpoints. Layer files hold layers only, so that it is in none of them.
NAME = "stand_in"


def with_dummy(module: Any, parameters: Iterable[Any] | None) -> list[Any]:
    """The parameters to pass to deepspeed.initialize: `parameters`, with a dummy parameter if this rank needs one.

    A rank needs one unless each of the ranks that share its layers trains a parameter that counts in the norm of the
    gradients. The dummy parameter is registered in `module`. Collective over tensor parallel ranks.

    Args:
        parameters: a list of parameters, or of groups; None for all parameters of `module`.
    """
    given = [{**entry, "params": _listed(entry["params"])} if isinstance(entry, dict) else entry
             for entry in (module.parameters() if parameters is None else parameters)]
    everything = [parameter for entry in given
                  for parameter in (entry["params"] if isinstance(entry, dict) else [entry])]
    trained = [parameter for parameter in everything if parameter.requires_grad]
    dummy = getattr(module, NAME, None)
    if _is_wanted(module, trained) and dummy is None:
        dummy = _registered(module)
    if dummy is None or any(parameter is dummy for parameter in everything):
        return given
    kept = given if trained else given[:1]
    if kept and isinstance(kept[0], dict):
        return [{**kept[0], "params": [*(kept[0]["params"] if trained else ()), dummy]}, *kept[1:]]
    return [*(kept if trained else ()), dummy]


def _registered(module: nn.Module) -> nn.Parameter:
    """A new dummy parameter, registered in `module`."""
    like = next((parameter for parameter in module.parameters() if parameter.is_floating_point()), torch.zeros(()))
    dummy: Any = nn.Parameter(torch.zeros(1, dtype=like.dtype, device=like.device))
    # It counts in the norm on every rank.
    dummy.ds_pipe_replicated, dummy.tensor_model_parallel = False, True
    module.register_parameter(NAME, dummy)
    return dummy  # type: ignore[no-any-return]


def _is_wanted(module: Any, trained: Iterable[Any]) -> bool:
    """Whether some rank that shares this one's layers trains nothing that counts in the norm."""
    first = is_first_tensor_rank(module.mpu())
    wanted = not any(not is_pipe_replicated(p) and (first or is_model_parallel_parameter(p)) for p in trained)
    groups = module.topology().get_axis_comm_lists("model")
    if not groups:
        return wanted
    of_ranks = [fact["wanted"] for fact in module.preflight.gather({"wanted": wanted})]
    return any(of_ranks[rank] for ranks in groups if module.global_rank in ranks for rank in ranks)


def add_dummy(optimizer: Any, module: nn.Module) -> None:
    """Add a dummy parameter to an optimizer that the script has made, if this rank needs one."""
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    *_, last = with_dummy(module, parameters)
    if not any(last is parameter for parameter in parameters):
        optimizer.param_groups[0]["params"].append(last)


def keep_from_universal(module: Any) -> None:
    """Leave the dummy parameter, if there is one, unchanged when a universal checkpoint is loaded.

    To be called after its optimizer has been made.
    """
    dummy: Any = getattr(module, NAME, None)
    if dummy is not None:
        load_universal_by(dummy, partial(_stay_zero, dummy))


def _stay_zero(dummy: Any, folder: str, *ranks: Any, **of_experts: Any) -> Any:
    """Replaces DeepSpeed's method: gives the dummy parameter the optimizer states of other parameters, filled with
    zeros, and returns their step."""
    mapping, step = mapping_of(dummy), None
    mapping.optim_fragment = {}
    for path in _files_of_a_parameter(Path(folder).parent):
        if path.stem == "step":
            step = torch.load(path, weights_only=True)
        elif path.stem != UNIVERSAL_WEIGHT:
            mapping.optim_fragment[path.stem] = torch.zeros_like(mapping.get_hp_fragment())
    return step


def _files_of_a_parameter(folder: Path) -> list[Path]:
    return next((sorted(path.parent.glob("*.pt")) for path in sorted(folder.rglob(f"{UNIVERSAL_WEIGHT}.pt"))
                 if path.parent.name != NAME), [])


def _listed(parameters: Any) -> list[Any]:
    """A group's parameters, which may be one tensor."""
    return [parameters] if torch.is_tensor(parameters) else list(parameters)


def give_gradient(module: nn.Module, accumulator: GradientAccumulator) -> None:
    """Add the dummy parameter's zero gradient of a batch, if there is one."""
    dummy = getattr(module, NAME, None)
    if dummy is not None:
        accumulator.add(dummy, torch.zeros_like(dummy))
