"""The end of a batch: its loss, its gradients, the step; and what is left of one that failed.

    ReturnLoss           the loss of all micro-batches is on its way to all ranks
    StartReduceGrads     a stage's gradients are complete, and are added up over replicas
    AgreeOnBatch         no rank has failed in its passes
    ReduceTiedGrads, ReduceGrads, OptimizerStep
"""

from __future__ import annotations

from collections import OrderedDict
from typing import Any

import torch
from deepspeed import comm as dist
from deepspeed.runtime.pipe.module import PipelineError
from torch import Tensor

from ds_vshape.comm.background import Background, Handle
from ds_vshape.comm.channels import Channels
from ds_vshape.deepspeed_adapter.engine import StockEngine, stock_execute
from ds_vshape.deepspeed_adapter.optimizers import convert_without, core_of, is_bf16
from ds_vshape.engine.guard import BatchGuard
from ds_vshape.engine.verification import Verification
from ds_vshape.health.failures import Agreement
from ds_vshape.health.step import Reached
from ds_vshape.health.waits import is_ended_wait
from ds_vshape.module.dummy_parameter import give_gradient
from ds_vshape.runtime import instructions as instr
from ds_vshape.runtime.buffers import Buffers
from ds_vshape.runtime.gradient_release import ReleasedWeights
from ds_vshape.runtime.gradients import (accumulator_of, clip_gradients, leave_to_backward, place_of,
                                         reduce_tied_gradients)
from ds_vshape.runtime.micro_batch import added, as_number, detached
from ds_vshape.runtime.reduction import reduction_for
from ds_vshape.runtime.script_functions import ScriptFunctions
from ds_vshape.runtime.drawn_batch import DrawnBatch
from ds_vshape.runtime.token_mean import TokenMean
from ds_vshape.split_backward.head import EarlyGradients


