"""Nothing in a checkpoint is executed: torch.load takes tensors, plain data and the classes named here.

DeepSpeed asks for anything at all in each of its calls (weights_only=False in runtime/checkpoint_engine,
runtime/base_optimizer.py and checkpoint/), and a pickle may run whatever its writer liked. torch has a variable in the
environment that counts more than the calls.
"""

from __future__ import annotations

import argparse
import os
import pickle
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from deepspeed.runtime.fp16.loss_scaler import DynamicLossScaler, LossScaler
from deepspeed.runtime.zero.config import ZeroStageEnum
from deepspeed.utils.tensor_fragment import fragment_address

from ds_vshape.checkpoints import CheckpointError

_FORCE, _TRUST = "TORCH_FORCE_WEIGHTS_ONLY_LOAD", "TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD"
# What DeepSpeed puts beside the tensors.
_OF_DEEPSPEED: list[Any] = [DynamicLossScaler, LossScaler, ZeroStageEnum, fragment_address]
# What users put into client_state: random states, options. The functions are those that make an array and a number.
_OF_USERS: list[Any] = [argparse.Namespace, np.ndarray, np.dtype, np.zeros(0).__reduce__()[0],
                        np.float64().__reduce__()[0], *{type(np.dtype(kind)) for kind in np.typecodes["All"]}]


@contextmanager
def weights_only() -> Iterator[None]:
    """While it lasts, torch.load refuses what could be executed, whatever its caller asks for.

    Raises CheckpointError for it, unless TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD=1 in the environment says to trust it.
    Classes that users have told torch.serialization.add_safe_globals are let in.
    """
    if os.environ.get(_TRUST, "0").lower() in ("1", "y", "yes", "true"):
        yield
        return
    before = os.environ.get(_FORCE)
    os.environ[_FORCE] = "1"
    try:
        with torch.serialization.safe_globals([*_OF_DEEPSPEED, *_OF_USERS]):
            yield
    except pickle.UnpicklingError as error:
        raise CheckpointError(f"a file of the checkpoint holds more than tensors and plain data: {_reason(error)}. If "
                              "you trust it: torch.serialization.add_safe_globals lets a class in, "
                              f"{_TRUST}=1 in the environment everything") from error
    finally:
        if before is None:
            del os.environ[_FORCE]
        else:
            os.environ[_FORCE] = before


def _reason(error: pickle.UnpicklingError) -> str:
    """What torch found, without its advice."""
    lines = [line.strip() for line in str(error).splitlines()]
    found = next((line for line in lines if "WeightsUnpickler error" in line or "GLOBAL" in line), lines[0])
    return (found.partition("WeightsUnpickler error: ")[2] or found).partition(". Please")[0].rstrip(".")
