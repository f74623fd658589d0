"""A training from its first batch, or from its last checkpoint, to its last batch, with evaluations and checkpoints.

The engine saves how far it has come: its batches, and the rows that they had (`global_samples`). A training therefore
continues from a checkpoint bit for bit.
"""

from __future__ import annotations

import json
import math
import re
import shutil
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch.distributed as dist

from ds_vshape.checkpoint.commit import LATEST
from ds_vshape.finetuning.batches import MicroBatches, Rows
from ds_vshape.finetuning.progress import Progress

BEST = "best"
# Before the names of metrics that are an evaluation's, as in TRL.
_EVALUATED = "eval_"
_TAG = re.compile(r"batch(\d+)")


@dataclass(frozen=True)
class TrainingPlan:
    """What is trained on, and how long.

    Attributes:
        batches: the number of the last batch.
        evaluate_every, save_every: numbers of batches; 0 is never. After the last batch there is an evaluation anyway.
        checkpoints: their folder; if it has any, the training continues from the last one. None saves nothing.
        kept: how many checkpoints are kept, besides the one with the best evaluation.
        seed: of the order of rows.
    """

    training: Rows
    validation: Rows
    batches: int
    evaluate_every: int = 0
    save_every: int = 0
    checkpoints: Path | None = None
    kept: int = 2
    seed: int = 0


@dataclass
class Result:
    """What a run has measured.

    Attributes:
        losses: of its batches, in nats a token, or in what the loss function counts.
        evaluations: the loss on the validation rows, in the same unit, by the number of batches before it.
        metrics: what else the loss function has measured, by the number of the batch; names that start with "eval_"
            are of the evaluation after it. Empty for a loss function without a method `measured`, which returns such
            numbers by their names since its last call (collective over all ranks).
        tokens_per_second: of all replicas, without padding; the time includes evaluations and checkpoints. 0 on ranks
            that draw no data.
    """

    losses: list[float] = field(default_factory=list)
    evaluations: dict[int, float] = field(default_factory=dict)
    metrics: dict[int, dict[str, float]] = field(default_factory=dict)
    tokens_per_second: float = 0.0

    @property
    def validation_loss(self) -> float:
        """The last evaluation's loss."""
        return self.evaluations[max(self.evaluations)]

    @classmethod
    def read(cls, written: Mapping[str, Any]) -> Result:
        """What asdict() gave, as JSON."""
        by_batch = {name: {int(batch): value for batch, value in written[name].items()}
                    for name in ("evaluations", "metrics")}
        return cls(**{**written, **by_batch})

    def write(self, path: Path) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(asdict(self), indent=2) + "\n")


def batches_of(epochs: float, rows: int, batch_rows: int) -> int:
    """The number of batches of `batch_rows` rows in so many epochs."""
    return math.ceil(epochs * rows / batch_rows)


class Training:
    """Trains by `plan` with an engine (collective over all ranks)."""

    def __init__(self, engine: Any, plan: TrainingPlan) -> None:
        self._engine = engine
        self._plan = plan
        self._replica = (engine.train_micro_batch_size_per_gpu(), plan.seed, engine.grid.get_data_parallel_rank(),
                         engine.grid.get_data_parallel_world_size())
        self._best = math.inf
        self._progress: Progress
        self.result = Result()

    def run(self) -> Result:
        """Train to the last batch."""
        resumed = self._resume()
        engine, plan = self._engine, self._plan
        self._progress = Progress(engine, plan.batches)
        if resumed:
            self._progress.tell(f"continues from {plan.checkpoints}")
        drawn = self._micro_batches(plan.training, engine.global_samples)
        while engine.global_steps < plan.batches:
            self._train_batch(drawn)
            if _is_due(plan.evaluate_every, engine.global_steps) or engine.global_steps == plan.batches:
                self._evaluate()
            if _is_due(plan.save_every, engine.global_steps):
                self._save(f"batch{engine.global_steps}")
        if not self.result.evaluations:  # the last checkpoint is that of the last batch
            self._evaluate()
        self._progress.close()
        return self.result

    def _train_batch(self, drawn: MicroBatches) -> None:
        before, start = drawn.tokens, time.perf_counter()
        loss = self._engine.train_batch(data_iter=drawn).item()
        *_, replicas = self._replica
        self._progress.batch(loss, replicas * (drawn.tokens - before), time.perf_counter() - start)
        self._measure()
        self.result.losses.append(loss)
        self.result.tokens_per_second = self._progress.tokens_per_second

    def _micro_batches(self, rows: Rows, start: int = 0) -> MicroBatches:
        return MicroBatches(rows, *self._replica, start=start)

    def _measure(self, prefix: str = "") -> None:
        """Note what the loss function has measured, and show it."""
        engine = self._engine
        measured = getattr(engine.module.loss_fn, "measured", None)
        if measured is None:
            return
        values = {prefix + name: value for name, value in measured().items()}
        self.result.metrics.setdefault(engine.global_steps, {}).update(values)
        self._progress.measured(values)

    def _evaluate(self) -> None:
        """On all validation rows but the last ones that don't fill a micro-batch of each replica; if none are filled,
        on some rows twice."""
        rows = self._plan.validation
        size, *_, replicas = self._replica
        count = max(1, len(rows) // (size * replicas))
        loss = self._engine.eval_batch(self._micro_batches(rows), num_micro_batches=count)
        self.result.evaluations[self._engine.global_steps] = loss.item()
        self._measure(_EVALUATED)
        self._progress.evaluated(loss.item())
        if self._plan.checkpoints is not None and loss.item() < self._best:
            self._best = loss.item()
            self._save(BEST)

    def _resume(self) -> bool:
        """Load the last checkpoint, if there is one."""
        folder = self._plan.checkpoints
        found = [folder is not None and (folder / LATEST).exists()]
        dist.broadcast_object_list(found, 0)
        if found[0]:
            _, kept = self._engine.load_checkpoint(str(folder))
            self._best = kept.get(BEST, math.inf)
        return bool(found[0])

    def _save(self, tag: str) -> None:
        folder = self._plan.checkpoints
        if folder is None:
            return
        self._engine.save_checkpoint(str(folder), tag, client_state={BEST: self._best}, save_latest=tag != BEST)
        self._progress.tell(f"saved as {folder / tag}")
        if dist.get_rank() == 0:
            numbers = sorted(int(match[1]) for path in folder.iterdir() if (match := _TAG.fullmatch(path.name)))
            for number in numbers[:-self._plan.kept]:
                shutil.rmtree(folder / f"batch{number}")


def _is_due(interval: int, batch: int) -> bool:
    return interval > 0 and batch % interval == 0
