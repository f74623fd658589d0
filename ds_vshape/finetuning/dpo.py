"""Direct preference optimization (Rafailov et al., 2023): the loss of preference pairs.

    [1] before training    the pipeline evaluates all pairs, by the weights that it starts with, or by the base model
                           of its adapters; their log-probabilities travel with the labels from then on (reference.py)
    [2] a micro-batch      the chosen answers of n pairs, then the rejected ones: one forward of 2n rows
    [3] its loss           the mean over its pairs; batches average micro-batches and replicas, which have n pairs each,
                           so that theirs is the mean over pairs too

Losses and metrics are those of TRL's DPOTrainer (trl/trainer/dpo_trainer.py).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from deepspeed.accelerator import get_accelerator
from torch import Tensor, nn

from ds_vshape.models.hugging_face.tensor_parallel import TensorParallelLoss, parts_of, shares_vocabulary
from ds_vshape.split_backward.head import IGNORE_INDEX, HeadOutput

# What TRL calls the means over pairs that a DPOLoss measures.
METRICS = ("rewards/chosen", "rewards/rejected", "rewards/accuracies", "rewards/margins")


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
        if not 0 < beta < math.inf:
            raise ValueError(f"beta = {beta}: must be greater than 0, and finite")
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
