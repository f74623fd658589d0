"""The best layout, micro-batch size and schedule for a model on some devices, by prediction.

Every way to share the devices among pipeline, tensor and data parallel ranks is tried with every micro-batch size and
every schedule, as the paper does by experiment ("Pipeline Parallelism with Controllable Memory", grid search). What
rules.py refuses is left out, and so is what needs more memory than there is.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from itertools import product
from typing import Annotated, Any

from pydantic import Field, StrictStr
from rich.table import Table

from ds_vshape.layouts.job import Count, Job, Positive, Section
from ds_vshape.layouts.job_costs import predict_job
from ds_vshape.layouts.prediction import Prediction
from ds_vshape.layouts.report import GIB
from ds_vshape.layouts.rules import read_job
from ds_vshape.measure.rank_memory import readable

Sizes = Annotated[tuple[Count, ...], Field(min_length=1)]


class SearchSpace(Section):
    """What to search: `ranks` devices that every layout must use, `batch` sequences that every layout must train in a
    step, and the sizes and schedules to try; None for all that divide. `memory` is GiB of a device, None for the
    machine's; `show` is a number of rows.
    """

    ranks: Count
    batch: Count
    pipe: Sizes | None
    tensor: Sizes | None
    data: Sizes | None
    micro_batch: Sizes
    schedules: Annotated[tuple[StrictStr, ...], Field(min_length=1)]
    memory: Positive | None
    show: Count


@dataclass(frozen=True)
class Found:
    """A job that can run, and what it would do."""

    job: Job
    prediction: Prediction


@dataclass(frozen=True)
class Ranking:
    """The layouts that fit into `memory` GiB, the fastest first; how many combinations were impossible, and how many
    too large; of these the one that needs least, and what the first impossible one was refused for.
    """

    search: SearchSpace
    memory: float
    found: tuple[Found, ...]
    impossible: int
    too_large: int
    least: Found | None = None
    refusal: str | None = None

    @property
    def tried(self) -> int:
        """All combinations."""
        return len(self.found) + self.impossible + self.too_large

    def table(self) -> Table:
        """The first `search.show`, each compared with the fastest 1F1B."""
        base = next((each.prediction.seconds for each in self.found if each.job.schedule_name == "1f1b"), None)
        shown = Table(title=f"{self.search.ranks} devices, {self.search.batch} sequences a step, within "
                            f"{self.memory:g} GiB: predicted", title_justify="left")
        for column in ("", "schedule", "pipeline", "tensor", "data", "micro-batch", "micro-batches", "GiB", "step s",
                       "bubble", "MFU", "over the best 1F1B"):
            shown.add_column(column, justify="left" if column == "schedule" else "right")
        for place, each in enumerate(self.found[:self.search.show], 1):
            job, prediction = each.job, each.prediction
            shown.add_row(str(place), job.schedule["name"], str(job.parallel.pipe), str(job.parallel.tensor),
                          str(job.replicas), str(job.data.micro_batch), str(job.micro_batches),
                          f"{prediction.fullest / GIB:.1f}", f"{prediction.seconds:.3f}", f"{prediction.bubble:.1%}",
                          f"{prediction.mfu:.1%}", f"{base / prediction.seconds:.3f}" if base else "-")
        return shown

    def why_nothing(self) -> str:
        """Why nothing was found: the least that a layout needs, and what takes most of it."""
        if self.least is None:
            why = "none uses all devices" if self.refusal is None else f"the first: {self.refusal}"
            return f"Nothing fits: no combination is possible; {why}"
        job, prediction = self.least.job, self.least.prediction
        fullest = max(prediction.memory, key=lambda memory: memory.total)
        part, size = max(asdict(fullest).items(), key=lambda item: item[1] or 0)
        return (f"Nothing fits into {self.memory:g} GiB. The least is {readable(fullest.total)}, with "
                f"{job.schedule['name']} on {job.parallel.pipe} pipeline x {job.parallel.tensor} tensor x "
                f"{job.replicas} data parallel ranks in micro-batches of {job.data.micro_batch}; most of it, "
                f"{readable(size)}, is for {part.replace('_peak', '')}.")

    def to_json(self) -> dict[str, Any]:
        """All that was found as plain values: times in seconds, memory in bytes; "stages" counts pipeline ranks."""
        return {
            "ranks": self.search.ranks,
            "batch": self.search.batch,
            "memory_gib": self.memory,
            "impossible": self.impossible,
            "too_large": self.too_large,
            "layouts": [{"schedule": each.job.schedule["name"],
                         "stages": each.job.parallel.pipe,
                         "tensor": each.job.parallel.tensor,
                         "data": each.job.replicas,
                         "micro_batch": each.job.data.micro_batch,
                         "micro_batches": each.job.micro_batches,
                         "partition": each.prediction.training.partition,
                         "metrics": {"step_s": each.prediction.seconds, "bubble": each.prediction.bubble,
                                     "samples_per_second": each.prediction.samples_per_second,
                                     "mfu": each.prediction.mfu, "fullest": each.prediction.fullest}}
                        for each in self.found],
        }


def candidates(search: SearchSpace, config: dict[str, Any],
               schedules: Sequence[dict[str, Any]]) -> Iterator[dict[str, Any]]:
    """`config` with every layout that uses all ranks, every micro-batch size and every one of `schedules`."""
    divisors = [size for size in range(1, search.ranks + 1) if search.ranks % size == 0]
    slots = config["machine"]["slots"] or search.ranks
    tensors = search.tensor or [size for size in divisors if slots % size == 0]
    for pipe, tensor, data in product(search.pipe or divisors, tensors, search.data or divisors):
        if pipe * tensor * data != search.ranks:
            continue
        for micro_batch, schedule in product(search.micro_batch, schedules):
            yield {**config, "schedule": schedule,
                   "parallel": {**config["parallel"], "pipe": pipe, "tensor": tensor, "data": data, "ranks": None},
                   "data": {**config["data"], "micro_batch": micro_batch, "micro_batches": None,
                            "batch": search.batch}}


def rank_layouts(search: SearchSpace, config: dict[str, Any], schedules: Sequence[dict[str, Any]],
                 progress: Callable[[float], None] = lambda fraction: None,
                 predict: Callable[[Job], Prediction] = predict_job) -> Ranking:
    """All layouts of `config`, a job's config whose layout and batch `search` replaces.

    `schedules` are "pipeline_schedule" sections; `progress` is called with the share that is done.
    """
    memory = search.memory or config["machine"]["memory"]
    found: list[Found] = []
    too_large: list[Found] = []
    refusals: list[str] = []
    every = list(candidates(search, config, schedules))
    for place, candidate in enumerate(every):
        progress(place / len(every))
        try:
            job = read_job(candidate)
            each = Found(job, predict(job))
        except ValueError as error:
            refusals.append(str(error))
            continue
        (too_large if each.prediction.fullest > memory * GIB else found).append(each)
    ranked = sorted(found, key=lambda each: each.prediction.seconds)
    least = min(too_large, key=lambda each: each.prediction.fullest, default=None)
    return Ranking(search, memory, tuple(ranked), len(refusals), len(too_large), least, *refusals[:1])
