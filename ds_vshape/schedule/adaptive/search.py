"""The search for good orders: known schedules, a population of blocks, cycles, then annealing of the best of them.

Blocks and cycles determine the repeating pattern; the list scheduler adds warm-up and cool-down. Annealing then moves
single passes, or those of many micro-batches or ranks together, which improves all three. It rarely gets from one
pattern to another, and the best one isn't known in advance. So many patterns are annealed in a race first, and the
slower ones drop out.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from itertools import product
from math import ceil, log2
from random import Random

import numpy as np
from numpy.typing import NDArray

from ds_vshape.schedule.adaptive.annealing import anneal
from ds_vshape.schedule.adaptive.blocks import PATIENCES, Block
from ds_vshape.schedule.adaptive.cool_down import reschedule_cooldown
from ds_vshape.schedule.adaptive.cycles import Cycle, best_cycles, periods
from ds_vshape.schedule.adaptive.extended import extended, fewer_micro_batches, lengthened
from ds_vshape.schedule.adaptive.list_scheduler import KINDS, W0, ListScheduler, Policy, PolicyRun, TargetStarts
from ds_vshape.schedule.adaptive.machine_code import COMPILED
from ds_vshape.schedule.adaptive.problem import SLACK, Problem
from ds_vshape.schedule.adaptive.reduced import is_large, reduced
from ds_vshape.schedule.adaptive.regular import regular_orders
from ds_vshape.schedule.adaptive.seeds import known_schedules
from ds_vshape.schedule.bounds import lower_bound_of_limits
from ds_vshape.schedule.passes import Kind
from ds_vshape.schedule.schedule import Schedule
from ds_vshape.schedule.timeline import simulate

Progress = Callable[[float], None]

# As many blocks are kept for each number of pieces of W.
_POPULATION = 10
# How many regular blocks and cycles are tried.
_REGULAR = 8
# The share of the time that is left for finding cycles, and how many micro-batches a batch has then for each rank: with
# fewer there is hardly a middle to repeat.
_CYCLES = 0.35
_PER_RANK = 2
# Micro-batches for each rank after whose half a list of passes has long come to repeat itself.
_SETTLED = 6
# Sizes of cycles (micro-batches, pieces of W) that known schedules are made into, and those that blocks may have.
_SIZES = ((1, 1), (2, 1), (3, 1), (4, 1), (1, 2), (3, 2))
_BLOCKS = 4
_BLOCK_SIZES = tuple((group, 1) for group in range(1, 9))
# What is left of the time when imitations end, and random blocks, and the population's descendants: then annealing
# begins.
_IMITATIONS = 0.95
_RANDOM = 0.92
_ANNEALING = 0.75
# The shares of the time for a problem of fewer ranks, and for one of fewer micro-batches.
_REDUCED = 0.4
_FEWER = 0.5
# Temperatures in units of the slowest rank's work on one micro-batch, at the start of a round and at its end. A round
# takes so much of the time.
_HOT = (0.02, 0.06, 0.2)
_COLD = 0.005
_ROUND = 0.15
# How many runs race, for which share of the time that is left after the blocks, and from which temperature.
_RACERS = 24
_RACE = 0.6
_RACE_HOT = 0.05
# Trying what runs of fewer micro-batches repeat takes no more than that share of the time.
_LENGTHENING = 0.06
# Runs that are longer than the best by more than that are not annealed.
_CHANCE = 1.03
# How often a run's Ws are cut once more before a round.
_FINER = 0.25
# Passes that annealing looks at between two looks at the clock: some hundredths of a second.
_PASSES_A_STEP = 3_000_000 if COMPILED else 30_000


class Search:
    """Looks for a schedule of `problem` until `left`, the share of the time that is left, is 0, or `goal` is reached.

    The same calls with the same clock give the same schedule: all chance comes from one seed.
    """

    def __init__(self, problem: Problem, goal: float, left: Callable[[], float]) -> None:
        self.problem = problem
        self.goal = goal
        self.left = left
        self.scheduler = ListScheduler(problem)
        self.random = Random(0)
        # The best run, by the number of pieces of W: those of fewer have less to gain, but are easier to improve.
        self.bests: dict[int, PolicyRun] = {}
        # How well annealing did lately, for each temperature to start from.
        self.successes = [1.0] * len(_HOT)
        # Whether blocks of a smaller problem stand in for random ones.
        self.adopted = False
        # Makespans and schedules of the table that are within the limits, if they aren't just like a run.
        self.known: list[tuple[float, Schedule]] = []
        # What repeats without a ramp, and runs of it; None before it was looked for.
        self.cycles: list[Cycle] | None = None
        self.repeated: list[PolicyRun] = []
        # The better half of each heat of the race, the best of the last one at the end.
        self.survivors: list[PolicyRun] = []
        # Makespans and blocks, by the number of pieces, best first, no makespan twice.
        self.populations: dict[int, list[tuple[float, Block]]] = {}

    @property
    def best(self) -> PolicyRun | None:
        """The best run of all."""
        return min(self.bests.values(), key=lambda run: run.makespan, default=None)

    @property
    def done(self) -> bool:
        """Whether to stop: out of time, or nothing can be better."""
        return self.left() <= 0 or any(run.makespan <= self.goal * (1 + SLACK) for run in self.bests.values())

    def step(self) -> None:
        """Try one more block, or anneal one more run."""
        left = self.left()
        if (left > _RANDOM and not self.adopted) or not self.populations:
            self._try_block(Block.random(self.problem.max_pieces, self.random))
        elif left > _ANNEALING:
            self._try_block(self._descendant(late=left < (_RANDOM + _ANNEALING) / 2))
        else:
            self._anneal()

    def try_known_blocks(self) -> None:
        """Start the population with what is known to be good."""
        for block in Block.known(self.problem.max_pieces):
            if self.left() > _ANNEALING and not self.done:
                self._try_block(block)

    def imitate(self, schedule: Schedule) -> None:
        """Keep `schedule`, and try its starts as target starts."""
        orders = self.scheduler.orders_of(schedule)
        run = self._run_of(orders) if orders is not None else None
        if run is None or any(work.kind is Kind.BW for _, work in schedule.passes()):
            self.known.append((simulate(schedule, self.problem.times).makespan, schedule))
        if run is None:
            return
        self._keep(run)
        self._imitate(run, _IMITATIONS)

    def try_regular_blocks(self) -> None:
        """Try blocks without a bubble, if the memory limits allow one."""
        for orders in regular_orders(self.scheduler, _REGULAR):
            run = self._run_of(orders)
            if run is not None:
                self._keep(run)
                # Nothing repeats faster.
                self.cycles = []

    def try_cycles(self) -> None:
        """Try the cycles with the shortest periods, and imitations with other ramps; finds the cycles if needed."""
        if self.cycles is None:
            self.cycles = self._find_cycles()
        for cycle in self.cycles:
            run = None if self.done else self._run_of(cycle.of_batch(self.problem.micro_batches), cycle.pieces)
            if run is not None:
                self._keep(run)
                self.repeated.append(min(self._imitate(run, 0.0), key=lambda run: run.makespan))

    def start(self) -> None:
        """Find a first run under any limits: every micro-batch runs as fast as it can."""
        for patience in PATIENCES:
            self._try_block(Block((0.0,) * 4, (0.0,) * 3, 0.0, 1.0, 0.0, patience, 1))

    def run(self, progress: Progress) -> None:
        """Search to the end; first with fewer ranks or micro-batches, if there are many, and then go on from there."""
        for schedule in known_schedules(self.problem):
            self.imitate(schedule)
        self.try_regular_blocks()
        self.try_known_blocks()
        if self.done:
            return
        fewer = fewer_micro_batches(self.problem)
        if fewer is not None:
            smaller = self._search_smaller(fewer, _FEWER, Search.run, progress)
            self.cycles = smaller.cycles or []
            self.try_cycles()
            self._adopt(smaller)
            self._lengthen([*smaller.bests.values(), *reversed(smaller.survivors)])
            for run in smaller.bests.values():
                self._extend(run)
        elif is_large(self.problem):
            self._adopt(self._search_smaller(reduced(self.problem), _REDUCED, Search.evolve, progress))
        else:
            self._go_on(progress, _ANNEALING)
            self.try_cycles()
            self._race(progress)
        self._go_on(progress)

    def evolve(self, progress: Progress) -> None:
        """Search for blocks alone, which another number of ranks can use; first with fewer ranks, if there are many."""
        self.try_known_blocks()
        if is_large(self.problem) and not self.done:
            self._adopt(self._search_smaller(reduced(self.problem), _REDUCED, Search.evolve, progress))
        while not self.done:
            progress(min(1.0, max(0.0, 1 - self.left())))
            late = self.left() < _RANDOM / 2
            self._try_block(self._descendant(late) if self.adopted or self.left() < _RANDOM else
                            Block.random(self.problem.max_pieces, self.random))

    def _go_on(self, progress: Progress, until: float = 0.0) -> None:
        while not self.done and self.left() > until:
            progress(min(1.0, max(0.0, 1 - self.left())))
            self.step()

    def _race(self, progress: Progress) -> None:
        """Anneal one run of each good block, then the better half of them for twice as long, until one is left."""
        found = [self.scheduler.run(block.policy(self.scheduler)) for population in self.populations.values()
                 for _, block in population]
        runs = {run.makespan: run for run in (*found, *self.repeated, *self.bests.values()) if run is not None}
        racers = [reschedule_cooldown(runs[makespan], self.scheduler) for makespan in sorted(runs)[:_RACERS]]
        heats = max(1, ceil(log2(len(racers))))
        length = self.left() * _RACE / heats
        while len(racers) > 1 and not self.done:
            after = []
            for run in racers:
                progress(min(1.0, max(0.0, 1 - self.left())))
                after.append(self._annealed(run, _RACE_HOT, length / len(racers)))
            racers = sorted(after, key=lambda run: run.makespan)[:ceil(len(after) / 2)]
            self.survivors += reversed(racers)

    def _search_smaller(self, problem: Problem, share: float, part: Callable[[Search, Progress], None],
                        progress: Progress) -> Search:
        """A search of `problem`, with `part` of it done in `share` of the time that is left."""
        began = max(self.left(), 1e-9)
        share *= began
        goal = lower_bound_of_limits(problem.placement, problem.micro_batches, problem.times, problem.activations,
                                     problem.limits)
        smaller = Search(problem, goal, lambda: 1 - (began - self.left()) / share)
        smaller.start()
        part(smaller, lambda done: progress(min(1.0, max(0.0, 1 - self.left()))))
        return smaller

    def _adopt(self, smaller: Search) -> None:
        """Try the blocks that `smaller` found."""
        self.adopted = True
        for population in smaller.populations.values():
            for _, block in population:
                if not self.done:
                    self._try_block(block.for_ranks(self.problem.ranks))

    def _keep(self, run: PolicyRun) -> None:
        """Remember `run` if it's no worse than others with as many pieces."""
        best = self.bests.get(run.policy.pieces)
        if best is None or (run.makespan, run.waiting) <= (best.makespan, best.waiting):
            self.bests[run.policy.pieces] = run

    def _find_cycles(self) -> list[Cycle]:
        """The best cycles that annealing makes of known schedules and of good blocks, with time for a steady state."""
        problem = self.problem
        if problem.micro_batches < _PER_RANK * problem.ranks or is_large(problem) or self.scheduler.fused:
            return []
        until = self.left() * (1 - _CYCLES)
        scheduler = ListScheduler(replace(problem, micro_batches=_SETTLED * problem.ranks))
        starts: list[Cycle] = []
        for orders in map(scheduler.orders_of, known_schedules(scheduler.problem)):
            if orders is not None:
                starts += periods(orders, [size for size in _SIZES if size[1] <= problem.max_pieces], len(_SIZES))
        for population in self.populations.values():
            for _, block in population[:_BLOCKS]:
                run = scheduler.run(replace(block, pieces=1).policy(scheduler))
                starts += periods(run.orders, _BLOCK_SIZES, 1) if run is not None and self.left() > until else []
        return best_cycles(self.scheduler, starts, lambda: self.left() - until, self.random, _REGULAR)

    def _lengthen(self, runs: Iterable[PolicyRun]) -> None:
        """Try what `runs`, of fewer micro-batches, repeat, in just their orders; the same run once."""
        until = self.left() - _LENGTHENING
        for run in {run.makespan: run for run in runs}.values():
            # Nothing repeats faster than the slowest rank works.
            least = run.makespan + (self.problem.micro_batches - run.starts.shape[2]) * self.scheduler.work
            longer = lengthened(run, self.problem.micro_batches)
            # Looked at first: finding what a run repeats takes time too.
            while not (self.done or self.left() < until or self.best is not None and self.best.makespan <= least):
                orders = next(longer, None)
                if orders is None:
                    break
                found = self._run_of(orders, run.policy.pieces)
                if found is not None:
                    self._keep(found)

    def _extend(self, run: PolicyRun) -> None:
        """Try what `run`, of fewer micro-batches, repeats, with its starts as target starts."""
        for starts in extended(run, self.problem.micro_batches):
            for policy in self._targeting(starts, (0.1, 0.5, 2.0), (0.0, 1.0)):
                like = None if self.done else self._try_policy(policy)
                if like is not None:
                    self._keep(reschedule_cooldown(like, self.scheduler))

    def _imitate(self, run: PolicyRun, until: float) -> list[PolicyRun]:
        """`run`, and runs with its starts as target starts, while more than `until` of the time is left; all kept."""
        runs = [run]
        for policy in self._targeting(run.starts, (0.1, 0.5, float("inf")), (0.0, 1.0, PATIENCES[-1])):
            if self.left() > until:
                like = self._try_policy(policy)
                runs += [like] if like is not None else []
        return runs

    def _targeting(self, starts: TargetStarts, eagernesses: Iterable[float],
                   patiences: Iterable[float]) -> Iterator[Policy]:
        """Policies with the target starts `starts`, from the least eager on.

        Eagerness is in units of the slowest rank's work.
        """
        for eagerness, patience in product(eagernesses, patiences):
            yield Policy(starts, patience, self.scheduler.least_reserves, eagerness * self.scheduler.work)

    def _run_of(self, orders: NDArray[np.int64], pieces: int = 1) -> PolicyRun | None:
        """The run of `orders`, its cool-down in haste; None if they exceed a limit."""
        policy = Policy(np.zeros((self.problem.ranks, len(KINDS), self.problem.micro_batches, pieces)), 0.0,
                        self.scheduler.least_reserves)
        run = self.scheduler.left_shift(orders, policy)
        return reschedule_cooldown(run, self.scheduler) if run is not None else None

    def _try_policy(self, policy: Policy, cutoff: float = float("inf")) -> PolicyRun | None:
        """Run `policy`, and keep it if it's good."""
        run = self.scheduler.run(policy, cutoff)
        if run is not None:
            self._keep(run)
        return run

    def _try_block(self, block: Block) -> None:
        """Run `block`, and take it into the population if it's good enough."""
        population = self.populations.setdefault(block.pieces, [])
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
        population = self.populations[random.choice(list(self.populations))]
        block = random.choice(population)[1]
        if random.random() < 0.3:
            return block.mixed(random.choice(population)[1], random)
        if late and random.random() < 0.5:
            return block.shifted(self.problem.ranks, random)
        return block.mutated(random)

    def _anneal(self) -> None:
        """A round of annealing of one of the best runs."""
        random = self.random
        least = min(run.makespan for run in self.bests.values())
        run = random.choice([run for run in self.bests.values() if run.makespan <= least * _CHANCE])
        if run.policy.pieces * 2 <= self.problem.max_pieces and not self.scheduler.fused and random.random() < _FINER:
            run = _finer(run)
        hot = random.choices(_HOT, self.successes)[0]
        improved = self._annealed(run, hot, _ROUND)
        index = _HOT.index(hot)
        self.successes[index] = 1.0 if improved.makespan < run.makespan else max(0.1, self.successes[index] / 2)

    def _annealed(self, run: PolicyRun, hot: float, length: float) -> PolicyRun:
        """`run` after annealing from the temperature `hot` down, in the share `length` of the time; kept if good."""
        layout, orders = self.scheduler.layouts(run.policy.pieces), run.orders.copy()
        best, best_orders = run.makespan, orders.copy()
        tries = max(10, _PASSES_A_STEP // orders.size)
        began = left = self.left()
        length = min(length, began)
        while left > began - length and left > 0 and best > self.goal * (1 + SLACK):
            temperature = self.scheduler.work * hot * (_COLD / hot) ** ((began - left) / length)
            best = anneal(layout, orders, best_orders, best, tries, temperature, self.goal, self.random.getrandbits(31))
            left = self.left()
        improved = self.scheduler.left_shift(best_orders, run.policy) or run
        self._keep(improved)
        return improved


def _finer(run: PolicyRun) -> PolicyRun:
    """The same with each piece of W cut into two."""
    target_starts, starts = (np.repeat(values, 2, axis=-1) for values in (run.policy.target_starts, run.starts))
    orders = np.array([np.repeat(row, np.where(row >= W0, 2, 1)) for row in run.orders])
    return replace(run, orders=orders, starts=starts, policy=replace(run.policy, target_starts=target_starts))
