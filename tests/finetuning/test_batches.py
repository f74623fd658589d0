"""Micro-batches of rows: their order, and what is in them."""

from __future__ import annotations

from collections import Counter
from itertools import islice
from typing import Any

import pytest
import torch
from datasets import Dataset
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM

from ds_vshape.finetuning.batches import MicroBatches, PackedRows, PaddedRows
from ds_vshape.split_backward.head import IGNORE_INDEX

SAMPLES = Dataset.from_list([
    {"ids": [10 * sample + token for token in range(2 + sample % 5)],
     "learned": [token != 1 or sample % 5 == 0 for token in range(2 + sample % 5)]} for sample in range(13)])
ROWS = PaddedRows(SAMPLES)


def firsts(batches: Any, number: int) -> list[int]:
    """The first tokens of the rows of the next micro-batches."""
    return [int(ids[row, 0]) for ids, _ in islice(batches, number) for row in range(len(ids))]


def test_an_epoch_has_every_row_once_and_each_its_own_order() -> None:
    drawn = firsts(MicroBatches(ROWS, 1, 0), 26)
    assert Counter(drawn[:13]) == Counter(drawn[13:]) == Counter(range(0, 130, 10))
    assert drawn[:13] != drawn[13:] and drawn != firsts(MicroBatches(ROWS, 1, 1), 26)


@pytest.mark.parametrize("replicas", [1, 2, 4])
def test_replicas_share_the_order_and_it_goes_on_anywhere(replicas: int) -> None:
    whole = firsts(MicroBatches(ROWS, 1, 3), 40)
    for start in (0, 8, 16):
        parts = [firsts(MicroBatches(ROWS, 2, 3, replica, replicas, start), 4 // replicas)
                 for replica in range(replicas)]
        rows = [row for step in range(4 // replicas) for part in parts for row in part[2 * step:2 * step + 2]]
        assert rows == whole[start:start + 8]


def losses(logits: Tensor, labels: Tensor) -> Tensor:
    return torch.nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten(), ignore_index=IGNORE_INDEX,
                                             reduction="sum")


@pytest.mark.parametrize("family, attention", [("llama", "sdpa"), ("llama", "eager"), ("gpt2", "sdpa")])
def test_padded_and_packed_rows_have_the_losses_of_samples_alone(family: str, attention: str) -> None:
    """transformers keeps the samples of a row apart, by its position ids."""
    torch.manual_seed(0)
    config = AutoConfig.for_model(family, vocab_size=256, hidden_size=16, num_hidden_layers=2, num_attention_heads=2,
                                  **({} if family == "gpt2" else {"intermediate_size": 32}))
    model = AutoModelForCausalLM.from_config(config, attn_implementation=attention).double().eval()
    alone = torch.zeros((), dtype=torch.double)
    for sample in SAMPLES:
        ids, learned = torch.tensor([sample["ids"]]), torch.tensor([sample["learned"]])
        alone = alone + losses(model(ids).logits[:, :-1], torch.where(learned, ids, IGNORE_INDEX)[:, 1:])
    ids, labels = ROWS.micro_batch(range(13))
    assert ids.shape == (13, 8)
    assert torch.allclose(losses(model(ids).logits, labels), alone)
    packed = PackedRows(SAMPLES, 11)
    assert len(packed) == 4  # of 37 tokens
    assert packed.samples_per_row == max(int((packed.micro_batch([row])[0][1] == 0).sum()) for row in range(4))
    (ids, positions), labels = packed.micro_batch(range(4))
    assert torch.allclose(losses(model(ids, position_ids=positions, use_cache=False).logits, labels), alone)
    assert not torch.allclose(losses(model(ids, use_cache=False).logits, labels), alone)


def test_no_rows() -> None:
    with pytest.raises(ValueError, match="no rows"):
        MicroBatches(PaddedRows(SAMPLES.select([])), 1, 0)
