"""What a run writes to DeepSpeed's logger."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from deepspeed.utils import logger


def lines_of(run: Callable[[], Any], word: str = "unknown") -> tuple[Any, list[str]]:
    """What `run` returns, and of what it tells DeepSpeed's logger the lines with `word`."""
    lines: list[str] = []
    info, warning = logger.info, logger.warning
    logger.info = logger.warning = lambda line, *args, **kwargs: lines.append(line)
    try:
        return run(), [line for line in lines if word in line]
    finally:
        logger.info, logger.warning = info, warning
