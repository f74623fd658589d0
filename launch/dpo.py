"""Trains a Hugging Face model on preference pairs, by direct preference optimization, with a pipeline of all ranks.

    python launch/tiny_model.py llama runs/tiny-chat --chat
    python launch/preferences.py runs/pairs.jsonl
    deepspeed --num_gpus 2 launch/dpo.py --model runs/tiny-chat --data runs/pairs.jsonl --output runs/preferred \\
        --deepspeed_config configs/finetune.json

The reference is the model that training starts from: the folder's, or with --lora FOLDER the folder's without adapters,
or with those adapters that FOLDER holds already. A micro-batch of the config has so many pairs.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from functools import partial
from typing import Any

from finetune import build, load, run, save, start
from finetune_options import add_options, parsed

from ds_vshape.finetuning.dpo import LOSS_TYPES, DPOLoss, disable_dropout
from ds_vshape.finetuning.pairs import open_pairs
from ds_vshape.finetuning.record import Record
from ds_vshape.finetuning.reference import with_reference
from ds_vshape.finetuning.training import Result, Training
from ds_vshape.models.hugging_face.folder import read_config

DESCRIPTION = ("Trains a Hugging Face model on preference pairs, by direct preference optimization, with a pipeline of "
               "all ranks. configs/finetune.yaml has the other keys.")
# In the folder of checkpoints.
REFERENCE_FILES = ("reference.safetensors", "reference-validation.safetensors")
_NOT_OF_PAIRS = ("text", "packed", "chunked_head")


def arguments(words: list[str] | None = None) -> argparse.Namespace:
    """Of the command line, or of `words`, as finetune.py has it; SystemExit if they are wrong."""
    parser = argparse.ArgumentParser(prog="dpo.py", description=DESCRIPTION, allow_abbrev=False)
    add_options(parser)
    parser.add_argument("--data", default=argparse.SUPPRESS, help="pairs, .jsonl, .json or .parquet with \"chosen\", "
                        "\"rejected\" and perhaps \"prompt\", or a folder of datasets")
    parser.add_argument("--beta", type=float, default=0.1, help="how strongly the model is kept near the reference")
    parser.add_argument("--loss_type", choices=LOSS_TYPES, default="sigmoid", help="as TRL calls it")
    parser.add_argument("--label_smoothing", type=float, default=0.0,
                        help="share of the pairs that are labelled the wrong way round")
    args = parsed(parser, words)
    if args.data is None:
        parser.error("data = None: must be a file or folder of pairs")
    for key in _NOT_OF_PAIRS:
        if getattr(args, key):
            parser.error(f"{key} = {getattr(args, key)}: must be left out with pairs")
    try:
        loss_of(args)()
    except ValueError as error:
        parser.error(str(error))
    return args


def loss_of(args: argparse.Namespace) -> Callable[..., DPOLoss]:
    """Makes the loss function for the group of a rank's tensor parallel ranks."""
    return partial(DPOLoss, beta=args.beta, loss_type=args.loss_type, label_smoothing=args.label_smoothing)


def reference_of(args: argparse.Namespace, module: Any) -> AbstractContextManager[None]:
    """Within it, the layers of a model that has just been loaded are those of the reference."""
    if args.lora is None:
        return nullcontext()
    from ds_vshape.models.hugging_face.lora import adapters_off  # peft is an extra of its own
    from ds_vshape.models.hugging_face.lora_files import has_adapter
    return nullcontext() if has_adapter(args.lora) else adapters_off(module)


def train_on_pairs(args: argparse.Namespace) -> Result:
    """Trains the model and writes it; to be called on every rank."""
    record = Record(vars(args))
    if (ended := record.result()) is not None:
        return ended
    config = read_config(args.model)
    module = build(args, config, loss_of(args))
    pairs = open_pairs(args.data, args.validation, args.model, args.length)
    load(args, module)
    disable_dropout(module)
    engine, plan = start(args, module, pairs)
    # Before a checkpoint is loaded: its weights have been trained.
    with reference_of(args, engine.module):
        training, validation = (with_reference(engine, rows, args.checkpoints and args.checkpoints / file)
                                for rows, file in zip(pairs, REFERENCE_FILES))
    result = Training(engine, replace(plan, training=training, validation=validation)).run()
    record.write(result)
    save(args, engine.module, config)
    return result


if __name__ == "__main__":
    run(arguments(), train_on_pairs)
