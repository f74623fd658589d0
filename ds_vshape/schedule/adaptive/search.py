"""The search for good orders: known schedules, a population of blocks, then changes to the wishes of the best so far.

Improving a schedule directly, pass by pass, breaks its memory limit at every other step. Here the search moves wishes
instead, and the list scheduler turns any wishes into a schedule that is within the limit.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from itertools import product
from random import Random

from ds_vshape.schedule.adaptive.blocks import PATIENCES, Block
from ds_vshape.schedule.adaptive.extended import extended, fewer_micro_batches
from ds_vshape.schedule.adaptive.list_scheduler import KINDS, W0, ListScheduler, Policy, Run, Wishes
from ds_vshape.schedule.adaptive.problem import SLACK, Problem
from ds_vshape.schedule.adaptive.reduced import is_large, reduced
from ds_vshape.schedule.adaptive.seeds import known_schedules
from ds_vshape.schedule.adaptive.windows import Windows, solver
from ds_vshape.schedule.bounds import lower_bound_of_limits
from ds_vshape.schedule.passes import Kind
from ds_vshape.schedule.schedule import Schedule
from ds_vshape.schedule.timeline import Span, simulate

Progress = Callable[[float], None]

_POPULATION = 12
# What is left of the time when imitations end, and random blocks, and the population's descendants: then changes begin.
_IMITATIONS = 0.95
_RANDOM = 0.85
_CHANGES = 0.5
# Earlier where the solver can have the whole batch, and later where blocks come from a smaller problem.
_CHANGES_OF_FEW = 0.85
_CHANGES_OF_MANY = 0.15
# The shares of the time for a problem of fewer ranks, and for one of fewer micro-batches.
_REDUCED = 0.55
_FEWER = 0.6
# The solver, where there is one, gets half of the time for changes. Its windows are as wide as so many times the
# slowest rank's work on one micro-batch; the solution of one may take so many seconds.
_WIDTHS = (2, 3, 4, 6)
_WINDOW_SECONDS = 1.0
# With no more passes than that the solver gets them all once.
_FEW = 400


class Search:
    """Looks for a schedule of `problem` until `left`, the share of the time that is left, is 0, or `goal` is reached.

    The same calls with the same clock give the same schedule: all chance comes from one seed.
    """

    def __init__(self, problem: Problem, goal: float, left: Callable[[], float], seconds: float) -> None:
        self.problem = problem
        self.goal = goal
        self.left = left
        self.scheduler = ListScheduler(problem)
        self.random = Random(0)
        self.seconds = seconds
        cp_model = solver()
        self.windows = Windows(self.scheduler, cp_model) if cp_model is not None else None
        # The best run, and the best of whole Ws: fewer passes, so easier for the solver.
        self.best: Run | None = None
        self.whole: Run | None = None
        self.solved_all = False
        passes = 6 * problem.ranks * problem.micro_batches
        self.few = self.windows is not None and passes <= _FEW
        self.changes = _CHANGES_OF_FEW if self.few else _CHANGES_OF_MANY if is_large(problem) else _CHANGES
        # Whether blocks of a smaller problem stand in for random ones.
        self.adopted = False
        # The share of the time that went to the solver.
        self.solving = 0.0
        # Makespans and schedules of the table that are within the limits.
        self.known: list[tuple[float, Schedule]] = []
        # Makespans and blocks, best first, no makespan twice.
        self.population: list[tuple[float, Block]] = []

    @property
    def done(self) -> bool:
        """Whether to stop: out of time, or nothing can be better."""
        return self.left() <= 0 or (self.best is not None and self.best.makespan <= self.goal * (1 + SLACK))

    def step(self) -> None:
        """One more try."""
        left = self.left()
        if (left > _RANDOM and not self.adopted) or len(self.population) < 2:
            self._try_block(Block.random(self.problem.max_pieces, self.random))
        elif left > self.changes:
            self._try_block(self._descendant(late=left < (_RANDOM + _CHANGES) / 2))
        elif self.windows is not None and self.solving < (self.changes - left) / 2:
            self._solve(self.windows)
            self.solving += left - self.left()
        else:
            self._change()

    def try_known_blocks(self) -> None:
        """Start the population with what is known to be good; a large problem gets it from a smaller one."""
        for block in Block.known(self.problem.max_pieces):
            if self.left() > _RANDOM and not self.done and not is_large(self.problem):
                self._try_block(block)

    def imitate(self, schedule: Schedule) -> None:
        """Try the starts of `schedule` as wishes."""
        if any(work.kind is Kind.BW for _, work in schedule.passes()) == self.scheduler.fused:
            wishes = _wishes_of(schedule, simulate(schedule, self.problem.times).ranks)
            for eagerness, patience in product((0.0, 0.1, 0.5, float("inf")), (0.0, 1.0, PATIENCES[-1])):
                if self.left() > _IMITATIONS:
                    self._try_policy(Policy(wishes, patience, self.scheduler.least_reserves, 1,
                                            eagerness * self.scheduler.work))

    def start(self) -> None:
        """Make sure of a run, whatever the limits: every micro-batch as fast as it can go."""
        for patience in PATIENCES:
            self._try_block(Block((0.0,) * 4, (0.0,) * 3, 0.0, 1.0, 0.0, patience, 1))

    def run(self, progress: Progress) -> None:
        """Search to the end; first with fewer ranks or micro-batches, if there are many, and then go on from there."""
        self.known = [(simulate(schedule, self.problem.times).makespan, schedule)
                      for schedule in known_schedules(self.problem)]
        for _, schedule in sorted(self.known, key=lambda known: known[0]):
            self.imitate(schedule)
        self.try_known_blocks()
        fewer = fewer_micro_batches(self.problem)
        if self.done:
            return
        if is_large(self.problem):
            self._adopt(self._search_smaller(reduced(self.problem), _REDUCED, Search.evolve, progress))
        elif fewer is not None:
            smaller = self._search_smaller(fewer, _FEWER, Search.run, progress)
            self._adopt(smaller)
            for policy in extended(smaller.best, self.scheduler) if smaller.best is not None else ():
                if not self.done:
                    self._try_policy(policy)
        self._go_on(progress)

    def evolve(self, progress: Progress) -> None:
        """Search for blocks alone, which another number of ranks can use; first with fewer ranks, if there are many."""
        self.changes = 0.0
        self.try_known_blocks()
        if is_large(self.problem) and not self.done:
            self._adopt(self._search_smaller(reduced(self.problem), _REDUCED, Search.evolve, progress))
        self._go_on(progress)

    def _go_on(self, progress: Progress) -> None:
        while not self.done:
            progress(min(1.0, max(0.0, 1 - self.left())))
            self.step()

    def _search_smaller(self, problem: Problem, share: float, part: Callable[[Search, Progress], None],
                        progress: Progress) -> Search:
        """A search of `problem`, with `part` of it done in `share` of the time that is left."""
        began = max(self.left(), 1e-9)
        share *= began
        goal = lower_bound_of_limits(problem.placement, problem.micro_batches, problem.times, problem.activations,
                                     problem.limits)
        smaller = Search(problem, goal, lambda: 1 - (began - self.left()) / share, self.seconds * share)
        smaller.start()
        part(smaller, lambda done: progress(min(1.0, max(0.0, 1 - self.left()))))
        return smaller

    def _adopt(self, smaller: Search) -> None:
        """Try the blocks that `smaller` found."""
        self.adopted = True
        for _, block in smaller.population:
            if not self.done:
                self._try_block(block.for_ranks(self.problem.ranks))

    def _try_policy(self, policy: Policy, cutoff: float = float("inf")) -> Run | None:
        """Run `policy`, and take it for the best if it's no worse."""
        run = self.scheduler.run(policy, cutoff)
        if run is not None and policy.pieces == 1 and (self.whole is None or run.makespan < self.whole.makespan):
            self.whole = run
        if run is not None and (self.best is None or
                                (run.makespan, run.waiting) <= (self.best.makespan, self.best.waiting)):
            self.best = run
        return run

    def _try_block(self, block: Block) -> None:
        """Run `block`, and take it into the population if it's good enough."""
        population = self.population
        full = len(population) >= _POPULATION
        run = self._try_policy(block.policy(self.scheduler), population[-1][0] if full else float("inf"))
        if run is None:
            return
        same = next((index for index, (makespan, _) in enumerate(population) if makespan == run.makespan), None)
        if same is not None:
            population[same] = (run.makespan, block)
            return
        if full:
            population.pop()
        population.append((run.makespan, block))
        population.sort(key=lambda member: member[0])

    def _descendant(self, late: bool) -> Block:
        """A block like the best ones; ranks depart from the common pattern only when that is settled."""
        random = self.random
        block = random.choice(self.population)[1]
        if random.random() < 0.3:
            return block.mixed(random.choice(self.population)[1], random)
        if late and random.random() < 0.5:
            return block.shifted(self.problem.ranks, random)
        return block.mutated(random)

    def _change(self) -> None:
        """Try a change to the wishes of the best run, or to its starts taken for wishes."""
        best, random = self.best, self.random
        if best is None:
            return
        policy = best.policy
        if random.random() < 0.5:
            policy = replace(policy, wishes=best.starts, patience=random.choice((0.0, 0.0, 0.3, policy.patience)),
                             eagerness=self.scheduler.work * random.choice((0.02, 0.1, 0.3, 1.0, 3.0)))
        self._try_policy(replace(policy, wishes=self._moved(policy.wishes, policy.pieces)), best.makespan)

    def _solve(self, windows: Windows) -> None:
        """Try the best order within a window of the best run, or of the whole batch where it is small."""
        best, random, work = self.best, self.random, self.scheduler.work
        if best is None:
            return
        left = self.left() * self.seconds
        whole = self.whole
        if self.few and whole is not None and not self.solved_all:
            self.solved_all = True
            run = windows.improve(whole, 0.0, whole.makespan, left * 0.6, self.goal)
        else:
            first = random.uniform(-work, best.makespan)
            end = first + work * random.choice(_WIDTHS)
            run = windows.improve(best, first, end, min(_WINDOW_SECONDS, left), self.goal)
        if run is not None and run.makespan <= best.makespan:
            self.best = run

    def _moved(self, wishes: Wishes, pieces: int) -> Wishes:
        """`wishes` with those of a few micro-batches, on one rank or all, moved: together, or each by chance."""
        random, ranks, work = self.random, self.problem.ranks, self.scheduler.work
        first = random.randrange(self.problem.micro_batches)
        end = first + random.choice((1, 1, 2, 4, 8, self.problem.micro_batches))
        chosen = range(ranks) if random.random() < 0.5 else (random.randrange(ranks),)
        together = random.random() < 0.6
        streams = (random.randrange(len(KINDS)),) if together else range(len(KINDS))
        sigma = work * random.choice((0.1, 0.3, 0.5))
        shift = random.gauss(0, sigma)

        def moved(line: Sequence[float], size: int) -> list[float]:
            window = line[first * size:end * size]
            return [*line[:first * size],
                    *(start + (shift if together else random.gauss(0, sigma)) for start in window),
                    *line[end * size:]]

        return [[moved(line, pieces if stream >= W0 else 1) if rank in chosen and stream in streams else line
                 for stream, line in enumerate(row)] for rank, row in enumerate(wishes)]


def _wishes_of(schedule: Schedule, ranks: Sequence[Sequence[Span]]) -> Wishes:
    """The starts of a V schedule's passes as wishes."""
    wishes: list[list[list[float]]] = []
    for chunks, spans in zip(schedule.placement.chunks, ranks):
        row: list[list[float]] = [[] for _ in KINDS]
        for span in spans:
            first = {Kind.F: 0, Kind.B: 2, Kind.BW: 2, Kind.W: W0}[span.work.kind]
            row[first + chunks.index(span.work.stage)].append(span.start)
        wishes.append(row)
    return wishes
