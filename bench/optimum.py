"""What no schedule can be better than, by constraint programming (CP-SAT), for cells where the lower bound is far off.

    python bench/optimum.py batch --ranks 4 --micro-batches 8 --peak 4 --times 10,9,7,3
    python bench/optimum.py block --ranks 16 --peak 12 --times 10,9,7,3 --intervals 75 76
    python bench/optimum.py block --ranks 4 --peak 4 --times 10,9,7,3 --group 2 --intervals 128 130

`batch`: the least makespan of a whole batch; the planner's is where the solver begins. `block`: whether a block of
`--group` micro-batches can be repeated every so many units of time, warm-up and cool-down left out; before that, what a
micro-batch takes in the planner's (`ds_vshape/schedule/adaptive/cycles.py`). Times are whole numbers: F, B and W of one
of 2p equal stages and a hop; W runs whole; the peak counts activations of one chunk. Needs OR-Tools (the extra
"proofs"). Small cells take seconds to minutes, large ones may end as "unknown".
"""

from __future__ import annotations

import argparse
import math
import sys
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from itertools import pairwise
from random import Random
from typing import Any

import record

from ds_vshape.schedule.activations import Activations
from ds_vshape.schedule.adaptive import Problem, plan
from ds_vshape.schedule.adaptive.cycles import best_cycles, periods
from ds_vshape.schedule.adaptive.lanes import Lanes
from ds_vshape.schedule.adaptive.list_scheduler import ListScheduler
from ds_vshape.schedule.adaptive.problem import SLACK
from ds_vshape.schedule.adaptive.seeds import known_schedules
from ds_vshape.schedule.passes import Kind, Pass
from ds_vshape.schedule.placement import Placement, v
from ds_vshape.schedule.timeline import Times

try:
    from ortools.sat.python import cp_model
except ImportError:
    sys.exit('bench/optimum.py needs OR-Tools: pip install "ds-vshape[proofs]"')

KINDS = (Kind.F, Kind.B, Kind.W)
# A pass of a repeated block begins so many intervals after the block at most.
HORIZON = 20


@dataclass(frozen=True)
class Cell:
    """Equal stages: times of F, B, W and a hop, and the peak of each rank in activations of one chunk."""

    ranks: int
    peak: int
    times: tuple[int, int, int, int]

    @property
    def of_stages(self) -> Times:
        """The times of all stages."""
        return Times.uniform(2 * self.ranks, *self.times)

    def problem(self, micro_batches: int) -> Problem:
        """As the planner is asked, with W whole."""
        return Problem(v(self.ranks), micro_batches, self.of_stages, Activations.counted(v(self.ranks)),
                       (float(self.peak),) * self.ranks, max_pieces=1)

    def duration(self, action: Pass) -> int:
        """How long a pass takes."""
        return self.times[KINDS.index(action.kind)]


def passes_of(stages: Iterable[int], micro_batches: int) -> list[Pass]:
    """All passes of a rank with these stages."""
    return [Pass(kind, stage, i) for stage in stages for i in range(micro_batches) for kind in KINDS]


def precedences(placement: Placement, times: Times, micro_batch: int) -> Iterator[tuple[Pass, Pass, int]]:
    """Which pass has to wait for which, and for how long after that one's end."""
    stages = range(placement.stages)
    for (a, b), delay in zip(pairwise(stages), map(round, times.delays(placement))):
        yield Pass(Kind.F, a, micro_batch), Pass(Kind.F, b, micro_batch), delay
        yield Pass(Kind.B, b, micro_batch), Pass(Kind.B, a, micro_batch), delay
    yield Pass(Kind.F, stages[-1], micro_batch), Pass(Kind.B, stages[-1], micro_batch), 0
    for stage in stages:
        yield Pass(Kind.B, stage, micro_batch), Pass(Kind.W, stage, micro_batch), 0


