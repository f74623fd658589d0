"""What an engine says of its training besides the loss: schedules, times, memory."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from deepspeed.utils import logger

from ds_vshape.comm.channels import Channels
from ds_vshape.engine.plans import Plans
from ds_vshape.health.watch import in_phase
from ds_vshape.measure.log_lines import comparison_line, ends_line
from ds_vshape.measure.observer import Observer
from ds_vshape.measure.rank_memory import RankMemory
from ds_vshape.runtime import instructions as instr
from ds_vshape.schedule.activations import Activations
from ds_vshape.schedule.placement import Placement
from ds_vshape.schedule.schedule import Schedule
from ds_vshape.schedule.timeline import Timeline, Times


class Reports:
    """The reports of a PipelineEngine, which has what is declared here."""

    global_rank: int
    global_steps: int
    micro_batches: int
    placement: Placement
    _channels: Channels
    _instruction: instr.PipeInstruction | None
    module: Any
    _observer: Observer
    _plans: Plans

    @in_phase
    def schedule(self) -> Schedule:
        """The schedule of a training batch with the present number of micro-batches; to be called on every rank where
        there has been no such batch yet."""
        return self._plans.schedule(self.micro_batches)

    @in_phase
    def pipeline_report(self) -> dict[str, Any]:
        """How the last training batch went; to be called on every rank.

        Returns what :func:`ds_vshape.measure.profiling.report` does.
        """
        return self._observer.report()

    @property
    def planned_times(self) -> Times | None:
        """The measured times that the present schedule was planned for; None where there are none, or none yet."""
        return self._plans.times

    @in_phase
    def timelines(self) -> tuple[Timeline, Timeline]:
        """The last training batch as predicted and as measured, in seconds; to be called on every rank.

        The prediction takes the times that the schedule was planned for, or else the batch's own mean times.
        """
        return self._observer.timelines(self.planned_times)

    def activation_sizes(self) -> Activations | None:
        """What a micro-batch leaves in memory on each stage, in bytes, as measured in the second training batch; None
        where it couldn't be measured. Raises PipelineError before that batch."""
        return self._observer.activations()

    def memory_report(self) -> tuple[RankMemory, ...]:
        """The bytes that each pipeline rank needs under the present schedule, as counted in the second training batch;
        with a limit in bytes also before it, by shapes. Any rank may call it alone. Activations are None where they
        couldn't be measured, which the log has said.

        Raises PipelineError before that."""
        return self._observer.counted(self.schedule())

    def rollback_bytes(self) -> int:
        """What this rank keeps to take a step back."""
        return 0

    # -- in errors and in the log

    def _doing(self, what: str) -> Callable[[], str]:
        """Gives the name of the instruction in which this rank is at the time (its device, where that runs behind the
        host), or `what` where there is none."""
        def name() -> str:
            awaited = self._channels.awaited_by_device()
            instruction = self._instruction if awaited is None else instr.instruction_of(awaited)
            return what if instruction is None else instr.name_of(instruction)

        return name

    def _progress(self) -> str:
        """What the error for a lost rank says of the training; before the first step also where the ends of the model
        are, since a script may wait for the wrong rank there."""
        return f"the last batch done is number {self.global_steps}" + ("" if self.global_steps else
                                                                       ends_line(self.placement))

    def _log(self, line: str) -> None:
        if self.global_rank == 0:
            logger.info(line)

    def _log_sizes(self) -> None:
        """Say which sizes of activations stay unknown; collective, after the batch in which they are measured."""
        unknown = self._observer.agree_on_sizes(self.module.preflight.exchange)
        if unknown:
            self._log(f"activations couldn't be measured in training batch {self._observer.batches}, and their sizes "
                      f"stay unknown: {unknown}")

    def _log_memory(self) -> None:
        for rank, memory in enumerate(self._observer.memory(self.schedule())):
            self._log(f"pipeline rank {rank} needs {memory}")

    def _log_comparison(self) -> None:
        """Say once after a swap how the new schedule ran."""
        self._log(comparison_line(self._observer.last_batch()[0].name, *self.timelines()))