class BatchEnd(StockEngine):
    """What a PipelineEngine does at the end of its batches; it has what is declared here."""

    total_loss: Any
    total_additional_losses: Any
    _agreement: Agreement
    _background: Background
    _channels: Channels
    _early: EarlyGradients
    _guard: BatchGuard
    _stage_buffers: Buffers
    _released: ReleasedWeights
    _returning_loss: Handle[Tensor] | None
    _script: ScriptFunctions
    _drawn: DrawnBatch
    _token_mean: TokenMean | None
    _verification: Verification | None

    def settle(self) -> None:
        """Wait until the last step is known to be right; it always is, unless steps are validated after they are done.

        To be called on every rank.
        """

    # -- the loss

    def _add_to_batch_loss(self, loss: Any) -> None:
        self.total_loss = added(self.total_loss, loss)
        additional = self.module.get_additional_losses()
        if additional is not None:
            totals = self.total_additional_losses or {}
            self.total_additional_losses = OrderedDict(
                (name, added(totals.get(name), detached(value))) for name, value in additional.items())

    def _exec_return_loss(self) -> None:
        if self._guard.failure is not None and self.is_last_stage():
            # It isn't used, but the others wait for it.
            self.total_loss = torch.full((), torch.nan, device=self.device)
            self.total_additional_losses = self.module.get_additional_losses()
        # They are sent as numbers; where they are computed, train_batch gives them their shape back.
        self.total_loss = as_number(self.total_loss)
        if self.total_additional_losses is not None:
            self.total_additional_losses = OrderedDict(
                (name, as_number(loss)) for name, loss in self.total_additional_losses.items())
        aggregate = super()._aggregate_total_loss if self.is_last_stage() else self._receive_total_loss
        self._returning_loss = self._background.start(aggregate)

    def _receive_total_loss(self) -> Tensor:
        """What DeepSpeed's `_aggregate_total_loss` does on ranks without the loss; that one copies numbers of the host
        to the device, and waits for it."""
        names = list(self.module.get_additional_losses() or ())
        losses = torch.zeros(2 + len(names), dtype=torch.float32, device=self.device)
        dist.broadcast(losses, self._loss_stage_global_rank(), group=self.grid.get_pipe_parallel_group())
        loss: Tensor
        self.dp_group_loss, loss, *additional = (one.clone() for one in losses)
        if names:
            self.agg_additional_losses = OrderedDict(zip(names, additional, strict=True))
        return loss

    def _aggregate_total_loss(self) -> Tensor:
        """The batch's loss, which is on its way since `ReturnLoss`."""
        assert self._returning_loss is not None
        loss = self._returning_loss.result()
        self._returning_loss = None
        return loss

    def _in_its_shape(self, loss: Tensor) -> Tensor:
        """The batch's loss as DeepSpeed returns it: where it's computed in its own shape, elsewhere a number."""
        if self.is_last_stage() and self.loss.dim():
            shape = self.loss.shape
            self.agg_train_loss, self.total_loss = loss.reshape(shape), self.total_loss.reshape(shape)
            return self.agg_train_loss
        return loss

    # -- gradients

    def _follow_optimizer(self) -> None:
        """Let gradients add up, and be reduced, where the present optimizer looks for them."""
        self._followed = self.optimizer
        self.using_bf16_optimizer = is_bf16(self.optimizer)
        self._sums = place_of(self.optimizer)
        self._accumulator = accumulator_of(self._sums, self.module.schedule_config.gradient_accumulation_fusion)
        leave_to_backward(self.module.parameters(), self._sums)
        convert_without(self.optimizer, self.module.idle_weights())
        self._reduction = reduction_for(self, self._background, self._accumulator)

    def _exec_start_reduce_grads(self, stage: int) -> None:
        if self._reduction is not None and not self._script.reduce:
            self._sums.take_in()
            self._reduction.start(stage)

    def _exec_compare_gradients(self, stage: int) -> None:
        assert self._verification is not None
        self._verification.compare(stage)

    def _exec_agree_on_gradients(self) -> None:
        assert self._verification is not None
        self._verification.agree()

    def _exec_agree_on_batch(self) -> None:
        if torch.is_grad_enabled() and self._guard.failure is None:
            try:
                self._released.check()
                self._early.check()
            except (PipelineError, RuntimeError) as error:
                self._guard.failure = self._agreement.failure(error, "the passes of the batch")
        self._guard.agree_on_passes()
        if torch.is_grad_enabled():
            self._prepare_reduction()

    def _prepare_reduction(self) -> None:
        """Between the passes of a batch and the reductions of its gradients, by whatever function."""
        # Replicas average the loss in the group in which gradients are reduced, so the loss comes first on all of them.
        if self._returning_loss is not None:
            self._returning_loss.result()
        self._sums.take_in()
        give_gradient(self.module, self._accumulator)

    def _exec_reduce_tied_grads(self) -> None:
        of_script = self._script.get(instr.ReduceTiedGrads)
        if of_script is not None:
            of_script(self)
        else:
            reduce_tied_gradients(self.module, self._sums)

    def _exec_reduce_grads(self) -> None:
        of_script = self._script.get(instr.ReduceGrads)
        if of_script is not None:
            of_script(self)
        elif self._reduction is None or not self._reduction.finish():
            stock_execute(instr.ReduceGrads)(self)

    def _exec_optimizer_step(self, *args: Any, **kwargs: Any) -> None:
        """As DeepSpeed's, or the script's; an error of it is kept until all ranks have come to the end of the batch."""
        execute = self._script.get(instr.OptimizerStep) or stock_execute(instr.OptimizerStep)
        step, before = self._guard.step, self.global_steps
        try:
            with step.watching(core_of(self.optimizer)):
                execute(self, *args, **kwargs)
        except Exception as error:
            if is_ended_wait(error):
                raise
            self._guard.fail_step(error)
            self.leave_step()
        if self.global_steps > before and not step.core_failed:
            step.reached = Reached.WHOLE

    def clip_fp32_gradients(self) -> None:
        self.set_grad_norm(clip_gradients(self.module.parameters(), self.gradient_clipping(), self.mpu))

    # -- a batch that failed

    def _forget_batch(self) -> None:
        """Leave nothing of a batch that failed: no messages, no activations, no gradients."""
        self._stage_buffers.clear()
        self._channels.end_batch()
        if self._returning_loss is not None:
            self._aggregate_total_loss()
        if self._reduction is not None:
            self._reduction.forget()
        self._drawn.forget()
        if self._token_mean is not None:
            self._token_mean.forget()
        for parameter in self.module.parameters():
            parameter.grad = None
        if hasattr(self.optimizer, "zero_grad"):
            self.optimizer.zero_grad()

    # Plain functions, as in the stock engine.
    _INSTRUCTION_MAP: dict[instr.Instruction, instr.Execute] = {
        instr.ReturnLoss: _exec_return_loss,
        instr.StartReduceGrads: _exec_start_reduce_grads,
        instr.CompareGradients: _exec_compare_gradients,
        instr.AgreeOnGradients: _exec_agree_on_gradients,
        instr.AgreeOnBatch: _exec_agree_on_batch,
        instr.ReduceTiedGrads: _exec_reduce_tied_grads,
        instr.ReduceGrads: _exec_reduce_grads,
        instr.OptimizerStep: _exec_optimizer_step,
    }
