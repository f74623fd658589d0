"""torch's own pipeline schedules (torch.distributed.pipelining) behind the engine's interface, on the same layers.

Weights, losses and the optimizer are those of the DeepSpeed contenders: layers seeded one by one, gradients divided by
the number of micro-batches, SGD, gradients clipped by their norm over all ranks (as torchtitan does it).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
import torch.distributed as dist
from deepspeed.runtime.utils import set_random_seed
from torch import Tensor, nn
from torch.distributed.pipelining import PipelineStage
from torch_orders import TorchSchedule
from workloads import Workload

BASE_SEED = 1234


class TorchPipeline:
    """Trains a workload by one of torch's schedules (collective)."""

    def __init__(self, kind: TorchSchedule, workload: Workload, learning_rate: float, clipping: float = 0.0,
                 bounds: Sequence[int] | None = None) -> None:
        """`bounds` are the first layer of each stage, and the number of layers; without any all have as many."""
        rank, placement = dist.get_rank(), kind.placement(dist.get_world_size())
        own, count = placement.chunks[rank], placement.stages
        if bounds is None:
            bounds = range(0, workload.layers + 1, workload.layers // count)
        self._micro_batches = workload.micro_batches
        self._loads, self._has_loss = 0 in own, placement.last_stage in own
        self._loss_rank = placement.rank_of(placement.last_stage)
        self.module = nn.ModuleList(_layers(workload, range(bounds[stage], bounds[stage + 1])) for stage in own)
        stages = [PipelineStage(module, stage, count, torch.device("cpu"))
                  for module, stage in zip(self.module, own, strict=True)]
        self._schedule = kind.schedule(stages[0] if len(own) == 1 else stages, workload.micro_batches,
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
