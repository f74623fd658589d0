"""Micro-batches of samples: in which order, and as which tensors.

A row is one sample, padded to the longest of its micro-batch; or several samples in a fixed length; or a window of one
long text. Epochs follow each other without a gap: a batch may have rows of two. One number says how far a training has
come, the rows so far, whatever the number of replicas.
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from functools import lru_cache
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import Tensor

from ds_vshape.finetuning.packing import pack
from ds_vshape.split_backward.head import IGNORE_INDEX

if TYPE_CHECKING:
    from datasets import Dataset

# The columns of samples: token ids, and for each whether it is learned.
IDS, LEARNED = "ids", "learned"
# Lengths of padded micro-batches are multiples of it, because matrix products on GPUs are faster then.
MULTIPLE = 8


class Rows(Protocol):
    """What a micro-batch is made of."""

    def __len__(self) -> int:
        """The number of rows of an epoch."""

    def micro_batch(self, rows: Sequence[int]) -> tuple[Any, Any]:
        """Inputs and labels of these rows. Labels [rows, length] are the tokens that come next, or IGNORE_INDEX; other
        labels are possible where the loss function knows them."""

    def tokens(self, row: int) -> int:
        """The number of tokens of a row, without padding."""


class PaddedRows:
    """A sample in each row; inputs are ids [rows, length].

    There is no attention mask: a causal model doesn't see the padding after a sample from within it.
    """

    def __init__(self, samples: Dataset, padding: int = 0) -> None:
        self._samples = samples
        self._padding = padding

    def __len__(self) -> int:
        return len(self._samples)

    def micro_batch(self, rows: Sequence[int]) -> tuple[Tensor, Tensor]:
        return padded([self._samples[row] for row in rows], self._padding)

    def tokens(self, row: int) -> int:
        return len(self._samples[row][IDS]) - 1


class PackedRows:
    """Samples one after the other in rows of `length` tokens; inputs are (ids, position ids), each [rows, length].

    The positions of each sample start at 0, by which transformers keeps the samples of a row apart. So do those of the
    padding after them.

    Attributes:
        samples_per_row: the most samples in a row, with its padding.

    Raises:
        ValueError: for a sample of more than `length` + 1 tokens.
    """

    def __init__(self, samples: Dataset, length: int, padding: int = 0) -> None:
        self._samples = samples
        self._length = length
        self._padding = padding
        self._lengths = [len(ids) - 1 for ids in samples[IDS]]
        self._rows = pack(self._lengths, length)
        self.samples_per_row = max((len(row) + (self.tokens(place) < length) for place, row in enumerate(self._rows)),
                                   default=1)

    def __len__(self) -> int:
        return len(self._rows)

    def micro_batch(self, rows: Sequence[int]) -> tuple[tuple[Tensor, Tensor], Tensor]:
        ids = torch.full((len(rows), self._length), self._padding)
        labels = torch.full((len(rows), self._length), IGNORE_INDEX)
        positions = torch.empty_like(ids)
        for row, place in enumerate(rows):
            start = 0
            for sample in self._rows[place]:
                stop = start + _put(self._samples[sample], ids[row, start:], labels[row, start:])
                positions[row, start:stop] = torch.arange(stop - start)
                start = stop
            positions[row, start:] = torch.arange(self._length - start)
        return (ids, positions), labels

    def tokens(self, row: int) -> int:
        return sum(self._lengths[sample] for sample in self._rows[row])


class WindowRows:
    """Windows of `length` tokens, one after the other, of a text; inputs are ids [rows, length].

    Raises:
        ValueError: for a text of `length` tokens or fewer.
    """

    def __init__(self, text: Tensor, length: int) -> None:
        if len(text) <= length:
            raise ValueError(f"a text of {len(text)} tokens has no window of {length} + 1")
        self._text = text
        self._length = length

    def __len__(self) -> int:
        return (len(self._text) - 1) // self._length

    def micro_batch(self, rows: Sequence[int]) -> tuple[Tensor, Tensor]:
        windows = self._text[torch.tensor(rows)[:, None] * self._length + torch.arange(self._length + 1)].long()
        return windows[:, :-1].contiguous(), windows[:, 1:].contiguous()

    def tokens(self, row: int) -> int:
        return self._length


def padded(samples: Sequence[dict[str, list[Any]]], padding: int) -> tuple[Tensor, Tensor]:
    """Ids and labels [samples, length of the longest, rounded up] with a sample in each row."""
    length = max(len(sample[IDS]) - 1 for sample in samples)
    length = -(-length // MULTIPLE) * MULTIPLE
    ids = torch.full((len(samples), length), padding)
    labels = torch.full((len(samples), length), IGNORE_INDEX)
    for row, sample in enumerate(samples):
        _put(sample, ids[row], labels[row])
    return ids, labels


def _put(sample: dict[str, list[Any]], ids: Tensor, labels: Tensor) -> int:
    """Write a sample at the start of a row; returns the number of its tokens there."""
    tokens, learned = torch.tensor(sample[IDS]), torch.tensor(sample[LEARNED])
    length = len(tokens) - 1
    ids[:length] = tokens[:-1]
    labels[:length] = torch.where(learned[1:], tokens[1:], IGNORE_INDEX)
    return length


class MicroBatches(Iterator[tuple[Any, Any]]):
    """The endless micro-batches of one replica, in an order that depends on `seed` and the epoch alone.

    Args:
        size: rows in a micro-batch.
        replica, replicas: of every `replicas` x `size` rows, each replica gets its own `size`.
        start: how many rows all replicas together have had before.

    Raises:
        ValueError: if there are no rows.
    """

    def __init__(self, rows: Rows, size: int, seed: int, replica: int = 0, replicas: int = 1, start: int = 0) -> None:
        if not len(rows):
            raise ValueError("there are no rows to make micro-batches of")
        self._rows = rows
        self._size = size
        self._seed = seed
        self._stride = size * replicas
        self._next = start + size * replica
        # Of the rows that have been drawn, without padding.
        self.tokens = 0

    def __next__(self) -> tuple[Any, Any]:
        rows = [self._row(place) for place in range(self._next, self._next + self._size)]
        self._next += self._stride
        self.tokens += sum(map(self._rows.tokens, rows))
        return self._rows.micro_batch(rows)

    def _row(self, place: int) -> int:
        epoch, place = divmod(place, len(self._rows))
        return _epoch_order(len(self._rows), self._seed, epoch)[place]


@lru_cache(maxsize=4)
def _epoch_order(rows: int, seed: int, epoch: int) -> list[int]:
    order = list(range(rows))
    random.Random(f"{seed} {epoch}").shuffle(order)
    return order
