"""What a training shows of itself: a bar in a terminal alone, lines in a log, and the same numbers in wandb and
TensorBoard."""

from __future__ import annotations

import os
import pty
import sys
import termios
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from pipelines import LENGTH, SAMPLES, VOCABULARY, Job
from ranks import run_ranks
from torch import Tensor
from wandb_log import history

from ds_vshape.config import compatibility
from ds_vshape.config.compatibility import check_monitors
from ds_vshape.config.section import ConfigError
from ds_vshape.finetuning.batches import WindowRows
from ds_vshape.finetuning.progress import Progress
from ds_vshape.finetuning.training import Result, Training, TrainingPlan

ROWS = WindowRows(torch.arange(400) * 7 % VOCABULARY, LENGTH)
BATCHES, MICRO_BATCHES, RATE = 4, 4, 0.5
OF_A_BATCH = MICRO_BATCHES * SAMPLES


def monitored(rank: int, folder: str) -> tuple[Result, float, list[Tensor]]:
    """A training by plain gradient descent: the result, its seconds, and how this rank's weights changed in the first
    batch."""
    os.environ.update(WANDB_MODE="offline", WANDB_DIR=folder, WANDB_SILENT="true")
    engine = Job("v-half", 2, MICRO_BATCHES, {
        "wandb": {"enabled": True, "project": "finetuning"},
        "tensorboard": {"enabled": True, "output_path": folder, "job_name": "job"},
        "zero_optimization": {"stage": 1}, "zero_allow_untested_optimizer": True,
        "optimizer": {"type": "SGD", "params": {"lr": RATE}}}).engine()
    before = [weight.detach().clone() for weight in engine.module.parameters()]
    plan = TrainingPlan(ROWS, ROWS, 1, evaluate_every=2)
    Training(engine, plan).run()
    changes = [old - new.detach() for old, new in zip(before, engine.module.parameters(), strict=True)]
    start = time.perf_counter()
    result = Training(engine, TrainingPlan(ROWS, ROWS, BATCHES, evaluate_every=2)).run()
    seconds = time.perf_counter() - start
    if rank == 0:
        import wandb
        wandb.finish()
    return result, seconds, changes


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("monitors")


@pytest.fixture(scope="module")
def ranks(folder: Path) -> list[tuple[Result, float, list[Tensor]]]:
    return run_ranks(2, monitored, str(folder))


def of_wandb(folder: Path) -> dict[str, dict[int, float]]:
    found: dict[str, dict[int, Any]] = {}
    for step in history(folder):
        for name, value in step.items():
            found.setdefault(name, {})[step["_step"] // OF_A_BATCH] = value
    return found


def of_tensorboard(folder: Path) -> dict[str, dict[int, float]]:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
    events = EventAccumulator(str(folder / "job"))
    events.Reload()
    return {name: {event.step // OF_A_BATCH: event.value for event in events.Scalars(name)}
            for name in events.Tags()["scalars"]}


@pytest.mark.parametrize("read", [of_wandb, of_tensorboard])
def test_monitors_have_losses_rates_and_norms(ranks: list[tuple[Result, float, list[Tensor]]], folder: Path,
                                              read: Any) -> None:
    found = read(folder)
    result, seconds, _ = ranks[0]
    later = range(2, BATCHES + 1)
    losses = found["Train/Samples/train_loss"]
    assert [losses[batch] for batch in later] == pytest.approx(result.losses, rel=1e-6)
    assert list(found["Train/Samples/lr"].values()) == pytest.approx([RATE] * BATCHES)
    evaluations = found["Train/Samples/eval_loss"]
    assert {batch: evaluations[batch] for batch in (2, 4)} == pytest.approx(result.evaluations, rel=1e-6)
    rates = found["Train/Finetuning/tokens_per_second"]
    tokens = OF_A_BATCH * LENGTH
    assert tokens / seconds < min(rates[batch] for batch in later)
    assert sum(tokens / rates[batch] for batch in later) < seconds
    # In a step of plain gradient descent weights change by their gradients.
    norm = sum(float((change / RATE).square().sum()) for *_, changes in ranks for change in changes) ** 0.5
    norms = found["Train/Finetuning/gradient_norm"]
    assert list(norms) == list(range(1, BATCHES + 1)) and norms[1] == pytest.approx(norm, rel=1e-3)


def shown(rank: int, terminal: bool) -> tuple[str, float]:
    """What a rank writes about two batches of 50 tokens, and the rate that it knows."""
    outside, inside = pty.openpty()
    termios.tcsetwinsize(inside, (24, 160))
    sys.stderr = sys.stdout = os.fdopen(inside, "w", buffering=1)
    if not terminal:
        reading, writing = os.pipe()
        outside = reading
        sys.stderr = sys.stdout = os.fdopen(writing, "w", buffering=1)
    engine: Any = SimpleNamespace(global_steps=3, global_samples=0, monitor=SimpleNamespace(enabled=False),
                                  get_global_grad_norm=lambda: None)
    progress = Progress(engine, 10)
    for _ in range(2):
        time.sleep(0.12)
        engine.global_steps += 1
        progress.batch(1.25, 50, 0.12)
    progress.evaluated(1.5)
    rate = progress.tokens_per_second
    progress.close()
    print("end")
    text = b""
    while not text.rstrip().endswith(b"end"):
        text += os.read(outside, 65536)
    return text.decode(), rate


def test_the_bar_is_for_terminals_and_on_one_rank() -> None:
    (bar, rate), (other, _) = run_ranks(2, shown, True)
    for part in ("training:", "5/10", "loss=1.250", "tokens/s=", "evaluation=1.500", "<00:00",
                 "batch 5 of 10: evaluation 1.5000"):
        assert part in bar, part
    assert 50 / 0.12 / 4 < rate < 50 / 0.12
    assert other.split() == ["end"]
    (line, _), (other, _) = run_ranks(2, shown, False)
    assert line.splitlines() == ["batch 5 of 10: evaluation 1.5000", "end"] and other == "end\n"


def test_a_monitor_that_is_not_installed_is_told_with_its_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    config = {"tensorboard": {"enabled": True}, "wandb": {"enabled": False}}
    check_monitors(config)
    monkeypatch.setattr(compatibility, "find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r"tensorboard.enabled = true: tensorboard isn't installed: pip install "
                                          r"'ds-vshape\[tensorboard\]'"):
        check_monitors(config)
    check_monitors({"tensorboard": {"enabled": False}})
