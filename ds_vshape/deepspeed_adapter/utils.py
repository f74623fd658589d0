"""Small functions of DeepSpeed's; checked with DeepSpeed 0.19.8 (runtime/utils.py, runtime/config.py)."""

from __future__ import annotations

from typing import Any

from deepspeed.runtime.config import DtypeEnum
from deepspeed.runtime.constants import PIPE_REPLICATED
from deepspeed.runtime.utils import bwc_tensor_model_parallel_rank, is_model_parallel_parameter, set_random_seed

__all__ = ["dtype_name", "is_first_tensor_rank", "is_model_parallel_parameter", "is_pipe_replicated",
           "set_random_seed"]


def is_first_tensor_rank(mpu: Any) -> bool:
    """Whether this rank counts the weights that tensor parallel ranks share."""
    return bool(bwc_tensor_model_parallel_rank(mpu) == 0)


def is_pipe_replicated(parameter: Any) -> bool:
    """Whether another pipeline rank counts it. PipelineModule marks the parameters that it has when it's made; a script
    may add others."""
    return bool(getattr(parameter, PIPE_REPLICATED, False))


def dtype_name(asked: Any) -> str | None:
    """The name that DeepSpeed calls a dtype by, of any of its names; None for what is no dtype."""
    name: str | None = next((dtype.name for dtype in DtypeEnum if asked in dtype._all_values), None)
    return name
