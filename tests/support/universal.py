"""DeepSpeed's conversion of checkpoints to universal ones."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path


def convert(folder: Path) -> None:
    """The latest checkpoint in `folder`, which is then the latest universal one too."""
    tag = (folder / "latest").read_text()
    subprocess.run([sys.executable, "-m", "deepspeed.checkpoint.ds_to_universal", "--inject_missing_state",
                    "--input_folder", folder / tag, "--output_folder", folder / f"{tag}_universal"],
                   check=True, capture_output=True, env={**os.environ, "DS_ACCELERATOR": "cpu"})
    (folder / "latest_universal").write_text(f"{tag}_universal")
