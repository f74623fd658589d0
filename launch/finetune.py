"""Trains a Hugging Face model on text with a pipeline of all ranks: safetensors in, safetensors out.

    python launch/tiny_model.py llama runs/tiny-llama
    deepspeed --num_gpus 2 launch/finetune.py --model runs/tiny-llama --output runs/tuned-llama \\
        --deepspeed_config configs/finetune.json

The model is a folder with config.json and safetensors, of any family in ds_vshape/docs/hugging-face.md. The schedule is
whatever "pipeline_schedule" in the config names; without that key DeepSpeed's own engine trains.
With --lora FOLDER, adapters are trained and written instead of the model: those that peft has saved in FOLDER, or new
ones where it holds an adapter_config.json alone (configs/lora).
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import deepspeed
import torch
import torch.distributed
from deepspeed.runtime.pipe.topology import PipeModelDataParallelTopology
from deepspeed.utils import logger
from result import Result
from text import load_corpus, micro_batches
from torch import Tensor
from train_rank import TRAINING_SEED, VALIDATION_SEED, start_distributed, train
from transformers import AutoConfig, AutoTokenizer

import ds_vshape
from ds_vshape.models.gpt import seed_layer
from ds_vshape.models.hugging_face import CHECKPOINTABLE_LAYERS, PARTITION_METHOD, next_token_loss, pipeline_layers
from ds_vshape.models.hugging_face_tensor_parallel import TensorParallelLoss
from ds_vshape.models.hugging_face_weights import check_output, load_weights, save_model
from ds_vshape.models.parallel_layers import tensor_group

BYTES = 256


def arguments(words: list[str] | None = None) -> argparse.Namespace:
    """Of the command line, or of `words`."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, required=True, help="folder with config.json and safetensors")
    parser.add_argument("--output", type=Path, required=True, help="new folder for the trained model")
    parser.add_argument("--lora", type=Path, help="folder with adapter_config.json: train adapters, not the model")
    parser.add_argument("--text", type=Path, help="folder with .py files (default: Python's own standard library)")
    parser.add_argument("--batches", type=int, default=30)
    parser.add_argument("--length", type=int, default=128, help="tokens in a sequence")
    parser.add_argument("--stages", type=int, default=0, help="pipeline ranks (default: all ranks)")
    parser.add_argument("--tensor_parallel", type=int, default=1, help="ranks that share each layer")
    parser.add_argument("--attention", choices=["sdpa", "eager"], help="by default transformers chooses")
    parser.add_argument("--experts", choices=["grouped_mm", "batched_mm", "eager"],
                        help="how the experts of a mixture are computed; by default transformers chooses")
    parser.add_argument("--result", type=Path, help="where rank 0 writes what it measured, as JSON")
    parser.add_argument("--local_rank", type=int, default=-1, help="set by the launcher")
    return deepspeed.add_config_arguments(parser).parse_args(words)


def tokens_of(text: Tensor, model: Path, vocabulary: int) -> Tensor:
    """Bytes as the tokens of the tokenizer in `model`; as they are where it has none.

    Raises:
        ValueError: if there is no tokenizer and the vocabulary has no place for every byte.
    """
    if (model / "tokenizer_config.json").exists():
        tokenizer = AutoTokenizer.from_pretrained(model)
        decoded = bytes(text.tolist()).decode(errors="replace")
        return torch.tensor(tokenizer(decoded, add_special_tokens=False)["input_ids"])
    if vocabulary < BYTES:
        raise ValueError(f"{model} has no tokenizer and vocab_size = {vocabulary}: must be at least {BYTES} for bytes")
    return text


def topology_of(stages: int, tensor: int) -> PipeModelDataParallelTopology:
    """Of all ranks; 0 stages are as many as there can be. ValueError if the ranks can't be divided so."""
    world = torch.distributed.get_world_size()
    stages = stages or world // max(tensor, 1)
    if min(stages, tensor) < 1 or world % (stages * tensor):
        raise ValueError(f"--stages {stages} --tensor_parallel {tensor}: their product must divide the {world} ranks")
    return PipeModelDataParallelTopology(num_pp=stages, num_mp=tensor, num_dp=world // (stages * tensor))


def finetune(args: argparse.Namespace) -> Result:
    """Trains the model and writes it; to be called on every rank."""
    check_output(args.output)
    config = AutoConfig.from_pretrained(args.model)
    topology = topology_of(args.stages, args.tensor_parallel)
    group = tensor_group(topology) if args.tensor_parallel > 1 else None
    lora: Any = None
    if args.lora is not None:
        from ds_vshape.models import lora_files as lora  # peft is an extra of its own
    layers = pipeline_layers(config, args.attention, experts=args.experts, tensor_group=group,
                             lora=lora and lora.read_config(args.lora))
    # seed_layers: dropout then doesn't depend on the order of the passes.
    module = ds_vshape.PipelineModule(layers,
                                      topology=topology,
                                      loss_fn=TensorParallelLoss(group) if group else next_token_loss,
                                      partition_method=PARTITION_METHOD,
                                      checkpointable_layers=CHECKPOINTABLE_LAYERS,
                                      seed_layers=True,
                                      seed_fn=seed_layer)
    unknown = load_weights(module, args.model)
    if unknown and torch.distributed.get_rank() == 0:
        logger.warning(f"{args.model} has tensors that its config.json doesn't mention: {', '.join(unknown)}")
    if lora and lora.has_adapter(args.lora):
        lora.load_adapter(module, args.lora)
    trained = [parameter for parameter in module.parameters() if parameter.requires_grad]
    engine, *_ = ds_vshape.initialize(args=args, model=module, model_parameters=trained)

    corpus = load_corpus(args.text)
    size = engine.train_micro_batch_size_per_gpu()
    replica = engine.grid.get_data_parallel_rank()

    def batches(text: Tensor, seed: int) -> Iterator[tuple[Tensor, Tensor]]:
        # A generator, so that a rank without the first or the last stage doesn't tokenize: it never draws.
        tokens = tokens_of(text, args.model, config.vocab_size)
        yield from micro_batches(tokens, size, args.length, seed + 1000 * replica)

    training = batches(corpus.training, TRAINING_SEED)
    validation = batches(corpus.validation, VALIDATION_SEED)
    result = train(engine, training, validation, args.batches)
    if lora:
        lora.save_adapter(engine.module, args.model, args.output)
    else:
        save_model(engine.module, config, args.model, args.output)
    return result


def main() -> None:
    args = arguments()
    start_distributed()
    result = finetune(args)
    if args.result and torch.distributed.get_rank() == 0:
        result.write(args.result)
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main()
