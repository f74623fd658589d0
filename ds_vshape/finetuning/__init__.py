"""Fine-tuning of Hugging Face models on text and conversations (the extra `finetuning`).

    settings.py     what a fine-tuning is told: one table
    composition.py  settings from overrides and configs, by hydra
    data.py         rows to train and to evaluate on, on every rank
    formats.py      what a row of data may hold
    samples.py      files to token ids, and which of them are learned
    packing.py      which samples share a row
    pairs.py        preference pairs: files to rows
    dpo.py          direct preference optimization: the loss of pairs
    reference.py    log-probabilities of pairs by the model that training starts from
    batches.py      rows to micro-batches, in an order that continues where a training stopped
    training.py     batches, with evaluations and checkpoints at intervals, from the last checkpoint on
    record.py       a training that has ended, so that its command ends at once when it's started again
    progress.py     a bar, lines of the log, numbers for wandb and TensorBoard
    trainer/        the Trainer of transformers, and TRL's SFTTrainer, with a pipeline in the place of their step
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ds_vshape.finetuning.trainer.pipeline_trainer import PipelineTrainer
    from ds_vshape.finetuning.trainer.sft_trainer import PipelineSFTTrainer

__all__ = ["PipelineSFTTrainer", "PipelineTrainer"]

# Imported when asked for: each needs an extra that the others do without.
_HOMES = {"PipelineTrainer": "ds_vshape.finetuning.trainer.pipeline_trainer",
          "PipelineSFTTrainer": "ds_vshape.finetuning.trainer.sft_trainer"}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(_HOMES[name]), name)
