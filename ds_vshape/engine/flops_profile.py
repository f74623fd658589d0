"""DeepSpeed's flops profiler, around a whole batch: its hooks of DeepSpeedEngine would profile one forward."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, Protocol

from ds_vshape.runtime.rank import TrainingRank


class ProfiledRank(TrainingRank, Protocol):
    """A rank that may have a flops profiler, by DeepSpeedEngine's names."""

    # Missing where the config doesn't ask for one.
    flops_profiler: Any

    def flops_profiler_profile_step(self) -> int:
        """The step that is profiled."""

    def flops_profiler_module_depth(self) -> int:
        """For print_model_profile, as the three that follow."""

    def flops_profiler_top_modules(self) -> int: ...
    def flops_profiler_detailed(self) -> bool: ...
    def flops_profiler_output_file(self) -> str | None: ...

    def wall_clock_breakdown(self) -> bool:
        """Whether DeepSpeed's timers run."""


def is_flops_profiled(rank: ProfiledRank) -> bool:
    """Whether the next training batch is the one that DeepSpeed's flops profiler measures, on all ranks."""
    return hasattr(rank, "flops_profiler") and rank.global_steps == rank.flops_profiler_profile_step()


@contextmanager
def flops_profile(rank: ProfiledRank, defer: Callable[[Exception, str], None]) -> Iterator[None]:
    """Around a training batch: profile what global rank 0 computes forward, recomputation included, in its step.

    `defer` is given an error of the report.
    """
    if rank.global_rank or not is_flops_profiled(rank):
        yield
        return
    profiler, step = rank.flops_profiler, rank.global_steps
    if rank.wall_clock_breakdown():
        # It would divide by timers that the end of the batch has set back.
        profiler.ds_engine = None
    profiler.start_profile()
    try:
        yield
        profiler.stop_profile()
        try:
            profiler.print_model_profile(step, rank.flops_profiler_module_depth(), rank.flops_profiler_top_modules(),
                                         rank.flops_profiler_detailed(), rank.flops_profiler_output_file())
        except Exception as error:
            defer(error, "flops profiler's report")
    finally:
        profiler.end_profile()
