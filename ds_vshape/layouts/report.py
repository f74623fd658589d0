"""What a job would do: its ranks and their hosts, what each pipeline rank holds and needs, and the step."""

from __future__ import annotations

import os
from dataclasses import asdict
from itertools import pairwise
from typing import Any

from rich.console import Console
from rich.table import Table

from ds_vshape.layouts.job import Job
from ds_vshape.layouts.job_costs import host_of, place_of
from ds_vshape.layouts.prediction import Prediction
from ds_vshape.measure.rank_memory import readable

GIB = 1024 ** 3


def print_job(job: Job, prediction: Prediction, console: Console) -> None:
    """Print a row for each pipeline rank, then the step in a few lines."""
    console.print(_table(job, prediction))
    console.print(f"predicted step: {prediction.seconds:.4g} s, {prediction.timeline.makespan:.4g} s of it for the "
                  f"passes (bubble {prediction.bubble:.1%}); {prediction.samples_per_second:.4g} sequences a second, "
                  f"{prediction.mfu:.1%} of the FLOPs of {job.ranks} devices. By a cost model, not measured.",
                  highlight=False)
    if not _fits(job, prediction):
        console.print(f"It doesn't fit: {readable(prediction.fullest)} of {job.machine.memory:g} GiB.")
    cores = os.cpu_count() or 1
    if job.machine.accelerator == "cpu" and job.ranks > cores * len(job.hosts):
        console.print(f"The prediction assumes a core for each rank; here {job.ranks} ranks share {cores} cores.")


def job_to_json(job: Job, prediction: Prediction) -> dict[str, Any]:
    """The same as plain values: times in seconds, memory in bytes; "stages" is the number of pipeline ranks."""
    parts = list(pairwise(prediction.training.partition))
    return {
        "schedule": job.schedule["name"],
        "stages": job.parallel.pipe,
        "tensor": job.parallel.tensor,
        "data": job.replicas,
        "micro_batch": job.data.micro_batch,
        "micro_batches": job.micro_batches,
        "ds_config": job.ds_config(),
        "ranks": [{"ranks": _ranks_of(job, pipe),
                   "hosts": _hosts_of(job, pipe),
                   "stages": list(stages),
                   "layers": [list(parts[stage]) for stage in stages],
                   "memory": {**asdict(prediction.memory[pipe]), "total": prediction.memory[pipe].total},
                   "busy": _busy(prediction, pipe)}
                  for pipe, stages in enumerate(job.placement.chunks)],
        "metrics": {"step_s": prediction.seconds, "makespan": prediction.timeline.makespan,
                    "bubble": prediction.bubble, "samples_per_second": prediction.samples_per_second,
                    "mfu": prediction.mfu, "fullest": prediction.fullest, "fits": _fits(job, prediction)},
    }


def _fits(job: Job, prediction: Prediction) -> bool:
    return prediction.fullest <= job.machine.memory * GIB


def _table(job: Job, prediction: Prediction) -> Table:
    layout = (f"{job.ranks} ranks = {job.parallel.pipe} pipeline x {job.replicas} data x {job.parallel.tensor} "
              f"tensor parallel, on {len(job.hosts)} host{'s' * (len(job.hosts) > 1)}")
    batch = (f"{job.micro_batches} micro-batches of {job.data.micro_batch} x {job.model.length}; "
             f"{job.precision.dtype}, ZeRO-{job.parallel.zero}")
    table = Table(title=f"{job.schedule['name']}: {layout}; {batch}", title_justify="left")
    for column in ("pipeline rank", "ranks", "host", "stages", "layers"):
        table.add_column(column)
    for column in ("parameters", "gradients", "optimizer", "activations", "working", "communicators",
                   "batch end", "all", "busy"):
        table.add_column(column, justify="right")
    parts = list(pairwise(prediction.training.partition))
    for pipe, stages in enumerate(job.placement.chunks):
        memory = prediction.memory[pipe]
        table.add_row(
            str(pipe), _range(_ranks_of(job, pipe)), ", ".join(_hosts_of(job, pipe)), ", ".join(map(str, stages)),
            "; ".join(_layers(*parts[stage], job.model.layers) for stage in stages),
            *map(readable, (memory.parameters, memory.gradients, memory.optimizer, memory.activations_peak or 0,
                            memory.working or 0, memory.communicators, memory.batch_end, memory.total)),
            f"{_busy(prediction, pipe):.1%}")
    return table


def _ranks_of(job: Job, pipe: int) -> list[int]:
    """The global ranks of a pipeline rank."""
    return [place_of(job, pipe, data, tensor) for data in range(job.replicas) for tensor in range(job.parallel.tensor)]


def _hosts_of(job: Job, pipe: int) -> list[str]:
    return list(dict.fromkeys(host_of(job, rank) for rank in _ranks_of(job, pipe)))


def _busy(prediction: Prediction, pipe: int) -> float:
    """The share of the makespan in which a pipeline rank computes."""
    return sum(span.end - span.start for span in prediction.timeline.ranks[pipe]) / prediction.timeline.makespan


def _range(numbers: list[int]) -> str:
    return str(numbers[0]) if len(numbers) == 1 else f"{numbers[0]}-{numbers[-1]}"


def _layers(start: int, stop: int, blocks: int) -> str:
    """The layers from `start` to `stop` of models/gpt.py's list: embedding, positions, blocks, norm, head."""
    names = ["embedding"] * (start == 0)
    first, last = max(start - 2, 0), min(stop - 2, blocks) - 1
    if first <= last:
        names.append(f"blocks {_range(list(range(first, last + 1)))}")
    return ", ".join(names + ["head"] * (stop == blocks + 4))
