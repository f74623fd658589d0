"""The main job: trains a byte-level GPT on the standard library's sources with a pipeline of all ranks.

    deepspeed --num_gpus 4 launch/train.py --deepspeed_config configs/quickstart.json --batches 30

The schedule is whatever "pipeline_schedule" in the config names; without that key DeepSpeed's own engine trains.
Nothing here knows which one it is, and the losses are the same.

    deepspeed --num_gpus 8 launch/train.py --deepspeed_config configs/tensor_parallel.json \\
        --stages 2 --tensor-parallel 2

does so on 2 pipeline x 2 data parallel x 2 tensor parallel ranks.
"""

from __future__ import annotations

import argparse
import statistics
import time
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import deepspeed
import torch
import torch.distributed
from clock import OwnEngineClock
from deepspeed.accelerator import get_accelerator
from deepspeed.runtime.pipe.topology import PipeModelDataParallelTopology
from gpt import PARTITION_METHOD, GPTConfig, gpt_layers, loss_fn, seed_layer
from gpt_parallel import parallel_gpt_layers, tensor_group
from result import Result
from text import load_corpus, micro_batches
from tqdm import tqdm

import ds_vshape

TRAINING_SEED = 1
VALIDATION_SEED = 2
# The first batches allocate, exchange shapes and fill caches.
WARM_UP_BATCHES = 3


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batches", type=int, default=30)
    parser.add_argument("--stages", type=int, default=0, help="pipeline ranks (default: all that are left)")
    parser.add_argument("--tensor-parallel", type=int, default=1, help="ranks that share each block")
    parser.add_argument("--layers", type=int, default=16)
    parser.add_argument("--hidden", type=int, default=128)
    parser.add_argument("--heads", type=int, default=4)
    parser.add_argument("--length", type=int, default=128, help="bytes in a sequence")
    parser.add_argument("--result", type=Path, help="where rank 0 writes what it measured, as JSON")
    parser.add_argument("--local_rank", type=int, default=-1, help="set by the launcher")
    return deepspeed.add_config_arguments(parser).parse_args()


def start_distributed() -> None:
    """Joins the ranks of the `deepspeed` launcher."""
    if get_accelerator().device_name() == "cpu":
        # DeepSpeed would compile a shared-memory all-reduce for minutes at the first start; gloo does without.
        # It asks this table, so that an empty one also saves the search for compilers.
        deepspeed.ops.__compatible_ops__ = {}
    # DeepSpeed broadcasts tied weights with gradients enabled, of which torch warns on every rank.
    warnings.filterwarnings("ignore", message="c10d::broadcast_: an autograd kernel was not registered")
    deepspeed.init_distributed()


def topology_of(stages: int, tensor_ranks: int) -> PipeModelDataParallelTopology:
    """All ranks as pipeline x data x tensor parallel ones; with 0 stages there is one replica."""
    ranks = torch.distributed.get_world_size()
    held = tensor_ranks * (stages or 1)
    if tensor_ranks < 1 or ranks % held:
        raise SystemExit(f"--stages {stages} --tensor-parallel {tensor_ranks}: {ranks} ranks must be a multiple of "
                         f"{held}")
    return PipeModelDataParallelTopology(num_pp=stages or ranks // held, num_mp=tensor_ranks,
                                         num_dp=ranks // held if stages else 1)


def train(engine: Any, training: Iterator[Any], validation: Iterator[Any], batches: int) -> Result:
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

    return Result(schedule=reports[-1]["schedule"],
                  stages=len(reports[-1]["peak_activations"]),
                  micro_batches=engine.micro_batches,
                  losses=losses,
                  validation_loss=engine.eval_batch(validation).item(),
                  batch_seconds=typical(seconds),
                  predicted_bubble=typical([report["predicted_bubble"] for report in reports]),
                  measured_bubble=typical([report["measured_bubble"] for report in reports]),
                  peak_activations=reports[-1]["peak_activations"])


def main() -> None:
    args = arguments()
    start_distributed()
    config = GPTConfig(args.layers, args.hidden, args.heads, args.length)
    topology = topology_of(args.stages, args.tensor_parallel)
    layers = gpt_layers(config) if args.tensor_parallel == 1 else parallel_gpt_layers(config, tensor_group(topology))
    # seed_layers: a layer's first weights depend on its place in the model, not on the rank that builds it.
    module = ds_vshape.PipelineModule(layers,
                                      topology=topology,
                                      loss_fn=loss_fn,
                                      partition_method=PARTITION_METHOD,
                                      seed_layers=True,
                                      seed_fn=seed_layer)
    engine, *_ = ds_vshape.initialize(args=args, model=module, model_parameters=module.parameters())

    corpus = load_corpus()
    size = engine.train_micro_batch_size_per_gpu()
    replica = engine.grid.get_data_parallel_rank()
    training = micro_batches(corpus.training, size, args.length, TRAINING_SEED + 1000 * replica)
    validation = micro_batches(corpus.validation, size, args.length, VALIDATION_SEED + 1000 * replica)

    result = train(engine, training, validation, args.batches)
    if args.result and torch.distributed.get_rank() == 0:
        result.write(args.result)
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main()
