"""Nothing in a checkpoint is executed: torch.load takes tensors, plain data and the classes named here.

DeepSpeed asks for anything at all in each of its calls (weights_only=False in runtime/checkpoint_engine,
runtime/base_optimizer.py and checkpoint/), and a pickle may run whatever its writer liked. torch has a variable in the
environment that counts more than the calls.
"""

from __future__ import annotations

import argparse
import os
import pickle
import pickletools
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from enum import EnumMeta
from typing import Any

import numpy as np
import torch

from ds_vshape.checkpoint.errors import CheckpointError
from ds_vshape.deepspeed_adapter.checkpoints import SAVED_CLASSES

_FORCE, _TRUST = "TORCH_FORCE_WEIGHTS_ONLY_LOAD", "TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD"
# What users put into client_state: random states, options. The functions are those that make an array and a number.
_OF_USERS: list[Any] = [argparse.Namespace, np.ndarray, np.dtype, np.zeros(0).__reduce__()[0],
                        np.float64().__reduce__()[0], *{type(np.dtype(kind)) for kind in np.typecodes["All"]}]
# What torch's messages say of what isn't data.
_REFUSED = ("GLOBAL", "unrecognized function", "Can only create new object", "Can only build Tensor", "is blocked",
            "must be imported")
# torch.save's format that is no zip archive: a magic number, the protocol, facts of the system, the state.
_PICKLES = 4


def _enum_member(kind: Any, name: str) -> Any:
    """In place of getattr, by which Python 3.11.0 to 3.11.3 pickle members of an Enum: a member and nothing else."""
    if not (isinstance(kind, EnumMeta) and name in kind.__members__):
        raise pickle.UnpicklingError(f"GLOBAL getattr of {kind!r} was not an allowed global")
    return kind[name]


@contextmanager
def weights_only() -> Iterator[None]:
    """While it lasts, torch.load refuses what could be executed, whatever its caller asks for.

    It raises UnpicklingError for it (see `refusal`), unless TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD=1 in the environment says
    to trust it. Classes that users have told torch.serialization.add_safe_globals are let in.
    """
    if os.environ.get(_TRUST, "0").lower() in ("1", "y", "yes", "true"):
        yield
        return
    before = os.environ.get(_FORCE)
    os.environ[_FORCE] = "1"
    try:
        with torch.serialization.safe_globals([*SAVED_CLASSES, *_OF_USERS, (_enum_member, "builtins.getattr")]):
            yield
    finally:
        if before is None:
            del os.environ[_FORCE]
        else:
            os.environ[_FORCE] = before


def refusal(path: str, error: Exception) -> CheckpointError | None:
    """The error for the file `path`, if loading it raised `error` because it holds more than data; else None."""
    found = _found(error)
    if found is None or _is_cut(path):
        return None
    return CheckpointError(f"{path} holds more than tensors and plain data: {found}. If you trust it: "
                           f"torch.serialization.add_safe_globals allows a class, {_TRUST}=1 in the environment "
                           "allows everything")


def _found(error: Exception) -> str | None:
    """What torch refused, without its advice; None for bytes that are no pickle."""
    if not isinstance(error, pickle.UnpicklingError):
        return None
    lines = [line.strip() for line in str(error).splitlines()]
    line = next((line for line in lines if any(word in line for word in _REFUSED)), None)
    return line and (line.partition("WeightsUnpickler error: ")[2] or line).partition(". Please")[0].rstrip(".")


def _is_cut(path: str) -> bool:
    """Whether `path` is no zip archive and its pickles end too early: what torch then sees is half of a name."""
    if zipfile.is_zipfile(path):
        return False
    try:
        with open(path, "rb") as file:
            for _ in range(_PICKLES):
                for _ in pickletools.genops(file):
                    pass
    except Exception:
        return True
    return False
