"""Exact improvement of a part of a schedule, with OR-tools' CP-SAT (the extra `planner`); without it there is none.

A whole batch has too many passes for an exact solver, but those that start within a window of time are few. All passes
before the window stay where they are, which gives those in it their heads (when their input is there); all passes after
it keep their orders, which gives the passes in it their tails (how long the batch lasts after them). The solver then
finds the best order within the window: the makespan is the greatest end plus tail. A window over the whole batch solves
a small problem to the end.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from types import ModuleType
from typing import Any

from ds_vshape.schedule.adaptive.list_scheduler import B0, F0, W0, ListScheduler, Run

# The solver counts in whole numbers: so many for the work of the slowest rank on one micro-batch, and for a limit.
_TICKS = 100_000
_ROOM = 1_000_000

Node = tuple[int, int, int]  # rank, stream, number within the stream


def solver() -> ModuleType | None:
    """CP-SAT's model, or None where OR-tools isn't installed."""
    try:
        from ortools.sat.python import cp_model
    except ImportError:
        return None
    module: ModuleType = cp_model
    return module


@dataclass(frozen=True)
class Windows:
    """Improves runs of `scheduler` with `cp_model`, OR-tools' module."""

    scheduler: ListScheduler
    cp_model: ModuleType

    def improve(self, run: Run, first: float, end: float, seconds: float, goal: float) -> Run | None:
        """`run` with its passes that start from `first` until before `end` in the best order found in `seconds`.

        A makespan of `goal` is known to be the least. None if nothing was found; the run may be no better than before.
        """
        graph = _Graph(self.scheduler, run)
        window = {node for node, start in graph.starts.items() if first <= start < end}
        if not window:
            return None
        scale = self._scale(graph.pieces)
        model, variables = self._model(graph, window, run, goal, scale)
        solver = self.cp_model.CpSolver()
        solver.parameters.max_time_in_seconds = seconds
        solver.parameters.num_workers = 2
        solver.parameters.random_seed = 0
        if solver.solve(model) not in (self.cp_model.OPTIMAL, self.cp_model.FEASIBLE):
            return None
        moved = {node: solver.value(variable) / scale for node, variable in variables.items()}
        orders = []
        for nodes in graph.orders:
            inside = iter(sorted((node for node in nodes if node in moved),
                                 key=lambda node: (moved[node], graph.place[node])))
            orders.append([(next(inside) if node in moved else node)[1] for node in nodes])
        return self.scheduler.squeeze(orders, run.policy)

    def _scale(self, pieces: int) -> float:
        """Ticks in a unit of time: few, if with few all times are whole numbers of them."""
        durations = self.scheduler.durations(pieces)
        times = {self.scheduler.problem.times.hop, *(time for row in durations for time in row)}
        for ticks in (1, 2, 4, 5, 8, 10, 20, 40, 100):
            if self.scheduler.work >= 6 and all((time * ticks).is_integer() for time in map(float, times)):
                return ticks
        return _TICKS / self.scheduler.work

    def _model(self, graph: _Graph, window: set[Node], run: Run, goal: float,
               scale: float) -> tuple[Any, dict[Node, Any]]:
        """The window as a constraint model, and the variable of each pass's start."""
        model = self.cp_model.CpModel()
        horizon = round(run.makespan * scale)
        makespan = model.new_int_var(min(horizon, round(goal * scale)), horizon, "makespan")
        variables: dict[Node, Any] = {}
        intervals: list[list[Any]] = [[] for _ in graph.orders]
        # Whichever passes of a rank come first and last in the window: after what is before it, before what is after.
        free, rest = graph.around(window)
        for node in window:
            duration = round(graph.duration(node) * scale)
            head = max((graph.end(before) + delay for before, delay in graph.before(node) if before not in window),
                       default=0.0)
            head = max(head, free[node[0]])
            start = variables[node] = model.new_int_var(min(round(head * scale), horizon), horizon, "")
            intervals[node[0]].append(model.new_fixed_size_interval_var(start, duration, ""))
            tail = max((delay + graph.tail(after) for after, delay in graph.after(node) if after not in window),
                       default=0.0)
            tail = max(tail, rest[node[0]])
            model.add(start + duration + round(tail * scale) <= makespan)
            model.add_hint(start, round(graph.starts[node] * scale))
        for node, start in variables.items():
            duration = round(graph.duration(node) * scale)
            for after, delay in graph.needs(node):
                if after in variables:
                    model.add(variables[after] >= start + duration + round(delay * scale))
        for rank, of_rank in enumerate(intervals):
            model.add_no_overlap(of_rank)
            self._limit_memory(model, rank, graph, variables, horizon, scale)
        model.add_hint(makespan, horizon)
        model.minimize(makespan)
        return model, variables

    def _limit_memory(self, model: Any, rank: int, graph: _Graph, variables: dict[Node, Any], horizon: int,
                      scale: float) -> None:
        """Keep what is alive on `rank` within its limit, from each F to its B, and what that leaves to its W."""
        scheduler, pieces = self.scheduler, graph.pieces
        if not any(node[0] == rank for node in variables):
            return
        begin = min(start for node, start in graph.starts.items() if node in variables and node[0] == rank)
        room = scheduler.limits[rank]
        lives: list[Any] = []
        sizes: list[int] = []

        def edge(node: Node, at_end: bool) -> Any:
            if node in variables:
                return variables[node] + (round(graph.duration(node) * scale) if at_end else 0)
            return 0 if graph.starts[node] < begin else horizon

        for chunk in (0, 1):
            for number in range(scheduler.problem.micro_batches):
                forward, backward = (rank, F0 + chunk, number), (rank, B0 + chunk, number)
                stays = [(edge(forward, False), edge(backward, True), scheduler.taken[rank][chunk])]
                if not scheduler.fused:
                    last = (rank, W0 + chunk, number * pieces + pieces - 1)
                    stays.append((edge(backward, True), edge(last, True), scheduler.kept[rank][chunk]))
                for start, end, size in stays:
                    share = int(size / room * _ROOM)
                    if share and not (isinstance(start, int) and isinstance(end, int) and start >= end):
                        lives.append(model.new_interval_var(start, model.new_int_var(0, horizon, ""), end, ""))
                        sizes.append(share)
        model.add_cumulative(lives, sizes, _ROOM)


