"""What errors call a rank: its place in the job, and where its process is."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any


def rank_names(topology: Any, hosts: Sequence[str]) -> list[str]:
    """The name of each global rank, in rank order.

    Args:
        topology: DeepSpeed's ProcessTopology of the job (runtime/pipe/topology.py).
        hosts: the host of each global rank.
    """
    return [_name(topology.get_coord(rank), rank, host) for rank, host in enumerate(hosts)]


def _name(place: Any, rank: int, host: str) -> str:
    tensor = getattr(place, "model", None)
    sharer = "" if tensor is None else f", tensor parallel rank {tensor}"
    return f"pipeline rank {place.pipe}, replica {place.data}{sharer} (global rank {rank} on {host})"
