"""The main job itself, tiny, through the real `deepspeed` launcher: with and without our key in its ds_config."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
from pathlib import Path

import pytest
from compare import LOSS_TOLERANCE, largest_difference
from result import Result

ROOT = Path(__file__).parent.parent
RANKS, BATCHES = 2, 4


def launch(folder: Path, name: str, *words: str) -> Result:
    """Trains a tiny model as a user does from a shell: launch/train.py, which starts the `deepspeed` launcher."""
    result = folder / f"{name}.json"
    command = [sys.executable, ROOT / "launch" / "train.py", "model=tiny", "data.micro_batches=4", f"batches={BATCHES}",
               f"parallel.pipe={RANKS}", f"port={free_port()}", f"result={result}", f"hydra.run.dir={folder}", *words]
    environment = {**os.environ, "DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1"}
    # A session of its own: if the ranks hang, all of them can be ended and not the launcher alone.
    with subprocess.Popen(command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
                          start_new_session=True) as process:
        try:
            output, errors = process.communicate(timeout=120)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            raise
    assert process.returncode == 0 and result.exists(), output[-4000:] + errors[-4000:]
    assert f"{BATCHES}/{BATCHES}" in errors, "the progress bar"
    return Result.read(result)


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


@pytest.fixture(scope="module")
def v_half(tmp_path_factory: pytest.TempPathFactory) -> Result:
    return launch(tmp_path_factory.mktemp("runs"), "v-half", "schedule=v-half")


@pytest.mark.launcher
def test_one_key_changes_the_schedule_and_not_the_losses(tmp_path: Path, v_half: Result):
    own = launch(tmp_path, "own", "schedule=deepspeed")

    assert own.schedule == "DeepSpeed's 1f1b" and v_half.schedule == "v-half"
    for result in (own, v_half):
        assert (result.stages, result.micro_batches, len(result.losses)) == (RANKS, 4, BATCHES)
        assert 0 < result.predicted_bubble < 1 and 0 < result.measured_bubble < 1
        assert len(result.peak_activations) == RANKS
        assert result.losses[0] > result.losses[-1]
    # In quarters of the model: two micro-batches and one of half the model; all ranks alike under V.
    assert own.peak_activations == [4, 2] and len(set(v_half.peak_activations)) == 1
    assert largest_difference(v_half, own) <= LOSS_TOLERANCE


@pytest.mark.launcher
def test_tensor_parallel_blocks_have_the_same_losses(tmp_path: Path, v_half: Result):
    """With ZeRO-1. Gradients aren't clipped; what that does here is tests/test_tensor_parallel.py's."""
    shared = launch(tmp_path, "shared", "parallel.tensor=2", "parallel.zero=1", "schedule=v-half")
    assert (shared.schedule, shared.stages) == ("v-half", RANKS)
    assert 0 < largest_difference(shared, v_half) <= LOSS_TOLERANCE, "partial products add up in another order"
