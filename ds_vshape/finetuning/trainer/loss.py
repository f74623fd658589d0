"""The loss that a Trainer trains on, for the rank that holds the last stage."""

from __future__ import annotations

import torch
from torch import Tensor
from transformers.trainer_pt_utils import LabelSmoother

from ds_vshape.models.hugging_face import next_token_loss
from ds_vshape.models.hugging_face.shared import Flow
from ds_vshape.models.hugging_face.tensor_parallel import parts_of


class TrainerLoss:
    """The cross-entropy of transformers, or with `smoothing` what its LabelSmoother computes, which leaves out a router
    loss.

    In training it is the share of a micro-batch in the mean over all tokens of the batch; in evaluation a micro-batch's
    own mean, as evaluation_loop of transformers averages it. `evaluated` keeps the latter for whoever empties it.
    """

    def __init__(self, smoothing: float) -> None:
        self._smooth = LabelSmoother(epsilon=smoothing) if smoothing else None
        self.evaluated: list[Tensor] = []

    def __call__(self, outputs: Flow, labels: Tensor, num_items_in_batch: Tensor | None = None) -> Flow:
        if torch.is_grad_enabled():
            return self._loss(outputs, labels, num_items_in_batch)
        loss = self._loss(outputs, labels, None)
        assert isinstance(loss, Tensor)
        self.evaluated.append(loss.detach())
        return loss

    def _loss(self, outputs: Flow, labels: Tensor, num_items_in_batch: Tensor | None) -> Flow:
        if self._smooth is None:
            return next_token_loss(outputs, labels, num_items_in_batch)
        logits, *_ = parts_of(outputs)
        loss: Tensor = self._smooth({"logits": logits}, labels, num_items_in_batch=num_items_in_batch)
        return loss
