"""Loads a batch's data: inputs for the first stage, labels for the last one."""

from __future__ import annotations

from typing import Any

from ds_vshape.comm.payload import members
from ds_vshape.deepspeed_adapter.engine import StockEngine
from ds_vshape.engine.guard import BatchGuard
from ds_vshape.engine.rollback import Samples
from ds_vshape.runtime import instructions as instr
from ds_vshape.runtime.buffers import Buffers
from ds_vshape.runtime.instructions import BufferId
from ds_vshape.runtime.micro_batch import Intake, own_copy, own_labels
from ds_vshape.runtime.token_mean import TokenMean
from ds_vshape.schedule.placement import Placement


class Loading(StockEngine):
    """How a PipelineEngine loads a micro-batch; it has what is declared here."""

    placement: Placement
    _guard: BatchGuard
    _intake: Intake
    _samples: Samples
    _stage_buffers: Buffers
    _token_mean: TokenMean | None

    def _holds(self, stage: int) -> bool:
        """Whether this rank has the stage."""
        return bool(self.module.placement.rank_of(stage) == self.stage_id)

    def _next_batch(self) -> Any:
        return self._samples.take(super()._next_batch)

    def _draw(self) -> tuple[Any, Any]:
        return self._intake.pair(self._next_batch())

    def draw_ahead(self, micro_batches: int) -> None:
        """Draw all data of a batch whose loss is a mean over tokens, on the rank that computes it."""
        if self._token_mean is not None and self.computes_loss:
            self._token_mean.start_batch(micro_batches, draws=self._guard.failure is None)

    def _exec_load_micro_batch(self, buffer_id: BufferId) -> None:
        if self._token_mean is not None and self.computes_loss:
            inputs, labels = self._token_mean.take()
        else:
            inputs, labels = self._draw()
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
