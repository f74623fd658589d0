"""What it gains to plan the partition of layers together with the order of passes.

    python bench/partitions.py                      cells with the layers of a small Gemma, and heads of several costs
    python bench/partitions.py --exhaustive         small cells, beside the best of all partitions and orders
    python bench/partitions.py --sleep 1            both plans of each cell, trained with layers that sleep

Each cell has a plan for balance's partition (ds_vshape/schedule/partition/balance.py), made in `--seconds` of the
processor, and one in which the partition is free (ds_vshape/schedule/partition/partition_and_order.py), for which there
is as much time again. A layer's F, B and W take 10, 12 and 8, those of the embedding 1, 0 and 2, of a head of cost h
10h each, and a hop 1. F of a layer leaves 17 and B 16 units of memory, of the embedding 0 and 1, of the head as of a
layer. Limits are fractions of what 1F1B keeps at most with balanced stages of its own.

`--exhaustive` asks CP-SAT (`optimum.py`) for the best order of each partition that could be better: all others have a
lower bound that isn't. W runs whole there. It needs OR-Tools (the extra "proofs").
"""

from __future__ import annotations

import argparse
import os
import statistics
import sys
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from itertools import combinations, pairwise, product
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "tests" / "support"))
os.environ.setdefault("DEEPSPEED_LOG_LEVEL", "warning")

import record
from ranks import run_ranks
from rich.console import Console
from rich.table import Table

from ds_vshape.schedule.adaptive import LimitError, Plan
from ds_vshape.schedule.bounds import lower_bound_of_limits
from ds_vshape.schedule.partition.layers import Layers
from ds_vshape.schedule.partition.partition_and_order import (Bounds, PartitionPlan, PartitionProblem, limits_of_1f1b,
                                                    plan_partition)
from ds_vshape.schedule.placement import v

EMBEDDING, LAYER, HEAD = (1, 0, 2), (10, 12, 8), (10, 10, 10)
OF_EMBEDDING, OF_LAYER = (0, 1), (17, 16)
HOP = 1
# That a plan is from where the solver begins, and what it may take to better that, or to prove that nothing does.
_PLANNING_SECONDS, _SOLVING_SECONDS = 0.3, 60


@dataclass(frozen=True)
class Cell:
    """`layers` layers between an embedding and a head that takes as long as `head` layers."""

    ranks: int
    micro_batches: int
    layers: int
    head: float
    limit: float

    @property
    def times(self) -> list[tuple[float, ...]]:
        """F, B and W of each layer."""
        return [EMBEDDING, *[LAYER] * self.layers, tuple(self.head * seconds for seconds in HEAD)]

    def problem(self, max_pieces: int) -> PartitionProblem:
        """What is planned."""
        sizes = [OF_EMBEDDING, *[OF_LAYER] * (self.layers + 1)]
        layers = Layers(*zip(*self.times), *zip(*sizes))
        return PartitionProblem(layers, v(self.ranks), self.micro_batches,
                                limits_of_1f1b(self.limit, layers, self.ranks, self.micro_batches),
                                (float(HOP),) * (2 * self.ranks - 1), max_pieces)


@dataclass(frozen=True)
class Result:
    """Makespans, `least` of what an exhaustive search found and proved; None where there is none."""

    balanced_bounds: Bounds
    balanced: float | None
    bounds: Bounds
    together: float
    lower_bound: float
    least: float | None = None
    slept: dict[str, list[float]] | None = None

    @property
    def gain(self) -> float | None:
        """By how much a batch of balance's partition takes longer."""
        return None if self.balanced is None else self.balanced / self.together - 1


def planned(cell: Cell, seconds: float, max_pieces: int = 4) -> PartitionPlan | None:
    """Both plans of a cell; None if no partition keeps the limit."""
    try:
        return plan_partition(cell.problem(max_pieces), seconds, time.process_time)
    except LimitError:
        return None


def result_of(found: PartitionPlan) -> Result:
    """The figures of both plans."""
    return Result(found.balanced_bounds, found.balanced.timeline.makespan if found.balanced else None, found.bounds,
                  found.plan.timeline.makespan, found.plan.lower_bound)


def partitions(problem: PartitionProblem) -> Iterator[Bounds]:
    """All that there are."""
    layers = len(problem.layers)
    for inner in combinations(range(1, layers), 2 * problem.ranks - 1):
        yield (0, *inner, layers)


