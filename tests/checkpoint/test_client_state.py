"""A script's client_state in a checkpoint: it comes back as it was given, and nothing of the engine's is replaced."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from pipelines import FP32, FP32_ZERO1, Job, Outcome, assert_equal, data, merged, train
from ranks import run_ranks

from ds_vshape.checkpoint.errors import CheckpointError
from ds_vshape.deepspeed_adapter.checkpoints import STATE_KEYS

PRECISIONS = {"fp32-zero0": FP32, "fp32-zero1": FP32_ZERO1}
OF_EXPERTS = {"num_experts", "ds_autoep_layers", "autoep_layers", "folding"}
STATES = "mp_rank_00_model_states.pt"
# All but the first have names of the engine's.
GIVEN = {"epoch": 4, "optimizer": {"kind": "mine"}, "lr_scheduler": [0.1], "module": None, "global_steps": -1,
         "checkpoint_parallel_dimensions": 2, "ds_vshape_forwards": "many", "ds_vshape_client_state": {"a": 1}}


def save(rank: int, job: Job, folder: str, client_state: dict[str, Any]) -> Outcome:
    """What follows the checkpoint."""
    engine = job.engine()
    train(engine, range(2))
    engine.save_checkpoint(folder, "first", client_state=client_state)
    return train(engine, range(2, 6))


def load(rank: int, job: Job, folder: str) -> tuple[Outcome, Any]:
    engine = job.engine()
    engine.train_batch(data(engine, 99))
    _, client_state = engine.load_checkpoint(folder, "first")
    return train(engine, range(2, 6)), client_state


def load_and_save_again(rank: int, job: Job, folder: str) -> tuple[Outcome, Any, int]:
    """What follows a checkpoint that was saved with the client_state of an earlier one."""
    engine = job.engine()
    _, client_state = engine.load_checkpoint(folder, "first")
    losses = train(engine, range(2, 4)).losses
    engine.save_checkpoint(folder, "second", client_state=client_state)
    engine = job.engine()
    _, again = engine.load_checkpoint(folder, "second")
    after = train(engine, range(4, 6))
    return Outcome(losses + after.losses, after.weights), again, engine.train_batch_size()


def load_damaged(rank: int, job: Job, folder: str) -> str:
    engine = job.engine()
    with pytest.raises(CheckpointError) as error:
        engine.load_checkpoint(folder, "first")
    train(engine, range(1))
    return str(error.value)


@pytest.mark.parametrize("precision", PRECISIONS)
def test_the_names_are_those_of_deepspeed(precision: str, tmp_path: Path) -> None:
    run_ranks(2, save, Job(None, 2, 3, PRECISIONS[precision]), str(tmp_path), {"epoch": 4})
    state = torch.load(tmp_path / "first" / STATES, weights_only=False)
    assert state.keys() - {"epoch"} == STATE_KEYS - OF_EXPERTS


@pytest.mark.parametrize("precision", PRECISIONS)
def test_members_with_names_of_the_engines(precision: str, tmp_path: Path) -> None:
    job = Job("v-half", 2, 3, PRECISIONS[precision])
    expected = run_ranks(2, save, job, str(tmp_path), GIVEN)
    results = run_ranks(2, load, job, str(tmp_path))
    assert_equal(merged([outcome for outcome, _ in results]), merged(expected))
    for _, client_state in results:
        assert {key: client_state[key] for key in GIVEN} == GIVEN


@pytest.mark.quick_cases("fp32-zero0-DeepSpeed's own", "fp32-zero1-zb-h1")
@pytest.mark.parametrize("saved_under", [None, "zb-h1"], ids=["DeepSpeed's own", "zb-h1"])
@pytest.mark.parametrize("precision", PRECISIONS)
def test_what_was_loaded_is_saved_again(precision: str, saved_under: str | None, tmp_path: Path) -> None:
    """Training goes on from the last checkpoint, not from the one whose client_state was given to it."""
    expected = run_ranks(2, save, Job(saved_under, 2, 3, PRECISIONS[precision]), str(tmp_path), {"epoch": 4})
    results = run_ranks(2, load_and_save_again, Job("zb-h1", 2, 3, PRECISIONS[precision]), str(tmp_path))
    assert_equal(merged([outcome for outcome, _, _ in results]), merged(expected))
    for _, client_state, batch_size in results:
        assert client_state["epoch"] == 4 and client_state["global_samples"] == 4 * batch_size
    first, second = (torch.load(tmp_path / tag / STATES, weights_only=False) for tag in ("first", "second"))
    assert second.keys() - first.keys() <= {"ds_vshape_forwards"}


@pytest.mark.parametrize("damage", [{"ds_vshape_client_state": 5}, {"ds_vshape_forwards": "many"}], ids=str)
def test_a_damaged_member_is_an_error_on_all_ranks(damage: dict[str, Any], tmp_path: Path) -> None:
    job = Job("zb-h1", 2, 3, FP32)
    run_ranks(2, save, job, str(tmp_path), {"epoch": 4})
    file = tmp_path / "first" / "mp_rank_01_model_states.pt"
    torch.save({**torch.load(file, weights_only=False), **damage}, file)
    for told in run_ranks(2, load_damaged, job, str(tmp_path)):
        assert f"{file} can't be loaded: ds_vshape_client_state = " in told and "a number" in told
