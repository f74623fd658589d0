"""Measures what micro-batches of mixed lengths cost a pipeline, and what their order wins back.

    python bench/mixed_lengths.py --simulate        makespans alone, of many batches
    python bench/mixed_lengths.py                   engines with layers that sleep in proportion to the length

Three batches of equal work take turns: all lengths alike; mixed in the order of the data; and the same data with
"micro_batch_order": "length". What mixed lengths add is bubble alone. Lengths are lognormal, with a mean of 1.
"""

from __future__ import annotations

import argparse
import os
import statistics
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "tests" / "support"))
os.environ.setdefault("DEEPSPEED_LOG_LEVEL", "warning")

import record
import torch.distributed as dist
from contenders import engine_of
from ranks import run_ranks
from rich.console import Console
from rich.table import Table
from workloads import SleepingByLength

from ds_vshape.schedule.builders.micro_batch_order import in_order, micro_batch_order
from ds_vshape.schedule.named import build
from ds_vshape.schedule.timeline import Times, simulate

ALIKE, DATA, LENGTH = "alike", "order of the data", "by length"
Makespans = dict[str, list[float]]


def simulated(name: str, workload: SleepingByLength, batches: int) -> Makespans:
    """Of each batch, with passes of equal length for the mean one."""
    schedule = build(name, workload.ranks, workload.micro_batches)
    alike = Times.uniform(schedule.placement.stages)
    found: Makespans = {ALIKE: [], DATA: [], LENGTH: []}
    for number in range(batches):
        times = replace(alike, scales=tuple(workload.scales(number)))
        ordered = in_order(times, micro_batch_order(schedule, times))
        # Rounded lengths differ a little in their sum.
        even = simulate(schedule, alike).makespan * sum(times.scales) / workload.micro_batches
        for contender, makespan in ((ALIKE, even), (DATA, simulate(schedule, times).makespan),
                                    (LENGTH, simulate(schedule, ordered).makespan)):
            found[contender].append(makespan)
    return found


def measured(rank: int, name: str, workload: SleepingByLength, rounds: int) -> tuple[Makespans, dict[str, list[float]]]:
    """Seconds of each batch, after one to warm up, and the losses."""
    even = replace(workload, sigma=0.0)
    engines = {contender: engine_of(name, of_contender, dynamic_shape=True,
                                    pipeline_schedule={"name": name, "micro_batch_order": order})
               for contender, of_contender, order in
               ((ALIKE, even, "length"), (DATA, workload, "data"), (LENGTH, workload, "length"))}
    found: Makespans = {contender: [] for contender in engines}
    losses: dict[str, list[float]] = {contender: [] for contender in engines}
    for number in range(rounds + 1):
        for contender, engine in engines.items():
            data = iter((even if contender == ALIKE else workload).batch(number))
            dist.barrier()
            start = time.perf_counter()
            losses[contender].append(float(engine.train_batch(data)))
            dist.barrier()
            if number:
                found[contender].append(time.perf_counter() - start)
    return found, losses


def summarize(found: Makespans) -> dict[str, float]:
    """Of median batches; a batch's work is the same in all three, so differences are bubble."""
    alike, data, length = (statistics.median(found[contender]) for contender in (ALIKE, DATA, LENGTH))
    speed = statistics.median(slow / fast for slow, fast in zip(found[DATA], found[LENGTH]))
    return {"added": (data - alike) / alike, "left": (length - alike) / alike,
            "won back": (data - length) / (data - alike), "speed": speed}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--simulate", action="store_true")
    parser.add_argument("--schedules", nargs="+", default=["1f1b", "zb-h1", "v-min", "v-half", "v-zb"])
    parser.add_argument("--ranks", type=int, nargs="+", default=[4])
    parser.add_argument("--micro-batches", type=int, nargs="+", default=[16], help="for each number of ranks")
    parser.add_argument("--sigma", type=float, nargs="+", default=[0.7], help="of the lognormal lengths")
    parser.add_argument("--ms", type=float, nargs=3, default=[5, 5, 5], metavar=("F", "B", "W"), help="of one layer")
    parser.add_argument("--rounds", type=int, default=8, help="batches of each contender")
    record.add_json_option(parser)
    options = parser.parse_args()
    table = Table(title=f"{'simulated' if options.simulate else 'sleeping layers'}, {options.rounds} batches")
    for column in ("p", "m", "sigma", "schedule", "bubble added", "left by length", "won back", "speed"):
        table.add_column(column, justify="left" if column == "schedule" else "right")
    written: list[dict[str, Any]] = []
    cases = [(ranks, micro_batches, sigma, name) for ranks, micro_batches in
             zip(options.ranks, options.micro_batches, strict=True) for sigma in options.sigma
             for name in options.schedules]
    for ranks, micro_batches, sigma, name in cases:
        workload = SleepingByLength(ranks, 2 * ranks, micro_batches, tuple(ms / 1000 for ms in options.ms), sigma=sigma)
        if options.simulate:
            found = simulated(name, workload, options.rounds)
        else:
            found, losses = run_ranks(ranks, measured, name, workload, options.rounds, timeout=3600)[0]
            if any(abs(a - b) > 1e-5 * abs(a) for a, b in zip(losses[DATA], losses[LENGTH], strict=True)):
                sys.exit(f"no times: {name} has losses {losses[DATA]} and {losses[LENGTH]}")
        summary = summarize(found)
        table.add_row(str(ranks), str(micro_batches), f"{sigma:g}", name, f"{summary['added']:.1%}",
                      f"{summary['left']:.1%}", f"{summary['won back']:.2f}", f"{summary['speed']:.2f}")
        written.append({"ranks": ranks, "micro_batches": micro_batches, "sigma": sigma, "schedule": name,
                        "seconds": found, "summary": summary})
    Console(width=120).print(table)
    record.write(options.json, written)


if __name__ == "__main__":
    main()
