"""The main job itself, tiny, through the real `deepspeed` launcher: with and without the key."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import hjson
import pytest
from compare import LOSS_TOLERANCE, largest_difference
from result import Result

ROOT = Path(__file__).parent.parent
RANKS, BATCHES = 2, 4
TINY = ["--layers", "4", "--hidden", "32", "--heads", "2", "--length", "32", "--batches", str(BATCHES)]


def launch(folder: Path, name: str, **keys: object) -> Result:
    """Trains with the quickstart's config plus `keys`, as a user does from a shell."""
    config, result = folder / f"ds_config.{name}.json", folder / f"{name}.json"
    base = hjson.loads((ROOT / "configs" / "quickstart.json").read_text())
    config.write_text(json.dumps({**base, "gradient_accumulation_steps": 4, **keys}))
    launcher = Path(sys.executable).with_name("deepspeed")
    command = [launcher, "--hostfile", os.devnull, "--num_gpus", str(RANKS), "--master_port", str(free_port()),
               ROOT / "launch" / "train.py", "--deepspeed_config", config, "--result", result, *TINY]
    # The launcher starts `python` by the interpreter that runs itself; nothing of pytest's environment is needed.
    environment = {**os.environ, "DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=150, check=False)
    assert done.returncode == 0 and result.exists(), done.stdout[-4000:] + done.stderr[-4000:]
    assert f"{BATCHES}/{BATCHES}" in done.stderr, "the progress bar"
    return Result.read(result)


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


@pytest.mark.launcher
def test_one_key_changes_the_schedule_and_not_the_losses(tmp_path: Path):
    own = launch(tmp_path, "own")
    v_half = launch(tmp_path, "v-half", pipeline_schedule="v-half")

    assert own.schedule == "DeepSpeed's 1f1b" and v_half.schedule == "v-half"
    for result in (own, v_half):
        assert (result.stages, result.micro_batches, len(result.losses)) == (RANKS, 4, BATCHES)
        assert 0 < result.measured_bubble < 1
        assert len(result.peak_activations) == RANKS
        assert result.losses[0] > result.losses[-1]
    assert own.predicted_bubble == pytest.approx(1 / 5)
    assert own.peak_activations == [4, 2]  # Two micro-batches and one, in halves of a stage.
    assert largest_difference(v_half, own) <= LOSS_TOLERANCE
