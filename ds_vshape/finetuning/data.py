"""Rows to train and to evaluate on, from files and the tokenizer of a model; the same on every rank."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import torch.distributed as dist
from transformers import AutoTokenizer

from ds_vshape.finetuning.batches import PackedRows, PaddedRows, Rows
from ds_vshape.finetuning.samples import read_rows, samples_of

if TYPE_CHECKING:
    from datasets import Dataset

# Without a file for evaluation, this share of the rows is kept for it, chosen by this seed.
HELD_OUT, HELD_OUT_SEED = 0.05, 0


def open_rows(training: Path, validation: Path | None, model: Path, length: int, packed: bool) -> tuple[Rows, Rows]:
    """Rows of at most `length` tokens to train and to evaluate on; without `validation`, HELD_OUT of the rows are for
    evaluation. To be called on every rank: the others read from datasets' cache what rank 0 has tokenized.

    Raises:
        ValueError: for files and folders that can't be used, as samples.py says.
    """
    with first_rank_first():
        tokenizer = AutoTokenizer.from_pretrained(model)
        padding = tokenizer.pad_token_id or 0
        samples = [samples_of(each, tokenizer, length + 1) for each in parts(training, validation, read_rows)]
    if packed:
        return PackedRows(samples[0], length, padding), PackedRows(samples[1], length, padding)
    return PaddedRows(samples[0], padding), PaddedRows(samples[1], padding)


def parts(training: Path, validation: Path | None, read: Callable[[Path], Dataset]) -> tuple[Dataset, Dataset]:
    """What `read` makes of both files; without `validation`, HELD_OUT of the rows of the other one are for evaluation.

    Raises:
        ValueError: for a single row that would be divided.
    """
    rows = read(training)
    if validation is not None:
        return rows, read(validation)
    if len(rows) < 2:
        raise ValueError(f"{training} has {len(rows)} rows: must have at least 2, one of them for evaluation")
    divided = rows.train_test_split(HELD_OUT if len(rows) * HELD_OUT >= 1 else 1, seed=HELD_OUT_SEED)
    return divided["train"], divided["test"]


@contextmanager
def first_rank_first() -> Iterator[None]:
    """The others wait for rank 0, even if it raises: they then meet the same error."""
    if dist.get_rank():
        dist.barrier()
    try:
        yield
    finally:
        if not dist.get_rank():
            dist.barrier()
