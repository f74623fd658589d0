"""The search for good orders, phase by phase: known schedules, blocks, cycles, a race, and rounds of annealing.

    known schedules   imitation.py       those of the table that fit, and runs with their starts as target starts
    regular blocks    regular.py         blocks without a bubble, where memory has room for them
    blocks            population.py      a population of blocks, put in order by the list scheduler
    cycles            steady_states.py   what a few micro-batches repeat fastest
    a race, rounds    rounds.py          all these orders, annealed

Blocks and cycles determine the repeating pattern; the list scheduler adds warm-up and cool-down; annealing improves all
three. What is found is kept in `Trials`. Problems with many ranks or micro-batches are searched with fewer first.
"""

from __future__ import annotations

from collections.abc import Callable

from ds_vshape.schedule.adaptive.cycles import Cycle
from ds_vshape.schedule.adaptive.extended import fewer_micro_batches
from ds_vshape.schedule.adaptive.imitation import extend, imitate, lengthen
from ds_vshape.schedule.adaptive.lanes import Lanes
from ds_vshape.schedule.adaptive.list_scheduler import PolicyRun
from ds_vshape.schedule.adaptive.population import Population
from ds_vshape.schedule.adaptive.problem import Problem
from ds_vshape.schedule.adaptive.reduced import is_large, reduced
from ds_vshape.schedule.adaptive.regular import regular_orders
from ds_vshape.schedule.adaptive.rounds import AnnealingRounds
from ds_vshape.schedule.adaptive.seeds import known_schedules
from ds_vshape.schedule.adaptive.steady_states import find_cycles, try_cycles
from ds_vshape.schedule.adaptive.trials import Progress, Trials
from ds_vshape.schedule.passes import Kind
from ds_vshape.schedule.schedule import Schedule
from ds_vshape.schedule.timeline import simulate

# How many regular blocks are tried.
_REGULAR = 8
# What is left of the time when imitations end, and random blocks, and the population's descendants: then annealing
# starts.
_IMITATIONS = 0.95
_RANDOM = 0.92
_ANNEALING = 0.75
# The shares of the time for a problem of fewer ranks, and for one of fewer micro-batches.
_REDUCED = 0.4
_FEWER = 0.5


