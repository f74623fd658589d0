"""`"detect_anomaly": true`: a batch ends at the first NaN or infinity, and the error says where it is.

The outputs of each forward are checked, which waits for the GPU to compute them: use it to find an error, not to train.
Gradients aren't checked: with fp16 they overflow now and then, which the loss scaler handles.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import wraps
from typing import Any

import torch

from ds_vshape.runtime import instructions as instr
from ds_vshape.runtime.buffers import Buffers
from ds_vshape.runtime.instructions import Execute, Instruction

_FORWARDS = (instr.ForwardPass, instr.SplitForwardPass)


def checked(instructions: Mapping[Instruction, Execute], buffers: Buffers,
            last_stage: int) -> dict[Instruction, Execute]:
    """An instruction map (of functions that take the engine first) whose forwards raise FloatingPointError in training
    for outputs, or on `last_stage` a loss, that aren't finite. The outputs are in `buffers`."""
    return {kind: _checked(execute, buffers, last_stage) if kind in _FORWARDS else execute
            for kind, execute in instructions.items()}


def _checked(execute: Execute, buffers: Buffers, last_stage: int) -> Execute:
    @wraps(execute)
    def run(engine: object, buffer_id: instr.BufferId, **arguments: Any) -> None:
        execute(engine, buffer_id=buffer_id, **arguments)
        if not torch.is_grad_enabled():
            return
        outputs = buffers.outputs(buffer_id)
        members = outputs if isinstance(outputs, (tuple, list)) else (outputs,)
        for number, tensor in enumerate(members):
            if torch.is_tensor(tensor) and tensor.is_floating_point() and not torch.isfinite(tensor).all():
                what = "loss" if buffer_id.stage == last_stage else "output"
                of_many = f" {number}" if len(members) > 1 else ""
                count = int((~torch.isfinite(tensor)).sum())
                raise FloatingPointError(f"{count} of {tensor.numel()} numbers of the {what}{of_many} of stage "
                                         f"{buffer_id.stage} are NaN or infinite")

    return run
