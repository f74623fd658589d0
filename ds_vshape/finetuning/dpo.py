"""Direct preference optimization (Rafailov et al., 2023): the loss of preference pairs, and their reference.

    [1] before training    the pipeline evaluates all pairs, by the weights that it starts with, or by the base model
                           of its adapters; their log-probabilities travel with the labels from then on
    [2] a micro-batch      the chosen answers of n pairs, then the rejected ones: one forward of 2n rows
    [3] its loss           the mean over its pairs; batches average micro-batches and replicas, which have n pairs each,
                           so that theirs is the mean over pairs too

Losses and metrics are those of TRL's DPOTrainer (trl/trainer/dpo_trainer.py).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from deepspeed.accelerator import get_accelerator
from torch import Tensor, nn
from tqdm import tqdm

from ds_vshape.finetuning.pairs import PairRows
from ds_vshape.models.hugging_face.tensor_parallel import TensorParallelLoss, parts_of, shares_vocabulary
from ds_vshape.split_backward.head import IGNORE_INDEX, HeadOutput

# What TRL calls the means over pairs that a DPOLoss measures.
METRICS = ("rewards/chosen", "rewards/rejected", "rewards/accuracies", "rewards/margins")
# Of an evaluation of the reference.
_MICRO_BATCHES = 32


@dataclass(frozen=True)
class LogRatios:
    """log p(answer) of the model, less that of the reference: each [pairs]; and the answers' numbers of tokens."""

    chosen: Tensor
    rejected: Tensor
    chosen_tokens: Tensor
    rejected_tokens: Tensor

    @property
    def margin(self) -> Tensor:
        return self.chosen - self.rejected

    @property
    def margin_per_token(self) -> Tensor:
        return self.chosen / self.chosen_tokens.clamp(min=1) - self.rejected / self.rejected_tokens.clamp(min=1)


def _sigmoid(ratios: LogRatios, beta: float, smoothing: float) -> Tensor:
    """Of which `smoothing` pairs are taken to be labelled the wrong way round (conservative DPO, Mitchell 2023)."""
    margin = beta * ratios.margin
    return -(1 - smoothing) * F.logsigmoid(margin) - smoothing * F.logsigmoid(-margin)


def _robust(ratios: LogRatios, beta: float, smoothing: float) -> Tensor:
    """Without the bias that pairs labelled the wrong way round have (Chowdhury et al., 2024)."""
    margin = beta * ratios.margin
    return (-(1 - smoothing) * F.logsigmoid(margin) + smoothing * F.logsigmoid(-margin)) / (1 - 2 * smoothing)


# The loss of each pair, by TRL's name for it.
LOSS_TYPES: dict[str, Callable[[LogRatios, float, float], Tensor]] = {
    "sigmoid": _sigmoid,
    "robust": _robust,
    "hinge": lambda ratios, beta, _: torch.relu(1 - beta * ratios.margin),
    "ipo": lambda ratios, beta, _: (ratios.margin_per_token - 1 / (2 * beta)) ** 2,
    "apo_zero": lambda ratios, beta, _: 1 - torch.sigmoid(beta * ratios.chosen) + torch.sigmoid(beta * ratios.rejected),
    "apo_down": lambda ratios, beta, _: torch.sigmoid(beta * ratios.chosen) + 1 - torch.sigmoid(beta * ratios.margin),
}
_SMOOTHED = ("sigmoid", "robust")


