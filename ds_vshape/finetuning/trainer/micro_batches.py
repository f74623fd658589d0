"""What a data collator gives, as the inputs and labels of a pipeline."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch.nn.functional as F
from torch import Tensor

from ds_vshape.split_backward.head import IGNORE_INDEX

IDS, LABELS, MASK, POSITIONS = "input_ids", "labels", "attention_mask", "position_ids"
# What collators of packed rows compute ahead from the position ids, for kernels that want it.
_FROM_POSITIONS = {"cu_seq_lens_q", "cu_seq_lens_k", "max_length_q", "max_length_k", "seq_idx"}


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