def solve(model: Any, seconds: float) -> tuple[str, Any]:
    """The solver's verdict in lower case, and the solver."""
    solver = cp_model.CpSolver()
    solver.parameters.max_time_in_seconds = seconds
    return solver.StatusName(solver.Solve(model)).lower(), solver


def least_makespan(problem: Problem, seconds: float, planning_seconds: float = 8.0,
                   below: float = math.inf) -> tuple[float, float, float]:
    """The planner's makespan, the solver's, and what it proved that none can be below; W runs whole.

    Times and sizes must be whole numbers. The solver looks for makespans below `below` alone: where it proves that
    there is none, the last two are infinite.
    """
    known = plan(replace(problem, max_pieces=1), planning_seconds, clock=time.process_time)
    planned = known.timeline.makespan
    times, activations = problem.times, problem.activations
    latest = round(min(planned, below - 1))
    model = cp_model.CpModel()
    every = [passes_of(chunks, problem.micro_batches) for chunks in problem.placement.chunks]
    starts = {action: model.NewIntVar(0, latest, repr(action)) for passes in every for action in passes}
    ends = {action: start + round(times.of(action)) for action, start in starts.items()}
    makespan = model.NewIntVar(0, latest, "makespan")
    model.Add(makespan >= round(known.lower_bound))
    for micro_batch in range(problem.micro_batches):
        for before, after, delay in precedences(problem.placement, times, micro_batch):
            model.Add(starts[after] >= ends[before] + delay)
    for passes, limit in zip(every, problem.limits):
        lives, sizes = [], []
        for action in passes:
            model.Add(makespan >= ends[action])
            if action.micro_batch:
                # Micro-batches are alike: in their order, without loss.
                model.Add(starts[action] >= ends[Pass(action.kind, action.stage, action.micro_batch - 1)])
            if action.kind is Kind.W:
                first, second = (Pass(kind, action.stage, action.micro_batch) for kind in (Kind.F, Kind.B))
                for start, end, of_stages in ((starts[first], ends[second], activations.after_forward),
                                              (ends[second], ends[action], activations.after_backward)):
                    length = model.NewIntVar(0, latest, "")
                    lives.append(model.NewIntervalVar(start, length, end, ""))
                    sizes.append(round(of_stages[action.stage]))
        model.AddNoOverlap([model.NewFixedSizeIntervalVar(starts[action], round(times.of(action)), "")
                            for action in passes])
        model.AddCumulative(lives, sizes, math.floor(limit + SLACK))
    for span in (span for rank in known.timeline.ranks for span in rank):
        action, start = span.action, round(span.start)
        if action.kind is Kind.BW:
            both = [Pass(kind, action.stage, action.micro_batch) for kind in (Kind.B, Kind.W)]
            model.AddHint(starts[both[0]], start)
            model.AddHint(starts[both[1]], start + round(times.of(both[0])))
        else:
            model.AddHint(starts[action], start)
    model.Minimize(makespan)
    verdict, solver = solve(model, seconds)
    if verdict == "infeasible":
        return planned, math.inf, math.inf
    found = solver.ObjectiveValue() if verdict in ("optimal", "feasible") else planned
    return planned, found, solver.BestObjectiveBound()


