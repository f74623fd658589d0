"""Errors about checkpoints that name the file, the cause, and the remedy.

torch and DeepSpeed raise an AssertionError without a message for a missing layer file, EOFError for an empty one, an
UnpicklingError for a truncated one, and "iostream error" for a full disk. None of them names the file.
"""

from __future__ import annotations

import os
import pickle
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from deepspeed.runtime.pipe.module import PipelineError

_LONGEST = 600
_REPLACE = "put a whole copy in its place, or load another checkpoint"
# Enough for a block of a file system, so that a full one says so.
_PROBE = b"\0" * (1 << 20)


class CheckpointError(PipelineError, RuntimeError):  # type: ignore[misc]
    """A checkpoint that can't be saved or loaded; the message names the file or the argument."""


def in_one_line(error: BaseException) -> str:
    """The kind of an error and its text."""
    text = " ".join(str(error).split())
    return f"{type(error).__name__}: {text[:_LONGEST]}" if text else type(error).__name__


def unreadable(path: str, error: Exception) -> CheckpointError:
    """The error for a file `path` that couldn't be read because of `error`."""
    if isinstance(error, FileNotFoundError):
        return missing(path)
    if isinstance(error, OSError) and error.filename is not None:
        return CheckpointError(f"{path} can't be read: {in_one_line(error)}")
    # Without a name it is what torch says where a part of an archive ends too early.
    size = Path(path).stat().st_size if os.path.isfile(path) else None
    if size == 0:
        return CheckpointError(f"{path} is empty (0 bytes): {_REPLACE}")
    return CheckpointError(f"{path} is truncated or damaged ({'no file' if size is None else f'{size:,} bytes'}; "
                           f"{in_one_line(error)}): {_REPLACE}")


def missing(path: str) -> CheckpointError:
    """The error for a missing file `path`; it lists the contents of the folder."""
    folder = Path(path).parent
    present = f"its folder has {_few(sorted(os.listdir(folder)))}" if folder.is_dir() else f"{folder} is not a folder"
    return CheckpointError(f"{path} is missing ({present}): {_REPLACE}")


def replace_text(path: Path, text: str, draft: Path) -> None:
    """Write `text` to the file `path` atomically: it is written to `draft` first, which then replaces `path`.

    Raises OSError that names `path`.
    """
    try:
        draft.write_text(text, encoding="utf-8")
        os.replace(draft, path)
    except OSError as error:
        with suppress(OSError):
            draft.unlink(missing_ok=True)
        # A full disk doesn't name the file.
        raise unwritable(str(path), error, None) from error


def _few(names: list[str]) -> str:
    shown = ", ".join(names[:8]) or "no files"
    return f"{shown} and {len(names) - 8} more" if len(names) > 8 else shown


def unwritable(path: str, error: Exception, content: Any) -> Exception:
    """The error for a file `path` that couldn't be written because writing `content` raised `error`."""
    if isinstance(error, OSError):
        return error if error.filename is not None else type(error)(error.errno, error.strerror or str(error), path)
    if isinstance(error, RuntimeError):
        try:
            with open(path, "ab") as file:
                file.write(_PROBE)
                file.flush()
                os.fsync(file.fileno())
        except OSError as cause:
            # The operating system says what torch's writer didn't.
            return type(cause)(cause.errno, cause.strerror, path)
    culprit = _unpicklable(content)
    if culprit is not None:
        return CheckpointError(f"{path} can't be written: {culprit} can't be pickled ({in_one_line(error)}); "
                               "client_state must hold plain data and tensors")
    return CheckpointError(f"{path} can't be written: {in_one_line(error)}")


def _unpicklable(content: Any) -> str | None:
    """The member of a state that can't be pickled, in words; None if all can."""
    found = _first_unpicklable(content)
    if found is None:
        return None
    key, value = found
    within = _first_unpicklable(value)
    return f"{key!r}, a {type(value).__name__}," if within is None else (
        f"{within[0]!r} in {key!r}, a {type(within[1]).__name__},")


def _first_unpicklable(content: Any) -> tuple[Any, Any] | None:
    """The key and the value of the first member of a dictionary that can't be pickled, if there is one."""
    for key, value in content.items() if isinstance(content, Mapping) else ():
        try:
            _WithoutTensors(_Nowhere()).dump(value)
        except Exception:
            return key, value
    return None


class _WithoutTensors(pickle.Pickler):
    """Finds objects that can't be pickled, without writing the others."""

    def persistent_id(self, thing: Any) -> str | None:
        return "tensor" if isinstance(thing, (torch.Tensor, torch.UntypedStorage)) else None


class _Nowhere:
    def write(self, data: Any) -> int:
        return len(data)
