"""`adaptive` beside torch's schedules where passes don't take equally long: time at no more memory, and least memory.

    python bench/unequal.py                              # all cells, simulated
    python bench/unequal.py --ranks 4 --rounds 2         # the same, and then run with layers that sleep
    python bench/unequal.py --cases head --seconds 20 --plans plans

A cell is one of CASES on so many ranks with so many micro-batches: a layer's F, B and W take 5, 8 and 3 ms, or 5, 10
and 5; or the model ends in a head that takes as long as eight layers; or one rank is slower by a fifth. torch's
schedules are simulated by the same rules as ours, with stages of balanced work on their own placement. `adaptive` is
planned for the cell's times

    - within the peak of the fastest of torch's schedules,
    - then within less and less, as long as a batch takes no more than 3% longer than that one's.

Each layer keeps as much of a micro-batch from F to W as any other, the embedding nothing, and peaks count these. With
--rounds each of torch's schedules and both plans train on ranks of this machine, in turns, with losses compared. Both
are planned anew for that, within the same memory, by the times of passes and messages that the engine measures there.
A layer then keeps 1 MiB of a micro-batch, and memory is what resident memory rises by in a batch, on the fullest rank.
With --plans the plans are kept in a folder, for the next run.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import cached_property, partial
from itertools import pairwise, product
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "tests" / "support"))
os.environ.setdefault("DEEPSPEED_LOG_LEVEL", "warning")

import record
from contenders import LEARNING_RATE, engine_of
from ranks import run_ranks
from resident import map_large_tensors, rise_in
from rich.console import Console
from rich.table import Table
from run import compare_losses
from torch_orders import TORCH_SCHEDULES
from torch_pipeline import TorchPipeline
from tqdm import tqdm
from turns import Turns
from workloads import SleepingLayers

from ds_vshape.schedule.activations import peak_activations
from ds_vshape.schedule.adaptive import LimitError, Problem, plan
from ds_vshape.schedule.partition.balance import balance
from ds_vshape.schedule.partition.layers import Layers
from ds_vshape.schedule.partition.partition_and_order import PartitionProblem, plan_partition
from ds_vshape.schedule.passes import Pass
from ds_vshape.schedule.placement import Placement, v
from ds_vshape.schedule.schedule import Schedule, ScheduleError
from ds_vshape.schedule.timeline import Times, simulate

TORCHS = ("torch 1f1b", "torch interleaved1f1b", "torch interleavedzerobubble", "torch zbvzerobubble",
          "torch dualpipev")
SLOW_RANK = 1
# By how much a plan with less memory may be slower than the fastest of torch's.
SLACK = 1.03
MIB = 2 ** 20
# Ours measures activations in the second batch.
_WARM_UP = 2


@dataclass(frozen=True)
class Case:
    """F, B and W of a layer in milliseconds; the cost of a head in layers, with which there is an embedding too; and
    how much longer the passes of SLOW_RANK take."""

    layer: tuple[float, float, float]
    head: float = 0
    slow: float = 1


CASES = {"5-8-3": Case((5, 8, 3)), "5-10-5": Case((5, 10, 5)), "head": Case((5, 8, 3), head=8),
         "slow-rank": Case((5, 8, 3), slow=1.2)}


@dataclass(frozen=True)
class Cell:
    """One case with `blocks` layers, embedding and head not counted."""

    case: str
    ranks: int
    micro_batches: int
    blocks: int

    def __str__(self) -> str:
        return f"{self.case}-{self.ranks}-{self.micro_batches}-{self.blocks}"

    @cached_property
    def layers(self) -> Layers:
        """In milliseconds, and what each keeps in units of a layer."""
        case = CASES[self.case]
        times, sizes = [case.layer] * self.blocks, [1.0] * self.blocks
        if case.head:
            forward, _, weight_grad = case.layer
            times = [(forward / 10, 0.0, weight_grad / 10), *times, tuple(case.head * part for part in case.layer)]
            sizes = [0.0, *sizes, 1.0]
        return Layers(*zip(*times), tuple(sizes), tuple(sizes))

    def balanced(self, placement: Placement) -> tuple[int, ...]:
        """The bounds of stages that give all ranks the same work, as far as whole layers can."""
        return balance(self.layers.costs, placement)

    def times(self, bounds: Sequence[int], placement: Placement) -> Times:
        """Of the stages, those of the slow rank as long as they take there; a W is cut between layers."""
        found = self.layers.times(bounds)
        speeds = [CASES[self.case].slow if placement.rank_of(stage) == SLOW_RANK else 1.0
                  for stage in range(placement.stages)]
        forward, input_grad, weight_grad = (
            tuple(time * speed for time, speed in zip(times, speeds))
            for times in (found.forward, found.input_grad, found.weight_grad))
        entries = tuple(self.layers.weight_grad[start:stop] for start, stop in pairwise(bounds))
        return Times(forward, input_grad, weight_grad, entry_costs=entries)


@dataclass(frozen=True)
class Run:
    """A schedule of stages with these bounds, its makespan in milliseconds and its highest peak in layers."""

    bounds: tuple[int, ...]
    schedule: Schedule
    makespan: float
    peak: float

    @classmethod
    def of(cls, cell: Cell, bounds: Sequence[int], schedule: Schedule) -> Run:
        """`schedule` simulated."""
        placement = schedule.placement
        return cls(tuple(bounds), schedule, simulate(schedule, cell.times(bounds, placement)).makespan,
                   max(peak_activations(schedule, cell.layers.activations(bounds))))


def torch_runs(cell: Cell) -> dict[str, Run]:
    """Of torch's schedules, those that can have so few micro-batches."""
    found = {}
    for name in TORCHS:
        try:
            schedule = TORCH_SCHEDULES[name].order(cell.ranks, cell.micro_batches)
        except ScheduleError:
            continue
        found[name] = Run.of(cell, cell.balanced(schedule.placement), schedule)
    return found


