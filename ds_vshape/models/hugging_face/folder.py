"""A model's folder: its config. Nothing is downloaded for it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from transformers import AutoConfig


def read_config(folder: Path) -> Any:
    """The config of the model in `folder`.

    Raises:
        ValueError: for anything but a folder with a config.json that transformers can read.
    """
    if not (folder / "config.json").is_file():
        raise ValueError(f"model = {str(folder)!r}: must be a folder with config.json and safetensors, as "
                         "huggingface_hub.snapshot_download gives it")
    try:
        return AutoConfig.from_pretrained(folder)
    except (ValueError, KeyError, OSError) as error:
        first = str(error).partition("\n")[0]
        raise ValueError(f"model = {str(folder)!r}: its config.json can't be read ({first}): must be one that "
                         "transformers has written") from error
