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
from ds_vshape.schedule.lowering import Message


class Messaging(StockEngine):
    """How a PipelineEngine sends and receives; it has what is declared here."""

    _channels: Channels
    _stage_buffers: Buffers
    _signatures: Signatures | None

    def _exec_recv(self, buffer_id: BufferId, message: Message) -> None:
        self._channels.post(message)

    def _exec_wait_activation(self, buffer_id: BufferId, message: Message) -> None:
        self._stage_buffers.open(buffer_id).inputs = self._channels.receive(message)

    def _exec_wait_grad(self, buffer_id: BufferId, message: Message) -> None:
        self._stage_buffers[buffer_id].output_grads = members(self._channels.receive(message))

    def _exec_send(self, buffer_id: BufferId, message: Message) -> None:
        self._channels.send(message, self._stage_buffers.take(message.channel.content, buffer_id))

    def _exec_release(self, buffer_id: BufferId, message: Message) -> None:
        self._channels.release(message)

    def reset_activation_shape(self) -> None:
        """Announce the shapes of all messages again in the next batch; to be called on every rank."""
        super().reset_activation_shape()
        self._signatures = None

    # Plain functions, as in the stock engine.
    _INSTRUCTION_MAP: dict[instr.Instruction, instr.Execute] = {
        instr.RecvActivation: _exec_recv,
        instr.RecvGrad: _exec_recv,
        instr.WaitActivation: _exec_wait_activation,
        instr.WaitGrad: _exec_wait_grad,
        instr.SendActivation: _exec_send,
        instr.SendGrad: _exec_send,
        instr.ReleaseActivation: _exec_release,
        instr.ReleaseGrad: _exec_release,
    }
