"""`"optimizer_post_validation": true`: a step isn't held up by other pipeline ranks, and is validated afterwards.

DeepSpeed's step reduces overflows and the norm of all gradients over all ranks, which all wait for the last one: the
bubbles between batches, which the schedule had removed, return. But nearly always nothing has overflowed and nothing
has to be clipped. So each rank steps at once on that assumption, and sends the others a report of its own gradients
("Zero Bubble Pipeline Parallelism", section 4, in a more general form: for any optimizer, and for bf16).

    [1] the end of batch n      its forwards succeeded everywhere, which is known by then; reduce, snapshot, step
    [2] the start of batch n+1  forwards with the new weights
    [3] before its backwards    the verdict: the step is accepted, and the snapshot is dropped; or
    [4]                         batch n+1 is abandoned like one that failed (failures.py), the step is rolled back and
                                repeated by DeepSpeed with all ranks, and batch n+1 runs again, with the same data
                                and the same random numbers

A step that isn't accepted costs the first passes of a batch, so the next one asks all ranks first, as DeepSpeed's does,
and so do those that follow, until one is neither clipped nor skipped.

Ranks of other replicas are still waited for: they add up gradients together. A batch whose forward fails raises
at its own end; if a backward fails later than that, the next batch raises it, on all ranks, and neither counts.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ds_vshape.comm.exchange import Exchange
from ds_vshape.config.section import KEY, ConfigError
from ds_vshape.deepspeed_adapter.checkpointing import forget_checkpoints
from ds_vshape.deepspeed_adapter.optimizers import zero_step_of
from ds_vshape.engine.engine import PipelineEngine
from ds_vshape.engine.plans import BatchPlan
from ds_vshape.engine.rollback import PassesSnapshot, StepSnapshot, change, snapshot_bytes
from ds_vshape.engine.verdict import NormLimits, StepReport, Verdict, judge
from ds_vshape.health.failures import Failure, PendingStatus
from ds_vshape.health.step import BatchStep, Reached
from ds_vshape.health.waits import is_ended_wait
from ds_vshape.health.watch import in_phase
from ds_vshape.module.tied import joined
from ds_vshape.runtime import instructions as instr
from ds_vshape.schedule.lowering import Program


class _GivenUp(Exception):
    """This batch started with weights from a step that was rejected."""


class _HeldEvents:
    """Keeps what a step reports to the monitors until it is accepted."""

    def __init__(self, enabled: bool) -> None:
        self.enabled = enabled
        self.events: list[Any] = []

    def write_events(self, events: list[Any]) -> None:
        self.events.append(events)


@dataclass
class _Ahead:
    """A step that isn't validated yet: its snapshot, and the reports of all ranks, which are on their way."""

    snapshot: StepSnapshot
    telling: PendingStatus
    limits: NormLimits
    failure: Failure | None
    forwards_before: int
    events: list[Any]


