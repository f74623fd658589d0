"""Measures DeepSpeed's own engine, which doesn't measure itself, as ds_vshape's engine does.

It gives that engine a `pipeline_report`, so that a run without the key can be compared with runs with it.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from deepspeed.runtime.pipe import schedule as own

from ds_vshape.deepspeed_adapter.engine import instructions_of, set_instructions
from ds_vshape.measure.profiling import PassRecorder, report
from ds_vshape.schedule.named import build
from ds_vshape.schedule.passes import Kind, Pass


class OwnEngineClock:
    """Records the passes of each training batch of `engine`, a deepspeed PipelineEngine, from now on."""

    def __init__(self, engine: Any) -> None:
        self._engine = engine
        self._recorder = PassRecorder()
        self._train_batch = engine.train_batch
        engine.train_batch = self._recorded_batch
        # On this engine alone: the class keeps its map.
        functions = instructions_of(type(engine))
        set_instructions(engine, {
            **functions,
            own.ForwardPass: self._timed(functions[own.ForwardPass], Kind.F),
            own.BackwardPass: self._timed(functions[own.BackwardPass], Kind.BW),
        })

    def _recorded_batch(self, *args: Any, **kwargs: Any) -> Any:
        self._recorder = PassRecorder()
        self._next = {Kind.F: 0, Kind.BW: 0}
        return self._train_batch(*args, **kwargs)

    def _timed(self, execute: Callable[..., None], kind: Kind) -> Callable[..., None]:

        def timed(engine: Any, **arguments: Any) -> None:
            if not torch.is_grad_enabled():  # Evaluation is no part of a batch.
                return execute(engine, **arguments)
            # DeepSpeed's instructions name buffers; 1F1B takes the micro-batches in turn, forwards and backwards.
            action = Pass(kind, engine.stage_id, self._next[kind])
            self._next[kind] += 1
            start = self._recorder.start(action)
            execute(engine, **arguments)
            self._recorder.end(action, start)

        return timed

    def pipeline_report(self) -> dict[str, Any]:
        """As ds_vshape's engine gives it: the last training batch in numbers (collective over the pipeline)."""
        stages, stage = self._engine.num_stages, self._engine.stage_id
        schedule = build("1f1b", stages, self._engine.micro_batches)
        order = tuple(span.action for span in self._recorder.spans())
        if order != schedule.orders[stage]:
            raise RuntimeError(f"stage {stage} ran another order than 1f1b's: {order}")
        group = self._engine.grid.get_pipe_parallel_group()
        return {**report(self._recorder, schedule, group, self._engine.device), "schedule": "DeepSpeed's 1f1b"}
