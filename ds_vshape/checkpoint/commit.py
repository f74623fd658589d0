"""Atomic checkpoints: a checkpoint is complete or absent, even if its writers die or fail.

DeepSpeed (engine.save_checkpoint in runtime/engine.py) writes directly into the checkpoint's folder, and rank 0 names
it in the file "latest" as soon as its own files are written. If another rank then dies, the latest checkpoint is
incomplete; and saving again under the same tag destroys the old checkpoint from the first byte on. Here:

    [1] all ranks write into TAG.ID.draft                             a kill leaves a draft, which the next save clears
    [2] when all have written, TAG becomes TAG.replaced, if there is one
    [3] TAG.ID.draft becomes TAG                                      between the two, TAG.replaced is loaded
    [4] "latest" names TAG, in one write; TAG.replaced is removed

Each save has its own ID, so that two jobs that save under one TAG never write into one folder: the later one
removes the earlier one's draft, or replaces it. Other files in TAG (a tokenizer's, say) stay there.
"""

from __future__ import annotations

import errno
import os
import re
import secrets
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

from ds_vshape.checkpoint.errors import CheckpointError, replace_text
from ds_vshape.checkpoint.tags import DRAFT, REPLACED

LATEST, LATEST_UNIVERSAL = "latest", "latest_universal"
# A file in the draft of a save that is in progress.
_MARK = ".saving"
_ID = "[0-9a-f]{16}"
# Errors of the operating system if another save has moved files meanwhile.
_OVERTAKEN = (errno.ENOENT, errno.ENOTEMPTY, errno.EEXIST)
# How often the file that names the latest checkpoint is written if other saves get in the way.
_ATTEMPTS = 5
# What DeepSpeed and this package write into a checkpoint's folder.
_OWN = re.compile(r".*states\.pt.*|pipeline_placement\.json|zero_to_(fp32|torch)\.py|offloaded_tensors|\.saving")


def new_id() -> str:
    """A name for one save."""
    return secrets.token_hex(8)


class Draft:
    """A checkpoint that is being written in the folder `parent`.

    Methods are for the one rank that keeps the folder; they raise OSError or CheckpointError.
    """

    def __init__(self, parent: str, tag: str, of_save: str) -> None:
        self.parent, self.tag = parent, tag
        # The tag under which it is written.
        self.name = f"{tag}.{of_save}{DRAFT}"
        self._place, self._folder = Path(parent, tag), Path(parent, self.name)
        self._replaced = Path(parent, f"{tag}{REPLACED}")
        # How far `commit` has come.
        self._gave_way = self._committed = False

    def start(self) -> None:
        """Create its folder, and remove the remains of interrupted saves of this tag.

        Raises CheckpointError if something that can't be replaced is in the checkpoint's place.
        """
        if os.path.lexists(self.parent) and not os.path.isdir(self.parent):
            raise CheckpointError(f"save_dir = {self.parent!r}: must be a folder, or must not exist yet")
        if os.path.ismount(self._place):
            raise CheckpointError(f"{self._place} is a mount point, which can't be replaced: save under another tag, "
                                  "or mount the save_dir there")
        if self._place.exists() and not self._place.is_dir():
            raise CheckpointError(f"{self._place} is not a folder: move it away, or save under another tag")
        if Path(self.parent, LATEST).is_dir():
            raise CheckpointError(f"{Path(self.parent, LATEST)} is a folder, where a file names the latest checkpoint: "
                                  "move it away")
        os.makedirs(self._place.parent, exist_ok=True)
        if self._place.is_dir() and os.path.lexists(self._replaced):
            self.forget_replaced()
        for leftover in self._leftovers():
            self._remove(leftover)
        self._folder.mkdir()
        with self.writing():
            (self._folder / _MARK).touch()

    @contextmanager
    def writing(self) -> Iterator[None]:
        """Where files or folders are missing or in the way because of another save, this is the error."""
        try:
            yield
        except OSError as error:
            if error.errno in _OVERTAKEN and not (self._folder / _MARK).exists():
                raise self._overtaken() from error
            raise

    def check(self) -> None:
        """Raise CheckpointError if another save has removed it meanwhile."""
        if not (self._folder / _MARK).exists():
            raise self._overtaken()

    def commit(self) -> None:
        """Put it in its place; to be called when all ranks have written their parts."""
        with self.writing():
            (self._folder / _MARK).unlink()
            if os.path.lexists(self._place):
                self._remove(self._replaced)
                os.rename(self._place, self._replaced)
                self._gave_way = True
            os.rename(self._folder, self._place)
        self._committed = True

    def _overtaken(self) -> CheckpointError:
        return CheckpointError(f"{self._place} wasn't saved: another job has saved it meanwhile. Give each job its "
                               "own save_dir")

    def discard(self) -> None:
        """Restore the previous checkpoint as far as possible, and remove what has been written."""
        with suppress(OSError):
            if self._committed:
                os.rename(self._place, self._folder)
            if self._gave_way:
                os.rename(self._replaced, self._place)
        with suppress(OSError):
            self._remove(self._folder)

    def forget_replaced(self) -> None:
        """Remove the checkpoint that it replaces, after files that aren't a checkpoint's own have been moved."""
        with suppress(OSError):
            for path in self._foreign_files():
                if not os.path.lexists(self._place / path.name):
                    os.rename(path, self._place / path.name)
            self._remove(self._replaced)

    def _foreign_files(self) -> Iterator[Path]:
        if self._replaced.is_dir() and not self._replaced.is_symlink():
            for path in list(self._replaced.iterdir()):
                if not _OWN.fullmatch(path.name):
                    yield path

    def _remove(self, path: Path) -> None:
        """Remove a file, link or folder. A folder is renamed first, so that other writers find it gone at once."""
        if path.is_dir() and not path.is_symlink():
            gone_to = self._place.with_name(f"{self._place.name}.{new_id()}{DRAFT}")
            with suppress(FileNotFoundError):  # another save has removed it
                os.rename(path, gone_to)
            shutil.rmtree(gone_to, ignore_errors=True)
        else:
            path.unlink(missing_ok=True)

    def _leftovers(self) -> Iterator[Path]:
        for name, folder in ((self._place.name, self._place.parent), (LATEST, Path(self.parent))):
            draft = re.compile(rf"{re.escape(name)}(\.{_ID})?{re.escape(DRAFT)}")
            yield from [path for path in folder.iterdir() if draft.fullmatch(path.name)]