def least_of_all(problem: PartitionProblem, known: float) -> float:
    """The least makespan of any partition and order that is proved, or `known` if nothing is below.

    Where the solver proves nothing in its time its bound counts, so that the result is too good rather than too bad.
    """
    from optimum import least_makespan

    least = known
    for bounds in partitions(problem):
        if problem.excess(bounds):
            continue
        one = problem.on(bounds)
        if lower_bound_of_limits(one.placement, one.micro_batches, one.times, one.activations, one.limits) < least:
            proved = least_makespan(one, _SOLVING_SECONDS, _PLANNING_SECONDS, below=least)[2]
            least = min(least, proved)
    return least


def slept(rank: int, cell: Cell, plans: dict[str, tuple[Bounds, Plan]], seconds: float,
          rounds: int) -> dict[str, list[float]]:
    """Seconds of the batches of each plan, which take turns, after one of each to warm up; `seconds` of a unit."""
    import torch.distributed as dist
    from contenders import engine_of
    from workloads import SleepingLayers

    of_layers = tuple(tuple(seconds * units for units in times) for times in cell.times)
    workload = SleepingLayers(cell.ranks, len(of_layers), cell.micro_batches, of_layers[1], of_layers=of_layers)
    engines, found = {}, {name: [] for name in plans}
    for name, (bounds, plan) in plans.items():
        engines[name] = engine_of("v-zb", workload, pipeline_schedule={"name": "v-zb", "partition": bounds})
        engines[name].use_schedule(plan.schedule)
    for number in range(rounds + 1):
        for name, engine in engines.items():
            data = iter(workload.batch(number))
            dist.barrier()
            start = time.perf_counter()
            engine.train_batch(data)
            dist.barrier()
            if number:
                found[name].append(time.perf_counter() - start)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ranks", type=int, nargs="+", default=[4, 8])
    parser.add_argument("--micro-batches", type=int, nargs="+", default=[8, 32])
    parser.add_argument("--layers", type=int, default=26, help="without embedding and head")
    parser.add_argument("--heads", type=float, nargs="+", default=[1, 8, 30], help="costs in layers")
    parser.add_argument("--limits", type=float, nargs="+", default=[0.5, 1], help="of 1F1B's peak")
    parser.add_argument("--seconds", type=float, default=10, help="for balance's plan, and as much for the other one")
    parser.add_argument("--exhaustive", action="store_true")
    parser.add_argument("--sleep", type=float, metavar="MS", help="of a unit of time")
    parser.add_argument("--rounds", type=int, default=3, help="batches of each partition that sleep")
    record.add_json_option(parser)
    options = parser.parse_args()
    table = Table(title=f"{options.layers} layers, planned in {options.seconds:g} s, and as much again")
    for column in ("p", "m", "head", "limit", "balance", "together", "gain", "lower bound", "least of all", "over it",
                   "slept: balance", "together", "stages"):
        table.add_column(column, justify="left" if column == "stages" else "right")
    written: list[dict[str, Any]] = []
    for ranks, micro_batches, head, limit in product(options.ranks, options.micro_batches, options.heads,
                                                     options.limits):
        cell = Cell(ranks, micro_batches, options.layers, head, limit)
        print(cell, file=sys.stderr, flush=True)
        found = planned(cell, options.seconds, max_pieces=1 if options.exhaustive else 4)
        row = [str(ranks), str(micro_batches), f"{head:g}", f"{limit:g}"]
        if found is None:
            table.add_row(*row, "-", "none fits")
            continue
        result = result_of(found)
        if options.exhaustive:
            result = replace(result, least=least_of_all(cell.problem(1), result.together))
        if options.sleep and found.balanced is not None:
            plans = {"balance": (found.balanced_bounds, found.balanced), "together": (found.bounds, found.plan)}
            result = replace(result, slept=run_ranks(ranks, slept, cell, plans, options.sleep / 1000, options.rounds,
                                                     timeout=3600)[0])
        written.append({**asdict(cell), **asdict(result), "gain": result.gain})
        of_sleeping = [""] * 2 if result.slept is None else [
            f"{statistics.median(seconds):.3f} s" for seconds in result.slept.values()]
        table.add_row(*row, "-" if result.balanced is None else f"{result.balanced:g}", f"{result.together:g}",
                      "-" if result.gain is None else f"{result.gain:.1%}", f"{result.lower_bound:g}",
                      *([""] * 2 if result.least is None else
                        [f"{result.least:g}", f"{result.together / result.least - 1:.1%}"]), *of_sleeping,
                      " ".join(str(stop - start) for start, stop in pairwise(result.bounds)))
    Console(width=140).print(table)
    record.write(options.json, written)


if __name__ == "__main__":
    main()
