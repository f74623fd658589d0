"""Loads a batch's data: inputs for the first stage, labels for the last one."""

from __future__ import annotations

from typing import Any

import torch

from ds_vshape.comm.payload import members
from ds_vshape.deepspeed_adapter.engine import StockEngine
from ds_vshape.engine.guard import BatchGuard
from ds_vshape.engine.ordering import Ordering
from ds_vshape.engine.plans import Plans
from ds_vshape.engine.rollback import Samples, loaded, unless_raised
from ds_vshape.runtime import instructions as instr
from ds_vshape.runtime.buffers import Buffers
from ds_vshape.runtime.drawn_batch import DrawnBatch
from ds_vshape.runtime.instructions import BufferId
from ds_vshape.runtime.micro_batch import Intake, own_copy, own_labels
from ds_vshape.runtime.token_mean import TokenMean
from ds_vshape.schedule.placement import Placement
from ds_vshape.schedule.schedule import Schedule
from ds_vshape.schedule.timeline import Times


class Loading(StockEngine):
    """How a PipelineEngine loads a micro-batch; it has what is declared here."""

    placement: Placement
    _guard: BatchGuard
    _drawn: DrawnBatch
    # Whether the present batch was drawn when it started.
    _draws_ahead: bool
    _intake: Intake
    _ordering: Ordering | None
    # A sample that was looked at before its time, or what loading it raised, with the iterator that it is of.
    _peeked: tuple[Any, Any] | None
    _plans: Plans
    _samples: Samples
    _stage_buffers: Buffers
    _token_mean: TokenMean | None

    def _holds(self, stage: int) -> bool:
        """Whether this rank has the stage."""
        return bool(self.module.placement.rank_of(stage) == self.stage_id)

    def _next_batch(self) -> Any:
        return self._samples.take()

    def _from_data(self) -> Any:
        if self._peeked is not None and self._peeked[0] is self.data_iterator:
            (_, sample), self._peeked = self._peeked, None
            return unless_raised(sample)
        return super()._next_batch()

    def peek(self) -> tuple[Any, Any]:
        """The next inputs and labels of the data, which the next micro-batch gets all the same; raises what loading
        them raises, as that micro-batch will."""
        if self._peeked is None or self._peeked[0] is not self.data_iterator:
            self._peeked = self.data_iterator, loaded(super()._next_batch)
        return self._intake.pair(unless_raised(self._peeked[1]))

    def _skip_micro_batch(self) -> None:
        """Draw the data of a micro-batch that isn't trained, since the batch has failed: the next batch must find the
        data of all ranks at the same place."""
        if not self._draws_ahead:
            self._samples.skip()

    def _draw(self) -> tuple[Any, Any]:
        return self._intake.pair(self._next_batch())

    @property
    def _counts_tokens(self) -> bool:
        return self._token_mean is not None and self.computes_loss

    def draw_ahead(self, schedule: Schedule) -> None:
        """Draw all data of a batch whose loss is a mean over tokens, or whose micro-batches are put in order, on the
        ranks that need it; collective over replicas, and over the ranks of the first and the last stage."""
        orders = self._ordering is not None and torch.is_grad_enabled()
        self._draws_ahead = self._counts_tokens or orders
        if self._draws_ahead:
            self._drawn.draw(schedule.micro_batches, self._look)
        if self._token_mean is not None and self._counts_tokens:
            self._token_mean.start_batch(schedule.micro_batches)
        if self._ordering is not None and orders:
            times = self._plans.times or Times.uniform(self.placement.stages)
            self._drawn.reorder(self._ordering.order(schedule, times, self._drawn.sizes))

    def _look(self, labels: Any) -> None:
        if self._token_mean is not None and self._counts_tokens:
            self._token_mean.count(labels)

    def _exec_load_micro_batch(self, buffer_id: BufferId) -> None:
        inputs, labels = self._drawn.take() if self._draws_ahead else self._draw()
        if self._holds(0):
            inputs = own_copy(inputs, self.device, "inputs")
            if self.recomputes_reentrantly():
                for tensor in members(inputs):
                    if tensor is not None:
                        tensor.requires_grad_(tensor.is_floating_point())
            self._stage_buffers.open(BufferId(0, buffer_id.micro_batch)).inputs = inputs
        if self._holds(self.placement.last_stage):
            buffer = self._stage_buffers.open(BufferId(self.placement.last_stage, buffer_id.micro_batch))
            buffer.labels = own_labels(labels, self.device)

    # Plain functions, as in the stock engine.
    _INSTRUCTION_MAP: dict[instr.Instruction, instr.Execute] = {instr.LoadMicroBatch: _exec_load_micro_batch}
