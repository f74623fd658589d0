"""launch/finetune.py and launch/dpo.py on one of the forked ranks."""

from __future__ import annotations

import dpo
from finetune import arguments, finetune

from ds_vshape.finetuning.training import Result


def run_finetune(rank: int, words: list[str]) -> list[float]:
    """The losses of the batches, and the last evaluation's."""
    result = finetune(arguments(words))
    return [*result.losses, result.validation_loss]


def run_dpo(rank: int, words: list[str]) -> Result:
    """What a rank has measured."""
    return dpo.train_on_pairs(dpo.arguments(words))
