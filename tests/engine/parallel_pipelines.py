"""Small GPTs of pipeline, data and tensor parallel ranks."""

from __future__ import annotations

from typing import Any

from deepspeed.runtime.pipe.topology import PipeModelDataParallelTopology
from pipelines import LENGTH, Job, cross_entropy

import ds_vshape
import ds_vshape.split_backward.tensor_parallel
from ds_vshape.models.gpt import GPTConfig
from ds_vshape.models.gpt_parallel import parallel_gpt_layers
from ds_vshape.models.parallel_layers import tensor_group

PIPE, DATA, TENSOR = 2, 2, 2
MODEL = GPTConfig(layers=4, hidden=8, heads=2, length=LENGTH)


def parallel_engine(job: Job, replicas: int, partition_method: str, loss_fn: Any = cross_entropy) -> Any:
    """The engine of MODEL on this rank (collective)."""
    topology = PipeModelDataParallelTopology(num_pp=PIPE, num_mp=TENSOR, num_dp=replicas)
    layers = parallel_gpt_layers(MODEL, tensor_group(topology))
    module = ds_vshape.PipelineModule(layers, topology=topology, loss_fn=loss_fn, seed_layers=True,
                                      partition_method=partition_method, config=job.ds_config())
    return ds_vshape.initialize(model=module, model_parameters=module.parameters(), config=job.ds_config())[0]
