"""Mixtures of experts in DeepSpeed's MoE layer (moe/layer.py, utils/groups.py); checked with DeepSpeed 0.19.8.

The experts of a layer are divided among ep_size replicas of a stage, which exchange tokens. An expert's parameters
have `allreduce` False and a `group_name`, by which DeepSpeed finds two groups: the replicas with the other experts, and
those with the same ones, over which gradients are reduced.
"""

from __future__ import annotations

from typing import Any

from deepspeed.moe.layer import MoE
from deepspeed.moe.utils import is_moe_param
from deepspeed.runtime.utils import bwc_pipeline_parallel_world_size
from deepspeed.utils import groups
from torch import nn

__all__ = ["expert_parallel_sizes", "expert_peers", "is_moe_param", "make_expert_groups"]


def expert_parallel_sizes(module: nn.Module) -> list[int]:
    """The numbers of replicas among which the experts of the MoE layers in `module` are divided, each once."""
    return sorted({layer.ep_size for layer in module.modules() if isinstance(layer, MoE)})


def make_expert_groups(engine: Any, size: int) -> None:
    """Make the groups of MoE layers with this ep_size, unless they are there. Collective over all ranks: DeepSpeed
    makes them where the first such layer is, and other ranks, which have none, would be missed."""
    groups._create_expert_and_data_parallel(
        size, pp_size=bwc_pipeline_parallel_world_size(engine.mpu),
        use_data_before_expert_parallel_=engine._config.use_data_before_expert_parallel_)


def expert_peers(parameter: Any) -> Any:
    """The process group of the replicas that have the other experts, for a parameter of an expert."""
    return groups._get_expert_parallel_group(parameter.group_name)