class _Graph:
    """The passes of a run, and which of them follow which."""

    def __init__(self, scheduler: ListScheduler, run: Run) -> None:
        self.scheduler = scheduler
        self.pieces = run.policy.pieces
        self.orders: list[list[Node]] = []
        self.place: dict[Node, int] = {}
        self.starts: dict[Node, float] = {}
        for rank, order in enumerate(run.orders):
            counts = [0] * 6
            nodes: list[Node] = []
            for stream in order:
                node = (rank, stream, counts[stream])
                self.place[node] = len(nodes)
                self.starts[node] = run.starts[rank][stream][counts[stream]]
                nodes.append(node)
                counts[stream] += 1
            self.orders.append(nodes)
        self._durations = scheduler.durations(self.pieces)
        self._before: dict[Node, list[tuple[Node, float]]] = {node: [] for node in self.starts}
        for node in self.starts:
            for after, delay in self.after(node):
                self._before[after].append((node, delay))
        self._tails: dict[Node, float] = {}
        for node in sorted(self.starts, key=lambda node: (self.starts[node], self.place[node]), reverse=True):
            self._tails[node] = self.duration(node) + max(
                (delay + self._tails.get(after, 0.0) for after, delay in self.after(node)), default=0.0)

    def around(self, window: set[Node]) -> tuple[list[float], list[float]]:
        """For each rank, the end of its last pass before the window, and the tail of its first pass after it."""
        free, rest = [0.0] * len(self.orders), [0.0] * len(self.orders)
        for rank, order in enumerate(self.orders):
            inside = [place for place, node in enumerate(order) if node in window]
            if inside and inside[0] > 0:
                free[rank] = self.end(order[inside[0] - 1])
            if inside and inside[-1] + 1 < len(order):
                rest[rank] = self.tail(order[inside[-1] + 1])
        return free, rest

    def duration(self, node: Node) -> float:
        """How long it takes."""
        return self._durations[node[0]][node[1]]

    def end(self, node: Node) -> float:
        """When it ends."""
        return self.starts[node] + self.duration(node)

    def tail(self, node: Node) -> float:
        """From its start to the end of the batch, at least."""
        return self._tails[node]

    def needs(self, node: Node) -> Iterator[tuple[Node, float]]:
        """The passes that wait for `node` in any order, and how long its output takes to them."""
        rank, stream, number = node
        following = (rank, stream, number + 1)
        if following in self.starts:
            yield following, 0.0
        if stream < W0:
            target, fed, delay = self.scheduler.ways[rank][stream]
            if fed >= 0:
                yield (target, fed, number), delay
            if stream >= B0 and not self.scheduler.fused:
                yield (rank, stream + W0 - B0, number * self.pieces), 0.0

    def after(self, node: Node) -> Iterator[tuple[Node, float]]:
        """`needs`, and what comes next on the rank."""
        yield from self.needs(node)
        order, place = self.orders[node[0]], self.place[node]
        if place + 1 < len(order):
            yield order[place + 1], 0.0

    def before(self, node: Node) -> list[tuple[Node, float]]:
        """The passes that `node` comes after."""
        return self._before[node]
