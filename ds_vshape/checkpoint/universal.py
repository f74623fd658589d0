"""Universal checkpoints: a folder for each parameter, with a file for its weight and for each part of its state.

DeepSpeed (checkpoint/universal_checkpoint.py:load_hp_checkpoint_state) takes the files that it finds: without fp32.pt a
parameter keeps the weight it had. It reads them by torch.load, whose errors don't name them.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch

from ds_vshape.checkpoint.errors import CheckpointError, missing, unreadable
from ds_vshape.checkpoint.weights_only import refusal
from ds_vshape.deepspeed_adapter.optimizers import groups_with_master_weights
from ds_vshape.module.dummy_parameter import NAME

_FOLDER, _WEIGHT, _OPTIMIZER = "zero", "fp32.pt", "optimizer_state.pt"


def check_universal(checkpoint: str, groups: list[list[str]]) -> None:
    """Raise CheckpointError unless all files of this rank's parameters are there.

    Args:
        checkpoint: the checkpoint's folder.
        groups: the parameters' names, by group of the optimizer; all of a group have the same parts of a state.
    """
    folder = Path(checkpoint, _FOLDER)
    if not (folder / _OPTIMIZER).is_file():
        raise missing(str(folder / _OPTIMIZER))
    for group in groups:
        present = {name: _files(folder / name) for name in group}
        expected = sorted({_WEIGHT}.union(*present.values()))
        for name in group:
            for file in expected:
                if file not in present[name]:
                    raise missing(str(folder / name / file))


def damaged(checkpoint: str, groups: list[list[str]]) -> CheckpointError | None:
    """The error for the first of the parameters' files that can't be read; None if all can."""
    folder = Path(checkpoint, _FOLDER)
    for path in _paths(folder, groups):
        try:
            torch.load(path, map_location="cpu", weights_only=False)
        except Exception as error:
            return refusal(str(path), error) or unreadable(str(path), error)
    return None


def parameter_groups(optimizer: Any, names: Mapping[Any, str]) -> list[list[str]]:
    """The names of the parameters of which this rank has master weights, by group of DeepSpeed's `optimizer`; without
    the dummy parameter, for which nothing is loaded."""
    return [[names[parameter] for parameter in group if names[parameter] != NAME]
            for group in groups_with_master_weights(optimizer)]


def _paths(folder: Path, groups: list[list[str]]) -> Iterator[Path]:
    yield folder / _OPTIMIZER
    for group in groups:
        for name in group:
            yield from (folder / name / file for file in sorted(_files(folder / name)))


def _files(folder: Path) -> set[str]:
    return {file for file in os.listdir(folder) if file.endswith(".pt")} if folder.is_dir() else set()
