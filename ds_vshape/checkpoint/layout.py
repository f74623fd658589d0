"""Saves the placement with a checkpoint, so that optimizer states are never loaded for the wrong layers.

Layer files are named by the layer's number in the model and fit every placement. Optimizer states are one flat tensor
for each rank, in the order of that rank's parameters. Under another placement it may have the right size, and would be
loaded without an error, for the wrong parameters.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path

from ds_vshape.checkpoint.errors import CheckpointError, replace_text, unreadable
from ds_vshape.module.pipeline_module import PipelineModule
from ds_vshape.schedule.placement import linear

FILE = "pipeline_placement.json"


@dataclass(frozen=True)
class SavedLayout:
    """Which layers each rank holds: its stages in order, and the first layer of each stage (with the end)."""

    chunks: list[list[int]]
    bounds: list[int]

    @classmethod
    def of(cls, module: PipelineModule) -> SavedLayout:
        return cls([list(stages) for stages in module.placement.chunks], list(module.parts))


def save_layout(directory: str, layout: SavedLayout, writer: int) -> None:
    """Write `layout` into the checkpoint `directory`; ranks that write at once, under their own `writer`, agree."""
    path = Path(directory) / FILE
    replace_text(path, json.dumps(asdict(layout)), path.with_suffix(f".{writer}.tmp"))


def check_layout(directory: str, layout: SavedLayout) -> None:
    """Raise CheckpointError unless optimizer state saved in `directory` fits `layout`.

    A checkpoint without the file is DeepSpeed's own: one stage a rank, in order.
    """
    path = Path(directory) / FILE
    ranks = len(layout.chunks)
    if path.exists():
        try:
            saved = SavedLayout(**json.loads(path.read_text(encoding="utf-8")))
        except (OSError, ValueError, TypeError) as error:
            raise unreadable(str(path), error) from error
    elif layout.chunks == [list(stages) for stages in linear(ranks).chunks]:
        return
    else:
        saved = SavedLayout([[rank] for rank in range(ranks)], [])
    if saved != layout:
        raise CheckpointError(
            f"the checkpoint {directory} was saved with stages {saved.chunks} on the ranks and stage bounds "
            f"{saved.bounds or 'unknown'}; now it is {layout.chunks} and {layout.bounds}, so its optimizer state "
            "belongs to other layers. Load it with the schedule and partition it was saved with; or convert it with "
            "DeepSpeed's ds_to_universal.py and set \"checkpoint\": {\"load_universal\": true}; or take the weights "
            "alone with load_module_only=True")
