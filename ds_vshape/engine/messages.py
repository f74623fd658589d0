"""The messages of a batch: an activation goes to the next stage, a gradient to the one before.

    Recv*      a buffer is offered            Send*      a tensor starts to leave
    Wait*      it is there                    Release*   it has left
"""

from __future__ import annotations

from ds_vshape.comm.channels import Channels, Signatures
from ds_vshape.comm.payload import members
from ds_vshape.deepspeed_adapter.engine import StockEngine
from ds_vshape.runtime import instructions as instr
from ds_vshape.runtime.buffers import Buffers
from ds_vshape.runtime.instructions import BufferId
from ds_vshape.schedule.lowering import Content, Message, message_into
from ds_vshape.schedule.passes import Kind, Pass
from ds_vshape.schedule.placement import Placement


class Messaging(StockEngine):
    """How a PipelineEngine sends and receives; it has what is declared here."""

    placement: Placement
    _channels: Channels
    _stage_buffers: Buffers
    _messages: dict[tuple[Kind, BufferId], Message]
    _signatures: Signatures | None

    def _exec_recv_activation(self, buffer_id: BufferId) -> None:
        self._channels.post(self._message(Kind.F, buffer_id))

    def _exec_recv_grad(self, buffer_id: BufferId) -> None:
        self._channels.post(self._message(Kind.B, buffer_id))

    def _exec_wait_activation(self, buffer_id: BufferId) -> None:
        self._stage_buffers.open(buffer_id).inputs = self._channels.receive(self._message(Kind.F, buffer_id))

    def _exec_wait_grad(self, buffer_id: BufferId) -> None:
        self._stage_buffers[buffer_id].output_grads = members(self._channels.receive(self._message(Kind.B, buffer_id)))

    def _exec_send_activation(self, buffer_id: BufferId) -> None:
        self._channels.send(self._message(Kind.F, buffer_id), self._stage_buffers.take(Content.ACTIVATION, buffer_id))

    def _exec_send_grad(self, buffer_id: BufferId) -> None:
        self._channels.send(self._message(Kind.B, buffer_id), self._stage_buffers.take(Content.GRADIENT, buffer_id))

    def _exec_release_activation(self, buffer_id: BufferId) -> None:
        self._channels.release(self._message(Kind.F, buffer_id))

    def _exec_release_grad(self, buffer_id: BufferId) -> None:
        self._channels.release(self._message(Kind.B, buffer_id))

    def _message_of(self, instruction: instr.BufferOpInstruction) -> Message:
        return self._message(instr.MESSAGE_KINDS[type(instruction)], instruction.kwargs["buffer_id"])

    def _message(self, kind: Kind, buffer_id: BufferId) -> Message:
        message = self._messages.get((kind, buffer_id))
        if message is None:
            message = message_into(Pass(kind, *buffer_id), self.placement)
            assert message is not None
            self._messages[kind, buffer_id] = message
        return message

    def reset_activation_shape(self) -> None:
        """Announce the shapes of all messages again in the next batch; to be called on every rank."""
        super().reset_activation_shape()
        self._signatures = None

    # Plain functions, as in the stock engine.
    _INSTRUCTION_MAP: dict[instr.Instruction, instr.Execute] = {
        instr.RecvActivation: _exec_recv_activation,
        instr.RecvGrad: _exec_recv_grad,
        instr.WaitActivation: _exec_wait_activation,
        instr.WaitGrad: _exec_wait_grad,
        instr.SendActivation: _exec_send_activation,
        instr.SendGrad: _exec_send_grad,
        instr.ReleaseActivation: _exec_release_activation,
        instr.ReleaseGrad: _exec_release_grad,
    }
