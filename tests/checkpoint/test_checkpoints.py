"""Save in one process group, load in another, continue bit for bit; and never load what doesn't fit."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from pipelines import (BF16_ZERO1, BF16_ZERO1_FP32, FP32, FP32_ZERO1, Dropping, Job, Outcome, assert_equal, data,
                       merged, specs, train)
from ranks import RanksFailed, run_ranks

BEFORE, AFTER = range(3), range(3, 6)
PRECISIONS = {"fp32-zero0": FP32, "fp32-zero1": FP32_ZERO1, "bf16-zero1": BF16_ZERO1,
              "bf16-zero1-fp32": BF16_ZERO1_FP32}


def train_and_save(rank: int, job: Job, folder: str) -> Outcome:
    engine = job.engine()
    train(engine, BEFORE)
    engine.save_checkpoint(folder, client_state={"note": 7})
    return train(engine, AFTER)


def load_and_train(rank: int, job: Job, folder: str) -> tuple[Outcome, Any]:
    engine = job.engine()
    # Other weights and another state of the optimizer, all of which loading must replace.
    engine.train_batch(data(engine, 99))
    path, client_state = engine.load_checkpoint(folder)
    assert path is not None
    return train(engine, AFTER), client_state


@pytest.mark.quick_cases("v-half-bf16-zero1", "zb-h1-fp32-zero0", "v-half-fp32-zero1")
@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("schedule", ["zb-h1", "v-half"])
def test_goes_on_bit_for_bit(schedule: str, precision: str, tmp_path: Path) -> None:
    job = Job(schedule, 2, 3, PRECISIONS[precision])
    saved = merged(run_ranks(4, train_and_save, job, str(tmp_path)))
    loaded = run_ranks(4, load_and_train, job, str(tmp_path))
    outcome = merged([result[0] for result in loaded])
    assert_equal(outcome, saved)
    assert all(result[1]["note"] == 7 and "ds_vshape_forwards" not in result[1] for result in loaded)


@pytest.mark.parametrize("schedule", ["v-half", {"name": "v-zb", "optimizer_post_validation": True}])
def test_dropout_goes_on_where_it_was(schedule: Any, tmp_path: Path) -> None:
    """Layers with seeds of their own draw what they would have drawn without the interruption."""
    job = Job(schedule, 2, 3, FP32_ZERO1, tuple(specs(7, Dropping)))
    saved = merged(run_ranks(2, train_and_save, job, str(tmp_path)))
    outcome = merged([result[0] for result in run_ranks(2, load_and_train, job, str(tmp_path))])
    assert_equal(outcome, saved)


def test_layer_files_are_those_of_deepspeed(tmp_path: Path) -> None:
    run_ranks(2, train_and_save, Job(None, 2, 3), str(tmp_path / "stock"))
    run_ranks(2, train_and_save, Job("v-zb", 2, 3), str(tmp_path / "ours"))

    def layers(name: str) -> set[str]:
        return {path.name for path in (tmp_path / name / "global_step3").glob("layer_*")}

    assert layers("ours") == layers("stock") != set()


SAVED_UNDER = {"DeepSpeed's own": Job(None, 2, 3, FP32_ZERO1), "another schedule's": Job("1f1b", 2, 3, FP32_ZERO1)}


@pytest.mark.parametrize("saved_under", SAVED_UNDER)
def test_a_checkpoint_of_another_placement_is_refused(saved_under: str, tmp_path: Path) -> None:
    run_ranks(2, train_and_save, SAVED_UNDER[saved_under], str(tmp_path))
    with pytest.raises(RanksFailed) as error:
        run_ranks(2, load_and_train, Job("v-half", 2, 3, FP32_ZERO1), str(tmp_path))
    message = str(error.value)
    assert message.count("belongs to other layers") == 2, "on every rank"
    assert "ds_to_universal.py" in message and "load_module_only=True" in message


def test_another_partition_is_refused(tmp_path: Path) -> None:
    run_ranks(2, train_and_save, Job("v-half", 2, 3, FP32_ZERO1, tuple(specs(4))), str(tmp_path))
    with pytest.raises(RanksFailed, match="belongs to other layers"):
        run_ranks(2, load_and_train, Job("v-half", 2, 3, FP32_ZERO1, tuple(specs(3))), str(tmp_path))


def test_deepspeeds_own_checkpoint_fits_linear_schedules(tmp_path: Path) -> None:
    saved = merged(run_ranks(2, train_and_save, Job(None, 2, 3, FP32_ZERO1), str(tmp_path)))
    loaded = run_ranks(2, load_and_train, Job("zb-h1", 2, 3, FP32_ZERO1), str(tmp_path))
    assert merged([result[0] for result in loaded]).losses == saved.losses


def load_weights(rank: int, job: Job, folder: str) -> Outcome:
    engine = job.engine()
    engine.load_checkpoint(folder, load_module_only=True)
    return train(engine, range(0))


def test_weights_alone_fit_every_placement(tmp_path: Path) -> None:
    run_ranks(2, train_and_save, Job(None, 2, 3, FP32_ZERO1), str(tmp_path))
    oracle = merged(run_ranks(2, load_weights, Job(None, 2, 3, FP32_ZERO1), str(tmp_path)))
    ours = merged(run_ranks(2, load_weights, Job("v-zb", 2, 3, FP32_ZERO1), str(tmp_path)))
    assert oracle.weights.keys() == ours.weights.keys()
    assert all((ours.weights[name] == value).all() for name, value in oracle.weights.items())
