"""Rows to train and to evaluate on, from files and the tokenizer of a model; the same on every rank."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import torch.distributed as dist
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from ds_vshape.finetuning.batches import IDS, PackedRows, PaddedRows, Rows
from ds_vshape.finetuning.samples import read_rows, samples_of
from ds_vshape.models.hugging_face.folder import read_config

if TYPE_CHECKING:
    from datasets import Dataset

# Without a file for evaluation, this share of the rows is kept for it, chosen by this seed.
HELD_OUT, HELD_OUT_SEED = 0.05, 0


def open_rows(training: Path, validation: Path | None, model: Path, length: int, packed: bool) -> tuple[Rows, Rows]:
    """Rows of at most `length` tokens to train and to evaluate on; without `validation`, HELD_OUT of the rows are for
    evaluation. To be called on every rank: the others read from datasets' cache what rank 0 has tokenized.

    Raises:
        ValueError: for files and folders that can't be used, as samples.py says, and for tokens that the model
            doesn't have.
    """
    with first_rank_first():
        tokenizer, vocabulary = open_tokenizer(model)
        padding = padding_of(tokenizer, vocabulary)
        samples = [samples_of(each, tokenizer, length + 1) for each in parts(training, validation, read_rows)]
        for part in samples:
            check_tokens(part, (IDS,), tokenizer, vocabulary)
    if packed:
        return PackedRows(samples[0], length, padding), PackedRows(samples[1], length, padding)
    return PaddedRows(samples[0], padding), PaddedRows(samples[1], padding)


def open_tokenizer(model: Path) -> tuple[PreTrainedTokenizerBase, int]:
    """The tokenizer in a model's folder, and how many tokens the model has.

    Raises:
        ValueError: if the folder has none that transformers can load, or no config.
    """
    vocabulary: int = read_config(model).get_text_config().vocab_size
    try:
        return AutoTokenizer.from_pretrained(model), vocabulary
    except (ValueError, KeyError, OSError) as error:
        raise ValueError(f"model = {str(model)!r}: has no tokenizer that transformers can load: must hold "
                         "tokenizer.json and tokenizer_config.json, or what its tokenizer reads instead") from error


def check_tokens(rows: Dataset, columns: Iterable[str], tokenizer: PreTrainedTokenizerBase, vocabulary: int) -> None:
    """ValueError for a token id in these columns that isn't below `vocabulary`: the embedding of a GPU would end the
    process without naming it."""
    if len(tokenizer) <= vocabulary:
        return
    largest = max((max(ids, default=0) for column in columns for ids in rows[column]), default=0)
    if largest >= vocabulary:
        raise ValueError(f"vocab_size = {vocabulary} in the model's config.json: must be at least {largest + 1}, for "
                         f"the token {tokenizer.convert_ids_to_tokens(largest)!r} of the data; resize the model's "
                         "embeddings (resize_token_embeddings), or use the tokenizer that it was trained with")


def padding_of(tokenizer: PreTrainedTokenizerBase, vocabulary: int) -> int:
    """The token that fills rows up: the tokenizer's, if the model has it. Nothing is learned of it."""
    padding = tokenizer.pad_token_id
    return padding if isinstance(padding, int) and padding < vocabulary else 0


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
