"""What a forward leaves on the device until its backward, where that is less than everything.

    RecomputePass, SplitRecomputePass     the first layers of the stage run again, whose forward has kept nothing
    Offload, WaitOffload                  it goes to the host
    Reload, WaitReload                    it comes back
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from itertools import pairwise
from typing import Any

from deepspeed.runtime.pipe.module import PipelineError

from ds_vshape.comm.payload import members
from ds_vshape.deepspeed_adapter.engine import StockEngine
from ds_vshape.engine.planning import PlannerFailed
from ds_vshape.health.waits import is_ended_wait
from ds_vshape.measure.keeping import KeepingMeter, Speeds
from ds_vshape.measure.observer import Observer
from ds_vshape.module.segment import modules_of
from ds_vshape.runtime import instructions as instr
from ds_vshape.runtime.buffers import Buffers, enter, enter_copies
from ds_vshape.runtime.copy_engine import CopyEngine
from ds_vshape.runtime.instructions import BufferId
from ds_vshape.runtime.recomputation import ChangingBuffers, Recomputation
from ds_vshape.schedule.timeline import Times
from ds_vshape.split_backward import Operators, SplitForward


class Keeping(StockEngine):
    """How a PipelineEngine recomputes and offloads; it has what is declared here."""

    # Of the device; another one may be put in its place between batches.
    copy_engine: CopyEngine
    _active_stage: int | None
    _keeping: KeepingMeter | None
    # By stage, and the layer before which they are.
    _changing_buffers: dict[tuple[int, int], ChangingBuffers]
    _forwards_before: int
    _observer: Observer
    _operators: Operators
    _stage_buffers: Buffers

    def _check_keeping(self, what: str) -> None:
        """Raise PipelineError, on every rank, where `what` recomputes what is recomputed already."""
        interval = self.module.activation_checkpoint_interval
        if interval:
            raise PipelineError(f"activation_checkpoint_interval = {interval} with {what}: must be 0, because the "
                                "plan decides what is recomputed")

    def _new_keeping_meter(self) -> KeepingMeter:
        layers = [stop - start for start, stop in pairwise(self.module.parts)]
        return KeepingMeter(self.module.at_layers, layers, self.device)

    def _keeping_times(self, times: Times) -> Times:
        """`times`, with those of recomputation and copies where these may be planned (collective)."""
        return times if self._keeping is None else self._keeping.of_times(times, self.copy_engine, self._measured)

    def _measured(self, measure: Callable[[], Speeds]) -> Speeds:
        """What `measure` gives; PlannerFailed on all ranks where it fails on one: there can't be a plan without."""
        try:
            return self.module.preflight.run(measure)  # type: ignore[no-any-return]
        except Exception as error:
            if is_ended_wait(error):
                raise
            raise PlannerFailed(f"copies to the host can't be measured: {error}") from error

    def _count_forward(self, buffer_id: BufferId) -> None:
        """The seeds of layers count forward calls, and must not depend on the order of the passes."""
        self.module.micro_offset = self._forwards_before + buffer_id.micro_batch

    def _forgetting_forward(self, buffer_id: BufferId, layers: int) -> Any:
        """The stage's outputs; its first `layers` (0 for all) keep nothing."""
        buffer, chunk = self._stage_buffers[buffer_id], self.module.chunk_of(buffer_id.stage)
        stop = chunk.start + (layers or len(chunk.funcs))
        key = buffer_id.stage, stop
        if key not in self._changing_buffers:
            forgotten = chunk.funcs[:stop - chunk.start]
            self._changing_buffers[key] = ChangingBuffers(modules_of(forgotten))
        again = Recomputation(f"stage {buffer_id.stage}, micro-batch {buffer_id.micro_batch}", stop,
                              self._changing_buffers[key])
        buffer.recomputation = again
        assert buffer.inputs is not None
        with self.module.at_layers(again.starts), again.forgetting():
            return self.stock_forward(enter_copies(buffer.inputs))

    def _exec_recompute_pass(self, buffer_id: BufferId, layers: int) -> None:
        self._recompute(buffer_id, layers, nullcontext())

    def _exec_split_recompute_pass(self, buffer_id: BufferId, layers: int) -> None:
        self._recompute(buffer_id, layers, SplitForward(self._stage_buffers[buffer_id].store, self._operators))

    def _recompute(self, buffer_id: BufferId, layers: int, recording: AbstractContextManager[Any]) -> None:
        buffer, chunk = self._stage_buffers[buffer_id], self.module.chunk_of(buffer_id.stage)
        again, buffer.recomputation = buffer.recomputation, None
        assert again is not None and buffer.inputs is not None
        self.module.activate_layers(buffer_id.stage, layers or len(chunk.funcs))
        # Not the whole stage.
        self._active_stage = None
        self._count_forward(buffer_id)
        self.module.record(recording)
        with again.again():
            self.run_module(enter(buffer.inputs))

    def _exec_offload(self, buffer_id: BufferId) -> None:
        buffer = self._stage_buffers[buffer_id]
        assert buffer.saved is not None and buffer.inputs is not None
        self._observer.copied(buffer_id, buffer.saved.offload(members(buffer.inputs), self.copy_engine))

    def _exec_wait_offload(self, buffer_id: BufferId) -> None:
        saved = self._stage_buffers[buffer_id].saved
        assert saved is not None
        saved.free()

    def _exec_reload(self, buffer_id: BufferId) -> None:
        saved = self._stage_buffers[buffer_id].saved
        assert saved is not None
        saved.reload()

    def _exec_wait_reload(self, buffer_id: BufferId) -> None:
        saved = self._stage_buffers[buffer_id].saved
        assert saved is not None
        saved.wait()

    # Plain functions, as in the stock engine.
    _INSTRUCTION_MAP: dict[instr.Instruction, instr.Execute] = {
        instr.RecomputePass: _exec_recompute_pass,
        instr.SplitRecomputePass: _exec_split_recompute_pass,
        instr.Offload: _exec_offload,
        instr.WaitOffload: _exec_wait_offload,
        instr.Reload: _exec_reload,
        instr.WaitReload: _exec_wait_reload,
    }
