"""What makes the host wait for the device in the middle of a batch is refused on a GPU, or made safe; on a CPU it does
what it does in DeepSpeed."""

from __future__ import annotations

import io
from contextlib import redirect_stdout
from typing import Any

import pytest
from deepspeed.accelerator import get_accelerator
from deepspeed.runtime.activation_checkpointing import checkpointing
from deepspeed.runtime.pipe.module import PipelineError
from pipelines import BATCHES, FP32_ZERO1, Block, Job, Outcome, data, specs, train
from ranks import run_ranks
from simulated_gpu.device import DEVICE_OF_RANK
from simulated_gpu.processes import run_on_gpus
from torch import Tensor

from ds_vshape.config.compatibility import check_asynchronous
from ds_vshape.config.section import ConfigError

CHECKPOINTING = {"activation_checkpointing": {"synchronize_checkpoint_boundary": True}}
COMMS_LOGGER = {"comms_logger": {"enabled": True, "verbose": False}}
BLOCKING = {"CUDA_LAUNCH_BLOCKING": "1"}
WHY = "on a GPU, where it would wait within a pass for messages that other ranks have yet to send"

# The batch of the flops profiler.
PROFILED = 3


def told(rank: int, cases: list[tuple[dict[str, Any], dict[int, dict[str, str]]]]) -> list[str]:
    """What each job says that has a config and, by rank, an environment of its own."""
    said = []
    for config, environments in cases:
        with pytest.MonkeyPatch.context() as patched:
            for name, value in environments.get(rank, {}).items():
                patched.setenv(name, value)
            try:
                Job("v-half", 2, 2, config).engine()
            except Exception as error:
                said.append(f"{type(error).__name__}: {error}")
            else:
                said.append("")
    return said


CASES: list[tuple[dict[str, Any], dict[int, dict[str, str]]]] = [
    (CHECKPOINTING, {}), (COMMS_LOGGER, {}), ({}, {0: BLOCKING, 1: BLOCKING}), ({}, {1: BLOCKING}),
    # What is legal.
    ({"activation_checkpointing": {"synchronize_checkpoint_boundary": False}, "comms_logger": {"enabled": False}}, {}),
    ({}, {0: {"CUDA_LAUNCH_BLOCKING": "0"}, 1: {"CUDA_LAUNCH_BLOCKING": "0"}}),
]


def test_refused_on_every_rank_of_a_gpu() -> None:
    first, second = run_on_gpus(2, told, CASES)
    assert first == second
    checkpointing, comms, blocking, on_one, *legal = first
    assert checkpointing == ("ConfigError: activation_checkpointing.synchronize_checkpoint_boundary = True: must be "
                             f"false {WHY}")
    assert comms == f"ConfigError: comms_logger.enabled = True: must be false {WHY}"
    assert blocking == f"ConfigError: CUDA_LAUNCH_BLOCKING = '1' in the environment: must be 0, or unset, {WHY}"
    assert on_one.startswith("PreflightError: not all ranks can go on: ConfigError: CUDA_LAUNCH_BLOCKING = '1' in")
    assert "rank 1" in on_one and "rank 0" not in on_one
    assert legal == ["", ""]


def test_nothing_is_refused_on_a_cpu() -> None:
    assert run_ranks(2, told, CASES) == [[""] * len(CASES)] * 2


def test_an_empty_environment_waits_for_nothing() -> None:
    check_asynchronous({}, {})
    check_asynchronous({}, {"CUDA_LAUNCH_BLOCKING": ""})


@pytest.mark.parametrize(["name", "value", "legal"], [
    ("PYTORCH_NO_CUDA_MEMORY_CACHING", "1", "unset"),
    ("PYTORCH_NO_CUDA_MEMORY_CACHING", "0", "unset"),
    # As Megatron's users set it.
    ("CUDA_DEVICE_MAX_CONNECTIONS", "1", "at least 8, or unset,"),
    ("CUDA_DEVICE_MAX_CONNECTIONS", "few", "at least 8, or unset,"),
])
def test_refused_in_the_environment(name: str, value: str, legal: str) -> None:
    with pytest.raises(ConfigError) as raised:
        check_asynchronous({}, {name: value})
    assert str(raised.value) == f"{name} = '{value}' in the environment: must be {legal} {WHY}"
    for connections in ("8", "32"):
        check_asynchronous({}, {"CUDA_DEVICE_MAX_CONNECTIONS": connections})


