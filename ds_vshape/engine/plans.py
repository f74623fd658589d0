"""What batches run by: a schedule for each number of micro-batches, lowered to this rank's instructions.

    the source (scheduling.py) -> a schedule -> lowered and checked (schedule/) -> the instructions of this rank

Each rank lowers and checks its own program, and all ranks agree that they have all done so
(schedule/proofs/own_proof.py).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property, partial

from deepspeed.runtime.pipe.module import PipelineError

from ds_vshape.config.compatibility import check_micro_batches
from ds_vshape.config.to_schedule import Room
from ds_vshape.engine.scheduling import Schedules
from ds_vshape.health.failures import Agreement
from ds_vshape.health.preflight import Preflight
from ds_vshape.measure.profiling import PassRecorder
from ds_vshape.runtime import instructions as instr
from ds_vshape.schedule.activations import Activations
from ds_vshape.schedule.builders.forward_only import forward_only
from ds_vshape.schedule.builders.pending import with_few_pending
from ds_vshape.schedule.collection import uncollected
from ds_vshape.schedule.lowering import Lowering, Program
from ds_vshape.schedule.passes import Pass
from ds_vshape.schedule.placement import Placement
from ds_vshape.schedule.proofs.own_proof import NotShown, show
from ds_vshape.schedule.proofs.synchronization import check_with_synchronization
from ds_vshape.schedule.schedule import Schedule, check
from ds_vshape.schedule.timeline import Times

# B leaves 16 times what F does where transformer blocks are recomputed, and twice as much in a chain of linear layers.
_RECOMPUTED = 4

# What all ranks do together, in errors.
_CHECK = "check of the plan"

# `Lowering.programs` or `Lowering.announced`.
Lower = Callable[[Lowering, Sequence[int] | None], tuple[Program, ...]]


@dataclass(frozen=True)
class BatchPlan:
    """A schedule, and what this rank does for it."""

    schedule: Schedule
    instructions: list[instr.PipeInstruction]

    @cached_property
    def passes(self) -> list[Pass | None]:
        """The pass of each instruction that runs one."""
        return [instr.pass_of(instruction) for instruction in self.instructions]

    @cached_property
    def splits(self) -> bool:
        """Whether there are split passes in it."""
        return any(isinstance(instruction, instr.SplitForwardPass) for instruction in self.instructions)


class Plans:
    """The plans of one rank's batches.

    Args:
        placement: of the model's stages.
        rank: this pipeline rank.
        name: of the schedule that is asked for.
        source: where training schedules come from.
        instructions: the instructions of a training batch, from this rank's program.
        recomputes: whether forwards leave less than backwards do, as far as the configuration says.
        knows_sizes: whether a plan takes the measured sizes of activations into account.
        agreement: of all ranks of the job.
        preflight: the same.
    """

    def __init__(self, placement: Placement, rank: int, name: str, source: Schedules,
                 instructions: Callable[[Program], list[instr.PipeInstruction]], recomputes: bool,
                 knows_sizes: Callable[[], bool], agreement: Agreement, preflight: Preflight) -> None:
        self._placement, self._rank, self._name, self._source = placement, rank, name, source
        self._instructions, self._knows_sizes = instructions, knows_sizes
        self._recomputes, self._agreement, self._preflight = recomputes, agreement, preflight
        self._schedules: dict[int, Schedule] = {}
        self._plans: dict[int, BatchPlan] = {}
        # The same schedules for batches in which messages are announced, as far as there were any.
        self._announced: dict[int, BatchPlan] = {}
        self._evaluated: dict[int, BatchPlan] = {}
        # Whether the next training batch is the first by another schedule.
        self.swapped = False

    @property
    def times(self) -> Times | None:
        """The measured times that the present schedule was planned for; None where there are none, or none yet."""
        return self._source.times

    def entry_costs(self, stage: int) -> tuple[float, ...]:
        """What W's entries cost on `stage`, as far as it was measured: its pieces are cut by that."""
        return self._source.entry_costs[stage] if self._source.entry_costs else ()

    def schedule(self, micro_batches: int) -> Schedule:
        """That of training batches; where there is none yet, collective."""
        if micro_batches not in self._schedules:
            self._preflight.run(partial(check_micro_batches, micro_batches, self._placement, self._name))
            self._schedules[micro_batches] = self._chosen(self._source.first(micro_batches))
        return self._schedules[micro_batches]

    def training(self, micro_batches: int) -> BatchPlan:
        """The plan of training batches; collective where there is none yet."""
        if micro_batches not in self._plans:
            self._lower(self.schedule(micro_batches))
        return self._plans[micro_batches]

    def announced(self, micro_batches: int) -> BatchPlan:
        """As `training`, for a batch in which messages are announced."""
        plan = self.training(micro_batches)
        if micro_batches not in self._announced:
            program = self.program(plan.schedule, Lowering.announced)
            self._announced[micro_batches] = BatchPlan(plan.schedule, self._instructions(program))
        return self._announced[micro_batches]

    def evaluation(self, micro_batches: int) -> BatchPlan:
        """The plan of an evaluated batch. Raises PipelineError for a number that can't be."""
        if micro_batches not in self._evaluated:
            self._preflight.run(partial(self._check_evaluated, micro_batches))
            schedule = forward_only(self._placement, micro_batches)
            instructions = instr.evaluation_instructions(self.program(schedule, Lowering.announced))
            self._evaluated[micro_batches] = BatchPlan(schedule, instructions)
        return self._evaluated[micro_batches]

    def _check_evaluated(self, micro_batches: int) -> None:
        if micro_batches < 1:
            raise PipelineError(f"num_micro_batches = {micro_batches}: must be at least 1")
        check_micro_batches(micro_batches, self._placement, self._name, "num_micro_batches")

    @property
    def will_plan(self) -> bool:
        """Whether another schedule than the present one is to come, within the limit."""
        return self._source.will_plan

    def start_within(self, room: Room) -> bool:
        """Train by a schedule for equal times within `room` until times are measured; False if there is none but the
        present one (collective)."""
        schedule = self._source.within(room)
        if schedule is not None:
            self._adopt(schedule)
        return schedule is not None

    def check(self, schedule: Schedule) -> None:
        """Raise ScheduleError for one that isn't whole, PipelineError for one with another placement than the model's.
        """
        if schedule.placement != self._placement:
            raise PipelineError(f"{schedule.name} places its stages as {schedule.placement.chunks}, but the model has "
                                f"{self._placement.chunks}")
        check(schedule)

    def use(self, schedule: Schedule) -> None:
        """Train by `schedule`, which `check` lets pass and all ranks have, from the next batch of as many micro-batches
        on (collective). Raises ScheduleError or DeadlockError, on all ranks, for one that can't run.
        """
        self._lower(schedule)

    def _lower(self, schedule: Schedule) -> None:
        instructions = self._instructions(self.program(schedule, Lowering.programs))
        self._schedules[schedule.micro_batches] = schedule
        self._plans[schedule.micro_batches] = BatchPlan(schedule, instructions)
        self._announced.pop(schedule.micro_batches, None)

    def after_batch(self, schedule: Schedule, record: PassRecorder) -> bool:
        """Take note of a training batch (collective). True if it was the first by a schedule for measured times."""
        better = self._source.after_batch(schedule, record)
        is_first = self.swapped and better is None and self.times is not None
        self.swapped = better is not None
        if better is not None:
            self._adopt(better)
        return is_first

    def look_at_sizes(self, activations: Activations | None) -> None:
        """A layer may recompute on its own; that shows when activations are measured."""
        if activations is None or self._recomputes:
            return
        if sum(activations.after_backward) > _RECOMPUTED * sum(activations.after_forward):
            self._recomputes = True
            for schedule in list(self._schedules.values()):
                self._adopt(schedule)

    def _adopt(self, schedule: Schedule) -> None:
        """Use a schedule of the source, which has checked it."""
        self._lower(self._chosen(schedule))

    def _chosen(self, schedule: Schedule) -> Schedule:
        """`schedule` with fewer pending weight gradients where those are most of the memory."""
        return with_few_pending(schedule) if self._recomputes and not self._knows_sizes() else schedule

    @uncollected()
    def program(self, schedule: Schedule, lower: Lower) -> Program:
        """This rank's part of `schedule`, after the checks of all ranks' parts (collective).

        Raises ScheduleError or DeadlockError, on all ranks, if they can't run.
        """
        lowering = Lowering(schedule, Times.uniform(self._placement.stages))
        own, = lower(lowering, [self._rank])
        try:
            show(own, self._rank, schedule, lowering)
            shown = True
        except NotShown:
            shown = False
        if self._agreement.holds_everywhere(shown, _CHECK):
            return own

        def checked() -> Program:
            programs = lower(lowering, None)
            check_with_synchronization(programs, self._placement)
            return programs[self._rank]

        return self._agreement.run(checked, _CHECK)
