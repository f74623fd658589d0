"""torch's own pipeline schedules (torch.distributed.pipelining): which stages a rank holds, and its passes in order.

torch makes the orders from a few numbers, without a process group, so that they can be simulated as ours.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from types import SimpleNamespace
from typing import Any

from torch.distributed.pipelining import (Schedule1F1B, ScheduleDualPipeV, ScheduleInterleaved1F1B,
                                          ScheduleInterleavedZeroBubble, ScheduleZBVZeroBubble)
from torch.distributed.pipelining.schedules import BACKWARD_INPUT, BACKWARD_WEIGHT, FORWARD, FULL_BACKWARD, OVERLAP_F_B

from ds_vshape.schedule.named import build
from ds_vshape.schedule.passes import Kind, Pass
from ds_vshape.schedule.placement import Placement, interleaved, linear, v
from ds_vshape.schedule.schedule import Schedule, ScheduleError, check

_KINDS = {FORWARD: Kind.F, BACKWARD_INPUT: Kind.B, BACKWARD_WEIGHT: Kind.W, FULL_BACKWARD: Kind.BW}


@dataclass(frozen=True)
class TorchSchedule:
    """One of torch's schedules, and where its stages are on a number of ranks."""

    schedule: type[Any]
    placement: Callable[[int], Placement]

    def order(self, ranks: int, micro_batches: int) -> Schedule:
        """As one of ours; ScheduleError for fewer micro-batches than it needs.

        Where torch has a forward and a backward overlap, one follows the other, as its own runtime has them.
        """
        if self.schedule is Schedule1F1B:
            # Its runtime goes by no list of passes, and the one that torch draws lacks the last rank's first.
            return build("1f1b", ranks, micro_batches)
        placement = self.placement(ranks)
        if self.schedule is ScheduleDualPipeV and micro_batches < placement.stages:
            raise ScheduleError(f"DualPipeV needs a micro-batch for each of {placement.stages} stages")
        rounds = max(1, micro_batches // ranks)
        own = SimpleNamespace(num_stages=placement.stages, pp_group_size=ranks, n_local_stages=placement.chunks_each,
                              _n_microbatches=micro_batches, number_of_rounds=rounds,
                              microbatches_per_round=micro_batches // rounds)
        made = Schedule(f"torch {self.schedule.__name__.removeprefix('Schedule')}", placement, micro_batches, tuple(
            tuple(_passes(self.schedule._calculate_single_rank_operations(own, rank))) for rank in range(ranks)))
        check(made)
        return made


TORCH_SCHEDULES = {
    "torch 1f1b": TorchSchedule(Schedule1F1B, linear),
    "torch interleaved1f1b": TorchSchedule(ScheduleInterleaved1F1B, interleaved),
    "torch interleavedzerobubble": TorchSchedule(ScheduleInterleavedZeroBubble, interleaved),
    "torch interleavedzerobubble:4": TorchSchedule(ScheduleInterleavedZeroBubble, partial(interleaved, chunks=4)),
    "torch zbvzerobubble": TorchSchedule(ScheduleZBVZeroBubble, v),
    "torch dualpipev": TorchSchedule(ScheduleDualPipeV, v),
}


def _passes(actions: list[Any]) -> Iterator[Pass]:
    for action in actions:
        if action is not None and action.computation_type is OVERLAP_F_B:
            yield from _passes(action.sub_actions)
        elif action is not None and action.computation_type in _KINDS:
            yield Pass(_KINDS[action.computation_type], action.stage_index, action.microbatch_index)
