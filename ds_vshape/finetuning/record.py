"""A training that has ended is recorded with its checkpoints, so that its command, started again, ends at once.

A job may be killed after its model is written, and then be started again by whatever watches over it.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch.distributed as dist

from ds_vshape.checkpoint.errors import replace_text
from ds_vshape.config.section import load_ds_config
from ds_vshape.finetuning.training import Result
from ds_vshape.models.hugging_face import check_output

FILE = "finished.json"


class Record:
    """Of the training that `settings` describe, which have `checkpoints`, `output` and `ds_config`; without a folder
    for checkpoints nothing is recorded."""

    def __init__(self, settings: Mapping[str, Any]) -> None:
        self._file = settings["checkpoints"] and Path(settings["checkpoints"], FILE)
        self._output = Path(settings["output"])
        described = {**settings, "ds_config": load_ds_config(settings["ds_config"])}
        self._settings = json.loads(json.dumps(described, default=str))

    def result(self) -> Result | None:
        """What the training measured, if it has ended and its model is written; else None (collective).

        Raises:
            FileExistsError: on every rank, if another training's model is there.
        """
        found: list[Any] = [self._found() if dist.get_rank() == 0 else None]
        dist.broadcast_object_list(found, 0)
        if isinstance(found[0], FileExistsError):
            raise found[0]
        if found[0] is not None and dist.get_rank() == 0:
            print(f"nothing to do: {self._output} holds the model that this training has made", flush=True)
        return found[0] and Result.read(found[0])

    def write(self, result: Result) -> None:
        """To be called before the model is written."""
        if self._file and dist.get_rank() == 0:
            self._file.parent.mkdir(parents=True, exist_ok=True)
            text = json.dumps({"settings": self._settings, "result": asdict(result)}, indent=2) + "\n"
            replace_text(self._file, text, self._file.with_suffix(".draft"))

    def _found(self) -> dict[str, Any] | FileExistsError | None:
        try:
            check_output(self._output)
        except FileExistsError as error:
            recorded = json.loads(self._file.read_text()) if self._file and self._file.exists() else {}
            return recorded["result"] if recorded.get("settings") == self._settings else error
        return None
