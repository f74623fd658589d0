"""The search for good orders: known schedules, random blocks, then changes to the wishes of the best so far.

Improving a schedule directly, pass by pass, breaks its memory limit at every other step. Here the search moves wishes
instead, and the list scheduler turns any wishes into a schedule that is within the limit.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from random import Random

from ds_vshape.schedule.adaptive.blocks import Shape, repeat
from ds_vshape.schedule.adaptive.list_scheduler import KINDS, W0, ListScheduler, Policy, Run, Wishes
from ds_vshape.schedule.adaptive.problem import SLACK, Problem
from ds_vshape.schedule.passes import Kind
from ds_vshape.schedule.schedule import Schedule
from ds_vshape.schedule.timeline import Timeline, simulate

PATIENCES = (0.0, 0.3, 1.0, 2.0, 5.0, 100.0)


@dataclass
class Search:
    """Looks for a schedule of `problem` until `left` says that no time is left, or `goal` is reached."""

    problem: Problem
    goal: float
    left: Callable[[], float]
    random: Random = field(default_factory=lambda: Random(0))

    def __post_init__(self) -> None:
        self.scheduler = ListScheduler(self.problem)
        self.best: Run | None = None
        self.splits = self.scheduler.splits()
        times = self.problem.times
        self.work = max(sum(times.forward[s] + times.input_grad[s] + times.weight_grad[s] for s in chunks)
                        for chunks in self.problem.placement.chunks)
        self.pieces = [pieces for pieces in (1, 2, 4, 8) if pieces <= self.problem.max_pieces]

    @property
    def done(self) -> bool:
        """Whether to stop: out of time, or nothing can be better."""
        return self.left() <= 0 or (self.best is not None and self.best.makespan <= self.goal * (1 + SLACK))

    def try_policy(self, policy: Policy) -> bool:
        """Run `policy`; whether it's no worse than the best, which it then is."""
        run = self.scheduler.run(policy, self.best.makespan if self.best else float("inf"))
        if run is None or (self.best and (run.makespan, run.ends) > (self.best.makespan, self.best.ends)):
            return False
        self.best = run
        return True

    def imitate(self, schedule: Schedule) -> None:
        """Try the starts of `schedule` as wishes."""
        wishes, fused = wishes_of(schedule, simulate(schedule, self.problem.times))
        for patience in PATIENCES:
            if fused or self.splits:
                self.try_policy(Policy(wishes, patience, self._least_reserves(), 1, fused))

    def start(self) -> None:
        """Make sure of a run, whatever the limits: forwards as soon as they may, the oldest micro-batch first."""
        shape = Shape((1.0, 1.0, 1.0, 1.0), (0.0, 0.0, 0.0), 0.0, self.work)
        wishes = repeat(shape.offsets(self.problem), shape.interval, self.problem.micro_batches)
        for patience in PATIENCES:
            self.try_policy(Policy(wishes, patience, self._least_reserves(), 1, not self.splits))

    def random_block(self) -> None:
        """Try a random block."""
        random, ranks = self.random, self.problem.ranks
        shape = Shape.random(self.work, random)
        pieces = random.choice(self.pieces)
        wishes = repeat(shape.offsets(self.problem), shape.interval, self.problem.micro_batches, pieces)
        slope = random.uniform(0, 0.5)
        reserves = [max(least, limit * slope * rank / max(1, ranks - 1)) for rank, (least, limit) in
                    enumerate(zip(self._least_reserves(), self.problem.limits))]
        fused = not self.splits or random.random() < 0.05
        self.try_policy(Policy(wishes, random.choice(PATIENCES), reserves, pieces, fused))

    def change(self) -> None:
        """Try a change to the best run's wishes."""
        if self.best is None:
            return
        random, best = self.random, self.best
        policy = replace(best.policy, wishes=best.starts, patience=random.choice((0.0, 0.0, *PATIENCES)))
        kind = random.random()
        if kind < 0.6:
            policy = replace(policy, wishes=self._shifted(best.starts))
        elif kind < 0.9:
            sigma = self.work * random.choice((0.02, 0.1, 0.3))
            policy = replace(policy, wishes=[[[start + random.uniform(-sigma, sigma) for start in line]
                                              for line in row] for row in best.starts])
        else:
            policy = replace(policy, reserves=self._least_reserves())
        self.try_policy(policy)

    def _shifted(self, starts: Wishes) -> Wishes:
        """`starts` with one stream of one rank or of all, or a window of it, earlier or later."""
        random, ranks, batch = self.random, self.problem.ranks, self.problem.micro_batches
        stream = random.randrange(len(KINDS))
        chosen = range(ranks) if random.random() < 0.3 else (random.randrange(ranks),)
        shift = random.gauss(0, self.work / 3)
        pieces = self.best.policy.pieces if self.best and stream >= W0 else 1
        first = random.randrange(batch)
        window = range(first * pieces, min(batch, first + random.choice((1, 2, 4, batch))) * pieces)
        if random.random() < 0.3:
            window = range(batch * pieces)
        return [[[start + shift if i in window else start for i, start in enumerate(line)]
                 if rank in chosen and number == stream else line for number, line in enumerate(row)]
                for rank, row in enumerate(starts)]

    def _least_reserves(self) -> list[float]:
        """What forwards of chunk 0 must leave free: room for one of chunk 1."""
        scheduler = self.scheduler
        kept = scheduler.kept if self.splits else scheduler.whole
        return [max(whole[1], left[1]) for whole, left in zip(scheduler.whole, kept)]


def wishes_of(schedule: Schedule, timeline: Timeline) -> tuple[Wishes, bool]:
    """The starts of a V schedule's passes as wishes, and whether its backwards are whole ones."""
    wishes: list[list[list[float]]] = []
    fused = any(work.kind is Kind.BW for _, work in schedule.passes())
    for chunks, spans in zip(schedule.placement.chunks, timeline.ranks):
        row: list[list[float]] = [[] for _ in KINDS]
        for span in spans:
            kind = {Kind.F: 0, Kind.B: 2, Kind.BW: 2, Kind.W: 4}[span.work.kind]
            row[kind + chunks.index(span.work.stage)].append(span.start)
        wishes.append(row)
    return wishes, fused
