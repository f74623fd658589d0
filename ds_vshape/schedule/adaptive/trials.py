"""Tries orders and policies on one problem while there is time, and keeps the incumbents: the best runs so far."""

from __future__ import annotations

from collections.abc import Callable
from random import Random

import numpy as np
from numpy.typing import NDArray

from ds_vshape.schedule.adaptive.cool_down import reschedule_cooldown
from ds_vshape.schedule.adaptive.lanes import Lanes
from ds_vshape.schedule.adaptive.list_scheduler import ListScheduler, Policy, PolicyRun
from ds_vshape.schedule.adaptive.problem import SLACK, Problem

Progress = Callable[[float], None]


class Trials:
    """The trials of one search, which all of its phases share.

    Args:
        problem: what runs are of.
        goal: a makespan that no run is below.
        left: the share of the time that is left, from 1 to 0.
        lanes: what annealing may use.
    """

    def __init__(self, problem: Problem, goal: float, left: Callable[[], float], lanes: Lanes) -> None:
        self.problem, self.goal, self.left, self.lanes = problem, goal, left, lanes
        self.scheduler = ListScheduler(problem)
        # The only source of random numbers of a search.
        self.random = Random(0)
        # By the number of pieces of W: those of fewer pieces have less to gain, but are easier to improve.
        self.incumbents: dict[int, PolicyRun] = {}

    @property
    def best(self) -> PolicyRun | None:
        """The best run of all."""
        return min(self.incumbents.values(), key=lambda run: run.makespan, default=None)

    @property
    def done(self) -> bool:
        """Whether to stop: out of time, or nothing can be better."""
        return self.left() <= 0 or any(run.makespan <= self.goal * (1 + SLACK) for run in self.incumbents.values())

    def report(self, progress: Progress) -> None:
        """Call `progress` with the share of the time that has passed."""
        progress(min(1.0, max(0.0, 1 - self.left())))

    def keep(self, run: PolicyRun) -> None:
        """Make `run` the incumbent if it's no worse than the one with as many pieces."""
        best = self.incumbents.get(run.policy.pieces)
        if best is None or (run.makespan, run.waiting) <= (best.makespan, best.waiting):
            self.incumbents[run.policy.pieces] = run

    def run_of(self, orders: NDArray[np.int64], pieces: int = 1) -> PolicyRun | None:
        """The run of `orders` [rank, place], its cool-down rescheduled; None if they exceed a limit."""
        policy = Policy(np.zeros((self.problem.ranks, self.scheduler.streams, self.problem.micro_batches, pieces)), 0.0,
                        self.scheduler.least_reserves)
        run = self.scheduler.left_shift(orders, policy)
        return reschedule_cooldown(run, self.scheduler) if run is not None else None

    def run_policy(self, policy: Policy, cutoff: float = float("inf")) -> PolicyRun | None:
        """Run `policy`, and keep the run if it's good; None if its makespan would be above `cutoff`."""
        run = self.scheduler.run(policy, cutoff)
        if run is not None:
            self.keep(run)
        return run
