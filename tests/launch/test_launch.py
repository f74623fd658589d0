"""The main job itself, tiny, through the real `deepspeed` launcher: with and without our key in its ds_config."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from compare import LOSS_TOLERANCE, largest_difference
from ports import free_port
from result import JobResult

ROOT = Path(__file__).parents[2]
RANKS, BATCHES = 2, 4


def start(*words: str) -> tuple[str, str]:
    """What launch/train.py says, on standard output and error, when a user starts it from the checkout with `words` and
    what makes the job tiny.
    """
    command = [sys.executable, "-m", "launch.train", "model=tiny", "data.micro_batches=4", f"batches={BATCHES}",
               f"port={free_port()}", *words]
    environment = {**os.environ, "DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1"}
    # A session of its own: if the ranks hang, all of them can be ended and not the launcher alone.
    with subprocess.Popen(command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
                          start_new_session=True) as process:
        try:
            output, errors = process.communicate(timeout=240)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            raise
    assert process.returncode == 0, output[-4000:] + errors[-4000:]
    assert f"{BATCHES}/{BATCHES}" in errors, "the progress bar"
    return output, errors


def launch(folder: Path, name: str, *words: str) -> JobResult:
    """One job on RANKS pipeline ranks; without `result`, rank 0 writes it into the run's folder."""
    start(f"parallel.pipe={RANKS}", f"hydra.run.dir={folder / name}", *words)
    return JobResult.read(folder / name / "result.json")


@pytest.fixture(scope="module")
def v_half(tmp_path_factory: pytest.TempPathFactory) -> JobResult:
    return launch(tmp_path_factory.mktemp("runs"), "v-half", "schedule=v-half")


@pytest.mark.launcher
def test_a_job_says_what_it_has_trained_with(v_half: JobResult) -> None:
    check(v_half, "v-half")
    # In quarters of the model, as below; all ranks alike under V.
    assert len(set(v_half.peak_activations)) == 1


@pytest.mark.launcher
@pytest.mark.slow
def test_one_key_changes_the_schedule_and_not_the_losses(tmp_path: Path, v_half: JobResult) -> None:
    own = launch(tmp_path, "own", "schedule=deepspeed")
    check(own, "DeepSpeed's 1f1b")
    # In quarters of the model: two micro-batches and one of half the model.
    assert own.peak_activations == [4, 2]
    assert largest_difference(v_half, own) <= LOSS_TOLERANCE


def check(result: JobResult, schedule: str) -> None:
    assert result.schedule == schedule
    assert (result.stages, result.micro_batches, len(result.losses)) == (RANKS, 4, BATCHES)
    assert 0 < result.predicted_bubble < 1 and 0 < result.measured_bubble < 1
    assert len(result.peak_activations) == RANKS
    assert result.losses[0] > result.losses[-1]


@pytest.mark.launcher
@pytest.mark.slow
def test_tensor_parallel_blocks_have_the_same_losses(tmp_path: Path, v_half: JobResult):
    """With ZeRO-1. Gradients aren't clipped; what that does here is tests/engine/test_tensor_parallel.py's."""
    shared = launch(tmp_path, "shared", "parallel.tensor=2", "parallel.zero=1", "schedule=v-half")
    assert (shared.schedule, shared.stages) == ("v-half", RANKS)
    assert 0 < largest_difference(shared, v_half) <= LOSS_TOLERANCE, "partial products add up in another order"


@pytest.mark.launcher
@pytest.mark.slow
def test_a_sweep_trains_each_of_its_jobs(tmp_path: Path):
    """Two schedules, and one table at the end; nothing is left in the checkout."""
    before = files_of_the_checkout()
    output, _ = start("--multirun", "schedule=1f1b,v-zb", "parallel.pipe=2", f"hydra.sweep.dir={tmp_path}")
    results = [JobResult.read(tmp_path / str(number) / "result.json") for number in range(2)]
    assert [result.schedule for result in results] == ["1f1b", "v-zb"]
    assert largest_difference(*results) <= LOSS_TOLERANCE
    for result in results:
        row, = (line for line in output.splitlines() if f"│ schedule={result.schedule} " in line)
        assert f"{result.batch_seconds:.3f}" in row and f"{result.loss:.6f}" in row
    assert files_of_the_checkout() == before


def files_of_the_checkout() -> set[Path]:
    """Without what Python itself keeps, and what other tests write at the same time."""
    kept = {"__pycache__", ".git", ".pytest_cache", ".hypothesis", ".mypy_cache"}
    return {path for path in ROOT.rglob("*") if not kept & set(path.relative_to(ROOT).parts)}


def test_what_hosts_must_know_is_given_to_all_of_them() -> None:
    given = {"CUDA_MODULE_LOADING": "EAGER", "CUDA_DEVICE_MAX_CONNECTIONS": "8", "NCCL_DEBUG": "INFO",
             "PYTORCH_CUDA_ALLOC_CONF": "expandable_segments:True", "PYTORCH_ALLOC_CONF": "expandable_segments:True",
             "NCCL_SOCKET_IFNAME": "eth0", "PATH": os.environ["PATH"], "VIRTUAL_ENV": sys.prefix}
    own = {"CUDA_VISIBLE_DEVICES": "1", "DS_ENV_FILE": "here", "PATHS": "none"}
    told = subprocess.run(["bash", "-c", "source launch/cluster/environment.sh && variables"], cwd=ROOT, text=True,
                          env={**given, **own}, capture_output=True, check=True).stdout
    assert sorted(told.split()) == sorted(given)
