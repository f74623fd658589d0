"""Log-probabilities of preference pairs by the model that training starts from, kept for a training that goes on."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from deepspeed.accelerator import get_accelerator
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from tqdm import tqdm

from ds_vshape.finetuning.pairs import PairRows

# Of one evaluation.
_MICRO_BATCHES = 32
# In files: the tensor [pairs, 2], and what it was computed from.
_NAME, _MADE_OF = "log_probabilities", "made_of"


def with_reference(engine: Any, rows: PairRows, file: Path | None = None) -> PairRows:
    """`rows` with the log-probabilities of their answers by the model of `engine` as it is now; its loss function must
    be a DPOLoss. Collective: each replica evaluates its share of the rows.

    With a `file`, rank 0 keeps them there. If it has them already, of the same tokens and the same weights on as many
    ranks, nothing is computed.
    """
    made_of = "" if file is None else _made_of(engine.module, rows)
    found: list[Tensor | None] = [_read(file, made_of) if file is not None and dist.get_rank() == 0 else None]
    dist.broadcast_object_list(found, 0)
    reference = found[0]
    if reference is None:
        reference = _computed(engine, rows)
        if file is not None and dist.get_rank() == 0:
            _write(file, made_of, reference)
    return rows.with_reference(reference)


def _computed(engine: Any, rows: PairRows) -> Tensor:
    size, replica, replicas = (engine.train_micro_batch_size_per_gpu(), engine.grid.get_data_parallel_rank(),
                               engine.grid.get_data_parallel_world_size())
    # The last micro-batches begin again with the first rows.
    starts = range(replica * size, len(rows) + replica * size, replicas * size)
    micro_batches = [[(start + place) % len(rows) for place in range(size)] for start in starts]
    found = torch.zeros(len(rows), 3, dtype=torch.float64, device=get_accelerator().current_device_name())
    chunks = [micro_batches[start:start + _MICRO_BATCHES] for start in range(0, len(micro_batches), _MICRO_BATCHES)]
    with _without_monitor(engine):
        for chunk in tqdm(chunks, desc="reference", disable=dist.get_rank() != 0):
            for places, log_probabilities in zip(chunk, _evaluate(engine, rows, chunk)):
                chosen, rejected = log_probabilities.chunk(2)
                found.index_add_(0, torch.tensor(places, device=found.device),
                                 torch.stack([chosen, rejected, torch.ones_like(chosen)], 1).double())
    # Of ranks that have found the same, and of rows that were evaluated twice, the mean.
    dist.all_reduce(found)
    return (found[:, :2] / found[:, 2:]).float().cpu()


def _evaluate(engine: Any, rows: PairRows, micro_batches: Sequence[Sequence[int]]) -> Sequence[Tensor]:
    """What the loss function returns for each of them; nothing on ranks that don't compute it."""
    found = engine.eval_batch(iter([rows.micro_batch(places) for places in micro_batches]), reduce_output=None,
                              bcast_loss=False, num_micro_batches=len(micro_batches))
    return found or ()


@contextmanager
def _without_monitor(engine: Any) -> Iterator[None]:
    """It would report the log-probabilities as an evaluation's loss."""
    enabled, engine.monitor.enabled = engine.monitor.enabled, False
    try:
        yield
    finally:
        engine.monitor.enabled = enabled


def _made_of(module: nn.Module, rows: PairRows) -> str:
    """Tells apart rows, weights, and what part of the weights each rank has (collective)."""
    own = hashlib.sha256(rows.digest().encode())
    for name, weight in module.named_parameters():
        own.update(name.encode())
        own.update(weight.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data)
    of_ranks: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(of_ranks, own.hexdigest())
    return hashlib.sha256("".join(of_ranks).encode()).hexdigest()


def _read(file: Path, made_of: str) -> Tensor | None:
    """What the file holds, if it is of the same."""
    try:
        with safe_open(file, framework="pt") as opened:
            if (opened.metadata() or {}).get(_MADE_OF) == made_of:
                kept: Tensor = opened.get_tensor(_NAME)
                return kept
    except (OSError, SafetensorError):  # absent, or from a run that was ended
        pass
    return None


def _write(file: Path, made_of: str, reference: Tensor) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    draft = file.with_name(f"{file.name}.draft")
    save_file({_NAME: reference.contiguous()}, draft, metadata={_MADE_OF: made_of})
    draft.replace(file)
