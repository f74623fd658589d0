"""Folders that a config names, tried before any rank waits for another one."""

from __future__ import annotations

import tempfile
from pathlib import Path

from ds_vshape.config.section import ConfigError, shown


def check_folder(key: str, path: str) -> None:
    """Make a folder; ConfigError, which names its `key`, if nothing can be written there. Called on the rank that
    writes."""
    try:
        Path(path).mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=path) as file:
            file.write(b"{}")
    except (OSError, TypeError, ValueError) as error:
        raise ConfigError(f"{key} = {shown(path)}: must be a folder that rank 0 can write into: {error}") from None