class Search:
    """Looks for a schedule of `problem` until `left`, the share of the time that is left, is 0, or `goal` is reached.

    The same calls with the same clock give the same schedule: all chance comes from one seed.
    """

    def __init__(self, problem: Problem, goal: float, left: Callable[[], float], lanes: Lanes) -> None:
        self.trials = Trials(problem, goal, left, lanes)
        self._population = Population(self.trials)
        self._rounds = AnnealingRounds(self.trials)
        # Makespans and schedules of the table that are within the limits, if they aren't just like a run.
        self.known: list[tuple[float, Schedule]] = []
        # Whether blocks of a smaller problem stand in for random ones.
        self._adopted = False
        # What repeats without a ramp, and runs of it; None before it was looked for.
        self._cycles: list[Cycle] | None = None
        self._repeated: list[PolicyRun] = []
        # The better half of each heat of the race, the best of the last one at the end.
        self._survivors: list[PolicyRun] = []

    @property
    def best(self) -> PolicyRun | None:
        """The best run of all."""
        return self.trials.best

    def fastest(self) -> tuple[float, Schedule]:
        """The best run or known schedule, with its makespan."""
        found = list(self.known)
        if self.best is not None:
            found.append((self.best.makespan, self.trials.scheduler.schedule(self.best)))
        return min(found, key=lambda each: each[0])

    @property
    def done(self) -> bool:
        """Whether to stop: out of time, or nothing can be better."""
        return self.trials.done

    def start(self) -> None:
        """Find a first run under any limits."""
        self._population.add_fastest()

    def step(self) -> None:
        """Try one more block, or anneal one more run on each lane."""
        left = self.trials.left()
        if (left > _RANDOM and not self._adopted) or not self._population:
            self._population.add_random()
        elif left > _ANNEALING:
            self._population.add_descendant(late=left < (_RANDOM + _ANNEALING) / 2)
        else:
            self._rounds.anneal_some()

    def run(self, progress: Progress) -> None:
        """Search to the end; first with fewer ranks or micro-batches, if there are many, and then go on from there."""
        problem = self.trials.problem
        for schedule in known_schedules(problem):
            self._try_known(schedule)
        self._try_regular_blocks()
        self._population.add_known(until=_ANNEALING)
        if self.done:
            return
        fewer = fewer_micro_batches(problem)
        if fewer is not None:
            self._run_after(self._search_smaller(fewer, _FEWER, Search.run, progress))
        elif is_large(problem):
            self._adopt(self._search_smaller(reduced(problem), _REDUCED, Search.evolve, progress))
        else:
            self._go_on(progress, _ANNEALING)
            self._try_cycles()
            self._race(progress)
        self._go_on(progress)

    def evolve(self, progress: Progress) -> None:
        """Search for blocks alone, which another number of ranks can use; first with fewer ranks, if there are many."""
        trials = self.trials
        self._population.add_known(until=_ANNEALING)
        if is_large(trials.problem) and not self.done:
            self._adopt(self._search_smaller(reduced(trials.problem), _REDUCED, Search.evolve, progress))
        while not self.done:
            trials.report(progress)
            late = trials.left() < _RANDOM / 2
            if self._adopted or trials.left() < _RANDOM:
                self._population.add_descendant(late)
            else:
                self._population.add_random()

    # -- phases

    def _try_known(self, schedule: Schedule) -> None:
        """Keep `schedule`, and try its starts as target starts."""
        orders = self.trials.scheduler.orders_of(schedule)
        run = self.trials.run_of(orders) if orders is not None else None
        if run is None or any(action.kind is Kind.BW for _, action in schedule.passes()):
            self.known.append((simulate(schedule, self.trials.problem.times).makespan, schedule))
        if run is None:
            return
        self.trials.keep(run)
        imitate(self.trials, run, _IMITATIONS)

    def _try_regular_blocks(self) -> None:
        """Try blocks without a bubble, if the memory limits allow one."""
        for orders in regular_orders(self.trials.scheduler, _REGULAR):
            run = self.trials.run_of(orders)
            if run is not None:
                self.trials.keep(run)
                # Nothing repeats faster.
                self._cycles = []

    def _try_cycles(self) -> None:
        """Try the cycles with the shortest periods; finds them if needed."""
        if self._cycles is None:
            self._cycles = find_cycles(self.trials, self._population)
        self._repeated += try_cycles(self.trials, self._cycles)

    def _race(self, progress: Progress) -> None:
        """Let one run of each good block, of each cycle and the incumbents race."""
        runs = [*self._population.runs(), *self._repeated, *self.trials.incumbents.values()]
        self._survivors += self._rounds.race(runs, progress)

    def _go_on(self, progress: Progress, until: float = 0.0) -> None:
        while not self.done and self.trials.left() > until:
            self.trials.report(progress)
            self.step()

    # -- smaller problems

    def _search_smaller(self, problem: Problem, share: float, part: Callable[[Search, Progress], None],
                        progress: Progress) -> Search:
        """A search of `problem`, with `part` of it done in `share` of the time that is left."""
        left = self.trials.left
        began = max(left(), 1e-9)
        share *= began
        smaller = Search(problem, problem.lower_bound, lambda: 1 - (began - left()) / share,
                         self.trials.lanes)
        smaller.start()
        part(smaller, lambda done: self.trials.report(progress))
        return smaller

    def _run_after(self, fewer: Search) -> None:
        """Take over what a search of fewer micro-batches has found."""
        self._cycles = fewer._cycles or []
        self._try_cycles()
        self._adopt(fewer)
        incumbents = fewer.trials.incumbents.values()
        lengthen(self.trials, [*incumbents, *reversed(fewer._survivors)])
        for run in incumbents:
            extend(self.trials, run)

    def _adopt(self, smaller: Search) -> None:
        """Try the blocks that `smaller` found."""
        self._adopted = True
        self._population.add_those_of(smaller._population)
