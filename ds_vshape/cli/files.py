"""Output files of the commands; it is checked that they can be written before anything is planned."""

from __future__ import annotations

import json
import os
import stat
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any


def check_writable(outputs: Mapping[str, Path], inputs: Iterable[Path]) -> None:
    """Raise ValueError, with the option, for an output that can't be written, or is an input or another output too."""
    taken = {os.path.realpath(file): "is an input" for file in inputs}
    for option, file in outputs.items():
        with writing(option, file):
            is_regular = _try(file)
            path = os.path.realpath(file)
        if is_regular and path in taken:
            raise ValueError(f"{option} {file}: {taken[path]} too")
        taken[path] = f"is the output of {option}"


def _try(file: Path) -> bool:
    """Whether `file` is a regular file, or would be created as one. Raises OSError if it can't be written.

    Devices aren't opened.
    """
    try:
        mode = os.stat(file).st_mode
    except FileNotFoundError:
        os.close(os.open(file, os.O_WRONLY | os.O_CREAT))
        os.unlink(os.path.realpath(file))
        return True
    if stat.S_ISREG(mode) or stat.S_ISDIR(mode):
        os.close(os.open(file, os.O_WRONLY))
    elif not os.access(file, os.W_OK):
        raise PermissionError(0, "Permission denied")
    return stat.S_ISREG(mode)


@contextmanager
def writing(option: str, file: Path) -> Iterator[None]:
    """Convert an error of writing `file` to a ValueError that names the option."""
    try:
        yield
    except OSError as error:
        raise ValueError(f"{option} {file}: {error.strerror}") from None
    except ValueError as error:  # a name that no file can have
        raise ValueError(f"{option} {file}: {error}") from None


def write_json(option: str, file: Path, content: Any) -> None:
    """Write `content` to `file`, which `option` names; ValueError if that fails."""
    with writing(option, file):
        file.write_text(json.dumps(content) + "\n", encoding="utf-8")