def configured(rank: int) -> tuple[list[str], list[float]]:
    """What is said to batches for which the script of rank 1 has configured checkpoints, and the losses of all others.
    """
    engine, errors, losses = Job("v-half", 2, 2).engine(), [], []
    for batch, synchronizes in enumerate((False, True, True, False)):
        checkpointing.configure(None, synchronize=synchronizes and rank == 1)
        try:
            losses.append(float(engine.train_batch(data(engine, batch))))
        except PipelineError as error:
            errors.append(str(error))
    return errors, losses


def test_checkpoints_that_the_script_configures_are_refused_on_every_rank_of_a_gpu() -> None:
    (told, losses), (own, same) = run_on_gpus(2, configured)
    assert losses == same and len(losses) == 2
    assert own == [f"deepspeed.checkpointing.configure(synchronize=True): must be False {WHY}"] * 2
    for error, of_other in zip(told, own, strict=True):
        assert error.startswith("the start of the batch on pipeline rank 1, ") and error.endswith(of_other)
    assert run_ranks(2, configured)[0][0] == []


# -- what is made safe


class Waiting(Block):
    """A block that waits for the device in its forward, as an allocator near full memory does, where it's told to."""

    waits = False

    def forward(self, x: Tensor) -> Tensor:
        if Waiting.waits:
            get_accelerator().synchronize()
        return super().forward(x)


def losses_and_waits(rank: int, job: Job) -> tuple[list[float], list[list[str]], str]:
    """The losses, where the host waited in each batch, and what was printed. In batch 3 `Waiting` layers of all ranks
    but the first wait."""
    DEVICE_OF_RANK.loads_lazily = True
    losses, waits = [], []
    with redirect_stdout(io.StringIO()) as output:
        engine = job.engine()
        for batch in BATCHES:
            Waiting.waits = rank > 0 and batch == PROFILED
            before = len(DEVICE_OF_RANK.synchronizations)
            losses.append(float(engine.train_batch(data(engine, batch))))
            waits.append([f"{why}: {where}" for why, where in DEVICE_OF_RANK.synchronizations[before:]])
    return losses, waits, output.getvalue()


@pytest.mark.parametrize("schedule", ["v-half", pytest.param("v-zb", marks=pytest.mark.slow),
                                      pytest.param("1f1b", marks=pytest.mark.slow)])
def test_the_flops_profiler(schedule: str) -> None:
    """It waits for the device before and after each module of the first rank, so that nothing may wait on another rank
    meanwhile; but something does. In that batch messages are announced, and training is what it is else."""
    layers = tuple(specs(3, Waiting))
    profiled = {"flops_profiler": {"enabled": True, "profile_step": PROFILED, "detailed": False}}
    (losses, waits, output), (others, _, _) = run_on_gpus(
        2, losses_and_waits, Job(schedule, 2, 4, profiled, layers))
    assert losses == others == run_ranks(2, train_job, Job(schedule, 2, 4, layers=layers))[0].losses
    assert output.count(f"Profile Summary at step {PROFILED}") == 1
    hooks = [[wait for wait in of_batch if "time_hook" in wait] for of_batch in waits]
    assert [bool(of_batch) for of_batch in hooks] == [batch == PROFILED for batch in BATCHES]


def train_job(rank: int, job: Job) -> Outcome:
    return train(job.engine(), BATCHES)


KEYS = {
    "overlap_comm, contiguous_gradients false": {
        "zero_optimization": {"stage": 1, "overlap_comm": True, "contiguous_gradients": False}},
    "overlap_comm, use_multi_rank_bucket_allreduce false": {
        "zero_optimization": {"stage": 1, "overlap_comm": True, "use_multi_rank_bucket_allreduce": False}},
    "timers": {**FP32_ZERO1, "wall_clock_breakdown": True, "memory_breakdown": True},
}


@pytest.fixture(scope="module")
def usual() -> list[Any]:
    return run_on_gpus(4, losses_and_waits, Job("zb-h1", 2, 3, FP32_ZERO1))


@pytest.mark.slow
@pytest.mark.parametrize("name", KEYS)
def test_keys_of_deepspeed_that_wait_for_nothing_in_a_pipeline(name: str, usual: list[Any]) -> None:
    """Two replicas, whose gradients are summed while passes run. DeepSpeed overlaps nothing on its own there."""
    of_ranks = run_on_gpus(4, losses_and_waits, Job("zb-h1", 2, 3, KEYS[name]))
    for (losses, waits, _), (expected, usual_waits, _) in zip(of_ranks, usual, strict=True):
        assert losses == expected
        # From the third batch on, when kernels are loaded and activations measured. Timers' events are read after the
        # step.
        for of_batch, of_usual in zip(waits[2:], usual_waits[2:], strict=True):
            assert [wait for wait in of_batch if not wait.startswith("an event: timer.py")] == of_usual
