"""Measures schedules: the contenders take turns in one run, and losses are compared before any time is shown.

    python bench/run.py --rounds 3 --micro-batches 8 16 32
    python bench/run.py --micro-batches 8 --contenders "deepspeed 1f1b" v-zb --json result.json
    python bench/run.py --workload gpt --ranks 2 --micro-batches 4 8    # real matrix products, one thread a rank
    python bench/run.py --workload holding --layers 2 --contenders v-zb adaptive+offload@0.3    # with large activations
"""

from __future__ import annotations

import argparse
import os
import statistics
import sys
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "tests" / "support"))
os.environ.setdefault("DEEPSPEED_LOG_LEVEL", "warning")

import record
from contenders import ADAPTIVE, CONTENDERS, contender_name, engine_of, section_of
from ranks import run_ranks
from resident import rise_in
from rich.console import Console
from rich.table import Table
from turns import Turns
from workloads import Gpt, Holding, Sleeping, Workload

from ds_vshape.schedule.activations import Activations, peak_activations

# Batches of a turn that are counted.
_IN_TURN = 3
MIB = 2 ** 20
DEFAULT_CONTENDERS = ["deepspeed 1f1b", "deepspeed dualpipev", "1f1b", "v-half", "v-zb"]


@dataclass(frozen=True)
class Result:
    """A contender's losses (of all batches) and seconds (of the measured ones), and where activations are large, by how
    many bytes resident memory rose at most in a later one; ours with the peak of activations under the schedule that
    ran, counted as the paper does, and what each measured batch would take if nothing but passes took time."""

    losses: list[float]
    seconds: list[float]
    simulated: list[float]
    rise: int | None
    peak: float | None


def measure(rank: int, names: list[str], workload: Workload, rounds: int, planning_seconds: float = 10
            ) -> dict[str, Result]:
    """The results of `rounds` turns of each contender, after those to warm up (on every rank).

    Contenders that plan for measured times have their plan before the first round. The first batch of a turn finds the
    caches full of another contender's data, as none does in a training, and isn't counted.
    """
    engines = {name: _engine_of(name, workload, planning_seconds) for name in names}
    planning = [name for name in names if ADAPTIVE.fullmatch(name)]
    seconds: dict[str, list[float]] = {name: [] for name in names}
    simulated: dict[str, list[float]] = {name: [] for name in names}
    turns = Turns(engines, workload)
    for name in names:
        turns.train(name)
    while any(engines[name].planned_times is None for name in planning):
        for name in names:
            turns.train(name)
    for _ in range(rounds):
        for name in names:
            turns.train(name)
            for _ in range(_IN_TURN):
                seconds[name].append(turns.train(name))
                if hasattr(engines[name], "schedule"):
                    simulated[name].append(workload.simulated(engines[name]))
    holds = isinstance(workload, Holding)
    rises = {name: rise_in(partial(turns.train, name)) if holds else None for name in names}
    return {name: Result(turns.losses[name], seconds[name], simulated[name], rises[name], _peak_of(engine))
            for name, engine in engines.items()}


def _engine_of(name: str, workload: Workload, planning_seconds: float) -> Any:
    section = section_of(name, "profile")
    if not isinstance(section, dict):
        return engine_of(name, workload)
    return engine_of(name, workload, pipeline_schedule={**section, "planning_seconds": planning_seconds})


def _peak_of(engine: Any) -> float | None:
    if not hasattr(engine, "schedule"):
        return None
    schedule, sizes = engine.schedule(), engine.activation_sizes()
    counted = Activations.counted(schedule.placement)
    gives_back = schedule.gives_back_memory
    return max(peak_activations(schedule, sizes.shares_in(counted) if gives_back else counted))


def compare_losses(results: dict[str, Result]) -> None:
    """Exit unless every contender had the first one's losses to 1e-5, relative."""
    first, *others = results
    for other in others:
        for number, (a, b) in enumerate(zip(results[first].losses, results[other].losses, strict=True)):
            if abs(a - b) > 1e-5 * abs(a):
                sys.exit(f"no times: batch {number} has loss {a!r} with {first} and {b!r} with {other}")


