"""A checkpoint is there whole, or not at all, whenever its writers die.

DeepSpeed (engine.save_checkpoint in runtime/engine.py) writes into the checkpoint's folder itself, and its rank 0 names
it in the file "latest" when its own files are written: a rank that dies a moment later leaves a latest checkpoint with
half of its files, and one saved again under the same tag is lost from the first byte on. Here:

    [1] all ranks write into TAG.draft                                a kill leaves a draft, which the next save clears
    [2] when all have written, TAG becomes TAG.replaced, if there is one
    [3] TAG.draft becomes TAG                                         between the two, TAG.replaced is what is loaded
    [4] "latest" names TAG, in one write; TAG.replaced goes
"""

from __future__ import annotations

import os
import shutil
from dataclasses import dataclass
from pathlib import Path

_LATEST = "latest"


@dataclass(frozen=True)
class Draft:
    """A checkpoint that is being written in the folder `parent`."""

    parent: str
    tag: str

    @property
    def name(self) -> str:
        """The tag under which it is written."""
        return f"{self.tag}.draft"

    def clear(self) -> None:
        """Remove what a save that didn't come to its end has left."""
        shutil.rmtree(Path(self.parent, self.name), ignore_errors=True)

    def commit(self) -> None:
        """It is whole now: put it in its place."""
        place, replaced = Path(self.parent, self.tag), Path(self.parent, _replaced(self.tag))
        if place.exists():
            shutil.rmtree(replaced, ignore_errors=True)
            os.rename(place, replaced)
        os.rename(Path(self.parent, self.name), place)

    def forget_replaced(self) -> None:
        """Remove the checkpoint whose place it has taken."""
        shutil.rmtree(Path(self.parent, _replaced(self.tag)), ignore_errors=True)


def name_latest(parent: str, tag: str) -> None:
    """Let `tag` be what is loaded from the folder `parent` by default."""
    draft = Path(parent, f"{_LATEST}.draft")
    draft.write_text(tag, encoding="utf-8")
    os.replace(draft, Path(parent, _LATEST))


def latest(parent: str) -> str | None:
    """The tag of the latest checkpoint in the folder `parent`."""
    path = Path(parent, _LATEST)
    return path.read_text(encoding="utf-8").strip() if path.is_file() else None


def whole(parent: str, tag: str) -> str:
    """Where the checkpoint `tag` is: under its name, or still under that of one which was being replaced."""
    if not Path(parent, tag).exists() and Path(parent, _replaced(tag)).exists():
        return _replaced(tag)
    return tag


def _replaced(tag: str) -> str:
    return f"{tag}.replaced"
