"""A rehearsal of a batch: its passes run without the end of the batch, unseen by timers, traces and monitors.

The batch itself runs afterwards, from the same samples.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from torch import Tensor
from torch.nn import Parameter

from ds_vshape.comm.channels import Channels, Signatures
from ds_vshape.deepspeed_adapter.checkpointing import forget_checkpoints
from ds_vshape.deepspeed_adapter.engine import StockEngine
from ds_vshape.engine.guard import BatchGuard
from ds_vshape.engine.plans import Plans
from ds_vshape.engine.rollback import Samples
from ds_vshape.measure.observer import Observer
from ds_vshape.runtime import instructions as instr
from ds_vshape.runtime.buffers import Buffers
from ds_vshape.runtime.wrappers import InstructionWrappers
from ds_vshape.schedule.lowering import Lowering
from ds_vshape.schedule.passes import Pass
from ds_vshape.schedule.schedule import Schedule


class Rehearsal(StockEngine):
    """How a PipelineEngine rehearses a batch; it has what is declared here."""

    _active_stage: int | None
    _channels: Channels
    _guard: BatchGuard
    _observer: Observer
    _plans: Plans
    _samples: Samples
    _signatures: Signatures | None
    _stage_buffers: Buffers
    _sums: Any
    _wrappers: InstructionWrappers

    @property
    def _announces(self) -> bool:
        raise NotImplementedError

    def _run(self, instructions: Sequence[instr.PipeInstruction], passes: Sequence[Pass | None]) -> None:
        raise NotImplementedError

    def draw_ahead(self, schedule: Schedule) -> None:
        """The engine's."""
        raise NotImplementedError

    @contextmanager
    def rehearsed(self, schedule: Schedule) -> Iterator[None]:
        """Run the passes of the next batch by `schedule`, without timers, traces and monitors.

        Within the context there are their losses and gradients, and the failure if this rank has failed. Afterwards
        only the gradients are left, and what layers have changed.
        """
        lower = Lowering.announced if self._announces else Lowering.programs
        instructions = instr.passes_alone(self._plans.program(schedule, lower))
        self._samples.keep()
        self.fwd_outputs: list[Any] = []
        self._channels.begin_batch(None if self._announces else self._signatures)
        self._active_stage = None
        # Micro-batches in the places that they have in the batch itself, whose schedule may order them otherwise.
        self.draw_ahead(self._plans.schedule(schedule.micro_batches))
        # What is copied isn't the last batch's.
        self._observer.begin_batch(schedule, training=False)
        with self._wrappers.none():
            self._run(instructions, [None] * len(instructions))
        yield
        self._guard.failure = None
        self._stage_buffers.clear()
        self._channels.end_batch()
        forget_checkpoints()
        self._samples.again()

    def gradient_so_far(self, parameter: Parameter) -> Tensor | None:
        """What the batch has added up for a parameter so far, wherever the optimizer wants it; None if nothing."""
        total: Tensor | None = self._sums.total(parameter) if self._sums.holds(parameter) else parameter.grad
        # Where sums are kept elsewhere, `.grad` has what was added since the last backward.
        rest: Tensor | None = parameter.grad
        if total is None or rest is None or total is rest:
            return rest if total is None else total
        return total + rest.view_as(total)