def summarize(results: dict[str, Result], workload: Workload) -> dict[str, dict[str, Any]]:
    """For each contender: median, least and most seconds, speed over the first one, and against the simulation."""
    base = next(iter(results.values())).seconds
    summary = {}
    for contender, result in results.items():
        seconds, median = result.seconds, statistics.median(result.seconds)
        over = [took / simulated for took, simulated in zip(seconds, result.simulated)]
        summary[contender] = {
            "seconds": median, "least": min(seconds), "most": max(seconds),
            "speed": statistics.median(b / s for b, s in zip(base, seconds)),
            "tokens_per_second": workload.tokens / median if workload.tokens else None,
            "simulated": statistics.median(result.simulated) if over else None,
            "over_simulated": statistics.median(over) if over else None,
            "peak": result.peak, "rise": None if result.rise is None else result.rise / MIB,
        }
    return summary


_COLUMNS = {"seconds": ("median s", ".3f"), "least": ("least", ".3f"), "most": ("most", ".3f"),
            "speed": ("speed over the first", ".2f"), "tokens_per_second": ("tokens/s", ".0f"),
            "simulated": ("simulated s", ".3f"), "over_simulated": ("over simulated", ".3f"), "peak": ("peak", ".2f"),
            "rise": ("rise of resident MiB", ".1f")}


def show(summary: dict[str, dict[str, Any]], workload: Workload, rounds: int) -> None:
    """The table; columns that nobody has are left out."""
    table = Table(title=f"{workload.ranks} ranks, {workload.micro_batches} micro-batches, {workload}; "
                        f"{rounds} rounds of {_IN_TURN} batches")
    table.add_column("contender")
    shown = [key for key in _COLUMNS if any(row[key] is not None for row in summary.values())]
    for key in shown:
        table.add_column(_COLUMNS[key][0], justify="right")
    for contender, row in summary.items():
        table.add_row(contender, *("-" if row[key] is None else format(row[key], _COLUMNS[key][1]) for key in shown))
    Console(width=150).print(table)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ranks", type=int, default=4)
    parser.add_argument("--workload", choices=("sleeping", "holding", "gpt"), default="sleeping")
    parser.add_argument("--layers", type=int, default=4, help="layers a rank")
    parser.add_argument("--micro-batches", type=int, nargs="+", default=[8, 16])
    parser.add_argument("--ms", type=float, nargs=3, default=[5, 5, 5], metavar=("F", "B", "W"),
                        help="of one sleeping layer")
    parser.add_argument("--hidden", type=int, default=256, help="of the GPT")
    parser.add_argument("--rounds", type=int, default=5, help=f"turns of each contender, of {_IN_TURN} batches")
    parser.add_argument("--planning-seconds", type=float, default=10, help="of a contender that plans")
    parser.add_argument("--contenders", nargs="+", type=contender_name, default=DEFAULT_CONTENDERS, metavar="NAME",
                        help=f"the first is what the others are compared with; of: {', '.join(CONTENDERS)}, and "
                             "adaptive@0.5 (planned for the times it measures, within half of 1F1B's peak), "
                             "adaptive+recompute+offload@0.2")
    record.add_json_option(parser)
    options = parser.parse_args()
    f, b, w = (ms / 1000 for ms in options.ms)
    written = []
    for micro_batches in options.micro_batches:
        layers = options.ranks * options.layers
        workload: Workload
        if options.workload == "gpt":
            workload = Gpt(options.ranks, layers, micro_batches, options.hidden)
        else:
            kind = Holding if options.workload == "holding" else Sleeping
            workload = kind(options.ranks, layers, micro_batches, (f, b, w))
        of_ranks = run_ranks(options.ranks, measure, options.contenders, workload, options.rounds,
                             options.planning_seconds, timeout=3600)
        results = {name: replace(result, rise=max((found[name].rise or 0 for found in of_ranks)) or None)
                   for name, result in of_ranks[0].items()}
        compare_losses(results)
        summary = summarize(results, workload)
        show(summary, workload, options.rounds)
        measured = {name: {"losses": result.losses, "seconds": result.seconds} for name, result in results.items()}
        written.append({"ranks": options.ranks, "workload": str(workload), "micro_batches": micro_batches,
                        "results": measured, "summary": summary})
    record.write(options.json, written)


if __name__ == "__main__":
    main()
