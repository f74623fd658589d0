"""Reads what wandb keeps of an offline run: its file of protobuf records in LevelDB's log format."""

from __future__ import annotations

import json
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any

_HEADER = struct.Struct("<4sHB")
_CHUNK = struct.Struct("<IHB")
_BLOCK = 32768
_FULL, _FIRST, _MIDDLE, _LAST = 1, 2, 3, 4


def history(folder: Path) -> list[dict[str, Any]]:
    """What the one run below `folder` logged, step by step."""
    from wandb.proto.wandb_internal_pb2 import Record
    file, = folder.rglob("run-*.wandb")
    steps = []
    for data in _records(file.read_bytes()):
        record = Record()
        record.ParseFromString(data)
        if record.WhichOneof("record_type") == "history":
            steps.append(_step(record.history.item))
    return steps


def _step(items: Any) -> dict[str, Any]:
    """What was logged: a value, or a dictionary for an image."""
    step: dict[str, Any] = {}
    for item in items:
        *path, last = item.nested_key or [item.key]
        place = step
        for name in path:
            place = place.setdefault(name, {})
        place[last] = json.loads(item.value_json)
    return step


def _records(data: bytes) -> Iterator[bytes]:
    assert _HEADER.unpack_from(data)[0] == b":W&B"
    at, parts = _HEADER.size, b""
    while at + _CHUNK.size <= len(data):
        if _BLOCK - at % _BLOCK < _CHUNK.size:
            at += _BLOCK - at % _BLOCK
            continue
        _, size, kind = _CHUNK.unpack_from(data, at)
        at += _CHUNK.size
        parts += data[at:at + size]
        at += size
        assert kind in (_FULL, _FIRST, _MIDDLE, _LAST)
        if kind in (_FULL, _LAST):
            yield parts
            parts = b""
