"""Trainings by a Trainer, of transformers or ours, on the same data."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad
from transformers import AutoModelForCausalLM, Trainer, TrainingArguments

from ds_vshape.finetuning import PipelineTrainer

STEPS = 20
CONFIG: dict[str, Any] = {"pipeline_schedule": "v-half", "zero_optimization": {"stage": 0}}
# What depends on the machine, or on how often evaluation was run.
_TIMES = ("runtime", "per_second", "model_preparation_time")


def rows(count: int, seed: int = 0) -> list[dict[str, Tensor]]:
    """Samples of different lengths; what is learned starts at different places."""
    generator = torch.Generator().manual_seed(seed)
    samples = []
    for length in torch.randint(5, 20, (count,), generator=generator).tolist():
        ids = torch.randint(256, (length,), generator=generator)
        samples.append({"input_ids": ids, "labels": torch.where(torch.arange(length) < length // 3, -100, ids)})
    return samples


def collate(samples: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    """Padded on the right, with a mask."""
    length = max(len(sample["input_ids"]) for sample in samples)

    def padded(tensors: list[Tensor], value: int) -> Tensor:
        return torch.stack([pad(tensor, (0, length - len(tensor)), value=value) for tensor in tensors])

    ids = [sample["input_ids"] for sample in samples]
    return {"input_ids": padded(ids, 0), "attention_mask": padded([torch.ones_like(each) for each in ids], 0),
            "labels": padded([sample["labels"] for sample in samples], -100)}


def arguments(output: Path, kind: Any = TrainingArguments, **others: Any) -> Any:
    """As both trainers get them, on the CPU."""
    # accelerate wants it where a launcher hasn't said how many ranks a host has.
    os.environ.setdefault("MASTER_ADDR", "127.0.0.1")
    return kind(**{"output_dir": str(output), "use_cpu": True, "dataloader_pin_memory": False, "report_to": [],
                   "disable_tqdm": True, "per_device_train_batch_size": 2, "per_device_eval_batch_size": 2,
                   "max_steps": STEPS, "logging_steps": 1, "save_strategy": "no", "eval_strategy": "steps",
                   "eval_steps": 5, "learning_rate": 1e-3, "warmup_steps": 2, "weight_decay": 0.1,
                   "include_num_input_tokens_seen": "all", **others})


def train_plainly(rank: int, model: Path, output: Path, training: Any, validation: Any,
                  others: dict[str, Any]) -> tuple[list[dict[str, Any]], dict[str, Tensor]]:
    """The log of transformers' Trainer, and its weights afterwards."""
    trainer = Trainer(AutoModelForCausalLM.from_pretrained(model), arguments(output, **others), collate, training,
                      validation)
    trainer.train()
    return measured(trainer), trainer.model.state_dict()


def train_in_pipelines(rank: int, model: Path, output: Path, training: Any, validation: Any, stages: int,
                       others: dict[str, Any]) -> list[dict[str, Any]]:
    """The log of a PipelineTrainer, whose model is in `output`/final afterwards."""
    trainer = PipelineTrainer(model, arguments(output, **{"deepspeed": CONFIG, **others}), data_collator=collate,
                              train_dataset=training, eval_dataset=validation, stages=stages)
    trainer.train()
    trainer.save_model(str(output / "final"))
    return measured(trainer)


def measured(trainer: Any) -> list[dict[str, Any]]:
    """The log without times."""
    return [{name: value for name, value in entry.items() if not name.endswith(_TIMES)}
            for entry in trainer.state.log_history]
