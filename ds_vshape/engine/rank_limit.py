"""The limit for all that a rank needs (`"memory_limit": "70GiB"`): checked before the first batch, by shapes, and again
when sizes have been measured; what it leaves for the passes is what schedules are planned for."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import astuple, dataclass, fields, replace

from deepspeed.runtime.pipe.module import PipelineError

from ds_vshape.comm.exchange import Exchange
from ds_vshape.config.section import KEY, ScheduleConfig
from ds_vshape.config.to_schedule import Room
from ds_vshape.measure.rank_memory import RankMemory, Sizes, beyond, least, rooms
from ds_vshape.schedule.placement import Placement


@dataclass(frozen=True)
class RankLimit:
    """A `limit` in bytes for each rank of all pipelines, whose plan may recompute and offload as far as `config` says;
    methods are collective over `exchange`, that of the job, and raise PipelineError on every rank."""

    limit: int
    placement: Placement
    exchange: Exchange
    config: ScheduleConfig

    def check(self, name: str, memory: Sequence[RankMemory], sizes: Sizes | None, known: str) -> None:
        """Raise if the ranks need more under the schedule `name`; `known` says how that is known."""
        if found := beyond(f"{KEY}.memory_limit", self.limit, f"{name} needs", self._largest(memory),
                           None if sizes is None else least(memory, self.placement, sizes, self.config)):
            raise PipelineError(f"{found} ({known})")

    def room(self, memory: Sequence[RankMemory], sizes: Sizes, known: str) -> Room:
        """What is left for the passes of any order; raises if that isn't enough for the one that needs least."""
        of_all = self._largest(memory)
        if found := beyond(f"{KEY}.memory_limit", self.limit, "the least possible is",
                           least(of_all, self.placement, sizes, self.config)):
            raise PipelineError(f"{found} ({known})")
        return Room(*sizes, rooms(self.limit, of_all))

    def fits(self, memory: Sequence[RankMemory]) -> bool:
        """Whether all ranks are within the limit."""
        return all(of_rank.total <= self.limit for of_rank in self._largest(memory))

    def _largest(self, memory: Sequence[RankMemory]) -> tuple[RankMemory, ...]:
        """The largest parts of all replicas."""
        known = [replace(of_rank, activations_peak=of_rank.activations_peak or 0, working=of_rank.working or 0)
                 for of_rank in memory]
        numbers = iter(self.exchange.largest_of_each([size for of_rank in known for size in astuple(of_rank)]))
        return tuple(RankMemory(*(next(numbers) for _ in fields(RankMemory))) for _ in memory)