class DPOLoss:
    """The mean loss of a micro-batch of preference pairs, for a PipelineModule of a Hugging Face model.

    Labels are (tokens of the answers [2 x pairs, length] and -100 elsewhere, the reference's log-probabilities
    [2 x pairs]), each with the chosen answers before the rejected ones. Given the first of these alone, it returns the
    log-probabilities of the answers [2 x pairs] instead, of which evaluations make the second.

    Args:
        group: of tensor parallel ranks, as TensorParallelLoss has it; None without.
        beta: how strongly the model is kept near the reference; greater than 0.
        loss_type: one of LOSS_TYPES.
        label_smoothing: the share of pairs that are labelled the wrong way round, from 0 to less than 0.5; for
            "sigmoid" and "robust".

    Raises:
        ValueError: for other arguments; when called, for a head in chunks of tokens, and for logits of a part of the
            vocabulary without `group`, or of the whole with it.
    """

    def __init__(self, group: Any = None, beta: float = 0.1, loss_type: str = "sigmoid",
                 label_smoothing: float = 0.0) -> None:
        if not beta > 0:
            raise ValueError(f"beta = {beta}: must be greater than 0")
        if loss_type not in LOSS_TYPES:
            raise ValueError(f"loss_type = {loss_type!r}: must be one of {', '.join(LOSS_TYPES)}")
        if not 0 <= label_smoothing < 0.5:
            raise ValueError(f"label_smoothing = {label_smoothing}: must be from 0 to less than 0.5")
        if label_smoothing and loss_type not in _SMOOTHED:
            raise ValueError(f"label_smoothing = {label_smoothing}: must be 0 with loss_type = {loss_type!r}; "
                             f"{' and '.join(_SMOOTHED)} have it")
        self._beta, self._loss, self._smoothing = beta, LOSS_TYPES[loss_type], label_smoothing
        self._token_losses = _token_losses if group is None else TensorParallelLoss(group).token_losses
        self._sums = _no_sums()

    def __call__(self, outputs: Any, labels: Any) -> Tensor:
        logits, *router_loss = parts_of(outputs)
        if isinstance(logits, HeadOutput):
            raise ValueError("chunked_head = True: must be False with DPOLoss, whose gradient by a token's logits "
                             "depends on all tokens of both answers")
        answers, reference = (labels, None) if isinstance(labels, Tensor) else labels
        log_probabilities = -self._token_losses(logits, answers).sum(-1)
        if reference is None:
            return log_probabilities
        chosen, rejected = (log_probabilities - reference).chunk(2)
        ratios = LogRatios(chosen, rejected, *(answers != IGNORE_INDEX).sum(-1).chunk(2))
        self._note(ratios)
        return sum(router_loss, self._loss(ratios, self._beta, self._smoothing).mean())

    def _note(self, ratios: LogRatios) -> None:
        chosen, rejected = self._beta * ratios.chosen.detach(), self._beta * ratios.rejected.detach()
        sums = [values.float().sum() for values in (chosen, rejected, chosen > rejected, chosen - rejected)]
        self._sums = self._sums + torch.stack([*sums, sums[0].new_tensor(len(chosen))])

    def measured(self) -> dict[str, float]:
        """The means of METRICS over all pairs since the last call (collective over all ranks)."""
        sums, self._sums = self._sums, _no_sums()
        dist.all_reduce(sums)
        *found, pairs = sums.tolist()
        return {name: value / pairs for name, value in zip(METRICS, found)} if pairs else {}


def _no_sums() -> Tensor:
    """Of METRICS, and the number of pairs."""
    return torch.zeros(len(METRICS) + 1, device=get_accelerator().current_device_name())


def _token_losses(logits: Tensor, labels: Tensor) -> Tensor:
    """[rows, length] in nats, in fp32; 0 where the label is IGNORE_INDEX."""
    if shares_vocabulary(logits):
        raise ValueError("loss_fn = DPOLoss without a group, and each of the tensor parallel ranks has logits of a "
                         "part of the vocabulary: must be DPOLoss(tensor_group)")
    return F.cross_entropy(logits.flatten(0, -2).float(), labels.flatten(), ignore_index=IGNORE_INDEX,
                           reduction="none").view_as(labels)


def disable_dropout(module: nn.Module) -> None:
    """Turn dropout modules off, adapters' too, as TRL does: the reference has none."""
    for part in module.modules():
        if isinstance(part, nn.Dropout):
            part.p = 0.0


def with_reference(engine: Any, rows: PairRows) -> PairRows:
    """`rows` with the log-probabilities of their answers by the model of `engine` as it is now; its loss function must
    be a DPOLoss. Collective: each replica evaluates its share of the rows."""
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
    return rows.with_reference((found[:, :2] / found[:, 2:]).float().cpu())


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