@dataclass(frozen=True)
class Planner:
    """`adaptive`, with so many seconds of the processor for a plan, which it may keep in a folder."""

    seconds: float
    folder: Path | None

    def run(self, cell: Cell, limit: float) -> Run | None:
        """The best plan within `limit` on each rank; None if there can't be one.

        Where there is a head the partition is planned first, with whole Ws, in as much time again.
        """
        file = self.folder and self.folder / f"{cell}-{limit:g}-{self.seconds:g}.json"
        if file is not None and file.exists():
            bounds, orders = json.loads(file.read_text())
            return Run.of(cell, bounds, Schedule("adaptive", v(cell.ranks), cell.micro_batches, tuple(
                tuple(map(Pass.parse, order)) for order in orders)))
        try:
            found = self._planned(cell, limit)
        except LimitError:
            return None
        if file is not None:
            file.write_text(json.dumps([found.bounds, [list(map(repr, order)) for order in found.schedule.orders]]))
        return found

    def by_times(self, cell: Cell, bounds: Sequence[int], times: Times, limit: float) -> Run:
        """The best plan within `limit` on each rank for stages of these bounds and times."""
        problem = Problem(v(cell.ranks), cell.micro_batches, times, cell.layers.activations(bounds),
                          (limit,) * cell.ranks)
        return Run.of(cell, bounds, plan(problem, self.seconds, clock=time.process_time).schedule)

    def _planned(self, cell: Cell, limit: float) -> Run:
        placement, limits = v(cell.ranks), (limit,) * cell.ranks
        bounds, runs = cell.balanced(placement), []
        if CASES[cell.case].head:
            together = plan_partition(PartitionProblem(cell.layers, placement, cell.micro_batches, limits,
                                                       max_pieces=1), self.seconds / 2, time.process_time)
            bounds = together.bounds
            runs.append(Run.of(cell, bounds, together.plan.schedule))
        runs.append(self.by_times(cell, bounds, cell.times(bounds, placement), limit))
        return min(runs, key=lambda run: run.makespan)


@dataclass(frozen=True)
class Compared:
    """A cell's runs: torch's by name, `adaptive` at no more than the peak of torch's fastest, and with the least memory
    that costs no more than SLACK, None if there is none."""

    cell: Cell
    torchs: Mapping[str, Run]
    same: Run
    least: Run | None

    @property
    def best(self) -> str:
        """The fastest of torch's, with less memory where two are as fast."""
        return min(self.torchs, key=lambda name: (self.torchs[name].makespan, self.torchs[name].peak))


def compare(cell: Cell, planner: Planner) -> Compared:
    """Simulate torch's schedules, and plan."""
    torchs = torch_runs(cell)
    best = min(torchs.values(), key=lambda run: (run.makespan, run.peak))
    same = planner.run(cell, best.peak)
    if same is None:
        raise AssertionError(f"{cell}: no V keeps within {best.peak:g}, which is enough for torch's")
    least, found = None, same
    while found is not None and found.makespan <= SLACK * best.makespan:
        least, found = found, planner.run(cell, found.peak - 1)
    return Compared(cell, torchs, same, least)


