"""DeepSpeed's universal conversion carries optimizer state from one placement to another, bit for bit."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from pipelines import BF16_ZERO1, BF16_ZERO1_FP32, FP32_ZERO1, Job, Outcome, merged, specs, train
from ranks import run_ranks

BEFORE, AFTER = range(3), range(3, 6)
LAYERS = tuple(specs(7))


def train_and_save(rank: int, job: Job, folder: str) -> Outcome:
    engine = job.engine()
    train(engine, BEFORE)
    engine.save_checkpoint(folder)
    return train(engine, AFTER)


def load_and_train(rank: int, job: Job, folder: str) -> Outcome:
    engine = job.engine()
    engine.load_checkpoint(folder)
    return train(engine, AFTER)


def convert(folder: Path) -> None:
    tag = (folder / "latest").read_text()
    subprocess.run([sys.executable, "-m", "deepspeed.checkpoint.ds_to_universal", "--inject_missing_state",
                    "--input_folder", folder / tag, "--output_folder", folder / f"{tag}_universal"],
                   check=True, capture_output=True, env={**os.environ, "DS_ACCELERATOR": "cpu"})
    (folder / "latest_universal").write_text(f"{tag}_universal")


CASES: dict[str, tuple[Any, int, Any, int, dict[str, Any]]] = {
    "from DeepSpeed's 1F1B to V": (None, 2, "v-half", 2, BF16_ZERO1),
    "from V to DeepSpeed's 1F1B": ("v-zb", 2, None, 2, BF16_ZERO1_FP32),
    "to more ranks": (None, 2, "v-min", 4, FP32_ZERO1),
    "to fewer ranks": ("v-half", 4, "zb-h1", 2, FP32_ZERO1),
}


@pytest.mark.parametrize("case", CASES)
def test_goes_on_with_equal_losses(case: str, tmp_path: Path) -> None:
    before, ranks_before, after, ranks_after, config = CASES[case]
    job = Job(before, ranks_before, 3, config, LAYERS)
    saved = merged(run_ranks(ranks_before, train_and_save, job, str(tmp_path)))
    convert(tmp_path)
    universal = {**config, "checkpoint": {"load_universal": True}}
    job = Job(after, ranks_after, 3, universal, LAYERS)
    loaded = merged(run_ranks(ranks_after, load_and_train, job, str(tmp_path)))
    assert loaded.losses == saved.losses
    assert all(torch.equal(loaded.weights[name], value) for name, value in saved.weights.items())
