"""What DeepSpeed's checkpoints contain besides tensors, and the functions that write them.

Checked with DeepSpeed 0.19.8 (runtime/engine.py, runtime/fp16/loss_scaler.py, runtime/zero/config.py,
utils/tensor_fragment.py, checkpoint/utils.py).
"""

from __future__ import annotations

from typing import Any

from deepspeed.checkpoint.constants import CHECKPOINT_PARALLEL_DIMS, FOLDING_METADATA_KEY
from deepspeed.checkpoint.utils import clone_tensors_for_torch_save
from deepspeed.runtime.fp16.loss_scaler import DynamicLossScaler, LossScaler
from deepspeed.runtime.zero.config import ZeroStageEnum
from deepspeed.utils.tensor_fragment import fragment_address

__all__ = ["SAVED_CLASSES", "STATE_KEYS", "clone_tensors_for_torch_save"]

# Of which objects are in the files.
SAVED_CLASSES: list[Any] = [DynamicLossScaler, LossScaler, ZeroStageEnum, fragment_address]

# Keys of the engine's state in a rank's file, and those that are reserved there (_common_checkpoint_state,
# _save_moe_checkpoint). Not universal_checkpoint_info, which Megatron-DeepSpeed's scripts give.
STATE_KEYS = frozenset((
    "module", "buffer_names", "optimizer", "param_shapes", "frozen_param_shapes", "shared_params",
    "frozen_param_fragments", "lr_scheduler", "data_sampler", "random_ltd", "skipped_steps", "global_steps",
    "global_samples", "dp_world_size", "mp_world_size", CHECKPOINT_PARALLEL_DIMS, "ds_config", "ds_version",
    "num_experts", "ds_autoep_layers", "autoep_layers", FOLDING_METADATA_KEY))
