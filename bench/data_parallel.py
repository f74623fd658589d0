"""DeepSpeed's data parallelism with ZeRO behind the engine's interface, on the same layers.

A rank has all layers and a share of the micro-batches. What it sends and keeps is what DeepSpeed does at full size: its
buckets and limits are in proportion to a layer's parameters, as its defaults are to those of a block of 7B parameters.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import deepspeed
import torch
import torch.distributed as dist
from deepspeed.runtime.pipe.topology import PipeDataParallelTopology, PipelineParallelGrid
from deepspeed.runtime.utils import set_random_seed
from torch import Tensor, nn
from torch_pipeline import BASE_SEED
from workloads import Workload

# In parameters of a layer; DeepSpeed's defaults of 5e8 and 1e9 are as many blocks of 2e8.
_BUCKET, _ALIVE = 2.5, 5


class DataParallel:
    """Trains a workload with ZeRO `stage` (collective).

    `joined` micro-batches run as one: fewer messages, and more memory. ValueError for a number of micro-batches that
    can't be shared out so.
    """

    def __init__(self, stage: int, workload: Workload, learning_rate: float, joined: int = 1) -> None:
        ranks = dist.get_world_size()
        steps, rest = divmod(workload.micro_batches, ranks * joined)
        if rest:
            raise ValueError(f"{workload.micro_batches} micro-batches can't be shared out over {ranks} ranks, {joined} "
                             "at a time")
        layers = []
        for number in range(workload.layers):
            set_random_seed(BASE_SEED + number)
            layers.append(workload.spec(number).build())
        block = max(sum(parameter.numel() for parameter in layer.parameters()) for layer in layers)
        bucket = int(_BUCKET * block)
        config = {
            "train_micro_batch_size_per_gpu": 1,
            "gradient_accumulation_steps": steps,
            "optimizer": {"type": "SGD", "params": {"lr": learning_rate}},
            "gradient_clipping": 0.0,
            "zero_allow_untested_optimizer": True,
            "zero_optimization": {
                "stage": stage, "overlap_comm": True, "reduce_bucket_size": bucket, "allgather_bucket_size": bucket,
                "stage3_prefetch_bucket_size": bucket, "stage3_max_live_parameters": _ALIVE * block,
                "stage3_max_reuse_distance": _ALIVE * block, "stage3_param_persistence_threshold": 0},
            "steps_per_print": 1000000,
            "disable_python_gc": True,
        }
        self._workload, self._joined, self._steps = workload, joined, steps
        model = nn.Sequential(*layers)
        # Without it DeepSpeed would go by the groups of a pipeline that another contender has made in this process.
        grid = PipelineParallelGrid(topology=PipeDataParallelTopology(num_pp=1, num_dp=ranks))
        self.engine: Any = deepspeed.initialize(model=model, model_parameters=model.parameters(), config=config,
                                                mpu=grid)[0]

    def train_batch(self, data: Iterator[tuple[Tensor, Tensor]]) -> Tensor:
        """The mean loss of a batch, on every rank, after the optimizer's step."""
        batch = [next(data) for _ in range(self._workload.micro_batches)]
        own = batch[dist.get_rank()::dist.get_world_size()]
        losses = []
        for step in range(self._steps):
            joined = own[step * self._joined:(step + 1) * self._joined]
            inputs, labels = (torch.cat(tensors) for tensors in zip(*joined))
            loss = self._workload.loss_fn(self.engine(inputs), labels)
            self.engine.backward(loss)
            self.engine.step()
            losses.append(loss.detach())
        mean = torch.stack(losses).mean() / dist.get_world_size()
        dist.all_reduce(mean)
        return mean
