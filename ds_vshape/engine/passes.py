"""The passes of a stage on a micro-batch: forward, and the backward whole or in its two halves.

    ForwardPass, SplitForwardPass                 outputs, and on the last stage the loss
    BackwardPass, InputGradPass, WeightGradPass   input gradients, and weight gradients at once or later
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import GradientEdge

from ds_vshape.comm.payload import members
from ds_vshape.deepspeed_adapter.checkpointing import forget_checkpoints
from ds_vshape.engine.keeping import Keeping
from ds_vshape.runtime import instructions as instr
from ds_vshape.runtime.buffers import Buffer, edges, enter
from ds_vshape.runtime.instructions import EVERYTHING, BufferId, Keeps
from ds_vshape.runtime.micro_batch import check_loss, check_number, detached, loss_of
from ds_vshape.runtime.token_mean import TokenMean
from ds_vshape.schedule.lowering import Content
from ds_vshape.schedule.placement import Placement
from ds_vshape.split_backward import GradientAccumulator, SplitBackward, SplitForward
from ds_vshape.split_backward.head import EarlyGradients, with_logits
from ds_vshape.split_backward.ownership import run_from


class StagePasses(Keeping):
    """How a PipelineEngine computes; it has what is declared here."""

    placement: Placement
    _accumulator: GradientAccumulator
    _early: EarlyGradients
    _sends_loss: bool
    _sums: Any
    _token_mean: TokenMean | None

    def _activate(self, stage: int) -> None:
        if stage != self._active_stage:
            self._active_stage = stage
            self.module.activate_stage(stage)

    # -- forward

    def _exec_forward_pass(self, buffer_id: BufferId, keeps: Keeps = EVERYTHING) -> None:
        self._pass_on(buffer_id, self._forward(buffer_id, keeps, nullcontext()))

    def _exec_split_forward_pass(self, buffer_id: BufferId, keeps: Keeps = EVERYTHING) -> None:
        recording = SplitForward(self._stage_buffers[buffer_id].store, self._operators)
        self._pass_on(buffer_id, self._forward(buffer_id, keeps, recording))

    def _forward(self, buffer_id: BufferId, keeps: Keeps, recording: AbstractContextManager[Any]) -> list[Any]:
        """Run the stage, and the loss function on the last one; the outputs alone in a list, if a stage follows.

        `recording` is around the model's functions alone: each call of torch costs more inside.
        """
        buffer = self._stage_buffers[buffer_id]
        buffer.check_unwritten(Content.ACTIVATION)
        self._activate(buffer_id.stage)
        self._count_forward(buffer_id)
        assert buffer.inputs is not None
        with buffer.saving(self.device) if keeps.goes_to_host else nullcontext():
            self.module.record(recording)
            if keeps.recomputed is None:
                outputs = self.stock_forward(enter(buffer.inputs))
            else:
                outputs = self._forgetting_forward(buffer_id, keeps.recomputed)
            if not self.module.training:
                forget_checkpoints()
            if buffer_id.stage == self.placement.last_stage:
                buffer.loss = self._compute_micro_batch_loss(outputs, buffer.labels, recording)
                buffer.labels = None
                return []
        return [outputs]

    def _pass_on(self, buffer_id: BufferId, outputs: list[Any]) -> None:
        """Hand a stage's outputs over to the next one. The list must have the only reference to them; it's emptied."""
        if outputs:
            self._stage_buffers[buffer_id].roots = edges(outputs[0], self.device)
            is_tuple = isinstance(outputs[0], tuple)
            receiver = BufferId(buffer_id.stage + 1, buffer_id.micro_batch)
            self._stage_buffers.hand_over(Content.ACTIVATION, receiver, [*members(outputs.pop())], is_tuple)
        if not torch.is_grad_enabled():
            self._stage_buffers.close(buffer_id)

    def _compute_micro_batch_loss(self, outputs: Any, labels: Any, recording: AbstractContextManager[Any]) -> Any:
        """The loss of one micro-batch; in training it is added to the batch's."""
        compute = self.computes_loss and self.module.loss_fn is not None
        with self._early.active(outputs, self._accumulator, self._gradient_of_loss) as outputs, recording:
            if compute and self._token_mean is not None:
                loss = self._token_mean.loss(outputs, labels)
            else:
                loss = loss_of(self.module.loss_fn, outputs, labels) if compute else with_logits(outputs)
        if torch.is_grad_enabled():
            check_loss(loss)
        elif self._sends_loss:
            check_number(loss)
        if self.eval_return_logits:
            self.outputs = with_logits(outputs)
        self.loss = detached(loss)
        self.fwd_outputs.append(self.loss)
        if torch.is_grad_enabled():
            self._add_to_batch_loss(self.loss)
        return loss

    def _gradient_of_loss(self) -> Tensor:
        """By what a backward multiplies the gradient of what the loss function has returned."""
        share = 1 if self._token_mean is None else self._token_mean.share
        return self.gradient_of_loss() * share

    # -- backward

    def _exec_backward_pass(self, buffer_id: BufferId) -> None:
        self._backward(buffer_id, nullcontext())
        self._stage_buffers.close(buffer_id)

    def _exec_input_grad_pass(self, buffer_id: BufferId) -> None:
        store = self._stage_buffers[buffer_id].store
        store.meanwhile = partial(self._weight_grad_meanwhile, buffer_id)
        # Active in the backward too: a checkpointed layer runs its forward again in there.
        self._backward(buffer_id, SplitBackward(store, self._operators))

    def _weight_grad_meanwhile(self, running: BufferId) -> None:
        """Take one weight gradient of a W to come while a B waits for other ranks."""
        store = self._stage_buffers.waiting(apart=running)
        if store is not None:
            self._observer.weights_split(store)
            store.run_next(self._accumulator)

    def _exec_weight_grad_pass(self, buffer_id: BufferId, piece: int, pieces: int) -> None:
        self._activate(buffer_id.stage)
        store = self._stage_buffers[buffer_id].store
        self._observer.weights_split(store)
        costs = self._plans.entry_costs(buffer_id.stage) if pieces > 1 else ()
        store.run_piece(piece, pieces, self._accumulator, costs, self._observer.entry_done)
        if piece == pieces - 1:
            self._stage_buffers.close(buffer_id)

    def _backward(self, buffer_id: BufferId, splitting: AbstractContextManager[Any]) -> None:
        """Run autograd from the stage's outputs to its inputs, and to the weights that `splitting` leaves to it."""
        buffer = self._stage_buffers[buffer_id]
        buffer.check_unwritten(Content.GRADIENT)
        self._activate(buffer_id.stage)
        if buffer_id.stage == self.placement.last_stage:
            loss, buffer.loss = buffer.loss, None
            self.stock_backward(loss, splitting)
        else:
            self._backward_without_loss(buffer, splitting)
        grads = buffer.take_input_grads()
        if buffer_id.stage:
            receiver = BufferId(buffer_id.stage - 1, buffer_id.micro_batch)
            self._stage_buffers.hand_over(Content.GRADIENT, receiver, grads, is_tuple=True)

    def _backward_without_loss(self, buffer: Buffer, splitting: AbstractContextManager[Any]) -> None:
        """What the stock engine does around the backward of a stage that has no loss."""
        pairs = [(root, grad) for root, grad in zip(buffer.roots, buffer.output_grads, strict=True)
                 if root is not None and grad is not None]
        buffer.roots = buffer.output_grads = ()
        if pairs:
            roots, grads = zip(*pairs)
            # The tuple alone holds them then, and W needs no copies.
            pairs.clear()
            self.run_backward(roots, grads, splitting)
        self._sums.take_in()

    def run_autograd(self, roots: tuple[GradientEdge, ...], gradients: tuple[Tensor, ...]) -> None:
        run_from(roots, gradients)

    def hook_outputs(self, outputs: Any) -> None:
        # Without a ZeROOptimizer there is nothing to do before a backward but on the stage with the loss: gradients of
        # its outputs are divided, and a backward that the engine doesn't run is refused.
        own = type(self)._backward_prologue is StagePasses._backward_prologue
        if self.surrounds_backwards or not own or self._active_stage == self.placement.last_stage:
            super().hook_outputs(outputs)

    # DeepSpeed's optimizers look at `.grad` in both, and one of them zeroes it in the first.
    def _backward_prologue(self) -> None:
        self._sums.take_in()
        super()._backward_prologue()

    def _backward_epilogue(self) -> None:
        self._sums.take_in()
        super()._backward_epilogue()

    def _backward_prologue_per_tensor(self, grad: Tensor) -> Tensor:
        # Gradients are divided by the accumulation steps once: on the stage with the loss.
        if self._active_stage == self.placement.last_stage:
            return self.divide_gradient(grad)
        return grad

    # Plain functions, as in the stock engine.
    _INSTRUCTION_MAP: dict[instr.Instruction, instr.Execute] = {
        **Keeping._INSTRUCTION_MAP,
        instr.ForwardPass: _exec_forward_pass,
        instr.SplitForwardPass: _exec_split_forward_pass,
        instr.BackwardPass: _exec_backward_pass,
        instr.InputGradPass: _exec_input_grad_pass,
        instr.WeightGradPass: _exec_weight_grad_pass,
    }
