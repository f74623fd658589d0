"""How errors name a rank: its place in the job, and the host of its process."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class RankName:
    """The name of global rank `rank`; pipeline rank and replica are None while nothing of them is known."""

    rank: int
    host: str
    pipeline_rank: int | None = None
    replica: int | None = None
    tensor_rank: int | None = None

    @property
    def short(self) -> str:
        """Its place in a pipeline, if it's known."""
        return f"global rank {self.rank}" if self.pipeline_rank is None else f"pipeline rank {self.pipeline_rank}"

    @property
    def rest(self) -> str:
        """What `short` doesn't say, without the host; empty where `short` says all."""
        return "" if self.pipeline_rank is None else f"{self._replica}, global rank {self.rank}"

    @property
    def _replica(self) -> str:
        tensor = "" if self.tensor_rank is None else f", tensor parallel rank {self.tensor_rank}"
        return f"replica {self.replica}{tensor}"

    def __str__(self) -> str:
        if self.pipeline_rank is None:
            return f"{self.short} on {self.host}"
        return f"{self.short}, {self._replica} (global rank {self.rank} on {self.host})"


def rank_names(hosts: Sequence[str], topology: Any = None) -> list[RankName]:
    """The name of each global rank, in rank order.

    Args:
        hosts: the host of each global rank.
        topology: DeepSpeed's ProcessTopology of the job (runtime/pipe/topology.py), once there is one.
    """
    if topology is None:
        return [RankName(rank, host) for rank, host in enumerate(hosts)]
    places = [topology.get_coord(rank) for rank in range(len(hosts))]
    return [RankName(rank, host, place.pipe, place.data, getattr(place, "model", None))
            for rank, (host, place) in enumerate(zip(hosts, places, strict=True))]
