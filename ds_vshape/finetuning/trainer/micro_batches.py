"""What a data collator gives, as the inputs and labels of a pipeline."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch.nn.functional as F
from torch import Tensor

from ds_vshape.split_backward.head import IGNORE_INDEX

IDS, LABELS, MASK, POSITIONS = "input_ids", "labels", "attention_mask", "position_ids"
# What collators of packed rows compute ahead from the position ids, for kernels that want it.
_FROM_POSITIONS = {"cu_seq_lens_q", "cu_seq_lens_k", "max_length_q", "max_length_k", "seq_idx"}


# The column in which TRL keeps how long each sample of a packed row is.
_LENGTHS = "seq_lengths"


def most_samples(collator: Any, data_sets: Iterable[Any], rows: int) -> int:
    """The most samples that a `collator` of packed rows puts into one: those of `rows` rows of the data sets, each of
    which is a sample unless TRL has packed it. What fills the row up counts as one sample each."""
    of_rows = [1]
    for data in data_sets:
        if _LENGTHS in (getattr(data, "column_names", None) or ()):
            of_rows += map(len, data[_LENGTHS])
    return rows * max(of_rows) + max(0, (getattr(collator, "pad_to_multiple_of", None) or 1) - 1)


def micro_batch(batch: Mapping[str, Any], packed: bool) -> tuple[Any, Tensor]:
    """Inputs as pipeline_layers takes them, and labels [rows, length] that are the tokens that come next.

    Args:
        packed: rows hold several samples, which their position ids keep apart.

    Raises:
        ValueError: for a batch with other members, or without one that is needed; it names the members.
    """
    needed = {IDS, LABELS, POSITIONS} if packed else {IDS, LABELS}
    legal = needed | (_FROM_POSITIONS if packed else {MASK, POSITIONS})
    if not needed <= batch.keys() <= legal:
        raise ValueError(f"the data collator gave {', '.join(sorted(batch))}: must be {', '.join(sorted(needed))}"
                         f"{'' if packed else f' and perhaps {MASK}, {POSITIONS}'}")
    ids: Tensor = batch[IDS]
    labels = F.pad(batch[LABELS][:, 1:], (0, 1), value=IGNORE_INDEX)
    if packed:
        return (ids, batch[POSITIONS]), labels
    if MASK not in batch and POSITIONS not in batch:
        return ids, labels
    mask = batch.get(MASK)
    positions = batch.get(POSITIONS)
    if positions is None:
        positions = ids.new_ones(ids.shape).cumsum(-1) - 1
    return (ids, ids.new_ones(ids.shape) if mask is None else mask, positions), labels