def simulated_table(compared: Sequence[Compared]) -> Table:
    """Makespans and peaks, and the ratios that count."""
    table = Table(title="simulated: milliseconds, and layers whose activations are alive on the fullest rank")
    table.add_column("case")
    for column in ("p", "m", *(name.removeprefix("torch ") for name in TORCHS), "adaptive, same memory",
                   "over the best", "adaptive, least memory", "over the best", "of its memory"):
        table.add_column(column, justify="right")
    for each in compared:
        best, least = each.torchs[each.best], each.least
        table.add_row(each.cell.case, str(each.cell.ranks), str(each.cell.micro_batches),
                      *(_cell(each.torchs.get(name)) for name in TORCHS), _cell(each.same),
                      f"{each.same.makespan / best.makespan:.3f}", _cell(least),
                      *(("-", "-") if least is None else
                        (f"{least.makespan / best.makespan:.3f}", f"{least.peak / best.peak:.2f}")))
    shares = [each.least.peak / each.torchs[each.best].peak for each in compared if each.least is not None]
    table.caption = f"slower at the same memory: {sum(_slower(each) for each in compared)} of {len(compared)}" + (
        f"; the least memory is {statistics.fmean(shares):.3f} in the mean of {len(shares)}" if shares else "")
    return table


def _slower(compared: Compared) -> bool:
    return compared.same.makespan > compared.torchs[compared.best].makespan * (1 + 1e-9)


def _cell(run: Run | None) -> str:
    return "-" if run is None else f"{run.makespan:.0f}, {run.peak:g}"


# -- run with layers that sleep


@dataclass(frozen=True)
class Measured:
    """A contender's losses (of all batches), seconds of those that count, and the bytes by which resident memory rose
    in the last one."""

    losses: list[float]
    seconds: list[float]
    rise: int


def _workload(rank: int, cell: Cell) -> SleepingLayers:
    speed = CASES[cell.case].slow if rank == SLOW_RANK else 1.0
    seconds = tuple(tuple(speed * time / 1000 for time in times) for times in zip(
        cell.layers.forward, cell.layers.input_grad, cell.layers.weight_grad))
    return SleepingLayers(cell.ranks, len(seconds), cell.micro_batches, seconds[1], of_layers=seconds,
                          held=tuple(int(size * MIB) for size in cell.layers.after_forward))


def measured_times(rank: int, cell: Cell, bounds: Sequence[int]) -> Times:
    """The seconds that the engine measures for `adaptive`, with stages of these bounds (on every rank)."""
    workload = _workload(rank, cell)
    section = {"name": "v-zb", "times": "profile", "planning_seconds": 0.1, "partition": bounds}
    engine = engine_of("v-zb", workload, pipeline_schedule=section)
    while engine.planned_times is None:
        engine.train_batch(iter(workload.batch(0)))
    times: Times = engine.planned_times
    return times


def measure(rank: int, cell: Cell, runs: Mapping[str, Run], rounds: int) -> dict[str, Measured]:
    """The contenders' batches in turns, after those to warm up (on every rank)."""
    map_large_tensors()
    workload = _workload(rank, cell)
    engines: dict[str, Any] = {}
    for name, run in runs.items():
        if name in TORCH_SCHEDULES:
            engines[name] = TorchPipeline(TORCH_SCHEDULES[name], workload, LEARNING_RATE, bounds=run.bounds)
        else:
            engines[name] = engine_of("v-zb", workload, pipeline_schedule={"name": "v-zb", "partition": run.bounds})
            engines[name].use_schedule(run.schedule)
    turns = Turns(engines, workload)
    found: dict[str, list[float]] = {name: [] for name in runs}
    rises: dict[str, int] = {}

    def counted(name: str) -> None:
        found[name].append(turns.train(name))

    for _ in range(_WARM_UP):
        for name in runs:
            turns.train(name)
    for _ in range(rounds):
        for name in runs:
            rises[name] = rise_in(partial(counted, name))
    return {name: Measured(turns.losses[name], found[name], rises[name]) for name in runs}


