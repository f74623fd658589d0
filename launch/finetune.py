"""Trains a Hugging Face model with a pipeline of all ranks: safetensors in, safetensors out.

    python launch/tiny_model.py llama runs/tiny-llama
    deepspeed --num_gpus 2 launch/finetune.py --model runs/tiny-llama --output runs/tuned schedule=v-zb
    deepspeed --num_gpus 2 launch/finetune.py --config my.yaml schedule=v-zb

The model is a folder with config.json and safetensors, of any family in ds_vshape/docs/hugging-face.md. With
schedule=deepspeed DeepSpeed's own engine trains it; on the sources of Python's standard library, or with --data on text
and conversations. With --lora FOLDER, adapters are trained and written instead of the model: those that peft has saved
in FOLDER, or new ones if it holds an adapter_config.json alone (configs/lora).
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.distributed
from deepspeed.runtime.config import DeepSpeedConfig
from deepspeed.runtime.pipe.topology import PipeModelDataParallelTopology
from deepspeed.utils import logger
from finetune_options import arguments
from text import load_corpus, tokens_of
from train_rank import start_distributed
from transformers import get_scheduler

import ds_vshape
from ds_vshape.finetuning.batches import PackedRows, Rows, WindowRows
from ds_vshape.finetuning.record import Record
from ds_vshape.finetuning.settings import BATCHES
from ds_vshape.finetuning.training import Result, Training, TrainingPlan, batches_of
from ds_vshape.models.gpt import seed_layer
from ds_vshape.models.hugging_face import (CHECKPOINTABLE_LAYERS, PARTITION_METHOD, TensorParallelLoss, load_weights,
                                           next_token_loss, pipeline_layers, save_model)
from ds_vshape.models.hugging_face.folder import read_config
from ds_vshape.models.parallel_layers import tensor_group

# Of text there is more to evaluate on than anyone waits for.
EVALUATED_BYTES = 4096


def topology_of(stages: int, tensor: int) -> PipeModelDataParallelTopology:
    """Of all ranks; 0 stages are as many as there can be. ValueError if the ranks can't be divided so."""
    world = torch.distributed.get_world_size()
    stages = stages or world // max(tensor, 1)
    if min(stages, tensor) < 1 or world % (stages * tensor):
        raise ValueError(f"--stages {stages} --tensor_parallel {tensor}: their product must divide the {world} ranks")
    return PipeModelDataParallelTopology(num_pp=stages, num_mp=tensor, num_dp=world // (stages * tensor))


def rows_of(args: argparse.Namespace, vocabulary: int) -> tuple[Rows, Rows]:
    """To train and to evaluate on; collective."""
    if args.data is not None:
        from ds_vshape.finetuning.data import open_rows  # datasets is an extra of its own
        return open_rows(args.data, args.validation, args.model, args.length, args.packed)
    corpus = load_corpus(args.text)
    validation = corpus.validation[:EVALUATED_BYTES]
    return (WindowRows(tokens_of(corpus.training, args.model, vocabulary), args.length),
            WindowRows(tokens_of(validation, args.model, vocabulary), args.length))


def token_loss(group: Any) -> Any:
    """The loss of the next tokens, over the tensor parallel ranks of `group` if there are any."""
    return TensorParallelLoss(group) if group else next_token_loss


def build(args: argparse.Namespace, config: Any, loss: Callable[[Any], Any] = token_loss,
          samples_per_row: int | None = None) -> Any:
    """The PipelineModule of `config`, a model's; its weights are random (collective). `loss` makes the loss function
    for the group of this rank's tensor parallel ranks, or for None; `samples_per_row` is the most of packed rows."""
    topology = topology_of(args.stages, args.tensor_parallel)
    group = tensor_group(topology) if args.tensor_parallel > 1 else None
    lora = None
    if args.lora is not None:
        from ds_vshape.models.hugging_face import lora_files  # peft is an extra of its own
        lora = lora_files.read_config(args.lora)
    layers = pipeline_layers(config, args.attention, experts=args.experts, tensor_group=group, lora=lora,
                             packed=args.packed, chunked_head=args.chunked_head, samples_per_row=samples_per_row)
    # seed_layers: dropout then doesn't depend on the order of the passes.
    return ds_vshape.PipelineModule(layers, topology=topology, config=args.ds_config, loss_fn=loss(group),
                                    partition_method=PARTITION_METHOD, checkpointable_layers=CHECKPOINTABLE_LAYERS,
                                    dynamic_shape=args.data is not None and not args.packed,
                                    seed_layers=True, seed_fn=seed_layer)


def load(args: argparse.Namespace, module: Any) -> None:
    """Read the model's weights, and adapters if there are any (collective)."""
    unknown = load_weights(module, args.model)
    if unknown and torch.distributed.get_rank() == 0:
        logger.warning(f"{args.model} has tensors that its config.json doesn't mention: {', '.join(unknown)}")
    if args.lora is not None:
        from ds_vshape.models.hugging_face.lora_files import has_adapter, load_adapter
        if has_adapter(args.lora):
            load_adapter(module, args.lora)


def save(args: argparse.Namespace, module: Any, config: Any) -> None:
    """Write what has been trained (collective)."""
    if args.lora is None:
        save_model(module, config, args.model, args.output)
        return
    from ds_vshape.models.hugging_face.lora_files import save_adapter
    save_adapter(module, args.model, args.output)


def start(args: argparse.Namespace, module: Any, rows: tuple[Rows, Rows]) -> tuple[Any, TrainingPlan]:
    """The engine that trains `module`, and how it trains on the first of `rows` and evaluates on the others
    (collective)."""
    batch = DeepSpeedConfig(args.ds_config, mpu=module.mpu()).train_batch_size
    batches = (args.batches or BATCHES) if args.epochs is None else batches_of(args.epochs, len(rows[0]), batch)
    schedule = args.learning_rate and partial(get_scheduler, args.learning_rate, num_training_steps=batches,
                                              num_warmup_steps=int(args.warmup * batches))
    trained = [parameter for parameter in module.parameters() if parameter.requires_grad]
    engine, *_ = ds_vshape.initialize(model=module, model_parameters=trained, lr_scheduler=schedule,
                                      config=args.ds_config)
    return engine, TrainingPlan(*rows, batches, args.evaluate_every, args.save_every, args.checkpoints)


def finetune(args: argparse.Namespace) -> Result:
    """Trains the model and writes it; to be called on every rank."""
    record = Record(vars(args))
    if (ended := record.result()) is not None:
        return ended
    config = read_config(args.model)
    rows = rows_of(args, config.get_text_config().vocab_size)  # first, since its errors come sooner than weights
    samples = max((each.samples_per_row for each in rows if isinstance(each, PackedRows)), default=None)
    module = build(args, config, samples_per_row=samples)
    load(args, module)
    engine, plan = start(args, module, rows)
    result = Training(engine, plan).run()
    record.write(result)
    save(args, engine.module, config)
    return result


def run(args: argparse.Namespace, train: Callable[[argparse.Namespace], Result]) -> None:
    """Run `train` as one of the launcher's ranks; rank 0 writes what it measured."""
    start_distributed()
    result = train(args)
    if args.result and torch.distributed.get_rank() == 0:
        result.write(args.result)
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    run(arguments(), finetune)
