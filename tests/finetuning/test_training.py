"""Evaluations, checkpoints and going on."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from pipelines import LENGTH, SAMPLES, VOCABULARY, Job
from ranks import run_ranks

from ds_vshape.finetuning.batches import WindowRows
from ds_vshape.finetuning.training import BEST, Result, Training, TrainingPlan, batches_of

TEXT = torch.arange(400) * 7 % VOCABULARY
PLAN = TrainingPlan(WindowRows(TEXT, LENGTH), WindowRows(TEXT[::2], LENGTH), batches=6, evaluate_every=2, save_every=2)


def train(rank: int, plans: list[TrainingPlan], replicas: int,
          micro_batches: int = 4) -> list[tuple[Result, list[torch.Tensor]]]:
    """One training after the other, each with an engine of its own, and batches of so many micro-batches of all
    replicas; results, and the rank's weights after each."""
    found = []
    for plan in plans:
        engine = Job("v-half", 2, micro_batches // replicas, {"train_micro_batch_size_per_gpu": SAMPLES}).engine()
        found.append((Training(engine, plan).run(), [weight.detach().clone() for weight in engine.module.parameters()]))
    return found


def test_a_training_goes_on_bit_for_bit(tmp_path: Path) -> None:
    whole = replace(PLAN, checkpoints=tmp_path / "whole", kept=1)
    parts = [replace(PLAN, checkpoints=tmp_path / "parts", batches=batches) for batches in (3, 6, 6)]
    for rank, results in enumerate(run_ranks(2, train, [whole, *parts], 1)):
        (uninterrupted, weights), (first, _), (second, resumed), (again, _) = results
        assert first.losses == uninterrupted.losses[:3]
        assert second.losses == uninterrupted.losses[2:]  # the last checkpoint is that of batch 2
        assert all(map(torch.equal, resumed, weights))
        assert sorted(uninterrupted.evaluations) == [2, 4, 6] and sorted(first.evaluations) == [2, 3]
        assert {**first.evaluations, **second.evaluations}.items() >= uninterrupted.evaluations.items()
        assert not again.losses and again.evaluations == {6: uninterrupted.evaluations[6]}
        assert (uninterrupted.tokens_per_second > 0) is (rank == 0)  # V leaves all data to rank 0
    assert {path.name for path in (tmp_path / "whole").iterdir()} == {"latest", BEST, "batch6"}
    assert {path.name for path in (tmp_path / "parts").iterdir()} == {"latest", BEST, "batch4", "batch6"}


def test_replicas_have_the_rows_of_one(tmp_path: Path) -> None:
    (alone, _), = run_ranks(2, train, [PLAN], 1)[0]
    (shared, _), = run_ranks(4, train, [PLAN], 2)[0]
    assert shared.losses == pytest.approx(alone.losses, rel=1e-5)
    assert shared.evaluations.keys() == alone.evaluations.keys()


@pytest.mark.slow
@pytest.mark.parametrize("before, after", [(2, 1), (1, 2)])
def test_a_training_goes_on_with_other_replicas(before: int, after: int, tmp_path: Path) -> None:
    """Across the end of an epoch; bit for bit with two micro-batches, whose gradients have one sum in any order."""
    whole = replace(PLAN, training=WindowRows(TEXT[:100], LENGTH), batches=12)
    first = replace(whole, checkpoints=tmp_path, batches=5)
    (uninterrupted, weights), = run_ranks(2 * before, train, [whole], before, 2)[0]
    assert 4 * 2 * SAMPLES < len(whole.training) < 12 * 2 * SAMPLES
    run_ranks(2 * before, train, [first], before, 2)
    (continued, found), = run_ranks(2 * after, train, [replace(whole, checkpoints=tmp_path)], after, 2)[0]
    assert continued.losses == pytest.approx(uninterrupted.losses[4:], rel=1e-6)
    assert all(map(torch.equal, found, weights))


def test_batches_of_epochs() -> None:
    assert [batches_of(epochs, 10, 4) for epochs in (0.1, 1, 2, 2.1)] == [1, 3, 5, 6]


def test_a_text_without_a_window() -> None:
    with pytest.raises(ValueError, match="a text of 3 tokens has no window of 3 \\+ 1"):
        WindowRows(TEXT[:3], 3)
