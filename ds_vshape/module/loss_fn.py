"""Saves the weights of a loss function that is a module, in a separate file of the checkpoint.

DeepSpeed's PipelineModule has them on every rank, trains them on the rank that computes the loss, and saves and loads
only layers. Its loading and its conversions look for `layer_*`, `mp_rank_*` and `*_optim_states.pt`, and ignore this
file. Each rank's optimizer file contains that rank's copies, so the conversion must skip all but the trained ones
(convert_without in deepspeed_adapter/optimizers.py).
"""

from __future__ import annotations

import os
from typing import Any

from deepspeed.utils import logger
from torch import nn

from ds_vshape.deepspeed_adapter.checkpoints import clone_tensors_for_torch_save


def loss_fn_path(folder: str, rank: str) -> str:
    """The file's path; `rank` names a tensor parallel rank as layer files do, and is empty where there are none."""
    return os.path.join(folder, "-".join(filter(None, ["loss_fn", rank, "model_states.pt"])))


def save_loss_fn(loss_fn: Any, path: str, checkpoint_engine: Any, exclude_frozen: bool) -> None:
    """Write the state of `loss_fn`, if it's a module that has one."""
    state = _state(loss_fn)
    if not state:
        return
    if exclude_frozen:
        for name, parameter in loss_fn.named_parameters():
            if not parameter.requires_grad:
                state.pop(name, None)
    if checkpoint_engine.preserves_storage_sharing():
        state = clone_tensors_for_torch_save(state)
    checkpoint_engine.save(state_dict=state, path=path)


def load_loss_fn(loss_fn: Any, path: str, checkpoint_engine: Any, strict: bool) -> None:
    """Load the state of `loss_fn` from `path`. A checkpoint of DeepSpeed's own has no such file: then it stays as it
    is, with a warning."""
    if not _state(loss_fn):
        return
    if os.path.exists(path):
        loss_fn.load_state_dict(checkpoint_engine.load(path, map_location="cpu"), strict=strict)
    else:
        logger.warning(f"the checkpoint has no {os.path.basename(path)}: the weights of the loss function aren't "
                       "loaded from it")


def _state(loss_fn: Any) -> Any:
    return loss_fn.state_dict() if isinstance(loss_fn, nn.Module) else {}
