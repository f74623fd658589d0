"""What DeepSpeed's checkpoints contain besides tensors, and the functions that write them.

Checked with DeepSpeed 0.19.8 (runtime/fp16/loss_scaler.py, runtime/zero/config.py, utils/tensor_fragment.py,
checkpoint/utils.py).
"""

from __future__ import annotations

from typing import Any

from deepspeed.checkpoint.utils import clone_tensors_for_torch_save
from deepspeed.runtime.fp16.loss_scaler import DynamicLossScaler, LossScaler
from deepspeed.runtime.zero.config import ZeroStageEnum
from deepspeed.utils.tensor_fragment import fragment_address

__all__ = ["SAVED_CLASSES", "clone_tensors_for_torch_save"]

# Of which objects are in the files.
SAVED_CLASSES: list[Any] = [DynamicLossScaler, LossScaler, ZeroStageEnum, fragment_address]