def repeats(cell: Cell, group: int, interval: int, seconds: float) -> str:
    """Whether a block of `group` micro-batches can begin every `interval`: feasible, infeasible or unknown.

    A pass starts `quotient` intervals and `phase` after the block. A rank's passes must not meet in their phases, and
    how many activations are alive when a forward starts is a matter of quotients, and of which phase comes first.
    """
    model = cp_model.CpModel()
    phase, quotient, start = {}, {}, {}

    def new(key: Any) -> None:
        phase[key], quotient[key] = model.NewIntVar(0, interval - 1, ""), model.NewIntVar(0, HORIZON, "")
        start[key] = phase[key] + interval * quotient[key]

    for rank in range(cell.ranks):
        passes = passes_of(v(cell.ranks).chunks[rank], group)
        for action in passes:
            new(action)
        model.AddNoOverlap([model.NewFixedSizeIntervalVar(phase[action] + later, cell.duration(action), "")
                            for action in passes for later in (0, interval)])
        forwards = [action for action in passes if action.kind is Kind.F]
        for action in forwards:
            new((action, "end"))
            last = Pass(Kind.W, action.stage, action.micro_batch)
            model.Add(start[action, "end"] == start[last] + cell.duration(last))
            # In micro-batch order, the next group's first after this one's last.
            following = Pass(Kind.F, action.stage, (action.micro_batch + 1) % group)
            if group > 1:
                model.Add(start[action] < start[following] + (interval if following.micro_batch == 0 else 0))
        for now in forwards:
            alive = []
            for action in forwards:
                begun, ended = model.NewBoolVar(""), model.NewBoolVar("")
                for key, passed in ((action, begun), ((action, "end"), ended)):
                    model.Add(phase[key] <= phase[now]).OnlyEnforceIf(passed)
                    model.Add(phase[key] > phase[now]).OnlyEnforceIf(passed.Not())
                alive.append(quotient[action, "end"] - quotient[action] + begun - ended)
            model.Add(sum(alive) <= cell.peak)
    for micro_batch in range(group):
        for before, after, delay in precedences(v(cell.ranks), cell.of_stages, micro_batch):
            model.Add(start[after] >= start[before] + cell.duration(before) + delay)
    model.Add(start[Pass(Kind.F, 0, 0)] == 0)
    return solve(model, seconds)[0].replace("optimal", "feasible")


def annealed(cell: Cell, group: int, seconds: float) -> float | None:
    """The interval of `group` micro-batches that the planner makes of the paper's blocks; None if none fits."""
    scheduler = ListScheduler(cell.problem(6 * cell.ranks))
    starts = [start for orders in map(scheduler.orders_of, known_schedules(scheduler.problem)) if orders is not None
              for start in periods(orders, [(group, 1)], 1)]
    began = time.process_time()
    found = best_cycles(scheduler, starts, lambda: 1 - (time.process_time() - began) / seconds, Random(0),
                        Lanes(1), 1)
    return found[0].interval if found else None


def main() -> None:
    """Ask, and print the answers."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("question", choices=("batch", "block"))
    parser.add_argument("--ranks", type=int, required=True)
    parser.add_argument("--peak", type=int, required=True)
    parser.add_argument("--times", required=True, metavar="F,B,W,HOP")
    parser.add_argument("--micro-batches", type=int, default=8, help="of a batch")
    parser.add_argument("--group", type=int, default=1, help="micro-batches of a block")
    parser.add_argument("--intervals", type=int, nargs="*", default=[], help="of a block")
    parser.add_argument("--seconds", type=float, default=120, help="that the solver may take for each answer")
    record.add_json_option(parser)
    arguments = parser.parse_args()
    forward, input_grad, weight_grad, hop = map(int, arguments.times.split(","))
    cell = Cell(arguments.ranks, arguments.peak, (forward, input_grad, weight_grad, hop))
    if arguments.question == "batch":
        planned, found, proved = least_makespan(cell.problem(arguments.micro_batches), arguments.seconds)
        print(f"planned {planned:g}, best found {found:g}, none below {proved:g}")
        record.write(arguments.json, {"planned": planned, "found": found, "none_below": proved})
        return
    known = annealed(cell, arguments.group, 10)
    print("the planner's: " + ("none" if known is None else f"{known / arguments.group:g}"), flush=True)
    verdicts = {}
    for interval in arguments.intervals:
        began = time.perf_counter()
        verdict = verdicts[interval] = repeats(cell, arguments.group, interval, arguments.seconds)
        print(f"interval {interval / arguments.group:g}: {verdict} ({time.perf_counter() - began:.1f} s)", flush=True)
    record.write(arguments.json, {"planned_interval": known, "intervals": verdicts})


if __name__ == "__main__":
    main()
