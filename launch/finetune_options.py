"""What launch/finetune.py is told on its command line, and what programs like it are told too."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

import deepspeed

DESCRIPTION = ("Trains a Hugging Face model with a pipeline of all ranks: safetensors in, safetensors out. The "
               "schedule is what \"pipeline_schedule\" in the config names.")
# An option, and the one that it must come with.
Needs = tuple[str, str]
_NEEDS: Sequence[Needs] = (("save_every", "checkpoints"), ("validation", "data"), ("warmup", "learning_rate"))


def arguments(words: list[str] | None = None) -> argparse.Namespace:
    """Of the command line, or of `words`; SystemExit if they are wrong."""
    parser = argparse.ArgumentParser(prog="finetune.py", description=DESCRIPTION)
    add_options(parser)
    parser.add_argument("--text", type=Path, help="folder with .py files (default: Python's own standard library)")
    parser.add_argument("--data", type=Path, help="instead of text: .jsonl, .json or .parquet with \"text\" or "
                        "\"messages\", or a folder of datasets")
    parser.add_argument("--packed", action="store_true", help="several samples of the data in each row")
    return parsed(parser, words, (*_NEEDS, ("packed", "data")))


def add_options(parser: argparse.ArgumentParser) -> None:
    """The options of a program that trains by ds_vshape.finetuning."""
    parser.add_argument("--model", type=Path, required=True, help="folder with config.json and safetensors")
    parser.add_argument("--output", type=Path, required=True, help="new folder for the trained model")
    parser.add_argument("--lora", type=Path, help="folder with adapter_config.json: train adapters, not the model")
    parser.add_argument("--validation", type=Path, help="as --data, for evaluation (default: a twentieth of the data)")
    parser.add_argument("--epochs", type=float, help="how often to train on the data, instead of --batches")
    parser.add_argument("--batches", type=int, default=30)
    parser.add_argument("--learning_rate", help="linear, cosine or another one of transformers' schedules (default: "
                        "as the config says)")
    parser.add_argument("--warmup", type=float, default=0.0, help="its share of the batches")
    parser.add_argument("--evaluate_every", type=int, default=0, help="batches (default: after the last one alone)")
    parser.add_argument("--checkpoints", type=Path, help="folder for checkpoints, from whose last one training goes on")
    parser.add_argument("--save_every", type=int, default=0, help="batches between checkpoints")
    parser.add_argument("--length", type=int, default=128, help="tokens in a row, at most")
    parser.add_argument("--stages", type=int, default=0, help="pipeline ranks (default: all ranks)")
    parser.add_argument("--tensor_parallel", type=int, default=1, help="ranks that share each layer")
    parser.add_argument("--attention", choices=["sdpa", "eager"], help="by default transformers chooses")
    parser.add_argument("--experts", choices=["grouped_mm", "batched_mm", "eager"],
                        help="how the experts of a mixture are computed; by default transformers chooses")
    parser.add_argument("--chunked_head", action="store_true", help="compute logits for some tokens at a time, which "
                        "saves their memory")
    parser.add_argument("--result", type=Path, help="where rank 0 writes what it measured, as JSON")
    parser.add_argument("--local_rank", type=int, default=-1, help="set by the launcher")


def parsed(parser: argparse.ArgumentParser, words: list[str] | None,
           needs: Sequence[Needs] = _NEEDS) -> argparse.Namespace:
    """The options in `words`; SystemExit for one of `needs` alone, which would be passed over in silence."""
    args = deepspeed.add_config_arguments(parser).parse_args(words)
    for option, needed in needs:
        if getattr(args, option) and not getattr(args, needed):
            parser.error(f"--{option} {getattr(args, option)}: must come with --{needed}")
    return args
