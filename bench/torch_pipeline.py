"""torch's own pipeline schedules (torch.distributed.pipelining) behind the engine's interface, on the same layers.

Weights, losses and the optimizer are those of the DeepSpeed contenders: layers seeded one by one, gradients divided by
the number of micro-batches, SGD, gradients clipped by their norm over all ranks (as torchtitan does it).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from deepspeed.runtime.utils import set_random_seed
from torch import Tensor, nn
from torch.distributed.pipelining import (PipelineStage, Schedule1F1B, ScheduleDualPipeV, ScheduleInterleaved1F1B,
                                          ScheduleInterleavedZeroBubble, ScheduleZBVZeroBubble)
from workloads import Workload

BASE_SEED = 1234


@dataclass(frozen=True)
class TorchSchedule:
    """One of torch's schedules, and which stages of how many a rank holds."""

    schedule: type[Any]
    chunks: int
    in_v: bool = False

    def stages(self, rank: int, ranks: int) -> list[int]:
        """The stages of a rank, in the order that torch wants."""
        if self.in_v:
            return [rank, 2 * ranks - 1 - rank]
        return [rank + chunk * ranks for chunk in range(self.chunks)]


TORCH_SCHEDULES = {
    "torch 1f1b": TorchSchedule(Schedule1F1B, 1),
    "torch interleaved1f1b": TorchSchedule(ScheduleInterleaved1F1B, 2),
    "torch interleavedzerobubble": TorchSchedule(ScheduleInterleavedZeroBubble, 2),
    "torch interleavedzerobubble:4": TorchSchedule(ScheduleInterleavedZeroBubble, 4),
    "torch zbvzerobubble": TorchSchedule(ScheduleZBVZeroBubble, 2, in_v=True),
    "torch dualpipev": TorchSchedule(ScheduleDualPipeV, 2, in_v=True),
}


class TorchPipeline:
    """Trains a workload by one of torch's schedules (collective)."""

    def __init__(self, kind: TorchSchedule, workload: Workload, learning_rate: float, clipping: float = 0.0) -> None:
        rank, ranks = dist.get_rank(), dist.get_world_size()
        count = kind.chunks * ranks
        self._micro_batches = workload.micro_batches
        self._loads, self._has_loss = 0 in kind.stages(rank, ranks), count - 1 in kind.stages(rank, ranks)
        self._loss_rank = next(other for other in range(ranks) if count - 1 in kind.stages(other, ranks))
        size = workload.layers // count
        self.module = nn.ModuleList(_layers(workload, range(stage * size, (stage + 1) * size))
                                    for stage in kind.stages(rank, ranks))
        stages = [PipelineStage(module, stage, count, torch.device("cpu"))
                  for module, stage in zip(self.module, kind.stages(rank, ranks), strict=True)]
        self._schedule = kind.schedule(stages[0] if kind.chunks == 1 else stages, workload.micro_batches,
                                       loss_fn=workload.loss_fn)
        self._clipping = clipping
        self._optimizer = torch.optim.SGD(self.module.parameters(), lr=learning_rate)

    def train_batch(self, data: Iterator[tuple[Tensor, Tensor]]) -> Tensor:
        """The mean loss of a batch, on every rank, after the optimizer's step."""
        inputs, labels = (torch.cat(tensors) for tensors in zip(*(next(data) for _ in range(self._micro_batches))))
        losses: list[Tensor] = []
        self._schedule.step(*([inputs] if self._loads else []), target=labels if self._has_loss else None,
                            losses=losses if self._has_loss else None, return_outputs=False)
        if self._clipping:
            self._clip()
        self._optimizer.step()
        self._optimizer.zero_grad()
        loss = torch.stack(losses).mean().detach() if self._has_loss else torch.zeros(())
        dist.broadcast(loss, self._loss_rank)
        return loss

    def _clip(self) -> None:
        parameters = [*self.module.parameters()]
        squared = nn.utils.get_total_norm([parameter.grad for parameter in parameters]) ** 2
        dist.all_reduce(squared)
        nn.utils.clip_grads_with_norm_(parameters, self._clipping, squared.sqrt())


def _layers(workload: Workload, numbers: range) -> nn.Sequential:
    made = []
    for number in numbers:
        set_random_seed(BASE_SEED + number)
        made.append(workload.layer_of_paths(number))
    return nn.Sequential(*made)
