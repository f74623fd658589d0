"""Wraps DeepSpeed's checkpoint engines while a checkpoint is saved or loaded, so that their errors name the file.

A checkpoint engine (runtime/checkpoint_engine/) is what reads and writes files for DeepSpeed; users have their own.
"""

from __future__ import annotations

import os
import traceback
import weakref
from typing import Any, Protocol

from ds_vshape.checkpoint.errors import CheckpointError, unreadable, unwritable
from ds_vshape.checkpoint.weights_only import refusal


class CheckpointEngine(Protocol):
    """The methods of DeepSpeed's checkpoint engines that are replaced here."""

    def load(self, path: str, *args: Any, **kwargs: Any) -> Any:
        """The content of a file."""

    def save(self, state_dict: Any, path: str) -> Any:
        """Write a file."""

    def makedirs(self, *args: Any, **kwargs: Any) -> None:
        """Create a folder."""

    def create(self, info: Any) -> None:
        """A checkpoint starts."""

    def commit(self, info: Any) -> Any:
        """A checkpoint is written."""


class _Wrapped:
    """A checkpoint engine of which some methods are replaced."""

    def __init__(self, engine: CheckpointEngine) -> None:
        self.engine = engine

    def __getattr__(self, name: str) -> Any:
        return getattr(self.engine, name)


class Reading(_Wrapped):
    """Raises CheckpointError for a file that can't be read; `path` is the file that was read last.

    Raises CheckpointError if there is no `folder`, which was there before. To be closed.
    """

    def __init__(self, engine: CheckpointEngine, folder: str) -> None:
        super().__init__(engine)
        # Errors of what is done with the content are about this file, or folder.
        self.path = self._folder = folder
        try:
            # Another folder can't get its number while it's open.
            self._open = os.open(folder, os.O_RDONLY)
        except OSError as error:
            raise self._replaced() from error
        self.close = weakref.finalize(self, os.close, self._open)

    def check_folder(self) -> None:
        """Raise CheckpointError if the folder isn't the one that was there at first: then files of two are mixed."""
        try:
            same = os.path.samestat(os.stat(self._folder), os.fstat(self._open))
        except OSError:
            same = False
        if not same:
            raise self._replaced()

    def _replaced(self) -> CheckpointError:
        return CheckpointError(f"{self._folder} was replaced while it was loaded: load it again when no job saves")

    def load(self, path: str, *args: Any, **kwargs: Any) -> Any:
        """As the engine's."""
        self.path = path
        try:
            return self.engine.load(path, *args, **kwargs)
        except CheckpointError:
            raise
        except Exception as error:
            raise refusal(path, error) or unreadable(path, error) from error


class Writing(_Wrapped):
    """Raises errors that name the file which couldn't be written.

    Errors of methods after which DeepSpeed has other ranks wait for this one are kept in `error` instead, and nothing
    is tried after the first.
    """

    error: Exception | None = None

    def save(self, state_dict: Any, path: str) -> Any:
        """As the engine's."""
        if self.error is not None:
            raise self.error
        try:
            return self.engine.save(state_dict, path)
        except Exception as error:
            # Its frames may keep the file open, and the space of an open file isn't freed when it is removed.
            traceback.clear_frames(error.__traceback__)
            raise unwritable(path, error, state_dict) from error

    def makedirs(self, *args: Any, **kwargs: Any) -> None:
        """As the engine's; an error is kept."""
        self._keep("makedirs", args, kwargs)

    def create(self, info: Any) -> None:
        """As the engine's; an error is kept."""
        self._keep("create", (info,), {})

    def commit(self, info: Any) -> None:
        """As the engine's; an error is kept."""
        self._keep("commit", (info,), {})

    def _keep(self, method: str, args: Any, kwargs: Any) -> None:
        if self.error is None:
            try:
                getattr(self.engine, method)(*args, **kwargs)
            except Exception as error:
                self.error = error
