"""Trains a Hugging Face model by transformers' Trainer, in a pipeline of all ranks.

    python launch/tiny_model.py llama runs/tiny-chat --chat
    python launch/conversations.py runs/library.jsonl
    deepspeed --num_gpus 2 launch/trainer.py --model runs/tiny-chat --data runs/library.jsonl \\
        --output_dir runs/trained --deepspeed configs/trainer.json --max_steps 20

All options but the first ones are TrainingArguments; on a machine without a GPU add --use_cpu. The folder --output_dir
then holds checkpoints and, as its `final`, a model that loads in AutoModelForCausalLM. --resume_from_checkpoint FOLDER
goes on from a checkpoint.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch.distributed
from transformers import AutoTokenizer, DataCollatorForSeq2Seq, HfArgumentParser, TrainingArguments

from ds_vshape.finetuning import PipelineTrainer
from ds_vshape.finetuning.batches import IDS, LEARNED
from ds_vshape.finetuning.data import HELD_OUT, HELD_OUT_SEED
from ds_vshape.finetuning.samples import read_rows, samples_of
from ds_vshape.split_backward.head import IGNORE_INDEX


@dataclass
class Options:
    """What is trained on what."""

    model: Path = field(metadata={"help": "folder with config.json, safetensors and a tokenizer"})
    data: Path = field(metadata={"help": "as launch/finetune.py takes it: rows with \"text\" or \"messages\""})
    length: int = field(default=512, metadata={"help": "tokens of a row, at most"})
    stages: int = field(default=0, metadata={"help": "ranks of a pipeline (default: all ranks)"})


def data_sets(options: Options, tokenizer: Any) -> dict[str, Any]:
    """To train and to evaluate on."""
    def as_columns(sample: dict[str, list[Any]]) -> dict[str, list[int]]:
        return {"input_ids": sample[IDS],
                "labels": [token if learned else IGNORE_INDEX for token, learned in zip(sample[IDS], sample[LEARNED])]}

    samples = samples_of(read_rows(options.data), tokenizer, options.length)
    parts = samples.map(as_columns, remove_columns=[IDS, LEARNED], desc="labels").train_test_split(
        HELD_OUT, seed=HELD_OUT_SEED)
    return {"train_dataset": parts["train"], "eval_dataset": parts["test"]}


def train(options: Options, args: TrainingArguments) -> float:
    """Train, save and evaluate, on every rank; the loss of the evaluation."""
    tokenizer = AutoTokenizer.from_pretrained(options.model)
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
    with args.main_process_first(desc="tokens"):  # the others read what it has cached
        data = data_sets(options, tokenizer)
    trainer = PipelineTrainer(options.model, args, data_collator=DataCollatorForSeq2Seq(tokenizer),
                              processing_class=tokenizer, stages=options.stages, **data)
    trainer.train(resume_from_checkpoint=args.resume_from_checkpoint)
    trainer.save_model(str(Path(str(args.output_dir)) / "final"))
    return float(trainer.evaluate()["eval_loss"])


def main() -> None:
    options, args = HfArgumentParser((Options, TrainingArguments)).parse_args_into_dataclasses()
    train(options, args)
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main()
