"""What a job would do: ranks and their places, what each pipeline rank holds and needs, the step, and the command."""

from __future__ import annotations

import os
import shlex
from itertools import pairwise

from command import command, environment
from composed import Composed
from job import Job
from job_costs import bounds_of, host_of, place_of, predict_job
from prediction import Prediction
from rich.console import Console
from rich.table import Table

from ds_vshape.rank_memory import readable

GIB = 1024 ** 3


def show(composed: Composed, console: Console) -> None:
    """Print it all; raises ValueError for a schedule that can't keep its memory limit."""
    job = composed.job
    prediction = predict_job(job)
    console.print(_ranks(job, prediction))
    print_step(job, prediction, console)
    words = [*(f"{key}={value}" for key, value in environment(job).items()), *command(job, composed.words)]
    # Whatever the width: to be copied.
    console.print(shlex.join(words), soft_wrap=True, highlight=False, markup=False)


def print_step(job: Job, prediction: Prediction, console: Console) -> None:
    """The batch in a few lines."""
    console.print(f"predicted step: {prediction.seconds:.4g} s, {prediction.timeline.makespan:.4g} s of it for the "
                  f"passes (bubble {prediction.bubble:.1%}); {prediction.samples_per_second:.4g} sequences a second, "
                  f"{prediction.mfu:.1%} of the FLOPs of {job.ranks} devices. By a model of costs, not measured.",
                  highlight=False)
    if prediction.fullest > job.machine.memory * GIB:
        console.print(f"It doesn't fit: {readable(prediction.fullest)} of {job.machine.memory:g} GiB.")
    cores = os.cpu_count() or 1
    if job.machine.accelerator == "cpu" and job.ranks > cores * len(job.hosts):
        console.print(f"With a core for each rank, that is: here {job.ranks} ranks share {cores} cores.")


def _ranks(job: Job, prediction: Prediction) -> Table:
    layout = (f"{job.ranks} ranks = {job.parallel.pipe} pipeline x {job.replicas} data x {job.parallel.tensor} "
              f"tensor parallel, on {len(job.hosts)} host{'s' * (len(job.hosts) > 1)}")
    batch = (f"{job.micro_batches} micro-batches of {job.data.micro_batch} x {job.model.length}; "
             f"{job.precision.dtype}, ZeRO-{job.parallel.zero}")
    table = Table(title=f"{job.schedule['name']}: {layout}; {batch}", title_justify="left")
    for column in ("pipeline rank", "ranks", "host", "stages", "layers"):
        table.add_column(column)
    for column in ("parameters", "gradients", "optimizer", "activations", "all", "busy"):
        table.add_column(column, justify="right")
    parts = list(pairwise(bounds_of(prediction.training)))
    for pipe, stages in enumerate(job.placement.chunks):
        ranks = [place_of(job, pipe, data, tensor)
                 for data in range(job.replicas) for tensor in range(job.parallel.tensor)]
        memory = prediction.memory[pipe]
        busy = sum(span.end - span.start for span in prediction.timeline.ranks[pipe]) / prediction.timeline.makespan
        table.add_row(
            str(pipe), _run(ranks), ", ".join(dict.fromkeys(host_of(job, rank) for rank in ranks)),
            ", ".join(map(str, stages)), "; ".join(_layers(*parts[stage], job.model.layers) for stage in stages),
            *map(readable, (memory.parameters, memory.gradients, memory.optimizer, memory.activations_peak,
                            memory.total)), f"{busy:.1%}")
    return table


def _run(numbers: list[int]) -> str:
    return str(numbers[0]) if len(numbers) == 1 else f"{numbers[0]}-{numbers[-1]}"


def _layers(start: int, stop: int, blocks: int) -> str:
    """Of launch/gpt.py's list: embedding, positions, blocks, norm, head."""
    names = ["embedding"] * (start == 0)
    first, last = max(start - 2, 0), min(stop - 2, blocks) - 1
    if first <= last:
        names.append(f"blocks {_run(list(range(first, last + 1)))}")
    return ", ".join(names + ["head"] * (stop == blocks + 4))
