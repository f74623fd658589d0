"""What launch/finetune.py is told on its command line."""

from __future__ import annotations

import argparse
from pathlib import Path

import deepspeed

DESCRIPTION = ("Trains a Hugging Face model with a pipeline of all ranks: safetensors in, safetensors out. The "
               "schedule is what \"pipeline_schedule\" in the config names.")


def arguments(words: list[str] | None = None) -> argparse.Namespace:
    """Of the command line, or of `words`; SystemExit if they are wrong."""
    parser = argparse.ArgumentParser(prog="finetune.py", description=DESCRIPTION)
    parser.add_argument("--model", type=Path, required=True, help="folder with config.json and safetensors")
    parser.add_argument("--output", type=Path, required=True, help="new folder for the trained model")
    parser.add_argument("--lora", type=Path, help="folder with adapter_config.json: train adapters, not the model")
    parser.add_argument("--text", type=Path, help="folder with .py files (default: Python's own standard library)")
    parser.add_argument("--data", type=Path, help="instead of text: .jsonl, .json or .parquet with \"text\" or "
                        "\"messages\", or a folder of datasets")
    parser.add_argument("--validation", type=Path, help="the same for evaluation (default: a twentieth of the data)")
    parser.add_argument("--packed", action="store_true", help="several samples of the data in each row")
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
    args = deepspeed.add_config_arguments(parser).parse_args(words)
    # Options that would be passed over in silence.
    for option, value, needed, is_there in (("--save_every", args.save_every, "--checkpoints", args.checkpoints),
                                            ("--validation", args.validation, "--data", args.data),
                                            ("--packed", args.packed, "--data", args.data),
                                            ("--warmup", args.warmup, "--learning_rate", args.learning_rate)):
        if value and not is_there:
            parser.error(f"{option} {value}: must come with {needed}")
    return args
