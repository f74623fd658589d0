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
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "launch"))
os.environ.setdefault("DEEPSPEED_LOG_LEVEL", "warning")

import torch.distributed as dist
from ranks import run_ranks
from rich.console import Console
from rich.table import Table

from contenders import CONTENDERS, Workload, engine_of
from ds_vshape.schedule.named import SCHEDULES

DEFAULT_CONTENDERS = ["deepspeed 1f1b", "deepspeed dualpipev", "1f1b", "v-half", "v-zb"]


def measure(rank: int, contenders: list[str], workload: Workload, rounds: int) -> dict[str, dict[str, list[float]]]:
    """The losses and seconds of `rounds` batches of each contender, after one to warm up (on every rank)."""
    engines = {contender: engine_of(contender, workload) for contender in contenders}
    results: dict[str, dict[str, list[float]]] = {contender: {"losses": [], "seconds": []} for contender in contenders}
    for number in range(rounds + 1):
        for contender, engine in engines.items():
            data = iter(workload.batch(number))
            dist.barrier()
            start = time.perf_counter()
            loss = engine.train_batch(data)
            dist.barrier()
            results[contender]["seconds"].append(time.perf_counter() - start)
            results[contender]["losses"].append(float(loss))
    for result in results.values():
        del result["seconds"][0]
    return results


def compare_losses(results: dict[str, dict[str, list[float]]]) -> None:
    """Exit unless every contender had the first one's losses to 1e-5, relative."""
    first, *others = results
    for other in others:
        for number, (a, b) in enumerate(zip(results[first]["losses"], results[other]["losses"], strict=True)):
            if abs(a - b) > 1e-5 * abs(a):
                sys.exit(f"no times: batch {number} has loss {a!r} with {first} and {b!r} with {other}")


def summarize(results: dict[str, dict[str, list[float]]], workload: Workload) -> dict[str, dict[str, Any]]:
    """For each contender: median, least and most seconds, speed over the first one, and against the simulation.

    A sleep takes a little longer than asked for, here as on every machine: the simulation knows how long.
    """
    base, slept = next(iter(results.values()))["seconds"], workload.slept()
    summary = {}
    for contender, result in results.items():
        seconds = result["seconds"]
        median = statistics.median(seconds)
        simulated = slept.simulated(contender) if contender in SCHEDULES else None
        summary[contender] = {
            "seconds": median, "least": min(seconds), "most": max(seconds),
            "speed": statistics.median(b / s for b, s in zip(base, seconds)),
            "simulated": simulated,
            "over_simulated": median / simulated if simulated else None,
        }
    return summary


def show(summary: dict[str, dict[str, Any]], workload: Workload, rounds: int) -> None:
    first = next(iter(summary))
    milliseconds = "/".join(f"{1000 * seconds:g}" for seconds in workload.seconds)
    table = Table(title=f"{workload.ranks} ranks, {workload.micro_batches} micro-batches, {workload.layers} layers a "
                  f"rank of {milliseconds} ms (F/B/W); work alone {workload.work:.2f} s; {rounds} rounds")
    for column in ("contender", "median s", "least", "most", f"speed over {first}", "simulated s", "over simulated"):
        table.add_column(column, justify="left" if column == "contender" else "right")
    for contender, row in summary.items():
        seconds = [f"{row[key]:.3f}" for key in ("seconds", "least", "most")]
        simulated = ["-" if row[key] is None else f"{row[key]:.3f}" for key in ("simulated", "over_simulated")]
        table.add_row(contender, *seconds, f"{row['speed']:.2f}", *simulated)
    Console(width=140).print(table)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ranks", type=int, default=4)
    parser.add_argument("--layers", type=int, default=4, help="layers a rank")
    parser.add_argument("--micro-batches", type=int, nargs="+", default=[8, 16])
    parser.add_argument("--ms", type=float, nargs=3, default=[5, 5, 5], metavar=("F", "B", "W"), help="of one layer")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--contenders", nargs="+", choices=CONTENDERS, default=DEFAULT_CONTENDERS, metavar="NAME",
                        help=f"the first is what the others are compared with; of: {', '.join(CONTENDERS)}")
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
        written.append({"ranks": options.ranks, "layers": options.layers, "ms": options.ms,
                        "micro_batches": micro_batches, "results": results, "summary": summary})
    if options.json:
        options.json.write_text(json.dumps(written, indent=1))


if __name__ == "__main__":
    main()
