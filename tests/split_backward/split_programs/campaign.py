"""Many programs, one after another, and what they were made of."""

from __future__ import annotations

import faulthandler
import sys
import time
import warnings
from collections import Counter
from dataclasses import dataclass, field

from hypothesis import HealthCheck, Phase, given, seed, settings
from split_programs.program import Program
from split_programs.run import Invalid, check
from split_programs.strategies import programs


@dataclass
class Tally:
    """What was run: programs, those with an oracle, those of them that deferred something; steps by kind, entries."""

    programs: int = 0
    compared: int = 0
    deferring: int = 0
    entries: int = 0
    seconds: float = 0.0
    steps: Counter[str] = field(default_factory=Counter)
    invalid: Counter[str] = field(default_factory=Counter)
    fault: str = ""

    def __add__(self, other: Tally) -> Tally:
        return Tally(self.programs + other.programs, self.compared + other.compared, self.deferring + other.deferring,
                     self.entries + other.entries, max(self.seconds, other.seconds), self.steps + other.steps,
                     self.invalid + other.invalid, self.fault or other.fault)

    def run(self, program: Program) -> None:
        """One more program; Fault if the split isn't plain autograd's."""
        self.programs += 1
        try:
            outcome = check(program)
        except Invalid as reason:
            self.invalid[str(reason)[:80]] += 1
            return
        self.compared += 1
        self.entries += outcome.entries
        self.deferring += outcome.entries > 0
        self.steps.update(step.kind for step in program.walk())


def prepare_process() -> None:
    """Warnings of torch about what programs do say nothing here; a crash says where it was."""
    warnings.simplefilter("ignore")
    faulthandler.enable()


class _OutOfTime(KeyboardInterrupt):
    """Which hypothesis lets through."""


def campaign(examples: int, start: int, seconds: float = float("inf")) -> Tally:
    """`examples` programs from the random seed `start`, or what can be run in `seconds`; the first fault ends it,
    shrunk."""
    tally, began = Tally(), time.monotonic()

    @seed(start)
    @settings(max_examples=examples, deadline=None, database=None, suppress_health_check=list(HealthCheck),
              phases=[Phase.generate, Phase.shrink], report_multiple_bugs=False)
    @given(programs)
    def many(program: Program) -> None:
        if time.monotonic() - began > seconds and not tally.fault:
            raise _OutOfTime
        if tally.programs % 1000 == 999:
            print(f"seed {start}: {tally.programs + 1} programs, {time.monotonic() - began:.0f} s", file=sys.stderr)
        try:
            tally.run(program)
        except AssertionError as fault:
            tally.fault = f"{program!r}\n    {fault}"  # the last one that hypothesis tries is the smallest
            raise

    try:
        many()
    except (AssertionError, _OutOfTime):
        pass
    tally.seconds = time.monotonic() - began
    return tally
