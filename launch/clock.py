"""Times the passes of DeepSpeed's own engine, which reports neither bubble nor peak.

It offers the `pipeline_report` of ds_vshape's engine, so that a run without the key can stand in the same table.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed
from deepspeed.runtime.pipe import schedule


@dataclass(frozen=True)
class TimedPass:
    """One pass on one rank; seconds of a clock that all processes of a machine share."""

    forward: bool
    start: float
    end: float


class PassClock:
    """Records each training batch of `engine`, a deepspeed PipelineEngine, from now on."""

    def __init__(self, engine: Any) -> None:
        self._engine = engine
        self._running: list[TimedPass] = []
        self._last_batch: list[TimedPass] = []
        own = type(engine)._INSTRUCTION_MAP
        # On this engine alone: the class keeps its map.
        engine._INSTRUCTION_MAP = {
            **own,
            schedule.ForwardPass: self._timed(own[schedule.ForwardPass], forward=True),
            schedule.BackwardPass: self._timed(own[schedule.BackwardPass], forward=False),
            schedule.OptimizerStep: self._closing(own[schedule.OptimizerStep]),
        }

    def _timed(self, execute: Callable[..., None], forward: bool) -> Callable[..., None]:

        def timed(engine: Any, **arguments: Any) -> None:
            start = time.perf_counter()
            execute(engine, **arguments)
            if torch.is_grad_enabled():  # Evaluation is no part of a batch.
                self._running.append(TimedPass(forward, start, time.perf_counter()))

        return timed

    def _closing(self, execute: Callable[..., None]) -> Callable[..., None]:

        def closing(engine: Any, **arguments: Any) -> None:
            self._last_batch, self._running = self._running, []
            execute(engine, **arguments)

        return closing

    def pipeline_report(self) -> dict[str, Any]:
        """The last training batch in numbers; all ranks of the pipeline must call it."""
        stages, micro_batches = self._engine.num_stages, self._engine.micro_batches
        ranks: list[list[TimedPass]] = [[] for _ in range(stages)]
        torch.distributed.all_gather_object(ranks, self._last_batch, group=self._engine.grid.get_pipe_parallel_group())
        return {
            "schedule": "DeepSpeed's 1f1b",
            "predicted_bubble": (stages - 1) / (micro_batches + stages - 1),
            "measured_bubble": bubble(ranks),
            "peak_activations": [peak_activations(passes) for passes in ranks],
            "peak_activation_bytes": None,
        }


def bubble(ranks: list[list[TimedPass]]) -> float:
    """1 - work / makespan, the makespan from the first pass on any rank to the last on any rank."""
    passes = [timed for rank in ranks for timed in rank]
    makespan = max(timed.end for timed in passes) - min(timed.start for timed in passes)
    return 1 - sum(timed.end - timed.start for timed in passes) / (len(ranks) * makespan)


def peak_activations(passes: list[TimedPass]) -> int:
    """The most micro-batches whose forward had begun on a rank and whose backward hadn't ended."""
    alive = peak = 0
    for timed in passes:
        alive += 1 if timed.forward else -1
        peak = max(peak, alive)
    return peak
