"""How many micro-batches a batch has, by the keys of a ds_config."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ds_vshape.config.section import shown


def micro_batches_of(ds_config: Mapping[str, Any], replicas: int = 1) -> int | None:
    """The accumulation steps of each of `replicas` data parallel ranks, as DeepSpeed finds them (runtime/config.py,
    _set_batch_related_parameters); None where nothing says so, or "auto".

    Raises ValueError for values that aren't positive whole numbers, and for a batch that can't be divided.
    """
    steps = whole_number(ds_config, "gradient_accumulation_steps")
    batch, micro_batch = (whole_number(ds_config, key) for key in ("train_batch_size",
                                                                   "train_micro_batch_size_per_gpu"))
    if steps is not None:
        return steps
    if batch is None and micro_batch is None:
        return None
    if batch is None or micro_batch is None:
        return 1
    if batch % (micro_batch * replicas):
        of_replicas = "" if replicas == 1 else f" on {replicas} replicas"
        raise ValueError(f"train_batch_size = {batch} is not a multiple of train_micro_batch_size_per_gpu = "
                         f"{micro_batch}{of_replicas}")
    return batch // (micro_batch * replicas)


def whole_number(section: Mapping[str, Any], key: str, path: str | None = None) -> int | None:
    """The value of `key`, None if it's missing or "auto"; ValueError, which names `path`, for others than counts."""
    value = section.get(key)
    if value is None or value == "auto":
        return None
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise ValueError(f"{path or key} = {shown(value)} in the config: must be a whole number of at least 1")
    return value