class PostValidatingEngine(PipelineEngine):
    """A PipelineEngine whose step is validated while the next batch starts.

    Between batches the last step may not be validated yet. `settle` does it, and so do evaluating, saving, loading,
    changing the batch size and the module's state_dict(); all of these are to be called on every rank.
    `get_global_grad_norm` gives the right norm in any case.
    """

    monitor: Any

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        step = zero_step_of(self.optimizer)
        if step is None:
            raise ConfigError(f"{KEY}.optimizer_post_validation = true: must be false with a "
                              f"{type(self.optimizer).__name__} or one that is offloaded")
        self._zero_step = step
        self._ahead: _Ahead | None = None
        self._passes: PassesSnapshot | None = None
        self._forwards: PendingStatus | None = None
        self._steps_before = 0
        # Whether the next step is taken before its verdict; and, after one that asked first, whether it was changed on
        # some rank: clipped, or skipped.
        self._steps_ahead = True
        self._reported: PendingStatus | None = None
        # Of this rank's gradients in the last step, loss scale included.
        self._norm = 0.0
        self._reducing = self._reducing_ranks()
        self.module.register_state_dict_pre_hook(lambda *_: self.settle())

    def _reducing_ranks(self) -> Exchange | None:
        """This rank with those that it reduces gradients with, if there are any; collective."""
        topology = self.grid.topology()
        alone = [{rank} for rank in range(self.placement.ranks)]
        found = None
        for pipeline_ranks in joined([*alone, *self.module.tied_ranks()]):
            ranks = sorted(rank for place in pipeline_ranks for rank in topology.get_axis_list("pipe", place))
            if len(ranks) > 1:
                exchange = Exchange(ranks)
                found = exchange if self.global_rank in ranks else found
        return found

    @in_phase
    def settle(self) -> None:
        """Wait for the verdict on the last step, and take the step back and do it again if it wasn't right.

        To be called on every rank. Raises what the last batch's backward raised, if it has failed on some rank after
        `train_batch` returned there.
        """
        try:
            self._settle()
        except Exception as error:
            error.add_note("while the batch before was validated")
            raise

    def _settle(self) -> None:
        if self._ahead is None:
            return
        ahead, self._ahead = self._ahead, None
        verdict, norm = self._judged(ahead)
        if verdict is Verdict.ACCEPTED:
            self._accept(ahead, norm)
        else:
            self._steps_ahead = False
            self._take_back(ahead, verdict)

    def rollback_bytes(self) -> int:
        buffers: int = sum(buffer.nbytes for buffer in self.module.buffers())
        return snapshot_bytes(self._zero_step) + buffers

    # -- [1] [4] the step

    def _judged(self, ahead: _Ahead) -> tuple[Verdict, float]:
        reports = [StepReport.of(numbers) for numbers in ahead.telling.result()]
        return judge(reports, self.dp_world_size, ahead.limits)

    def _accept(self, ahead: _Ahead, norm: float) -> None:
        self._set_norm(norm)
        for events in ahead.events:
            try:
                self.monitor.write_events(events)
            except Exception as error:
                self._guard.defer(error, "monitor")

    def _set_norm(self, norm: float) -> None:
        if self._zero_step.counts_norm:
            on_device = self._on_device(norm)
            self._zero_step.set_grad_norm(on_device)
            self.set_grad_norm(on_device)

    def _take_back(self, ahead: _Ahead, verdict: Verdict) -> None:
        changes = ahead.snapshot.changes()
        ahead.snapshot.restore()
        if verdict is Verdict.REDO:
            ahead.snapshot.restore_gradients()
            self._guard.step = BatchStep()
            self._execute(instr.OptimizerStep())
            change(self._zero_step, changes)
            super()._agree_on_step(None)
            return
        change(self._zero_step, changes)
        self._forwards_before = ahead.forwards_before
        # Those of a failed batch may be incomplete.
        self._signatures = None
        self._guard.failure = ahead.failure
        self._exec_agree_on_batch()

    def _exec_step_ahead(self) -> None:
        if self._reported is not None:
            reported, self._reported = self._reported, None
            self._steps_ahead = not any(map(any, reported.result()))
        if self._steps_ahead:
            self._step_ahead()
        else:
            self._step_with_all()

    def _step_with_all(self) -> None:
        """The end of a batch as a PipelineEngine's. Whether the next step may go ahead is asked for meanwhile."""
        limits = NormLimits(self._zero_step.clip, self._zero_step.loss_scale)
        for instruction in instr.END:
            self._execute(instruction())
        norm = self.get_global_grad_norm() if limits.clip else 0.0
        is_right = not self._zero_step.overflow and limits.allow(float(norm))
        self._reported = self._agreement.start_status([float(not is_right)])

    def _step_ahead(self) -> None:
        failure, self._guard.failure = self._guard.failure, None
        failed = failure is not None
        if self._reducing is not None:
            failed = bool(self._reducing.largest(failed))
        if failed:
            # The loss is that of all forwards.
            loss, self._returning_loss = self._returning_loss, None
            self._forget_batch()
            self._returning_loss = loss
        else:
            self._prepare_reduction()
            self._execute(instr.ReduceTiedGrads())
            self._execute(instr.ReduceGrads())
        limits = NormLimits(self._zero_step.clip, self._zero_step.loss_scale)
        snapshot = StepSnapshot(self, self._zero_step)
        self._steps_before = self.global_steps
        events = _HeldEvents(self.monitor.enabled)
        if failed:
            report = StepReport(True, False, 0.0)
            self._count_step()
        else:
            with self._without_other_stages(events):
                self._execute(instr.OptimizerStep())
            failure = self._failed_step()
            report = self._report() if failure is None else StepReport(True, False, 0.0)
        snapshot.stepped()
        telling = self._agreement.start_status(report.numbers())
        self._ahead = _Ahead(snapshot, telling, limits, failure, self._forwards_before, events.events)

    def _failed_step(self) -> Failure | None:
        """Why this rank's step has failed, if it has: then it's taken back, as that of a batch which has failed."""
        error, self._guard.step.error = self._guard.step.error, None
        if error is None:
            return None
        if self.global_steps == self._steps_before:
            self._count_step()
        return self._agreement.failure(error, "OptimizerStep")

    def _count_step(self) -> None:
        """Ranks must not differ in the number of their steps."""
        self.global_steps += 1
        self.global_samples += self.train_batch_size()

    def _agree_on_step(self, failure: Failure | None) -> None:
        if not self._steps_ahead:
            super()._agree_on_step(failure)
            return
        # This rank waits for no other; an error after the step is reported with the next batch, as one in the step is.
        if failure is not None and self._guard.step.reached is not Reached.WHOLE:
            raise failure.error
        self._guard.failure = self._guard.failure or failure or self._guard.take_deferred()

    def _report(self) -> StepReport:
        """What this rank says of the step that it has taken."""
        if self._zero_step.overflow:
            return StepReport(False, True, 0.0)
        return StepReport(False, False, self._norm)

    @contextmanager
    def _without_other_stages(self, events: _HeldEvents) -> Iterator[None]:
        """Around a step that exchanges only with other replicas, and isn't reported yet."""
        def keep(norm: float) -> None:
            self._norm = norm

        self._norm, monitor = 0.0, self.monitor
        self.monitor = events
        try:
            with self._zero_step.without_pipeline(keep):
                yield
        finally:
            self.monitor = monitor

    # -- [2] [3] [4] the next batch

    def execute_plan(self, pipe_schedule: BatchPlan) -> None:
        if not torch.is_grad_enabled():
            super().execute_plan(pipe_schedule)
            return
        if self._verification is not None and self._verification.is_due:
            # Both of its runs start with validated weights.
            self.settle()
        announced = self._signatures is None and not self.dynamic_shape
        self._samples.drop()
        if self._ahead is not None:
            self._passes = PassesSnapshot(self.module)
            self._samples.keep()
        if not self._run_through(pipe_schedule):
            self._run_through(pipe_schedule)
        if announced:
            # Only where it was done everywhere do all ranks know the shapes of all messages.
            self._settle()

    def _run_through(self, plan: BatchPlan) -> bool:
        """Run the batch; False if the step before it wasn't right, and all is ready to run it again."""
        try:
            super().execute_plan(plan)
            return True
        except _GivenUp:
            self._forget_batch()
        forget_checkpoints()
        self._guard.failure = None
        assert self._passes is not None
        self._passes.restore()
        self._passes = None
        try:
            self.settle()
        except Exception as error:
            if not is_ended_wait(error):
                self._samples.drop()
            raise
        self._samples.again()
        self.total_loss = self.total_additional_losses = None
        return False

    def _exec_await_verdict(self) -> None:
        if self._ahead is None:
            return
        verdict, norm = self._judged(self._ahead)
        if verdict is not Verdict.ACCEPTED:
            self._guard.failure = Failure(_GivenUp(), "step before")
            return
        self._accept(self._ahead, norm)
        self._ahead = self._passes = None
        self._samples.drop()

    def _exec_tell_forwards(self) -> None:
        self._forwards = self._agreement.start_status([float(self._guard.failure is not None)])

    def _exec_agree_on_forwards(self) -> None:
        assert self._forwards is not None
        forwards, self._forwards = self._forwards, None
        failed = max(forwards.result())
        if self._ahead is not None:
            raise _GivenUp
        if failed != [0.0]:
            self._exec_agree_on_batch()

    _INSTRUCTION_MAP = {
        **PipelineEngine._INSTRUCTION_MAP,
        instr.AwaitVerdict: _exec_await_verdict,
        instr.TellForwards: _exec_tell_forwards,
        instr.AgreeOnForwards: _exec_agree_on_forwards,
        instr.StepAhead: _exec_step_ahead,
    }

    def _training_instructions(self, program: Program) -> list[instr.PipeInstruction]:
        return instr.stepping_ahead(super()._training_instructions(program))

    # -- what needs a validated step

    def eval_batch(self, *args: Any, **kwargs: Any) -> Any:
        self.settle()
        return super().eval_batch(*args, **kwargs)

    def save_checkpoint(self, *args: Any, **kwargs: Any) -> Any:
        self.settle()
        return super().save_checkpoint(*args, **kwargs)

    def load_checkpoint(self, *args: Any, **kwargs: Any) -> Any:
        self.settle()
        return super().load_checkpoint(*args, **kwargs)

    def set_train_batch_size(self, train_batch_size: int) -> None:
        self.settle()
        super().set_train_batch_size(train_batch_size)

    def get_global_grad_norm(self) -> Any:
        """The norm of all gradients of the last step, as DeepSpeed's, to rounding; infinite after an overflow."""
        if self._ahead is None or not self._zero_step.counts_norm:
            return super().get_global_grad_norm()
        return self._on_device(self._judged(self._ahead)[1])

    def _on_device(self, number: float) -> Tensor:
        # Filled there: for a copy from the host's memory the host would wait.
        return torch.full((), number, dtype=torch.float32, device=self.device)
