"""What the adaptive planner is asked, and what it answers."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

from ds_vshape.schedule.activations import Activations
from ds_vshape.schedule.bounds import lower_bound_of_limits
from ds_vshape.schedule.of_stages import check_numbers
from ds_vshape.schedule.passes import Kind
from ds_vshape.schedule.placement import Placement
from ds_vshape.schedule.schedule import Schedule
from ds_vshape.schedule.timeline import Timeline, Times

# Sums of sizes and times are compared with this relative slack: their order of summation differs.
SLACK = 1e-9


class LimitError(ValueError):
    """A memory limit that no schedule can meet; the message says the least possible of each rank."""


@dataclass(frozen=True)
class Problem:
    """One batch on a placement, how long its passes take, and how much each rank may keep.

    `times` and `activations` are those of its stages, which may all differ; `limits` are the highest peaks of the
    ranks, in the unit of `activations`. `max_pieces` is how many pieces a W may be cut into (1: whole).
    `recompute` and `offload` say whether a plan may run forwards again, and move activations to the host and back.

    Raises ValueError for counts below 1 and lengths that don't fit, and LimitError for a limit below `least`.
    """

    placement: Placement
    micro_batches: int
    times: Times
    activations: Activations
    limits: tuple[float, ...]
    max_pieces: int = 4
    recompute: bool = False
    offload: bool = False

    def __post_init__(self) -> None:
        if self.micro_batches < 1 or self.max_pieces < 1:
            raise ValueError(f"micro-batches and pieces must be at least 1, not {self.micro_batches} and "
                             f"{self.max_pieces}")
        stages = self.placement.stages
        check_numbers("times.forward", self.times.forward, stages)
        check_numbers("times.input_grad", self.times.input_grad, stages)
        check_numbers("times.weight_grad", self.times.weight_grad, stages)
        if self.times.hops:
            check_numbers("times.hops", self.times.hops, stages - 1, "boundary between stages")
        if self.times.scales:
            check_numbers("times.scales", self.times.scales, self.micro_batches, "micro-batch")
        check_numbers("activations.after_forward", self.activations.after_forward, stages)
        check_numbers("activations.after_backward", self.activations.after_backward, stages)
        if len(self.limits) != self.ranks:
            raise ValueError(f"there must be a limit for each of {self.ranks} ranks, not {len(self.limits)}")
        short = [rank for rank, least in enumerate(self.least) if self.limits[rank] < least * (1 - SLACK)]
        if short:
            raise LimitError(f"a limit of {', '.join(f'{self.limits[rank]:g} on rank {rank}' for rank in short)} can't "
                             "be met: the least possible peaks of the ranks are "
                             f"{', '.join(f'{least:g}' for least in self.least)}")

    @property
    def ranks(self) -> int:
        """How many pipeline ranks there are."""
        return self.placement.ranks

    @cached_property
    def least(self) -> tuple[float, ...]:
        """The least possible peak of each rank.

        No schedule has less: when the first micro-batch's F of one of the rank's chunks starts, the activations of the
        chunks before are still waiting. And one micro-batch at a time with whole backwards has no more.
        """
        whole, waiting = self.activations.after_forward, self.waiting
        return tuple(max(whole[stage] + sum(waiting[before] for before in chunks[:place])
                         for place, stage in enumerate(chunks)) for chunks in self.placement.chunks)

    @cached_property
    def lower_bound(self) -> float:
        """A makespan that no schedule is below."""
        kinds = [*([Kind.C] if self.recompute else []), *([Kind.O] if self.offload else [])]
        return lower_bound_of_limits(self.placement, self.micro_batches, self.times, self.activations, self.limits,
                                     kinds)

    @cached_property
    def waiting(self) -> tuple[float, ...]:
        """The least that each stage's activation can take on the device between its F and its backward."""
        return tuple(self.activations.least_between(stage, self.recompute, self.offload)[0]
                     for stage in range(self.placement.stages))


@dataclass(frozen=True)
class Plan:
    """A checked schedule (its name is "adaptive") with what it is predicted to cost.

    `timeline` is simulated with the problem's times, `peaks` are those of `activations.peak_activations`;
    `lower_bound` is a makespan that no schedule of the problem is below (`bounds.lower_bound_of_limits`); `planning_s`
    are seconds.
    """

    schedule: Schedule
    timeline: Timeline
    peaks: tuple[float, ...]
    lower_bound: float
    planning_s: float
