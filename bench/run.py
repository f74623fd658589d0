"""Measures schedules: every contender's batches in turn in one run, losses compared before any time is shown.

    python bench/run.py                                        # the table of README.md
    python bench/run.py --micro-batches 8 --contenders "deepspeed 1f1b" v-zb --json result.json
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "launch"))
os.environ.setdefault("DEEPSPEED_LOG_LEVEL", "warning")

import torch.distributed as dist
from ranks import run_ranks
from rich.console import Console
from rich.table import Table

from contenders import ADAPTIVE, CONTENDERS, Workload, contender_name, engine_of
from ds_vshape.schedule.schedule import Schedule
from ds_vshape.schedule.timeline import peak_activations

DEFAULT_CONTENDERS = ["deepspeed 1f1b", "deepspeed dualpipev", "1f1b", "v-half", "v-zb"]


@dataclass(frozen=True)
class Result:
    """A contender's losses (of all batches) and seconds (of the measured ones); ours with the schedule that ran."""

    losses: list[float]
    seconds: list[float]
    schedule: Schedule | None


def measure(rank: int, names: list[str], workload: Workload, rounds: int) -> dict[str, Result]:
    """The results of `rounds` batches of each contender in turn, after those to warm up (on every rank).

    Contenders that plan for measured times have their plan before the first round.
    """
    engines = {name: engine_of(name, workload) for name in names}
    planning = [name for name in names if ADAPTIVE.fullmatch(name)]
    losses: dict[str, list[float]] = {name: [] for name in names}
    seconds: dict[str, list[float]] = {name: [] for name in names}

    def train_all() -> None:
        for name, engine in engines.items():
            data = iter(workload.batch(len(losses[name])))
            dist.barrier()
            start = time.perf_counter()
            losses[name].append(float(engine.train_batch(data)))
            dist.barrier()
            seconds[name].append(time.perf_counter() - start)

    train_all()
    while any(engines[name].planned_times is None for name in planning):
        train_all()
    for _ in range(rounds):
        train_all()
    return {name: Result(losses[name], seconds[name][-rounds:], getattr(engine, "schedule", lambda: None)())
            for name, engine in engines.items()}


def compare_losses(results: dict[str, Result]) -> None:
    """Exit unless every contender had the first one's losses to 1e-5, relative."""
    first, *others = results
    for other in others:
        for number, (a, b) in enumerate(zip(results[first].losses, results[other].losses, strict=True)):
            if abs(a - b) > 1e-5 * abs(a):
                sys.exit(f"no times: batch {number} has loss {a!r} with {first} and {b!r} with {other}")


def summarize(results: dict[str, Result], workload: Workload) -> dict[str, dict[str, Any]]:
    """For each contender: median, least and most seconds, speed over the first one, and against the simulation.

    A sleep takes a little longer than asked for, here as on every machine: the simulation knows how long.
    """
    base, slept = next(iter(results.values())).seconds, workload.slept()
    summary = {}
    for contender, result in results.items():
        seconds = result.seconds
        median = statistics.median(seconds)
        simulated = slept.simulated(result.schedule) if result.schedule else None
        summary[contender] = {
            "seconds": median, "least": min(seconds), "most": max(seconds),
            "speed": statistics.median(b / s for b, s in zip(base, seconds)),
            "simulated": simulated,
            "over_simulated": median / simulated if simulated else None,
            "peak": max(peak_activations(result.schedule)) if result.schedule else None,
        }
    return summary


def show(summary: dict[str, dict[str, Any]], workload: Workload, rounds: int) -> None:
    first = next(iter(summary))
    milliseconds = "/".join(f"{1000 * seconds:g}" for seconds in workload.seconds)
    table = Table(title=f"{workload.ranks} ranks, {workload.micro_batches} micro-batches, {workload.layers} layers a "
                  f"rank of {milliseconds} ms (F/B/W); work alone {workload.work:.2f} s; {rounds} rounds")
    table.add_column("contender")
    for column in ("median s", "least", "most", f"speed over {first}", "simulated s", "over simulated", "peak"):
        table.add_column(column, justify="right")
    for contender, row in summary.items():
        seconds = [f"{row[key]:.3f}" for key in ("seconds", "least", "most")]
        simulated = ["-" if row[key] is None else f"{row[key]:.3f}" for key in ("simulated", "over_simulated")]
        peak = "-" if row["peak"] is None else f"{row['peak']:g}"
        table.add_row(contender, *seconds, f"{row['speed']:.2f}", *simulated, peak)
    Console(width=150).print(table)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ranks", type=int, default=4)
    parser.add_argument("--layers", type=int, default=4, help="layers a rank")
    parser.add_argument("--micro-batches", type=int, nargs="+", default=[8, 16])
    parser.add_argument("--ms", type=float, nargs=3, default=[5, 5, 5], metavar=("F", "B", "W"), help="of one layer")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--contenders", nargs="+", type=contender_name, default=DEFAULT_CONTENDERS, metavar="NAME",
                        help=f"the first is what the others are compared with; of: {', '.join(CONTENDERS)}, and "
                             "adaptive@0.5 (planned for the times it measures, within half of 1F1B's peak)")
    parser.add_argument("--json", type=Path, help="write all measurements to this file")
    options = parser.parse_args()
    f, b, w = (ms / 1000 for ms in options.ms)
    written = []
    for micro_batches in options.micro_batches:
        workload = Workload(options.ranks, options.layers, micro_batches, (f, b, w))
        results = run_ranks(options.ranks, measure, options.contenders, workload, options.rounds, timeout=600)[0]
        compare_losses(results)
        summary = summarize(results, workload)
        show(summary, workload, options.rounds)
        measured = {name: {"losses": result.losses, "seconds": result.seconds} for name, result in results.items()}
        written.append({"ranks": options.ranks, "layers": options.layers, "ms": options.ms,
                        "micro_batches": micro_batches, "results": measured, "summary": summary})
    if options.json:
        options.json.write_text(json.dumps(written, indent=1))


if __name__ == "__main__":
    main()
