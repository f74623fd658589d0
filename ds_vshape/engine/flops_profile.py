"""DeepSpeed's flops profiler, around a whole batch: its hooks of DeepSpeedEngine would profile one forward."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any


def is_flops_profiled(engine: Any) -> bool:
    """Whether the next training batch is the one that DeepSpeed's flops profiler measures, on all ranks."""
    return hasattr(engine, "flops_profiler") and engine.global_steps == engine.flops_profiler_profile_step()


@contextmanager
def flops_profile(engine: Any) -> Iterator[None]:
    """Around a training batch: profile what global rank 0 computes forward, recomputation included, in its step."""
    if engine.global_rank or not is_flops_profiled(engine):
        yield
        return
    profiler, step = engine.flops_profiler, engine.global_steps
    if engine.wall_clock_breakdown():
        # It would divide by timers that the end of the batch has set back.
        profiler.ds_engine = None
    profiler.start_profile()
    try:
        yield
        profiler.stop_profile()
        profiler.print_model_profile(step, engine.flops_profiler_module_depth(), engine.flops_profiler_top_modules(),
                                     engine.flops_profiler_detailed(), engine.flops_profiler_output_file())
    finally:
        profiler.end_profile()
