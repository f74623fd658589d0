"""What measuring, reduction and rollback know of an engine: this rank's place, its model, and how far training is."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

import torch
from torch import nn

from ds_vshape.schedule.placement import Placement
from ds_vshape.schedule.timeline import Times


class Grid(Protocol):
    """The process groups of the job, as DeepSpeed's PipelineParallelGrid has them."""

    data_parallel_id: int
    pipe_groups: Sequence[list[int]]

    def get_pipe_parallel_group(self) -> Any:
        """The process group of this rank's pipeline."""

    def get_data_parallel_world_size(self) -> int:
        """The number of replicas."""


class Rank(Protocol):
    """This rank of a pipeline; a ds_vshape PipelineEngine is one.

    `optimizer` and `lr_scheduler` may be replaced during training.
    """

    module: nn.Module
    optimizer: Any
    lr_scheduler: Any
    grid: Grid
    device: torch.device
    dp_world_size: int
    global_rank: int
    stage_id: int
    placement: Placement

    def rollback_bytes(self) -> int:
        """Bytes that this rank keeps to roll a step back."""


class TrainingRank(Rank, Protocol):
    """A rank during training."""

    monitor: Any
    global_steps: int
    global_samples: int

    @property
    def planned_times(self) -> Times | None:
        """The measured times that the present schedule was planned for."""

    def train_batch_size(self) -> int:
        """Samples of a batch, of all replicas."""

    def steps_per_print(self) -> int | None:
        """How many batches lie between two reports; None for no reports."""
