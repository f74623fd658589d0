"""The best layout, micro-batch size and schedule for a model on some devices, by prediction: a ranked table.

    python launch/grid.py
    python launch/grid.py model=21b search.ranks=24 search.batch=96 search.memory=40
    python launch/grid.py search.schedules=[1f1b,v-half] search.tensor=[1] search.micro_batch=[1]

Every way to share the devices among pipeline, tensor and data parallel ranks is tried with every size of micro-batch
and every schedule, as the paper does by experiment ("Pipeline Parallelism with Controllable Memory", grid search).
What job_rules.py refuses is left out, and so is what needs more memory than there is. Words are those of train.py and
the section `search` of configs/grid.yaml. Nothing is started.
"""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import product
from typing import Annotated, Any

from composed import CONFIGS, check_keys, compose_config
from job import Count, Job, Positive, Section
from job_costs import predict_job
from job_rules import legal_keys, read_job, section_of
from omegaconf import OmegaConf
from prediction import Prediction
from pydantic import Field, StrictStr
from rich.console import Console
from rich.table import Table
from tqdm import tqdm

from ds_vshape.config import ConfigError, nearest

GIB = 1024 ** 3
Sizes = Annotated[tuple[Count, ...], Field(min_length=1)]


class Search(Section):
    """What configs/grid.yaml says of it."""

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
    """A job that can be run, and what it would do."""

    job: Job
    prediction: Prediction


def candidates(search: Search, config: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """`config` with every layout that uses all ranks, every micro-batch size and every schedule."""
    divisors = [size for size in range(1, search.ranks + 1) if search.ranks % size == 0]
    slots = config["machine"]["slots"] or search.ranks
    tensors = search.tensor or [size for size in divisors if slots % size == 0]
    sections = [_section(name, config["schedule"]) for name in search.schedules]
    for pipe, tensor, data in product(search.pipe or divisors, tensors, search.data or divisors):
        if pipe * tensor * data != search.ranks:
            continue
        for micro_batch, section in product(search.micro_batch, sections):
            yield {**config, "schedule": section,
                   "parallel": {**config["parallel"], "pipe": pipe, "tensor": tensor, "data": data, "ranks": None},
                   "data": {**config["data"], "micro_batch": micro_batch, "micro_batches": None,
                            "batch": search.batch}}


def find(search: Search, config: dict[str, Any]) -> tuple[list[Found], Counter[str]]:
    """What fits, the fastest first; and how many were tried, impossible, and too large."""
    limit = (search.memory or config["machine"]["memory"]) * GIB
    found, counts = [], Counter[str]()
    for candidate in tqdm(list(candidates(search, config)), desc="predicting", leave=False, disable=None):
        counts["tried"] += 1
        try:
            job = read_job(candidate)
            prediction = predict_job(job)
        except ValueError:
            counts["impossible"] += 1
            continue
        if prediction.fullest > limit:
            counts["too large"] += 1
        else:
            found.append(Found(job, prediction))
    return sorted(found, key=lambda each: each.prediction.seconds), counts


def _section(name: str, said: dict[str, Any]) -> dict[str, Any]:
    """The schedule's file with what the command line says of all."""
    file = CONFIGS / "schedule" / f"{name}.yaml"
    if not file.exists():
        legal = sorted(path.stem for path in file.parent.glob("*.yaml"))
        raise ConfigError(f"search.schedules = {name!r}: {nearest(name, legal)}")
    chosen: Any = OmegaConf.to_container(OmegaConf.load(file))
    return {**chosen, **{key: value for key, value in said.items() if value is not None and key != "name"}}


def table(found: Sequence[Found], search: Search, title: str) -> Table:
    """The first `search.show` of `found`, each against the fastest 1F1B."""
    base = next((each.prediction.seconds for each in found if each.job.schedule_name == "1f1b"), None)
    shown = Table(title=title, title_justify="left")
    for column in ("", "schedule", "pipeline", "tensor", "data", "micro-batch", "micro-batches", "GiB", "step s",
                   "bubble", "MFU", "over the best 1F1B"):
        shown.add_column(column, justify="left" if column == "schedule" else "right")
    for place, each in enumerate(found[:search.show], 1):
        job, prediction = each.job, each.prediction
        shown.add_row(str(place), job.schedule["name"], str(job.parallel.pipe), str(job.parallel.tensor),
                      str(job.replicas), str(job.data.micro_batch), str(job.micro_batches),
                      f"{prediction.fullest / GIB:.1f}", f"{prediction.seconds:.3f}", f"{prediction.bubble:.1%}",
                      f"{prediction.mfu:.1%}", f"{base / prediction.seconds:.3f}" if base else "-")
    return shown


def main() -> int:
    words = sys.argv[1:]
    if {"-h", "--help"} & set(words):
        print(__doc__)
        return 0
    try:
        check_keys(words, [*legal_keys(), "search", *(f"search.{key}" for key in Search.model_fields)])
        config = compose_config("grid", words)
        search = section_of(Search, config.pop("search"), "search")
        found, counts = find(search, config)
    except ValueError as error:
        print(f"grid.py: error: {error}", file=sys.stderr)
        return 2
    memory = search.memory or config["machine"]["memory"]
    console = Console(width=150)
    title = f"{search.ranks} devices, {search.batch} sequences a step, within {memory:g} GiB: predicted"
    console.print(table(found, search, title))
    console.print(f"{counts['tried']} combinations: {counts['impossible']} impossible, {counts['too large']} above "
                  f"{memory:g} GiB, {len(found)} ranked.", highlight=False)
    return 0 if found else 1


if __name__ == "__main__":
    sys.exit(main())
