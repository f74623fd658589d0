"""Measures all that a rank needs in training, beside what a memory limit goes by, on a GPT with AdamW.

    python bench/whole_rank.py
    python bench/whole_rank.py --cases v-half v-half-zero1 --hidden 256

Each rank is a process of its own, and what it needs is the high-water mark of its resident memory (Linux, /proc/self)
from before the first batch to the end of the last one: parameters, gradients, optimizer, rollback, activations, what
passes and the step need while they run, and the interpreter with its libraries. Beside it stand the two predictions
that `"memory_limit": "70GiB"` is checked by: by shapes, before the first batch, and with the sizes that are measured in
the second one; and both again without what the process has besides tensors.
"""

from __future__ import annotations

import argparse
import os
import sys
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "tests" / "support"))
os.environ.setdefault("DEEPSPEED_LOG_LEVEL", "warning")

import record
from contenders import engine_of
from ranks import run_ranks
from resident import map_large_tensors, peak_in
from rich.console import Console
from rich.table import Table
from tqdm import tqdm
from workloads import Gpt

from ds_vshape.measure.rank_memory import RankMemory

MIB = 2 ** 20
# Before the third batch all that a limit is checked by is known.
LEAST_BATCHES = 3


@dataclass(frozen=True)
class Case:
    """How a job of `replicas` pipelines trains."""

    schedule: str
    zero: int
    replicas: int = 1
    post_validation: bool = False
    recomputes: bool = False
    bf16: bool = False

    def config(self) -> dict[str, Any]:
        """The keys of its ds_config; its limit is above everything."""
        section = {"name": self.schedule, "memory_limit": "1TiB", "optimizer_post_validation": self.post_validation}
        return {"optimizer": {"type": "AdamW", "params": {"lr": 1e-3, "torch_adam": True}},
                "zero_optimization": {"stage": self.zero}, "bf16": {"enabled": self.bf16}, "pipeline_schedule": section,
                "pipeline": {"activation_checkpoint_interval": int(self.recomputes)}}


CASES = {
    "v-half": Case("v-half", 0),
    "v-half-zero1": Case("v-half", 1),
    "1f1b-zero1": Case("1f1b", 1),
    "v-zb-post-validation": Case("v-zb", 1, post_validation=True),
    "v-half-recomputed": Case("v-half", 1, recomputes=True),
    "v-half-bf16": Case("v-half", 1, bf16=True),
    "v-half-2-replicas": Case("v-half", 1, replicas=2),
}


def measure(number: int, workload: Gpt, case: Case, batches: int) -> dict[str, Any]:
    """Bytes of this rank, of pipeline rank `rank` in `replica`: `resident`, and the parts of what is predicted
    `by_shapes` and after measurement (`measured`)."""
    map_large_tensors()
    engine = engine_of(case.schedule, workload, **case.config())
    replica, rank = engine.grid.data_parallel_id, engine.stage_id
    data = [iter(workload.batch(case.replicas * batch + replica)) for batch in range(batches)]
    predicted = []

    def train() -> None:
        engine.set_dataiterator(data[0])
        engine.look_at_shapes()
        predicted.append(engine.memory_report()[rank])
        for of_batch in data[:LEAST_BATCHES - 1]:
            engine.train_batch(of_batch)
        predicted.append(engine.memory_report()[rank])
        for of_batch in data[LEAST_BATCHES - 1:]:
            engine.train_batch(of_batch)

    resident = peak_in(train)
    by_shapes, measured = map(asdict, predicted)
    return {"rank": rank, "replica": replica, "resident": resident, "by_shapes": by_shapes, "measured": measured}


def ratios(found: dict[str, Any]) -> list[float]:
    """Predicted over resident, by shapes and measured; then both without the process, as it was measured."""
    predicted = [RankMemory(**found[known]) for known in ("by_shapes", "measured")]
    process = predicted[1].process
    return [of_rank.total / found["resident"] for of_rank in predicted] + [
        (of_rank.total - of_rank.process) / (found["resident"] - process) for of_rank in predicted]


def show(rows: list[dict[str, Any]], workload: Gpt) -> None:
    """A row for each case and rank."""
    table = Table(title=f"{workload.ranks} pipeline ranks, {workload.micro_batches} micro-batches, {workload}, AdamW; "
                        "predicted over resident")
    for column in ("case", "rank", "replica", "resident MiB", "process MiB", "by shapes", "measured",
                   "by shapes, tensors", "measured, tensors"):
        table.add_column(column, justify="left" if column == "case" else "right")
    for row in rows:
        for found in row["ranks"]:
            sizes = [f"{size / MIB:.0f}" for size in (found["resident"], found["measured"]["process"])]
            table.add_row(row["case"], str(found["rank"]), str(found["replica"]), *sizes,
                          *(f"{ratio:.3f}" for ratio in ratios(found)))
    Console(width=140).print(table)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", nargs="+", choices=list(CASES), default=list(CASES), metavar="NAME",
                        help=f"of {', '.join(CASES)}")
    parser.add_argument("--ranks", type=int, default=2, help="of a pipeline")
    parser.add_argument("--layers", type=int, default=4, help="blocks a rank")
    parser.add_argument("--micro-batches", type=int, default=6)
    parser.add_argument("--hidden", type=int, default=512)
    parser.add_argument("--length", type=int, default=256)
    parser.add_argument("--batches", type=int, default=LEAST_BATCHES + 1, help=f"at least {LEAST_BATCHES}")
    record.add_json_option(parser)
    options = parser.parse_args()
    if options.batches < LEAST_BATCHES:
        parser.error(f"--batches {options.batches}: must be at least {LEAST_BATCHES}")
    workload = Gpt(options.ranks, options.ranks * options.layers, options.micro_batches, options.hidden, options.length)
    rows = []
    for name in tqdm(options.cases, desc="measuring", disable=None):
        case = CASES[name]
        ranks = run_ranks(options.ranks * case.replicas, measure, workload, case, options.batches, timeout=1800)
        rows.append({"case": name, "ranks": sorted(ranks, key=lambda found: (found["replica"], found["rank"]))})
    show(rows, workload)
    record.write(options.json, rows)


if __name__ == "__main__":
    main()
