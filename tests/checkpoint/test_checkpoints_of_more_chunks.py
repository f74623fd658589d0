"""Checkpoints and tied weights with four stages on a rank: saved, loaded, converted, and refused elsewhere."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from pipelines import (AFTER, BEFORE, BF16_ZERO1, FP32_ZERO1, Job, Outcome, PlainTraining, assert_equal, data,
                       merged, specs, tied_specs, train, train_and_save)
from ranks import RanksFailed, run_ranks
from universal import convert

V = {"name": "v-zb", "chunks": 4}
INTERLEAVED = {"name": "interleaved-zb", "chunks": 4}
ADAPTIVE = {"name": "adaptive", "chunks": 4, "memory_limit": 0.75, "planning_seconds": 0.5}
# An embedding, blocks and a head on eight stages, of which some have two layers.
LAYERS, TIED = tuple(specs(9)), tuple(tied_specs(9))


def load_and_train(rank: int, job: Job, folder: str) -> Outcome:
    engine = job.engine()
    # Other weights and another state of the optimizer, all of which loading must replace.
    engine.train_batch(data(engine, 99))
    path, _ = engine.load_checkpoint(folder)
    assert path is not None
    return train(engine, AFTER)


def load_weights(rank: int, job: Job, folder: str) -> Outcome:
    engine = job.engine()
    engine.load_checkpoint(folder, load_module_only=True)
    return train(engine, range(0))


@pytest.mark.parametrize("section, config, layers", [
    (V, FP32_ZERO1, TIED), pytest.param(INTERLEAVED, BF16_ZERO1, LAYERS, marks=pytest.mark.slow),
    pytest.param(ADAPTIVE, FP32_ZERO1, LAYERS, marks=pytest.mark.slow)], ids=lambda value: "")
def test_goes_on_bit_for_bit(section: dict[str, Any], config: dict[str, Any], layers: tuple[Any, ...],
                             tmp_path: Path) -> None:
    job = Job(section, 2, 3, config, layers)
    saved = merged(run_ranks(2, train_and_save, job, str(tmp_path)))
    assert_equal(merged(run_ranks(2, load_and_train, job, str(tmp_path))), saved)


def test_two_stages_on_a_rank_are_another_placement(tmp_path: Path) -> None:
    run_ranks(2, train_and_save, Job("v-zb", 2, 3, FP32_ZERO1, LAYERS), str(tmp_path))
    with pytest.raises(RanksFailed) as error:
        run_ranks(2, load_and_train, Job(V, 2, 3, FP32_ZERO1, LAYERS), str(tmp_path))
    assert str(error.value).count("belongs to other layers") == 2, "on every rank"


@pytest.mark.parametrize("before, after", [
    (None, V), pytest.param(INTERLEAVED, None, marks=pytest.mark.slow),
    pytest.param(V, "v-half", marks=pytest.mark.slow)], ids=str)
def test_weights_alone_and_universal_checkpoints_fit_every_placement(before: Any, after: Any, tmp_path: Path) -> None:
    saved = merged(run_ranks(2, train_and_save, Job(before, 2, 3, FP32_ZERO1, LAYERS), str(tmp_path)))
    oracle = merged(run_ranks(2, load_weights, Job(before, 2, 3, FP32_ZERO1, LAYERS), str(tmp_path)))
    assert_equal(merged(run_ranks(2, load_weights, Job(after, 2, 3, FP32_ZERO1, LAYERS), str(tmp_path))), oracle)
    convert(tmp_path)
    universal = Job(after, 2, 3, {**FP32_ZERO1, "checkpoint": {"load_universal": True}}, LAYERS)
    assert_equal(merged(run_ranks(2, load_and_train, universal, str(tmp_path))), saved)


def train_tied(rank: int, jobs: list[Job]) -> list[Outcome]:
    return [train(job.engine(), BEFORE) for job in jobs]


def test_tied_weights() -> None:
    """Embedding and head are on one rank in the V, on the first and the last one where stages are interleaved."""
    jobs = [Job(section, 2, 5, FP32_ZERO1, TIED) for section in (None, INTERLEAVED, V)]
    oracle, apart, together = (merged(list(outcomes)) for outcomes in zip(*run_ranks(2, train_tied, jobs), strict=True))
    assert_equal(apart, oracle)
    # The two gradients of the weight are added up in another order.
    plain = PlainTraining(jobs[0], 1).train(BEFORE, 5)
    for outcome in (together, plain):
        assert outcome.losses == pytest.approx(oracle.losses, rel=1e-5)
        for name, value in oracle.weights.items():
            torch.testing.assert_close(outcome.weights[name], value, rtol=1e-3, atol=1e-4)