def planned_here(compared: Compared, planner: Planner) -> Compared:
    """Both plans of a cell made again, by the times that passes and messages take on this machine."""
    cell, times = compared.cell, dict[tuple[int, ...], Times]()

    def again(run: Run, limit: float) -> Run:
        if run.bounds not in times:
            times[run.bounds] = run_ranks(cell.ranks, measured_times, cell, run.bounds, timeout=3600)[0]
        return planner.by_times(cell, run.bounds, times[run.bounds], limit)

    least = compared.least
    return replace(compared, same=again(compared.same, compared.torchs[compared.best].peak),
                   least=None if least is None else again(least, least.peak))


def run_cell(compared: Compared, rounds: int) -> dict[str, Measured]:
    """The contenders of a cell on ranks of this machine, the rise on the fullest one."""
    runs = {**compared.torchs, "adaptive, same memory": compared.same}
    if compared.least is not None:
        runs["adaptive, least memory"] = compared.least
    of_ranks = run_ranks(compared.cell.ranks, measure, compared.cell, runs, rounds, timeout=3600)
    compare_losses(of_ranks[0])
    return {name: replace(measured, rise=max(found[name].rise for found in of_ranks))
            for name, measured in of_ranks[0].items()}


def measured_table(rows: Sequence[tuple[Compared, Mapping[str, Measured]]]) -> Table:
    """Each cell's contenders beside the fastest of torch's that was measured."""
    table = Table(title="measured, with layers that sleep; over the fastest of torch's")
    for column in ("case", "p", "m", "contender", "median s", "least", "over simulated", "time", "resident MiB",
                   "memory"):
        table.add_column(column, justify="left" if column in ("case", "contender") else "right")
    for compared, measured in rows:
        runs = {**compared.torchs, "adaptive, same memory": compared.same, "adaptive, least memory": compared.least}
        medians = {name: statistics.median(each.seconds) for name, each in measured.items()}
        best = min((name for name in measured if name in TORCH_SCHEDULES), key=medians.__getitem__)
        cell = compared.cell
        for name, each in measured.items():
            run = runs[name]
            assert run is not None
            table.add_row(cell.case, str(cell.ranks), str(cell.micro_batches), name, f"{medians[name]:.3f}",
                          f"{min(each.seconds):.3f}", f"{1000 * medians[name] / run.makespan:.3f}",
                          f"{medians[name] / medians[best]:.3f}", f"{each.rise / MIB:.1f}",
                          f"{each.rise / measured[best].rise:.2f}", end_section=name == list(measured)[-1])
    return table


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", nargs="+", choices=list(CASES), default=list(CASES))
    parser.add_argument("--ranks", type=int, nargs="+", default=[4, 8])
    parser.add_argument("--micro-batches", type=int, nargs="+", default=[8, 32])
    parser.add_argument("--layers", type=int, default=32, help="of the model, without embedding and head")
    parser.add_argument("--seconds", type=float, default=8, help="of the processor, for each plan")
    parser.add_argument("--plans", type=Path, metavar="FOLDER", help="where plans are kept")
    parser.add_argument("--rounds", type=int, default=0, help="batches of each contender that are run and counted")
    record.add_json_option(parser)
    options = parser.parse_args()
    if options.plans is not None:
        options.plans.mkdir(parents=True, exist_ok=True)
    planner = Planner(options.seconds, options.plans)
    cells = [Cell(case, ranks, micro_batches, options.layers)
             for case, ranks, micro_batches in product(options.cases, options.ranks, options.micro_batches)]
    compared = [compare(cell, planner) for cell in tqdm(cells, desc="planning", disable=None)]
    console = Console(width=180)
    console.print(simulated_table(compared))
    measured = []
    if options.rounds:
        compared = [planned_here(each, planner) for each in tqdm(compared, desc="planning again", disable=None)]
        measured = [run_cell(each, options.rounds) for each in tqdm(compared, desc="measuring", disable=None)]
        console.print(measured_table(list(zip(compared, measured))))
    record.write(options.json, [
        {**asdict(each.cell), "best": each.best,
         "simulated": {name: {"bounds": run.bounds, "makespan": run.makespan, "peak": run.peak} for name, run in {
             **each.torchs, "adaptive, same memory": each.same, "adaptive, least memory": each.least}.items() if run},
         **({"measured": {name: asdict(found) for name, found in measured[place].items()}} if measured else {})}
        for place, each in enumerate(compared)])


if __name__ == "__main__":
    main()
