"""launch/finetune.py on one of the forked ranks."""

from __future__ import annotations

from finetune import arguments, finetune


def run_finetune(rank: int, words: list[str]) -> list[float]:
    """The losses of the batches, and the last evaluation's."""
    result = finetune(arguments(words))
    return [*result.losses, result.validation_loss]
