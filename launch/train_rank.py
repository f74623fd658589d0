"""One rank of the main job: trains a byte-level GPT on the standard library's sources, as configs/ say.

    python launch/train.py schedule=v-half parallel.pipe=4          checks this, and starts the command below
    deepspeed --num_gpus 4 --no_local_rank launch/train_rank.py schedule=v-half parallel.pipe=4

Any launcher that sets RANK, LOCAL_RANK, WORLD_SIZE, MASTER_ADDR and MASTER_PORT does as well. The schedule is whatever
"pipeline_schedule" in the composed ds_config names; without that key DeepSpeed's own engine trains. Nothing here knows
which one it is, and the losses are the same.
"""

from __future__ import annotations

import os
import statistics
import sys
import time
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import deepspeed
import torch
import torch.distributed
from deepspeed.accelerator import get_accelerator
from deepspeed.runtime.pipe.topology import PipeModelDataParallelTopology
from result import JobResult
from text import load_corpus, micro_batches
from tqdm import tqdm

import ds_vshape
from ds_vshape.config.section import ConfigError
from ds_vshape.layouts.composition import compose_job
from ds_vshape.layouts.job import Job
from ds_vshape.layouts.job_costs import training_of
from ds_vshape.measure.own_engine import OwnEngineClock
from ds_vshape.models.gpt import GPTConfig, gpt_layers, loss_fn, seed_layer
from ds_vshape.models.gpt_parallel import parallel_gpt_layers
from ds_vshape.models.parallel_layers import tensor_group

TRAINING_SEED = 1
VALIDATION_SEED = 2
# The first batches allocate, exchange shapes and fill caches.
WARM_UP_BATCHES = 3


def start_distributed() -> None:
    """Joins the ranks of the `deepspeed` launcher."""
    if get_accelerator().device_name() == "cpu":
        # DeepSpeed would compile a shared-memory all-reduce for minutes at the first start; gloo does without.
        # It looks operators up in this table; an empty one also saves its search for compilers.
        deepspeed.ops.__compatible_ops__ = {}
    # DeepSpeed broadcasts tied weights with gradients enabled, of which torch warns on every rank.
    warnings.filterwarnings("ignore", message="c10d::broadcast_: an autograd kernel was not registered")
    deepspeed.init_distributed()


def job_of(overrides: list[str]) -> Job:
    """The job of the command line; SystemExit if it is wrong, or if another number of ranks has been started."""
    try:
        # DeepSpeed's launcher adds the option unless it is told --no_local_rank; LOCAL_RANK says the same.
        job = compose_job([each for each in overrides if not each.startswith("--local_rank=")])
    except ConfigError as error:
        raise SystemExit(f"train_rank.py: error: {error}") from None
    started = int(os.environ.get("WORLD_SIZE", job.ranks))
    if started != job.ranks:
        raise SystemExit(f"train_rank.py: error: {started} ranks have been started; the layout parallel.pipe x "
                         f"parallel.tensor x data has {job.ranks}")
    return job


def train(engine: Any, training: Iterator[Any], validation: Iterator[Any], batches: int) -> JobResult:
    """Trains and measures each batch, then evaluates once."""
    # DeepSpeed's own engine doesn't measure itself.
    measured = engine if hasattr(engine, "pipeline_report") else OwnEngineClock(engine)
    losses, seconds, reports = [], [], []
    progress = tqdm(range(batches), desc="training", unit="batch", disable=torch.distributed.get_rank() != 0)
    for _ in progress:
        start = time.perf_counter()
        losses.append(engine.train_batch(data_iter=training).item())
        seconds.append(time.perf_counter() - start)
        reports.append(measured.pipeline_report())
        progress.set_postfix(loss=f"{losses[-1]:.3f}")

    def typical(values: list[float]) -> float:
        return statistics.median(values[WARM_UP_BATCHES:] or values)

    return JobResult(schedule=reports[-1]["schedule"],
                  stages=len(reports[-1]["peak_activations"]),
                  micro_batches=engine.micro_batches,
                  losses=losses,
                  validation_loss=engine.eval_batch(validation).item(),
                  batch_seconds=typical(seconds),
                  predicted_bubble=typical([report["predicted_bubble"] for report in reports]),
                  measured_bubble=typical([report["measured_bubble"] for report in reports]),
                  peak_activations=reports[-1]["peak_activations"])


def build_engine(job: Job) -> Any:
    """The engine that trains `job` (collective)."""
    model, parallel = job.model, job.parallel
    config = GPTConfig(model.layers, model.hidden, model.heads, model.length, model.vocabulary)
    topology = PipeModelDataParallelTopology(num_pp=parallel.pipe, num_dp=job.replicas, num_mp=parallel.tensor)
    layers = gpt_layers(config) if parallel.tensor == 1 else parallel_gpt_layers(config, tensor_group(topology))
    ds_config = job.ds_config()
    # seed_layers: a layer's first weights depend on its place in the model, not on the rank that builds it.
    module = ds_vshape.PipelineModule(layers,
                                      topology=topology,
                                      loss_fn=loss_fn,
                                      partition_method=training_of(job).partition,
                                      seed_layers=True,
                                      seed_fn=seed_layer,
                                      config=ds_config)
    engine, *_ = ds_vshape.initialize(model=module, model_parameters=module.parameters(), config=ds_config)
    return engine


def batches_of(job: Job, replica: int) -> tuple[Iterator[Any], Iterator[Any]]:
    """Training and validation micro-batches of a data parallel rank."""
    corpus = load_corpus(Path(job.data.text) if job.data.text else None)
    return (micro_batches(corpus.training, job.data.micro_batch, job.model.length, TRAINING_SEED + 1000 * replica),
            micro_batches(corpus.validation, job.data.micro_batch, job.model.length, VALIDATION_SEED + 1000 * replica))


def main() -> None:
    job = job_of(sys.argv[1:])
    start_distributed()
    engine = build_engine(job)
    training, validation = batches_of(job, engine.grid.get_data_parallel_rank())
    result = train(engine, training, validation, job.batches)
    if job.result and torch.distributed.get_rank() == 0:
        result.write(Path(job.result))
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main()