def name_latest(parent: str, tag: str) -> None:
    """Make `tag` the checkpoint that is loaded from the folder `parent` by default."""
    for attempt in range(_ATTEMPTS):
        try:
            replace_text(Path(parent, LATEST), tag, Path(parent, f"{LATEST}.{new_id()}{DRAFT}"))
            return
        except FileNotFoundError:
            # The start of another save may have taken the draft of this file for a leftover.
            if attempt == _ATTEMPTS - 1:
                raise


def latest(parent: str, file: str = LATEST) -> str | None:
    """The tag that `file` in the folder `parent` names; None without the file.

    Raises CheckpointError for a file that names none.
    """
    path = Path(parent, file)
    if not os.path.lexists(path):
        return None
    try:
        tag = path.read_text(encoding="utf-8").strip()
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path} can't be read: {error}; {_should_name(parent)}") from error
    if not tag:
        raise CheckpointError(f"{path} is empty; {_should_name(parent)}")
    return tag


def resolve_tag(parent: str, tag: str) -> list[str]:
    """The folders in `parent` that hold a whole checkpoint `tag`: of its own name, or of one that was being replaced.

    Raises CheckpointError where the system doesn't say.
    """
    try:
        return [name for name in (tag, f"{tag}{REPLACED}") if Path(parent, name).is_dir()]
    except OSError as error:
        raise CheckpointError(f"{Path(parent, tag)} can't be read: {error}; {_should_name(parent)}") from error


def not_found(parent: str, tag: str, ranks: Sequence[int]) -> CheckpointError:
    """The error for a checkpoint `tag` that isn't there: on the `ranks`, or on all if there are none."""
    where = f" on rank {', '.join(map(str, ranks))}" if ranks else ""
    return CheckpointError(f"there is no checkpoint {Path(parent, tag)}{where}; {_should_name(parent)}")


def _should_name(parent: str) -> str:
    return f"the tag, or the file {LATEST!r} in {parent}, must name one of its folders: {_listed(_tags(parent))}"


def _tags(parent: str) -> Sequence[str]:
    with suppress(OSError):
        return sorted(path.name for path in Path(parent).iterdir()
                      if path.is_dir() and not path.name.endswith((DRAFT, REPLACED)))
    return ()


def _listed(names: Sequence[str]) -> str:
    return ", ".join(names[-8:]) + (f" and {len(names) - 8} more" if len(names) > 8 else "") if names else "none"
