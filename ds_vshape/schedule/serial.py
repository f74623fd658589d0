"""Schedules, times and sizes as JSON, for the planner's output, its cache and its process.

A pass is [kind, stage, micro-batch], and a piece of a W has a fourth element [piece, pieces].
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

from ds_vshape.schedule.activations import Activations
from ds_vshape.schedule.passes import Kind, Pass
from ds_vshape.schedule.placement import Placement
from ds_vshape.schedule.schedule import Schedule
from ds_vshape.schedule.timeline import Times


def pass_to_json(work: Pass) -> list[Any]:
    """A pass as a list."""
    whole = [work.kind.value, work.stage, work.micro_batch]
    return whole if work.pieces == 1 else [*whole, [work.piece, work.pieces]]


def pass_from_json(entry: list[Any]) -> Pass:
    """The pass that `pass_to_json` wrote; ValueError if it is none."""
    kind, stage, micro_batch, *piece = entry
    return Pass(Kind(kind), stage, micro_batch, *(piece[0] if piece else ()))


def schedule_to_json(schedule: Schedule) -> dict[str, Any]:
    """A schedule as a dictionary of plain values."""
    return {
        "name": schedule.name,
        "placement": {"name": schedule.placement.name, "chunks": list(map(list, schedule.placement.chunks))},
        "micro_batches": schedule.micro_batches,
        "orders": [[pass_to_json(work) for work in order] for order in schedule.orders],
    }


def schedule_from_json(data: Mapping[str, Any]) -> Schedule:
    """The schedule that `schedule_to_json` wrote."""
    placement = Placement(data["placement"]["name"], tuple(map(tuple, data["placement"]["chunks"])))
    orders = tuple(tuple(map(pass_from_json, order)) for order in data["orders"])
    return Schedule(data["name"], placement, data["micro_batches"], orders)


def times_to_json(times: Times) -> dict[str, Any]:
    """Times as a dictionary of plain values."""
    return asdict(times)


def times_from_json(data: Mapping[str, Any]) -> Times:
    """The times that `times_to_json` wrote."""
    return Times(tuple(data["forward"]), tuple(data["input_grad"]), tuple(data["weight_grad"]),
                 tuple(data["hops"]))


def activations_to_json(activations: Activations) -> dict[str, Any]:
    """Sizes as a dictionary of plain values."""
    return asdict(activations)


def activations_from_json(data: Mapping[str, Any]) -> Activations:
    """The sizes that `activations_to_json` wrote."""
    return Activations(tuple(data["whole"]), tuple(data["kept"]))
