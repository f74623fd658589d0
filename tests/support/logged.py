"""What DeepSpeed's logger, which ds_vshape writes to as well, is given."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

from deepspeed.utils import logger


class Lines(logging.Handler):
    """The lines of `level` and above, from where its `with` starts to where that ends."""

    def __init__(self, level: int = logging.INFO) -> None:
        super().__init__(level)
        self.told: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.told.append(record.getMessage())

    def with_word(self, word: str) -> list[str]:
        """The lines that `word` is in."""
        return [line for line in self.told if word in line]

    def __enter__(self) -> Lines:
        logger.addHandler(self)
        return self

    def __exit__(self, *_: Any) -> None:
        logger.removeHandler(self)


def lines_of(run: Callable[[], Any], word: str = "unknown") -> tuple[Any, list[str]]:
    """What `run` returns, and the lines with `word` of what it tells."""
    with Lines() as lines:
        return run(), lines.with_word(word)
