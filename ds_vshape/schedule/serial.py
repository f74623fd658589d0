"""Schedules, times and sizes as JSON, for the planner's output, its cache and its process.

A pass is [kind, stage, micro-batch]. A piece of a W has a fourth element [piece, pieces], a C of some layers [layers].
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Annotated, Any, Literal, TypeVar

from pydantic import Field, PlainValidator, TypeAdapter, ValidationError
from typing_extensions import TypedDict

from ds_vshape.schedule.activations import Activations, Working
from ds_vshape.schedule.passes import Kind, Pass
from ds_vshape.schedule.placement import Placement
from ds_vshape.schedule.schedule import Schedule
from ds_vshape.schedule.timeline import Times

T = TypeVar("T")

# Strict, or 1.0 and true would be 1: equal, but no index.
_Count = Annotated[int, Field(strict=True, ge=0)]
_Text = Annotated[str, Field(strict=True)]
_Whole = tuple[Literal["F", "B", "W", "BW", "C", "O", "R"], _Count, _Count]
_Piece = tuple[Literal["W"], _Count, _Count, tuple[_Count, _Count]]
_OfLayers = tuple[Literal["C"], _Count, _Count, tuple[_Count]]
# Bytes of the longest pass, and of all else in a schedule for each rank.
_PASS_BYTES, _RANK_BYTES = 64, 256


class _Placement(TypedDict):
    name: _Text
    chunks: tuple[tuple[_Count, ...], ...]


class _Schedule(TypedDict):
    name: _Text
    placement: _Placement
    micro_batches: _Count
    orders: tuple[tuple[_Whole | _Piece | _OfLayers, ...], ...]


_SCHEDULE = TypeAdapter(_Schedule)


def pass_to_json(action: Pass) -> list[Any]:
    """A pass as a list."""
    whole = [action.kind.value, action.stage, action.micro_batch]
    if action.layers:
        return [*whole, [action.layers]]
    return whole if action.pieces == 1 else [*whole, [action.piece, action.pieces]]


def pass_from_json(entry: Sequence[Any]) -> Pass:
    """The pass that `pass_to_json` wrote; ValueError for anything else."""
    kind, stage, micro_batch, *part = entry
    if Kind(kind) is Kind.C and part:
        return Pass(Kind.C, stage, micro_batch, layers=part[0][0])
    return Pass(Kind(kind), stage, micro_batch, *(part[0] if part else ()))


def placement_to_json(placement: Placement) -> dict[str, Any]:
    """A placement as a dictionary of plain values."""
    return {"name": placement.name, "chunks": list(map(list, placement.chunks))}


def placement_from_json(data: Mapping[str, Any]) -> Placement:
    """The placement that `placement_to_json` wrote."""
    return Placement(data["name"], tuple(map(tuple, data["chunks"])))


def schedule_to_json(schedule: Schedule) -> dict[str, Any]:
    """A schedule as a dictionary of plain values."""
    return {
        "name": schedule.name,
        "placement": placement_to_json(schedule.placement),
        "micro_batches": schedule.micro_batches,
        "orders": [[pass_to_json(action) for action in order] for order in schedule.orders],
    }


def schedule_from_json(data: Any) -> Schedule:
    """The schedule that `schedule_to_json` wrote; ValueError for anything else. Whether it can run isn't looked at."""
    found = _SCHEDULE.validate_python(data)
    orders = tuple(tuple(map(pass_from_json, order)) for order in found["orders"])
    return Schedule(found["name"], placement_from_json(found["placement"]), found["micro_batches"], orders)


# A schedule within other data that pydantic reads.
JsonSchedule = Annotated[Schedule, PlainValidator(schedule_from_json)]


def most_bytes(placement: Placement, micro_batches: int, pieces: int) -> int:
    """No schedule on `placement`, with F, B, C, O, R and each W in up to `pieces`, takes more as JSON."""
    return (5 + pieces) * placement.stages * micro_batches * _PASS_BYTES + (placement.ranks + 16) * _RANK_BYTES


def read_json(text: bytes, kind: TypeAdapter[T]) -> T:
    """`text` as `kind`; ValueError in one line for anything that isn't JSON of that kind, however large or deep."""
    try:
        return kind.validate_json(text)
    except ValidationError as error:
        first = error.errors(include_url=False, include_input=False)[0]
        place = ".".join(map(str, first["loc"]))
        raise ValueError(" ".join([*([f"{place}:"] if place else []), *first["msg"].split()])[:300]) from None


def times_to_json(times: Times) -> dict[str, Any]:
    """Times as a dictionary of plain values."""
    return asdict(times)


def times_from_json(data: Mapping[str, Any]) -> Times:
    """The times that `times_to_json` wrote."""
    return Times(tuple(data["forward"]), tuple(data["input_grad"]), tuple(data["weight_grad"]),
                 tuple(data["hops"]), tuple(data["scales"]), tuple(map(tuple, data["recompute"])),
                 tuple(data["offload"]), tuple(data["reload"]), tuple(map(tuple, data["copied"])),
                 tuple(map(tuple, data["entry_costs"])))


def activations_to_json(activations: Activations) -> dict[str, Any]:
    """Sizes as a dictionary of plain values."""
    return asdict(activations)


def activations_from_json(data: Mapping[str, Any]) -> Activations:
    """The sizes that `activations_to_json` wrote."""
    return Activations(tuple(data["after_forward"]), tuple(data["after_backward"]),
                       tuple(map(tuple, data["recomputed"])), tuple(data["offloadable"]))


def working_to_json(working: Working) -> dict[str, Any]:
    """What passes need while they run, as a dictionary of plain values."""
    return asdict(working)


def working_from_json(data: Mapping[str, Any]) -> Working:
    """What `working_to_json` wrote."""
    return Working(**{name: tuple(sizes) for name, sizes in data.items()})
